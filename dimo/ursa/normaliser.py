"""The metric path's normaliser, log Z_k(beta) = log sum_x exp(-beta d(x, k)), for all clean codes k at any beta.

At 64,000 codes it is a sum over 4e9 distances for every beta, and each sample, or latent frame, has a beta of its own.
So it is summed once at KNOTS values of beta, with its derivative, minus the mean distance under exp(-beta d) / Z, and
interpolated between them by cubics that match both (Hermite). In v = log(1 + beta) it is smooth at both ends: on FSQ
codebooks of 16 to 4,096 codes the cubics are off by 1e-7 nats on average and 1e-4 at most, less than float32 distances
are at large beta.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from dimo.ursa.chunks import chunks, tokens_at_once

KNOTS = 96  # of a path; with a step h between them the cubics are off by h^4
IN_CACHE = 2**16  # entries of a temporary that stay in the cache of a CPU's core, which every knot reads again


class LogNormaliser:
    """log Z_k(beta) for beta in [0, most].

    Args:
        distance: codes (n,) in [0, C) -> their distances (n, K) to all codes.
        codes: C, the number of clean codes.
        codebook_size: K.
        most: the largest beta.
        device: of the tables, 2 x knots x C numbers: 49 MB at 64,000 codes.
        knots: their number.
    """

    def __init__(
        self, distance: Callable[[torch.Tensor], torch.Tensor], codes: int, codebook_size: int, most: float, device,
        knots: int = KNOTS,
    ):  # fmt: skip
        self.most, self.knots, self.step = most, knots, math.log1p(most) / (knots - 1)
        at = torch.arange(knots, dtype=torch.float64) * self.step
        values, slopes = [], []
        every = torch.arange(codes, device=device)
        on_cpu = every.device.type == "cpu"
        size = max(1, IN_CACHE // codebook_size) if on_cpu else tokens_at_once(codebook_size, every.device)
        for (some,) in chunks(size, every):
            d, value, slope = distance(some), [], []
            for beta in at.expm1().tolist():
                weight = (-beta * d).exp()  # 1 for the code itself, so that the sum is never 0
                z = weight.sum(-1)
                value.append(z.log())
                slope.append(-(1 + beta) * (weight * d).sum(-1) / z)  # by v = log(1 + beta)
            values.append(torch.stack(value))
            slopes.append(torch.stack(slope))
        self.values, self.slopes = torch.cat(values, 1), torch.cat(slopes, 1)  # (knots, C)

    def weights(self, beta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For beta (n,): the knots below (n,), and the weights (4, n, 1) of both values and both slopes."""
        at = beta.double().log1p() / self.step
        below = at.long().clamp(max=self.knots - 2)
        f = at - below
        weights = [
            1 + f * f * (2 * f - 3),
            f * f * (3 - 2 * f),
            f * (1 - f) ** 2 * self.step,
            f * f * (f - 1) * self.step,
        ]
        return below, torch.stack(weights).to(self.values.dtype).unsqueeze(-1)

    def __call__(self, beta: torch.Tensor) -> torch.Tensor:
        """beta (n,) -> (n, C), in the dtype of the distances."""
        return interpolate(*self.weights(beta), self.values, self.slopes)


def interpolate(below: torch.Tensor, weights: torch.Tensor, values: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """The cubic between the knots `below` and below + 1, with what `LogNormaliser.weights` gave: (n, C)."""
    v0, v1, s0, s1 = weights
    return v0 * values[below] + v1 * values[below + 1] + s0 * slopes[below] + s1 * slopes[below + 1]
