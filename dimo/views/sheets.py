"""Contact sheets of videos: one row per prompt, frames side by side."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import torch

from dimo.errors import DimoError, require_shape
from dimo.files import whole_file
from dimo.views.figure import Figure
from dimo.views.fonts import families, legible

LABEL = 24  # characters per line of a row's label: four escapes
ACROSS, APART, GAP = 1.06, 0.15, 0.08  # from frame to frame, between sets of videos, under a row; in widths of a frame


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
    high = max(frames.shape[2] / frames.shape[3] for frames in columns.values())  # of a frame, whose width is 1
    wide = len(columns) * (shown * ACROSS + APART)
    size = 2.0 + 0.8 * wide, 0.5 + 0.8 * count * (high + GAP)
    figure = Figure(figsize=size, layout="constrained", about=about)
    axis, titles, edges = figure.subplots(), {}, []  # one for all frames: two dozen take a second to draw
    for c, (name, frames) in enumerate(columns.items()):
        picks = torch.linspace(0, frames.shape[1] - 1, shown).round().long().tolist()
        for r in range(count):
            for f, pick in enumerate(picks):
                left, top = c * (shown * ACROSS + APART) + f * ACROSS, r * (high + GAP)
                bottom = top + frames.shape[2] / frames.shape[3]
                axis.imshow(frames[r, pick].numpy(), interpolation="nearest", extent=(left, left + 1, bottom, top))
                right = left + 1
                edges += [(left, top), (left, bottom), (right, bottom), (right, top), (left, top), (math.nan, math.nan)]
                titles[left] = f"{name}\nframe {pick}" if f == 0 else f"frame {pick}"
    axis.plot(*zip(*edges), "k-", linewidth=0.8)
    axis.set(xlim=(-0.02, wide - APART), ylim=(count * (high + GAP), -0.02), frame_on=False)
    axis.xaxis.tick_top()
    axis.set_xticks([*titles], [*titles.values()], fontsize=8, ha="left")
    # parse_math: a caption may contain dollar signs
    axis.set_yticks([r * (high + GAP) + high / 2 for r in range(count)], [_label(prompt) for prompt in prompts],
                    fontsize=8, fontfamily=families(), parse_math=False)  # fmt: skip
    axis.tick_params(length=0)
    return figure


def _label(prompt: str) -> str:
    label = legible(prompt)
    if len(label) <= LABEL:
        return label
    return "\n".join(textwrap.wrap(label, LABEL, max_lines=6, placeholder=" ..."))


def student_title(passes: int) -> str:
    """Title of a student's column."""
    return f"student, {passes} pass{'es' if passes > 1 else ''}"


def save_sheet(file: Path, columns: dict[str, torch.Tensor], prompts: list[str]) -> None:
    """Write `video_sheet` as a PNG, atomically."""
    with whole_file(file) as beside:
        video_sheet(columns, prompts).savefig(beside, dpi=110, format="png")
