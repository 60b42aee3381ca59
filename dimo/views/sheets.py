"""Contact sheets of videos: one row per prompt, frames side by side."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch

from dimo.errors import DimoError, require_shape
from dimo.files import whole_file
from dimo.views.figure import Figure
from dimo.views.fonts import families, legible

LABEL = 24  # characters per line of a row's label: four escapes


def video_sheet(columns: dict[str, torch.Tensor], prompts: list[str], shown: int = 3) -> Figure:
    """A contact sheet with a row per prompt and a group of columns per set of videos.

    Args:
        columns: {title: frames (B, F, height, width, 3), RGB in [0, 1]}.
        prompts: the B prompts.
        shown: number of frames to draw of each video, evenly spaced.
    """
    if not columns:
        raise DimoError("columns must hold at least one set of videos")
    count = len(prompts)
    for name, frames in columns.items():
        require_shape(f"columns[{name!r}]", frames, (count, "F", "height", "width", 3))
    shown = min(shown, *(frames.shape[1] for frames in columns.values()))  # an image is one frame
    about = f"Frames of videos of {count} prompts: {'; '.join(columns)}"
    size = 2.2 + len(columns) * shown * 0.85, 0.5 + count * 0.9
    figure = Figure(figsize=size, layout="constrained", about=about)
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
                # parse_math: a caption may contain dollar signs
                axes[r][0].set_ylabel(label, fontsize=8, fontfamily=families(), rotation=0, ha="right", va="center",
                                      parse_math=False)  # fmt: skip
    return figure


def student_title(passes: int) -> str:
    """Title of a student's column."""
    return f"student, {passes} pass{'es' if passes > 1 else ''}"


def save_sheet(file: Path, columns: dict[str, torch.Tensor], prompts: list[str]) -> None:
    """Write `video_sheet` as a PNG, atomically."""
    with whole_file(file) as beside:
        video_sheet(columns, prompts).savefig(beside, dpi=110, format="png")
