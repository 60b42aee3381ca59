"""The explorer as a figure: what papermill, nbconvert and a notebook without a kernel show in its place."""

from __future__ import annotations

import math

import matplotlib
import numpy as np

from dimo.views.explorer_view import COLOURS, colours_of, named, scale_of
from dimo.views.figure import Figure
from dimo.views.fonts import families, legible

NETWORK = {
    "conditional": "#0072B2", "unconditional": "#56B4E9", "guided": "#0072B2", "auxiliary": "#E69F00",
    "student": "#009E73", "one_pass": "#CC79A7",
}  # fmt: skip


def twin(view: dict, about: dict) -> Figure:
    """Maps, decoded frames and most likely codes of a view, in the page's colours.

    Args:
        view: an answer of `ExplorerView.view`.
        about: `ExplorerView.about`.
    """
    low, high = scale_of(view, about)
    statistic, grid, panes = about["statistics"][view["statistic"]], about["grid"], view["panes"]
    about_it = f"The explorer: {named(view, about, panes[-1])}, of {panes[-1]['asked']['prompt']!r}"
    figure = Figure(figsize=(12, 4.8), layout="constrained", about=about_it)
    left, right = figure.subfigures(1, 2, width_ratios=[5, 6])
    pictured = "picture" in panes[-1]
    axes = left.subplots(len(panes) + pictured, 1, squeeze=False)[:, 0]
    if pictured:
        size = (*panes[-1]["picture"]["size"], 3)
        _mosaic(axes[0], np.frombuffer(panes[-1]["picture"]["rgb"], np.uint8).reshape(size), grid, None)
        axes[0].set_title("decoded frames", fontsize=9, loc="left")
    for axis, pane in zip(axes[pictured:], panes):
        values = np.frombuffer(pane["values"], "<f4").reshape(grid)
        _mosaic(axis, colours_of(values, low, high), grid, view["token"])
        axis.set_title(f"{named(view, about, pane)}: mean {values.mean():.3g}", fontsize=9, loc="left")
    shades = matplotlib.cm.ScalarMappable(
        matplotlib.colors.Normalize(low, high), matplotlib.colors.ListedColormap(COLOURS / 255)
    )
    left.colorbar(shades, ax=list(axes), label=statistic["unit"], shrink=0.7, location="bottom", aspect=40)
    pane, token = panes[-1], view["token"]
    right.suptitle(
        legible(f'"{pane["asked"]["prompt"]}": frame {token[0]}, row {token[1]}, column {token[2]}; '
                f"x_hat is code {pane['x_hat']}"), fontsize=9, fontfamily=families(), parse_math=False,
    )  # fmt: skip
    rows = math.ceil(len(pane["top"]) / 3)
    for axis, top in zip(right.subplots(rows, 3, squeeze=False).flat, pane["top"]):
        places = range(len(top["codes"]))
        axis.barh(places, top["p"], color=NETWORK[top["of"]])
        axis.set_yticks(places, [f"{code}{' *' if code == pane['x_hat'] else ''}" for code in top["codes"]], fontsize=8)
        axis.invert_yaxis()
        end = end_of_bars(top["p"])
        axis.set_xlim(0, end)
        axis.set_xticks((0, end), ("0", f"p {end:g}"), fontsize=8)  # few: text takes most of the time of a figure
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(
            f"{about['titles'][top['of']]}: H {max(0, round(top['entropy'], 6)):.3g}", fontsize=9, loc="left"
        )
    for axis in right.axes[len(pane["top"]) :]:
        axis.set_visible(False)
    return figure


def end_of_bars(p: list[float]) -> float:
    """Where the axis of the bars of p ends: the power of ten, 1 at most, to which the longest is a tenth or more."""
    most = max(p)
    return min(1.0, 10.0 ** math.ceil(math.log10(most))) if most > 0 else 1.0


def _mosaic(axis, frames: np.ndarray, grid: list[int], token: list[int] | None) -> None:
    """Frames (T, h, w, 3) beside each other; the token is framed if they are maps, with a pixel per token."""
    count, height, width = frames.shape[:3]
    across = min(count, max(1, round(math.sqrt(2.2 * count * height / width))))
    if across < count:
        across = math.ceil(count / math.ceil(count / across))
    gap = max(1, width // 4)
    lines = math.ceil(count / across)
    shown = np.full((lines * (height + gap) - gap, across * (width + gap) - gap, 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        top, at = i // across * (height + gap), i % across * (width + gap)
        shown[top : top + height, at : at + width] = frame
    axis.imshow(shown, interpolation="nearest")
    axis.set_axis_off()
    if token is not None:
        corner = (
            token[0] % across * (width + gap) + token[2] - 0.5,
            token[0] // across * (height + gap) + token[1] - 0.5,
        )
        axis.add_patch(matplotlib.patches.Rectangle(corner, 1, 1, fill=False, edgecolor="#D55E00", linewidth=2))
