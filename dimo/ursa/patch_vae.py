"""A video tokenizer without a network, for videos made of few patches: every code is one of 8x8 pixels, in a table."""

from __future__ import annotations

from pathlib import Path

import torch

from dimo.errors import DimoError, require_ids, require_shape
from dimo.ursa.chunks import chunks
from dimo.ursa.inputs import SPATIAL_STRIDE, TEMPORAL_STRIDE
from dimo.ursa.palette import load_table, save_table

TOKENS = 4096  # encoded at a time


class PatchVae:
    """Frames (B, 4 (T-1) + 1, 8 H, 8 W, 3), RGB in [0, 1] <-> codes (B, T, H, W) in [0, K), with URSA's strides.

    Args:
        patches: (K, 8, 8, 3) uint8 RGB, all different.
    """

    def __init__(self, patches: torch.Tensor):
        require_shape("patches", patches, ("K", SPATIAL_STRIDE, SPATIAL_STRIDE, 3))
        if patches.dtype != torch.uint8:
            raise DimoError(f"patches must be uint8, got {patches.dtype}")
        self.patches = patches

    @property
    def codebook_size(self) -> int:
        return len(self.patches)

    def to(self, device) -> PatchVae:
        return PatchVae(self.patches.to(device))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Look the patches up; the first latent frame becomes one frame, each later one four that are alike."""
        require_shape("codes", codes, ("B", "T", "H", "W"))
        require_ids("codes", codes, len(self.patches))
        frames = self.patches[codes].permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(2, 3)
        return torch.cat([frames[:, :1], frames[:, 1:].repeat_interleave(TEMPORAL_STRIDE, 1)], 1).float() / 255

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """The nearest patch of each token, by squared distance to the mean of its frames.

        Pixels are rounded to the 256 values of the table and centred, so that float32 sums of their products are exact.
        """
        require_shape("frames", frames, ("B", "F", "Y", "X", 3))
        batch, count, height, width, _ = frames.shape
        if count % TEMPORAL_STRIDE != 1 or height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
            raise DimoError(
                f"frames must be 4 (T-1) + 1 of 8 H x 8 W pixels, got {count} of {height}x{width}: crop or pad them"
            )
        later = frames[:, 1:].unflatten(1, (-1, TEMPORAL_STRIDE)).float().mean(2)
        pixels = (torch.cat([frames[:, :1].float(), later], 1) * 255).round() - 128
        cells = pixels.unflatten(2, (-1, SPATIAL_STRIDE)).unflatten(4, (-1, SPATIAL_STRIDE)).transpose(3, 4)
        known = self.patches.flatten(1).float() - 128
        half = known.square().sum(1) / 2
        nearest = [(half - part @ known.T).argmin(1) for (part,) in chunks(TOKENS, cells.flatten(4).flatten(0, 3))]
        return torch.cat(nearest).view(batch, -1, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)

    def save(self, folder: Path) -> None:
        save_table(folder, "PatchVae", "patches", self.patches)

    @classmethod
    def load(cls, folder: Path) -> PatchVae:
        return cls(load_table(folder, "patches"))
