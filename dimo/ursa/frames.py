"""Frames in [0, 1], and their 8 bits as URSA's pipeline makes them: cut off, not rounded."""

from __future__ import annotations

import torch


def frames_of(decoded: torch.Tensor) -> torch.Tensor:
    """A VAE's output, of any shape, where -1 is black and 1 white -> the same in [0, 1], whose `eight_bits` are URSA's.

    Values outside of [-1, 1] are clipped.
    """
    levels = (decoded.float() * 127.5 + 127.5).clamp(0, 255)
    frames, whole = levels / 255, levels.floor()
    # one rounding error from a whole level, the way to [0, 1] and back could end on its other side
    return torch.where((frames * 255).floor() == whole, frames, whole / 255)


def eight_bits(frames: torch.Tensor) -> torch.Tensor:
    """Frames in [0, 1], of any shape -> uint8 in [0, 255]; what lies outside is clipped."""
    return (frames * 255).clamp(0, 255).to(torch.uint8)
