"""A stand-in for a VAE: every code decodes to a patch of one colour."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dimo.errors import DimoError, require_ids, require_shape
from dimo.files import save_file
from dimo.ursa.inputs import SPATIAL_STRIDE, TEMPORAL_STRIDE
from dimo.ursa.weights import WEIGHTS, read_weights


class PaletteDecoder:
    """Codes (B, T, H, W) -> frames (B, 4 (T-1) + 1, 8 H, 8 W, 3), RGB in [0, 1], with the strides of URSA's VAE."""

    def __init__(self, palette: torch.Tensor):
        require_shape("palette", palette, ("K", 3))
        self.palette = palette

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode; the first latent frame becomes one frame, each later one four."""
        require_shape("codes", codes, ("B", "T", "H", "W"))
        require_ids("codes", codes, self.palette.shape[0])
        frames = self.palette[codes]
        frames = frames.repeat_interleave(SPATIAL_STRIDE, 2).repeat_interleave(SPATIAL_STRIDE, 3)
        return torch.cat([frames[:, :1], frames[:, 1:].repeat_interleave(TEMPORAL_STRIDE, 1)], 1)

    def to(self, device) -> PaletteDecoder:
        return PaletteDecoder(self.palette.to(device))

    def save(self, folder: Path) -> None:
        save_table(folder, "PaletteDecoder", "palette", self.palette)

    @classmethod
    def load(cls, folder: Path) -> PaletteDecoder:
        return cls(load_table(folder, "palette"))


def save_table(folder: Path, class_name: str, name: str, table: torch.Tensor) -> None:
    """Write a VAE's folder for a tokenizer that is a table with a row for every code, with URSA's strides."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: table.cpu()}, folder / f"{WEIGHTS}.safetensors")
    config = {"_class_name": class_name, "temporal_stride": TEMPORAL_STRIDE, "spatial_stride": SPATIAL_STRIDE}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_table(folder: Path, name: str) -> torch.Tensor:
    """The table that `save_table` wrote.

    Raises:
        DimoError: the weights do not contain it.
    """
    state = read_weights(folder)
    if name not in state:
        raise DimoError(f"the weights in {folder} contain no {name}")
    return state[name]
