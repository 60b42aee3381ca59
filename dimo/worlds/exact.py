"""The exact teacher of tiles and sprites: p(x_1 | x_t, prompt) of every token, by Bayes' rule over all valid videos.

Videos v_m of a prompt are equally likely and noise falls on each token by itself, so
    log p(v_m | x_t) = sum_i log p_t(x_t^i | v_m^i) + const,
and a token's distribution is the share of the videos that have each code there. Everything is float64: the sums run
over up to 33,280 tokens, and a difference of one nat between two of them must not be lost. Strays
(`TilesWorld.strays`) count too, with their own weight, whatever the prompt.

In training nothing is read back from the GPU, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.nn import functional as F

from dimo.errors import DimoError, may_read, require_ids, require_shape
from dimo.ursa.chunks import ENTRIES, FEW_CODES, chunks, tokens_at_once
from dimo.ursa.normaliser import LogNormaliser
from dimo.ursa.probability_path import T_MAX, MetricPath, MixturePath, time_like
from dimo.ursa.sparse import Sparse
from dimo.worlds import is_world, load_world
from dimo.worlds.protocol import World, prompt_length
from dimo.worlds.sprites import SpritesWorld
from dimo.worlds.teacher import PAD, encode, words
from dimo.worlds.tiles import TilesWorld

KNOTS = 384  # of the normaliser of many codes
FLOOR = -25.0  # log-probability in nats of codes that cannot be: 64,000 of them have 1e-6 together


def exact_teacher(folder: str | Path, path: MetricPath | MixturePath) -> ExactTeacher:
    """The exact teacher of the world that a checkpoint folder belongs to; `path` is the folder's.

    Raises:
        DimoError: it belongs to no world, or to one whose posterior is not known.
    """
    if not is_world(folder):
        raise DimoError(f"distill.teacher is exact, but {folder} belongs to no world whose posterior is known")
    return ExactTeacher(load_world(folder), path)


class ExactTeacher:
    """A teacher without weights, for `dimo.ursa.predict`; it must be told t.

    A posterior is exact only for one t, and whoever re-noises knows it. A transformer infers t from x_t: what it learns
    is a mean over the times that x_t may come from.

    Args:
        world: whose videos are counted.
        path: the metric path on the world's codebook; predictions are on its device.

    Raises:
        DimoError: another world, or a path that does not fit it.
    """

    def __init__(self, world: World, path: MetricPath | MixturePath):
        if not isinstance(world, TilesWorld | SpritesWorld):
            raise DimoError(f"only the worlds tiles and sprites have an exact teacher, got {world.name!r}")
        if not isinstance(path, MetricPath):
            raise DimoError(f"path must be a MetricPath, got {type(path).__name__}")
        if path.codebook_size != world.codebook_size:
            raise DimoError(f"path has {path.codebook_size} codes, the world {world.codebook_size}")
        self.world, self.path = world, path
        self.codes = world.used_codes.to(path.device)
        points = path.codebook.double()
        self._distance = torch.stack([(points - points[code]).square().sum(-1) for code in self.codes], 1)  # (K, C)
        self._normaliser: LogNormaliser | None = None  # made when it is first needed, of one code of each group
        self._group = torch.empty(0, dtype=torch.int64)  # (C,) of every used code
        self._pad = words(world).index(PAD)
        empty = torch.full((1, prompt_length(world)), self._pad)
        self._txt_ids = torch.cat([encode(world, world.prompts), empty]).to(path.device)

    @torch.no_grad()
    def predict(
        self, txt_ids: torch.Tensor, visual_tokens: torch.Tensor, latents_shape, t: torch.Tensor | float | None = None
    ) -> Sparse:
        """The posterior of every token.

        Args:
            txt_ids: (B, L) the world's prompts as its tokenizer gives them, padded on the left; padding alone is the
                empty prompt, under which every video of every prompt is as likely.
            visual_tokens: (B, N) x_t.
            latents_shape: the world's.
            t: times of x_t in [0, 1): a number, (B,) or (B, N), the same for all tokens of a latent frame.

        Returns:
            Log-probabilities of the C codes that videos use, floored at FLOOR, and FLOOR for all others.
        """
        prompts = self._prompts(txt_ids)
        if tuple(latents_shape) != self.world.latents_shape:
            raise DimoError(f"latents_shape must be the world's {self.world.latents_shape}, got {tuple(latents_shape)}")
        require_shape("visual_tokens", visual_tokens, (len(txt_ids), self.world.num_visual_tokens))
        require_ids("visual_tokens", visual_tokens, self.world.codebook_size)
        if t is None:
            raise DimoError("the exact teacher must be given t, the time of visual_tokens")
        t = self._per_frame(t, visual_tokens)
        videos = max(1, tokens_at_once(4 * len(self.codes), self.path.device) // visual_tokens.shape[1])
        log_p = [self._marginals(*part) for part in chunks(videos, prompts, visual_tokens, t)]
        codes = self.codes.expand(*visual_tokens.shape, -1)
        return Sparse(codes, torch.cat(log_p).float(), FLOOR, self.world.codebook_size)

    def _per_frame(self, t: torch.Tensor | float, x_t: torch.Tensor) -> torch.Tensor:
        """t as (B, 1) or, where it is given by token, as (B, T)."""
        per_token = isinstance(t, torch.Tensor) and t.dim() == 2
        t = time_like(t, x_t)
        if not per_token:
            return t[:, :1]
        frames = t.unflatten(1, (self.world.latents_shape[0], -1))
        if may_read(t) and not bool((frames == frames[..., :1]).all()):
            raise DimoError("t must be the same for all tokens of a latent frame")
        return frames[..., 0]

    def log_likelihood(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """log p_t(x_t | c) for every used code c, in nats, float64: x_t (B, N), t (B, 1 or T) -> (B, N, C)."""
        beta = self.path.c * (t.double() / (1 - t.double())) ** self.path.alpha
        log_z = self._log_normaliser(beta.flatten())
        each = x_t.shape[1] // beta.shape[1]  # tokens that share a time
        log_z = log_z.view(*beta.shape, -1)
        beta, log_z = (x.unsqueeze(2).expand(-1, -1, each, -1).flatten(1, 2) for x in (beta[..., None], log_z))
        return -beta * self._distance[x_t] - log_z

    def _log_normaliser(self, beta: torch.Tensor) -> torch.Tensor:
        """log Z of beta (n,) and every used code, (n, C): summed over all codes, or between knots where they are many.

        A knot costs as much as a beta, of which every step brings hundreds. Between so many knots the cubics are off by
        less than 1e-6 nats (`tests/test_tiles.py`): at most .03 over the 33,280 tokens of a video.
        """
        if self.world.codebook_size <= FEW_CODES:
            size = max(1, ENTRIES["cpu"] // self._distance.numel())
            return torch.cat([(-b[:, None, None] * self._distance).logsumexp(1) for (b,) in chunks(size, beta)])
        if self._normaliser is None:
            most, by_code = self.path.c * (T_MAX / (1 - T_MAX)) ** self.path.alpha, self._distance.T.contiguous()
            one, self._group = _groups(by_code)
            self._normaliser = LogNormaliser(
                lambda i: by_code[one[i]], len(one), self.path.codebook_size, most, beta.device, KNOTS
            )
        return self._normaliser(beta.clamp(max=self._normaliser.most))[:, self._group]

    def _marginals(self, prompts: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (B, N, C).

        They are a gradient: with L_ic = log p_t(x_t^i | c), the derivative of log sum_m exp(sum_i L_i,v_m^i) by L_ic is
        the sum of the weights of the videos that have c at i.
        """
        with torch.enable_grad():
            values = self.log_likelihood(x_t, t).requires_grad_()
            evidence = self.world.log_evidence(values, prompts).sum()
            (shares,) = torch.autograd.grad(evidence, values)
        return shares.clamp(min=math.exp(FLOOR)).log()

    def _prompts(self, txt_ids: torch.Tensor) -> torch.Tensor:
        """(B, prompts) bool: the prompts whose videos count."""
        require_shape("txt_ids", txt_ids, ("B", "L"))
        length = self._txt_ids.shape[1]
        if txt_ids.shape[1] < length:
            raise DimoError(f"txt_ids must have at least {length} ids, the words of a prompt, got {txt_ids.shape[1]}")
        known = F.pad(self._txt_ids, (txt_ids.shape[1] - length, 0), value=self._pad)
        same = (txt_ids[:, None] == known).all(-1)
        if may_read(same) and not bool(same.any(-1).all()):
            row = int((~same.any(-1)).nonzero()[0])
            raise DimoError(f"txt_ids must be prompts of the {self.world.name} world, or empty; row {row} is neither")
        return same[:, :-1] | same[:, -1:]


def _groups(distance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Group codes that have the same distances to all codes, in whatever order, and so the same log Z.

    Codes that a symmetry of the codebook maps to each other are such: 4,036 of the world sprites are 329 groups.

    Args:
        distance: (C, K), of C codes.

    Returns:
        (the first code of each of G groups (G,), the group of each code (C,)).
    """
    seen: dict[bytes, int] = {}
    ascending = distance.cpu().sort(1).values.numpy()
    group = [seen.setdefault(row.tobytes(), len(seen)) for row in ascending]
    first = [group.index(g) for g in range(len(seen))]
    return torch.tensor(first, device=distance.device), torch.tensor(group, device=distance.device)
