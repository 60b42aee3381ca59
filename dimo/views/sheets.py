"""Sheets of videos: one row per prompt, frames side by side."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch

from dimo.errors import DimoError, require_shape
from dimo.files import whole_file
from dimo.views.figure import Figure
from dimo.views.fonts import families, legible

LABEL = 24  # characters beside a row: four escapes


def video_sheet(columns: dict[str, torch.Tensor], prompts: list[str], shown: int = 3) -> Figure:
    """prompts x columns; each column holds frames (B, F, height, width, 3) in [0, 1], of which `shown` are drawn."""
    if not columns:
        raise DimoError("columns must name at least one set of videos")
    count = len(prompts)
    for name, frames in columns.items():
        require_shape(f"columns[{name!r}]", frames, (count, "F", "height", "width", 3))
    shown = min(shown, *(frames.shape[1] for frames in columns.values()))  # an image is one frame
    figure = Figure(figsize=(2.2 + len(columns) * shown * 0.85, 0.5 + count * 0.9), layout="constrained")
    axes = figure.subplots(count, len(columns) * shown, squeeze=False)
    for c, (name, frames) in enumerate(columns.items()):
        picks = torch.linspace(0, frames.shape[1] - 1, shown).round().long().tolist()
        for r in range(count):
            for f, pick in enumerate(picks):
                axis = axes[r][c * shown + f]
                axis.imshow(frames[r, pick].numpy(), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                if r == 0:
                    axis.set_title(f"{name}\nframe {pick}" if f == 0 else f"\nframe {pick}", fontsize=8, loc="left")
            if c == 0:
                label = legible(prompts[r])
                if len(label) > LABEL:
                    label = "\n".join(textwrap.wrap(label, LABEL, max_lines=6, placeholder=" ..."))
                # a caption may hold dollar signs
                axes[r][0].set_ylabel(label, fontsize=8, fontfamily=families(), rotation=0, ha="right", va="center",
                                      parse_math=False)  # fmt: skip
    return figure


def save_sheet(file: Path, columns: dict[str, torch.Tensor], prompts: list[str]) -> None:
    """`video_sheet` as a PNG, written whole or not at all."""
    with whole_file(file) as beside:
        video_sheet(columns, prompts).savefig(beside, dpi=110, format="png")
