"""Motion, flicker and sharpness of frames: squared differences of colours in [0, 1], averaged over the three channels.

They are those of `dimo.evaluation.tokens`, of a video as it is seen: a decoder may hide what codes do, or add to it.
"""

from __future__ import annotations

import torch

from dimo.errors import require_shape


def _differences(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one - other).square().mean(-1)


def motion(frames: torch.Tensor) -> torch.Tensor | None:
    """Mean difference of a pixel from the same place one frame before: (B, F, h, w, 3) -> (B,); None of images."""
    require_shape("frames", frames, ("B", "F", "h", "w", 3))
    return _differences(frames[:, 1:], frames[:, :-1]).flatten(1).mean(1) if frames.shape[1] > 1 else None


def flicker(frames: torch.Tensor) -> torch.Tensor | None:
    """Mean over pixels and triples of frames of the smaller of a pixel's differences from the frame before and after.

    As in `tokens.flicker`, what differs from both is a flash. (B, F, h, w, 3) -> (B,); None of fewer than three frames.
    It is 0 where every latent frame is held for several frames, as by `PaletteDecoder`.
    """
    require_shape("frames", frames, ("B", "F", "h", "w", 3))
    if frames.shape[1] < 3:
        return None
    middle = frames[:, 1:-1]
    before, after = _differences(middle, frames[:, :-2]), _differences(middle, frames[:, 2:])
    return torch.minimum(before, after).flatten(1).mean(1)


def sharpness(frames: torch.Tensor) -> torch.Tensor | None:
    """Mean difference of pixels that are neighbours in height or width: (B, F, h, w, 3) -> (B,); None of 1x1 pixels."""
    require_shape("frames", frames, ("B", "F", "h", "w", 3))
    down = _differences(frames[:, :, 1:], frames[:, :, :-1]).flatten(1)
    across = _differences(frames[..., 1:, :], frames[..., :-1, :]).flatten(1)
    both = torch.cat([down, across], 1)
    return both.mean(1) if both.shape[1] else None
