"""Motion, flicker and sharpness of codes: squared distances in the codebook's space, whose vectors have norm 1."""

from __future__ import annotations

import torch

from dimo.errors import require_ids, require_shape
from dimo.ursa.probability_path import MetricPath, MixturePath


def _distance(path: MetricPath | MixturePath, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Squared distance of codes, as in `dimo.views.collapse.spread`: 2 for any two codes of a mixture path."""
    if isinstance(path, MetricPath):
        return (path.codebook[one] - path.codebook[other]).square().sum(-1)
    return 2.0 * (one != other)


def _check(codes: torch.Tensor, path: MetricPath | MixturePath) -> None:
    require_shape("codes", codes, ("B", "T", "H", "W"))
    require_ids("codes", codes, path.codebook_size)


def motion(codes: torch.Tensor, path: MetricPath | MixturePath) -> torch.Tensor | None:
    """Mean distance of a token from the same place one latent frame before: (B, T, H, W) -> (B,); None of images."""
    _check(codes, path)
    return _distance(path, codes[:, 1:], codes[:, :-1]).flatten(1).mean(1) if codes.shape[1] > 1 else None


def flicker(codes: torch.Tensor, path: MetricPath | MixturePath) -> torch.Tensor | None:
    """Mean over tokens and triples of frames of the smaller of a token's distances from the frame before and after.

    An object that passes over a place changes it as well, but what was there before and after often stays; a token
    that differs from both is a flash. (B, T, H, W) -> (B,); None of fewer than three latent frames.
    """
    _check(codes, path)
    if codes.shape[1] < 3:
        return None
    middle = codes[:, 1:-1]
    before, after = _distance(path, middle, codes[:, :-2]), _distance(path, middle, codes[:, 2:])
    return torch.minimum(before, after).flatten(1).mean(1)


def sharpness(codes: torch.Tensor, path: MetricPath | MixturePath) -> torch.Tensor | None:
    """Mean distance of tokens that are neighbours in height or width: (B, T, H, W) -> (B,); None of 1x1 tokens."""
    _check(codes, path)
    down = _distance(path, codes[:, :, 1:], codes[:, :, :-1]).flatten(1)
    across = _distance(path, codes[..., 1:], codes[..., :-1]).flatten(1)
    both = torch.cat([down, across], 1)
    return both.mean(1) if both.shape[1] else None
