"""What changes over training: times and their curriculum, x_init, the entropy bonus and the reward baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dimo.errors import DimoError, require_ids, require_shape
from dimo.ursa.probability_path import T_MAX, T_PER, shifted

LAW_TOKENS = 48  # at which `t_shift=law` is 1: the built-in world, on which t_power was tuned


def sample_t_curriculum(
    size: int | Sequence[int],
    step: int,
    curriculum_steps: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    draws: int = 1,
) -> torch.Tensor:
    """Sample times t in [0, 0.999]: 1 - (1-u)^2 while step < curriculum_steps, else u, with u uniform in [0, 1).

    During the curriculum the density of t is 1 / (2 sqrt(1-t)), so early training mostly sees times close to the data,
    where teacher and auxiliary differ in few tokens.

    Args:
        size: number of samples B, or (B, ...) for several times per sample.
        step: training step.
        curriculum_steps: length of the curriculum in steps; 0 switches it off.
        draws: number of draws R per sample. They are stratified: one u falls into each of [0, 1/R), [1/R, 2/R), ...,
            starting from a random stratum, so each draw is uniform and the variance of their mean is reduced.

    Returns:
        (R B, ...) times: all samples of the first draw, then all of the second, and so on.
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


def shift_for(value: float | str, num_visual_tokens: int, checkpoints: float | None = None) -> float:
    """The shift s >= 1 that `distill.t_shift` stands for.

    Args:
        value: a number, "law" or "checkpoint" (`Distill.shift_value`).
        num_visual_tokens: N, for "law", s = sqrt(N / 48): a prompt's mode is betrayed by all tokens together, ever
            nearer to the noise as N grows. At most 48 tokens give 1.
        checkpoints: the shift that the checkpoint's scheduler names, if it does.

    Raises:
        DimoError: "checkpoint", where there is none or one below 1.
    """
    if value == "law":
        return math.sqrt(max(1.0, num_visual_tokens / LAW_TOKENS))
    if isinstance(value, float):
        return value
    if checkpoints is None or not checkpoints >= 1:
        has = "has none" if checkpoints is None else f"has {checkpoints}, and a shift must be at least 1"
        raise DimoError(
            "distill.t_shift is checkpoint, which stands for `shift` in the checkpoint's "
            f"scheduler/scheduler_config.json, but that file {has}; give a number, or law"
        )
    return checkpoints


def power_at(step: int, power: float, start: float, until: float) -> float:
    """t_power at a step: from `start` it moves geometrically to `power`, which it reaches at step `until`.

    Near the noise a prompt's videos are kept equally likely, near the data each is made sharp. Large powers first and
    small ones later give both in turn (docs/experiments.md).

    Args:
        start: the power at step 0; 0: `power` throughout.
    """
    return power * (start / power) ** fade(step, 0, until) if start else power


def draw_t(
    batch: int,
    grid: tuple[int, int, int],
    step_index: int,
    curriculum_steps: int,
    t_per: str,
    t_power: float | torch.Tensor,
    draws: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    shift: float = 1.0,
) -> torch.Tensor:
    """Draw the times of stage 4: t = S(C(u)^t_power), u uniform and stratified over the draws.

    C(u) is `sample_t_curriculum`, 0.999 (1 - (1 - u)^2) during the curriculum and 0.999 u after it, and S `shifted`,
    S(t) = t / (t + shift (1 - t)).

    Args:
        batch: number of samples B.
        grid: latents_shape (T, H, W).
        step_index: training step.
        curriculum_steps: length of the time curriculum in steps; 0 switches it off.
        t_per: "sample" draws one t per sample, "frame" one per latent frame, "mixed" decides by a coin per sample.
        t_power: exponent, a positive number or a scalar tensor, whose value is not read back; above 1 more times lie
            near the noise (t = 0), where mode coverage is decided.
        draws: number of draws R per sample, stratified.
        shift: s of `shifted`.

    Returns:
        Times in [0, 0.999]: (R B,), or unless t_per is "sample" (R B, N), equal for all tokens of a frame.
    """
    if not isinstance(t_power, torch.Tensor) and not t_power > 0:
        raise DimoError(f"t_power must be positive, got {t_power}")
    if not shift >= 1:
        raise DimoError(f"shift must be at least 1 (1: off), got {shift}")
    if t_per not in T_PER:
        raise DimoError(f"t_per must be one of {', '.join(T_PER)}, got {t_per!r}")

    def draw(size: int | tuple[int, int]) -> torch.Tensor:
        t = sample_t_curriculum(size, step_index, curriculum_steps, generator, device, draws) ** t_power
        return shifted(t, shift)

    if t_per == "sample":
        return draw(batch)
    t = draw((batch, grid[0]))
    if t_per == "mixed":
        coin = torch.rand(batch, generator=generator, device=device) < 0.5
        t = torch.where(coin.repeat(draws)[:, None], draw(batch)[:, None], t)
    return t.unsqueeze(-1).expand(-1, -1, grid[1] * grid[2]).flatten(1)


def fade(step: int, begin: float, end: float) -> float:
    """Linear decay from 1 at step `begin` to 0 at step `end`; a drop if both are equal; always 1 if `end` is 0."""
    if end <= begin:
        return 0.0 if 0 < end <= step else 1.0
    return min(1.0, max(0.0, (end - step) / (end - begin)))


class XInit:
    """Stage 2: the student's input, either uniform random codes or a corrupted earlier sample of the student.

    Corrupted samples help early in training. But the loss matches the teacher's distribution for fresh and corrupted
    rows together: fresh rows may collapse to one mode while corrupted rows make up for it. Since inference uses only
    fresh rows, the share of corrupted ones should fade to zero before training ends. The trainer sets `fade`, a factor
    of `p_corrupt` (a number or a scalar tensor), before every step.

    The memory of earlier samples is part of a checkpoint (`state_dict`), so resuming is exact. Once it is full it is
    updated in place.

    Args:
        p_corrupt: probability that a row starts from a remembered x_hat, together with the prompt of that sample.
        corrupt_ratio: probability that a token of such a row is replaced by a uniform one.
        capacity: number of samples that are remembered, the latest ones.
    """

    def __init__(self, codebook_size: int, p_corrupt: float, corrupt_ratio: float, capacity: int = 256):
        for name, value in (("p_corrupt", p_corrupt), ("corrupt_ratio", corrupt_ratio)):
            if not 0 <= value <= 1:
                raise DimoError(f"{name} must lie in [0, 1], got {value}")
        self.codebook_size, self.p_corrupt, self.corrupt_ratio = codebook_size, p_corrupt, corrupt_ratio
        self.capacity = capacity
        self.fade: float | torch.Tensor = 1.0
        self.x_hat: torch.Tensor | None = None
        self.txt_ids: torch.Tensor | None = None

    @property
    def full(self) -> bool:
        """Whether the memory no longer grows."""
        return self.p_corrupt == 0 or (self.x_hat is not None and len(self.x_hat) == self.capacity)

    def __call__(
        self, txt_ids: torch.Tensor, num_visual_tokens: int, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw x_init for a batch of prompts txt_ids (B, L).

        Returns:
            (x_init (B, N), txt_ids (B, L) with the remembered prompts in corrupted rows, corrupted (B,) bool).
        """
        require_shape("txt_ids", txt_ids, ("B", "L"))
        batch, device = txt_ids.shape[0], txt_ids.device
        size = (batch, num_visual_tokens)
        x_init = torch.randint(self.codebook_size, size, generator=generator, device=device)
        corrupted = torch.zeros(batch, dtype=torch.bool, device=device)
        if self.x_hat is None or self.txt_ids is None:
            return x_init, txt_ids, corrupted
        corrupted = torch.rand(batch, generator=generator, device=device) < self.p_corrupt * self.fade
        row = torch.randint(len(self.x_hat), (batch,), generator=generator, device=device)
        replace = torch.rand(size, generator=generator, device=device) < self.corrupt_ratio
        old = torch.where(replace, x_init, self.x_hat[row])
        x_init = torch.where(corrupted[:, None], old, x_init)
        return x_init, torch.where(corrupted[:, None], self.txt_ids[row], txt_ids), corrupted

    def remember(self, x_hat: torch.Tensor, txt_ids: torch.Tensor) -> None:
        """Add samples x_hat (B, N) and their prompts txt_ids (B, L) to the memory."""
        if self.p_corrupt == 0:
            return
        require_shape("x_hat", x_hat, (len(txt_ids), "N"))
        require_ids("x_hat", x_hat, self.codebook_size)
        if self.x_hat is not None and self.txt_ids is not None:
            x_hat, txt_ids = torch.cat([x_hat, self.x_hat]), torch.cat([txt_ids, self.txt_ids])
        x_hat, txt_ids = x_hat[: self.capacity].detach(), txt_ids[: self.capacity]
        if self.x_hat is None or self.txt_ids is None or not self.full:
            self.x_hat, self.txt_ids = x_hat.clone(), txt_ids.clone()
        else:
            self.x_hat.copy_(x_hat)
            self.txt_ids.copy_(txt_ids)

    def state_dict(self) -> dict:
        return {"x_hat": self.x_hat, "txt_ids": self.txt_ids}

    def load_state_dict(self, state: dict) -> None:
        self.x_hat, self.txt_ids = (
            None if kept is None else kept.clone() for kept in (state["x_hat"], state["txt_ids"])
        )


class EntropyController:
    """Controls lambda_ent, the weight of the entropy bonus: `low`, or `high` while the entropy is below the floor.

    The weight returns to `low` only when the entropy exceeds the floor by 10%, so that it does not flicker. A one-step
    student should end with almost no entropy per token, and a lasting bonus costs quality: the trainer sets `fade`, a
    factor of the weight (a number or a scalar tensor), before every step.

    The state consists of tensors that are updated in place, so that a CUDA graph can contain the controller.

    Args:
        low, high: the two weights.
        floor: lower limit of the mean token entropy, as a share of its mean over the first `WARMUP` steps.
        device: of the state, and of the entropies that are given.
    """

    WARMUP = 20  # steps over which the initial entropy is averaged

    def __init__(self, low: float, high: float, floor: float, device: torch.device | str = "cpu"):
        if min(low, high, floor) < 0:
            raise DimoError(f"lambda_ent, lambda_ent_high and entropy_floor must be >= 0, got {low}, {high}, {floor}")
        self.floor = floor
        self.fade: float | torch.Tensor = 1.0
        self.low, self.high = (torch.tensor(weight, dtype=torch.float64, device=device) for weight in (low, high))
        self.raised = torch.zeros((), dtype=torch.bool, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.start = torch.zeros((), dtype=torch.float64, device=device)

    def __call__(self, entropy: torch.Tensor) -> torch.Tensor:
        """lambda_ent for this step, a float64 scalar, given its mean token entropy in nats, a finite scalar."""
        require_shape("entropy", entropy, ())
        entropy = entropy.double()
        counts = self.seen < self.WARMUP
        self.seen += counts
        self.start += torch.where(counts, (entropy - self.start) / self.seen, 0.0)
        limit = self.floor * self.start * (1 + 0.1 * self.raised.double())
        self.raised.copy_(entropy < limit)
        return self.fade * torch.where(self.raised, self.high, self.low)

    def state_dict(self) -> dict:
        return {"raised": self.raised.item(), "seen": self.seen.item(), "start": self.start.item()}

    def load_state_dict(self, state: dict) -> None:
        for name in ("raised", "seen", "start"):
            getattr(self, name).fill_(state[name])


class Baseline:
    """Exponential moving average of the reward, initialised with the first reward and then updated in place."""

    def __init__(self, decay: float = 0.99):
        if not 0 <= decay < 1:
            raise DimoError(f"baseline decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.value: torch.Tensor | None = None

    def __call__(self, reward: torch.Tensor) -> torch.Tensor:
        """Return the baseline before this reward (of any shape) enters it, a scalar; then update the average."""
        mean = reward.mean().detach()
        if self.value is None:
            self.value = mean.clone()
        self.value = self.value.to(mean.device)  # a checkpoint is loaded on the CPU
        now = self.value.clone()
        self.value.copy_(now * self.decay + mean * (1 - self.decay))
        return now

    def state_dict(self) -> dict:
        return {"value": None if self.value is None else self.value.clone()}

    def load_state_dict(self, state: dict) -> None:
        if self.value is not None and state["value"] is not None:
            self.value.copy_(state["value"])
        else:
            self.value = state["value"]
