"""The exact teacher of the tiles world: p(x_1 | x_t, prompt) of every token, by Bayes' rule over all valid videos.

Videos v_m of a prompt are equally likely and noise falls on each token by itself, so
    log p(v_m | x_t) = sum_i log p_t(x_t^i | v_m^i) + const,
and a token's distribution is the share of the videos that have each code there. Everything is float64: the sums run
over up to 33,280 tokens, and a difference of one nat between two of them must not be lost.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from dimo.errors import DimoError, require_ids, require_shape
from dimo.ursa.chunks import ENTRIES, chunks, tokens_at_once
from dimo.ursa.prediction import Sparse
from dimo.ursa.probability_path import MetricPath, time_like
from dimo.worlds.protocol import prompt_length
from dimo.worlds.teacher import PAD, encode, words
from dimo.worlds.tiles import TilesWorld

FLOOR = -25.0  # log-probability in nats of codes that cannot be: 64,000 of them have 1e-6 together


class ExactTeacher:
    """A teacher without weights, for `dimo.ursa.predict`; it must be told t.

    A posterior is exact only for one t, and whoever re-noises knows it. A transformer infers t from x_t: what it learns
    is a mean over the times that x_t may come from.

    Args:
        world: whose videos are counted.
        path: the metric path on the world's codebook; predictions are on its device.
    """

    def __init__(self, world: TilesWorld, path: MetricPath):
        if not isinstance(path, MetricPath):
            raise DimoError(f"path must be a MetricPath, got {type(path).__name__}")
        if path.codebook_size != world.codebook_size:
            raise DimoError(f"path has {path.codebook_size} codes, the world {world.codebook_size}")
        self.world, self.path = world, path
        self.codes = world.used_codes.to(path.device)
        points = path.codebook.double()
        self._distance = torch.stack([(points - points[code]).square().sum(-1) for code in self.codes], 1)  # (K, C)
        empty = torch.full((1, prompt_length(world)), words(world).index(PAD))
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
            t: times of x_t in [0, 1): a number, (B,) or (B, N).

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
        t = time_like(t, visual_tokens)
        videos = max(1, tokens_at_once(4 * len(self.codes), self.path.device) // visual_tokens.shape[1])
        log_p = [self._marginals(*part) for part in chunks(videos, prompts, visual_tokens, t)]
        codes = self.codes.expand(*visual_tokens.shape, -1)
        return Sparse(codes, torch.cat(log_p).float(), FLOOR, self.world.codebook_size)

    def log_likelihood(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """log p_t(x_t | c) for every used code c, in nats, float64: x_t and t (B, N) -> (B, N, C)."""
        beta, where = (self.path.c * (t.double() / (1 - t.double())) ** self.path.alpha).unique(return_inverse=True)
        size = max(1, ENTRIES["cpu"] // self._distance.numel())
        log_z = [(-b[:, None, None] * self._distance).logsumexp(1) for (b,) in chunks(size, beta)]
        return -beta[where][..., None] * self._distance[x_t] - torch.cat(log_z)[where]

    def log_posterior(self, values: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Unnormalised log p(video | x_t), (B, prompts * M), -inf where `prompts` (B, prompts) bool rules it out.

        Args:
            values: (B, N, C), what `log_likelihood` gave.
        """
        return self.world.totals(values).masked_fill(~prompts[:, :, None], -torch.inf).flatten(1)

    def _marginals(self, prompts: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (B, N, C).

        They are a gradient: with L_ic = log p_t(x_t^i | c), the derivative of log sum_m exp(sum_i L_i,v_m^i) by L_ic is
        the sum of the weights of the videos that have c at i.
        """
        with torch.enable_grad():
            values = self.log_likelihood(x_t, t).requires_grad_()
            evidence = self.log_posterior(values, prompts).logsumexp(-1).sum()
            (shares,) = torch.autograd.grad(evidence, values)
        return shares.clamp(min=math.exp(FLOOR)).log()

    def _prompts(self, txt_ids: torch.Tensor) -> torch.Tensor:
        """(B, prompts) bool: the prompts whose videos count."""
        require_shape("txt_ids", txt_ids, ("B", "L"))
        length, pad = self._txt_ids.shape[1], int(self._txt_ids[-1, 0])
        if txt_ids.shape[1] < length:
            raise DimoError(f"txt_ids must have at least {length} ids, the words of a prompt, got {txt_ids.shape[1]}")
        known = F.pad(self._txt_ids, (txt_ids.shape[1] - length, 0), value=pad)
        same = (txt_ids[:, None] == known).all(-1)
        if not bool(same.any(-1).all()):
            row = int((~same.any(-1)).nonzero()[0])
            raise DimoError(f"txt_ids must be prompts of the {self.world.name} world, or empty; row {row} is neither")
        return same[:, :-1] | same[:, -1:]
