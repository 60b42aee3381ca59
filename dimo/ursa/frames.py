"""Frames in [0, 1] and their conversion to 8 bits, which truncates like URSA's pipeline instead of rounding."""

from __future__ import annotations

import torch


def frames_of(decoded: torch.Tensor) -> torch.Tensor:
    """VAE output of any shape in [-1, 1] (clipped) -> float32 frames in [0, 1] whose `eight_bits` equal URSA's."""
    levels = (decoded.float() * 127.5 + 127.5).clamp(0, 255)
    frames, whole = levels / 255, levels.floor()
    # next to an integer level, rounding in levels / 255 * 255 could cross it; snap to the level there
    return torch.where((frames * 255).floor() == whole, frames, whole / 255)


def eight_bits(frames: torch.Tensor) -> torch.Tensor:
    """Frames of any shape in [0, 1] (clipped) -> uint8 in [0, 255], truncated."""
    return (frames * 255).clamp(0, 255).to(torch.uint8)
