"""Motion, flicker and sharpness: mean differences of what is near in time or space, of codes or of frames.

Codes differ by their squared distance in the codebook's space, whose vectors have norm 1; frames, a video as it is
seen, by that of their colours in [0, 1], averaged over the channels: a decoder may hide what codes do, or add to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dimo.errors import require_shape
from dimo.ursa.probability_path import MetricPath, MixturePath

Difference = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def of_colours(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of colours (..., 3): (...)."""
    return (one - other).square().mean(-1)


def of_codes(path: MetricPath | MixturePath) -> Difference:
    """Of codes (...), as in `dimo.views.collapse.spread`: 2 for any two codes of a mixture path."""
    if isinstance(path, MetricPath):
        return lambda one, other: (path.codebook[one] - path.codebook[other]).square().sum(-1)
    return lambda one, other: 2.0 * (one != other)


def motion(video: torch.Tensor, difference: Difference) -> torch.Tensor | None:
    """Mean difference from the same place one frame before: video (B, T, H, W, ...) -> (B,); None of images."""
    _check(video)
    return difference(video[:, 1:], video[:, :-1]).flatten(1).mean(1) if video.shape[1] > 1 else None


def flicker(video: torch.Tensor, difference: Difference) -> torch.Tensor | None:
    """Mean over places and triples of frames of the smaller of the differences from the frame before and after.

    An object that passes over a place changes it as well, but what was there before and after often stays; what differs
    from both is a flash. video (B, T, H, W, ...) -> (B,); None of fewer than three frames. It is 0 where every latent
    frame is held for several frames, as by `PaletteDecoder`.
    """
    _check(video)
    if video.shape[1] < 3:
        return None
    middle = video[:, 1:-1]
    return torch.minimum(difference(middle, video[:, :-2]), difference(middle, video[:, 2:])).flatten(1).mean(1)


def sharpness(video: torch.Tensor, difference: Difference) -> torch.Tensor | None:
    """Mean difference of neighbours in height or width: video (B, T, H, W, ...) -> (B,); None of a single place."""
    _check(video)
    down = difference(video[:, :, 1:], video[:, :, :-1]).flatten(1)
    across = difference(video[:, :, :, 1:], video[:, :, :, :-1]).flatten(1)
    both = torch.cat([down, across], 1)
    return both.mean(1) if both.shape[1] else None


def _check(video: torch.Tensor) -> None:
    require_shape("video", video, ("B", "T", "H", "W", *video.shape[4:]))


MEASURES = {"motion": motion, "flicker": flicker, "sharpness": sharpness}
