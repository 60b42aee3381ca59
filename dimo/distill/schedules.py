"""What varies over training: the time curriculum, the start of the student's pass, the entropy bonus, the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dimo.errors import DimoError, require_ids, require_shape

T_MAX = 0.999  # beta_t is infinite at t = 1


def sample_t_curriculum(
    size: int | Sequence[int],
    step: int,
    curriculum_steps: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    draws: int = 1,
) -> torch.Tensor:
    """Times in [0, 0.999]: 1 - (1-u)^2 while step < curriculum_steps, else u, with u uniform.

    The curriculum's density is 2 (1-t) inverted: 1 / (2 sqrt(1-t)), so early training sees times close to data, where
    teacher and auxiliary differ in few tokens. `curriculum_steps=0` switches it off.

    With several `draws` the result has draws times size[0] rows, all samples once for each draw. The draws of a sample
    are stratified: u falls once into each of [0, 1/draws), [1/draws, 2/draws), ..., in an order that starts at random,
    so that each is uniform by itself and their mean is a better estimate of the mean over t than free draws give.
    """
    if draws < 1:
        raise DimoError(f"draws must be at least 1, got {draws}")
    if step < 0 or curriculum_steps < 0:
        raise DimoError(f"step and curriculum_steps must not be negative, got {step} and {curriculum_steps}")
    size = (size,) if isinstance(size, int) else tuple(size)
    u = torch.rand((draws * size[0], *size[1:]), generator=generator, device=device)
    if draws > 1:
        first = torch.randint(draws, size, generator=generator, device=device)
        part = torch.arange(draws, device=device).view(draws, *[1] * len(size)) + first
        u = (u + (part % draws).flatten(0, 1)) / draws
    return (1 - (1 - u).square() if step < curriculum_steps else u) * T_MAX


def fade(step: int, begin: float, end: float) -> float:
    """What falls linearly from 1 at step `begin` to 0 at `end`, at once where they are one; `end` 0: it stays 1."""
    if end <= begin:
        return 0.0 if 0 < end <= step else 1.0
    return min(1.0, max(0.0, (end - step) / (end - begin)))


class XInit:
    """Stage 2: where the student starts. Uniform codes, or an earlier sample of its own, corrupted.

    A share `p_corrupt` of rows starts from a remembered x_hat whose tokens were replaced by uniform ones with
    probability `corrupt_ratio`; such a row comes with the prompt that its sample was made for. The memory holds the
    latest `capacity` samples; it is part of a checkpoint (`state_dict`), so that a resumed run is the run.

    `fade`, which a trainer sets before every step, multiplies p_corrupt. The mix helps a student early, but what stage
    8 holds to the teacher's shares is the sum of fresh and corrupted rows: fresh ones may all take one shade while
    corrupted ones make up for it. Only fresh ones are asked for later, so the mix should be gone before the end.
    """

    def __init__(self, codebook_size: int, p_corrupt: float, corrupt_ratio: float, capacity: int = 256):
        for name, value in (("p_corrupt", p_corrupt), ("corrupt_ratio", corrupt_ratio)):
            if not 0 <= value <= 1:
                raise DimoError(f"{name} must lie in [0, 1], got {value}")
        self.codebook_size, self.p_corrupt, self.corrupt_ratio = codebook_size, p_corrupt, corrupt_ratio
        self.capacity, self.fade = capacity, 1.0
        self.x_hat: torch.Tensor | None = None
        self.txt_ids: torch.Tensor | None = None

    def __call__(
        self, txt_ids: torch.Tensor, num_visual_tokens: int, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """txt_ids (B, L) -> x_init (B, N), txt_ids (B, L) with remembered prompts put in, corrupted rows (B,) bool."""
        require_shape("txt_ids", txt_ids, ("B", "L"))
        batch, device = txt_ids.shape[0], txt_ids.device
        size = (batch, num_visual_tokens)
        x_init = torch.randint(self.codebook_size, size, generator=generator, device=device)
        corrupted = torch.zeros(batch, dtype=torch.bool, device=device)
        if self.x_hat is None:
            return x_init, txt_ids, corrupted
        corrupted = torch.rand(batch, generator=generator, device=device) < self.p_corrupt * self.fade
        row = torch.randint(len(self.x_hat), (batch,), generator=generator, device=device)
        replace = torch.rand(size, generator=generator, device=device) < self.corrupt_ratio
        old = torch.where(replace, x_init, self.x_hat[row])
        x_init = torch.where(corrupted[:, None], old, x_init)
        return x_init, torch.where(corrupted[:, None], self.txt_ids[row], txt_ids), corrupted

    def remember(self, x_hat: torch.Tensor, txt_ids: torch.Tensor) -> None:
        """Keep the newest samples with their prompts, x_hat (B, N) and txt_ids (B, L)."""
        if self.p_corrupt == 0:
            return
        require_shape("x_hat", x_hat, (len(txt_ids), "N"))
        require_ids("x_hat", x_hat, self.codebook_size)
        if self.x_hat is not None:
            x_hat, txt_ids = torch.cat([x_hat, self.x_hat]), torch.cat([txt_ids, self.txt_ids])
        self.x_hat, self.txt_ids = x_hat[: self.capacity].detach().clone(), txt_ids[: self.capacity].clone()

    def state_dict(self) -> dict:
        return {"x_hat": self.x_hat, "txt_ids": self.txt_ids}

    def load_state_dict(self, state: dict) -> None:
        self.x_hat, self.txt_ids = state["x_hat"], state["txt_ids"]


class EntropyController:
    """lambda_ent: the weight of the entropy bonus, `low` until the student's entropy falls, then `high`.

    The floor is a share of the first steps' mean entropy. Crossing back needs 10% more than the floor, so that the
    weight does not flicker. From `anneal_from` to `anneal_to` (steps) the weight fades to zero: a one-step student must
    end with no entropy left per token, and a bonus that stays costs quality.
    """

    WARMUP = 20  # steps whose mean entropy sets the scale

    def __init__(
        self, low: float, high: float, floor: float, anneal_from: int = 0, anneal_to: int = 0
    ):
        if min(low, high, floor) < 0:
            raise DimoError(f"lambda_ent, lambda_ent_high and entropy_floor must be >= 0, got {low}, {high}, {floor}")
        self.low, self.high, self.floor = low, high, floor
        self.anneal_from, self.anneal_to = anneal_from, anneal_to
        self.raised, self.seen, self.start = False, 0, 0.0

    def __call__(self, entropy: float, step: int) -> float:
        """Feed the mean token entropy (nats) of this step -> lambda_ent."""
        if not math.isfinite(entropy):
            raise DimoError(f"entropy must be finite, got {entropy}")
        if self.seen < self.WARMUP:
            self.seen += 1
            self.start += (entropy - self.start) / self.seen
        limit = self.floor * self.start * (1.1 if self.raised else 1.0)
        self.raised = entropy < limit
        return fade(step, self.anneal_from, self.anneal_to) * (self.high if self.raised else self.low)

    def state_dict(self) -> dict:
        return {"raised": self.raised, "seen": self.seen, "start": self.start}

    def load_state_dict(self, state: dict) -> None:
        self.raised, self.seen, self.start = state["raised"], state["seen"], state["start"]


class Baseline:
    """The exponential moving average of the reward, started at the first reward rather than at zero."""

    def __init__(self, decay: float = 0.99):
        if not 0 <= decay < 1:
            raise DimoError(f"baseline decay must lie in [0, 1), got {decay}")
        self.decay, self.value = decay, None

    def __call__(self, reward: torch.Tensor) -> torch.Tensor:
        """The baseline to subtract from this reward (of any shape), a scalar that has not seen it; then update."""
        mean = reward.mean().detach()
        now = mean if self.value is None else self.value.to(mean.device)
        self.value = now * self.decay + mean * (1 - self.decay)
        return now

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]
