"""Figures of single steps; axes have units, and colours are colour-blind-safe."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import torch
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator

from dimo.errors import DimoError, require_shape
from dimo.views.figure import Figure

# Okabe and Ito's palette, ordered so that neighbours differ in lightness, too
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
WIDEST = 7.0  # inches of all maps beside each other
NARROWEST = 1e-3  # range in nats of a colour scale, so that rounding is not shown as structure
STYLES = ("-", (0, (5, 4)), (0, (1.5, 2)))  # dashes, so that coinciding lines remain visible


def token_maps(maps: dict[str, torch.Tensor], unit: str, together: Sequence[int] = ()) -> Figure:
    """Per-token values as heat maps: a row per map, a column per latent frame, and a colour scale for all of them.

    The scale is logarithmic where a map would be of one colour otherwise: its largest value is less than a tenth of the
    largest of all. It then covers three decades.

    Args:
        maps: {name: values (T, H, W)}.
        unit: label of the colour bar.
        together: how many maps after each other share a scale, such as (2, 1) of three, each scale linear and at least
            NARROWEST wide; empty: one scale for all.

    Raises:
        DimoError: no maps, one of another shape, or `together` does not add up to their number.
    """
    if not maps:
        raise DimoError("maps must hold at least one map")
    frames = next(iter(maps.values())).shape[0]
    for name, values in maps.items():
        require_shape(f"maps[{name!r}]", values, (frames, "H", "W"))
    if together and (sum(together) != len(maps) or min(together) < 1):
        raise DimoError(f"together must be numbers of at least 1 that add up to {len(maps)} maps, got {together}")
    all_values, groups = list(maps.values()), together or (len(maps),)
    begins = [sum(groups[:i]) for i in range(len(groups))]
    scales = [_scale(all_values[i : i + n], unit, bool(together)) for i, n in zip(begins, groups)]
    wide = min(1.5 if len(maps) < 4 else 1.0, WIDEST / frames)  # inches of a map
    tall = wide * min(1.5, max(m.shape[1] / m.shape[2] for m in maps.values()))
    size = 2.8 + (wide + 0.24) * frames, 0.5 + max(tall, 0.5) * len(maps)
    means = ", ".join(f"{name} {values.float().mean().item():.3g}" for name, values in maps.items())
    figure = Figure(figsize=size, layout="constrained", about=f"Maps over a video's tokens, {unit}; means: {means}")
    figure.get_layout_engine().set(w_pad=0.12)  # inches; the layout does not expect square axes
    axes = figure.subplots(len(maps), frames, squeeze=False)
    norms = [norm for (norm, _), n in zip(scales, groups) for _ in range(n)]
    for r, (name, values) in enumerate(maps.items()):
        for f in range(frames):
            axes[r][f].imshow(values[f].float().cpu().numpy(), cmap="cividis", norm=norms[r])
            axes[r][f].set_xticks([])
            axes[r][f].set_yticks([])
            if r == 0:
                axes[r][f].set_title(f"latent frame {f}" if wide >= 1 else f"{f}", fontsize=9)
        axes[r][0].set_ylabel(textwrap.fill(name, 16), fontsize=9, rotation=0, ha="right", va="center")
    for (norm, label), i, n in zip(scales, begins, groups):
        bar = figure.colorbar(axes[i][0].images[0], ax=axes[i : i + n], extend="min" if norm.clip else "neither",
                              ticks=MaxNLocator(4) if together else None)  # fmt: skip
        bar.set_label(label, fontsize=9 if together else 10)  # beside a single row there is little room
    return figure


def _scale(maps: list[torch.Tensor], unit: str, linear: bool) -> tuple[Normalize, str]:
    """The colour scale of maps that share one, and the label of its bar; see `token_maps`."""
    everything = torch.cat([m.flatten().float() for m in maps])
    low, high = min(0.0, everything.min().item()), everything.max().item()
    if linear:
        return Normalize(low, max(high, low + NARROWEST)), unit
    if low == 0 and min(m.max().item() for m in maps) < high / 10:
        return LogNorm(high / 1000, high, clip=True), f"{unit} (log scale)"
    return Normalize(low, high), unit


def path_maps(prob: dict[float, torch.Tensor]) -> Figure:
    """The probability path p_t(x | x_1) for the first n codes, as one n x n heat map per t.

    The common logarithmic colour scale starts at 0.01 / K, so it shows which codes are confused, and in which order.

    Args:
        prob: {t: probabilities (n, K) of x (columns) given x_1 (rows)}.
    """
    if not prob:
        raise DimoError("prob must hold at least one t")
    shape = tuple(next(iter(prob.values())).shape)
    times = ", ".join(f"{t:g}" for t in prob)
    about = f"p_t(x | x_1) of {shape[0]} codes at t = {times}: what every clean code may have become"
    figure = Figure(figsize=(1.2 + 2.3 * len(prob), 2.8), layout="constrained", about=about)
    axes = figure.subplots(1, len(prob), squeeze=False)[0]
    for axis, (t, p) in zip(axes, prob.items()):
        require_shape(f"prob[{t}]", p, shape if len(shape) == 2 else ("n", "K"))
        shown = p[:, : len(p)].float().cpu().numpy()
        image = axis.imshow(shown, norm=LogNorm(0.01 / shape[1], 1, clip=True), cmap="cividis")
        axis.set_title(f"t = {t:g}", fontsize=9)
        axis.set_xlabel("x (code)", fontsize=8)
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(MaxNLocator(5, integer=True))
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("x_1 (code)", fontsize=8)
    figure.colorbar(image, ax=axes, label="p_t(x | x_1)", extend="min")
    return figure


def input_map(input_ids: torch.Tensor, rope_pos: torch.Tensor, text_length: int) -> Figure:
    """The transformer's input for one sample, and where the visual logits are read.

    Args:
        input_ids: (S,) token ids: text, BOV, visual tokens.
        rope_pos: (S, 3) RoPE positions (t, y, x).
        text_length: number of text tokens L.
    """
    require_shape("input_ids", input_ids, ("S",))
    require_shape("rope_pos", rope_pos, (len(input_ids), 3))
    about = f"Token ids and RoPE positions of a sequence: {text_length} of text, BOV, and the visual tokens"
    figure = Figure(figsize=(11, 4.8), layout="constrained", about=about)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axis in (top, bottom):
        axis.axvspan(-0.5, text_length - 0.5, color="0.92", label="text")
        axis.axvspan(text_length - 0.5, text_length + 0.5, color="0.7", label="BOV")
    top.scatter(range(len(input_ids)), input_ids.tolist(), s=12, color=COLOURS[0])
    top.margins(y=0.15)
    top.hlines(
        0.05, text_length - 0.5, len(input_ids) - 1.5, color=COLOURS[5], linewidth=4, label="logits are read here",
        transform=top.get_xaxis_transform(),
    )  # fmt: skip
    top.set_ylabel("token id")
    for i, (name, colour) in enumerate(zip(("t", "y", "x"), COLOURS)):
        # thinner than the line below, since all three coincide in the text
        bottom.step(range(len(rope_pos)), rope_pos[:, i].tolist(), where="mid", color=colour, linewidth=3.4 - i,
                    label=f"position {name}")  # fmt: skip
    bottom.set_ylabel("RoPE position")
    bottom.set_xlabel("index in the sequence")
    for axis in (top, bottom):  # legends above the axes, clear of the data
        axis.legend(fontsize=8, frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure


def histogram(values: torch.Tensor, density: Callable[[torch.Tensor], torch.Tensor], xlabel: str) -> Figure:
    """Histogram of samples (n,) in [0, 1) with the density that they should follow, a function of (m,) to (m,)."""
    require_shape("values", values, ("n",))
    about = f"Histogram of {len(values):,} draws of {xlabel} with their density"
    figure = Figure(figsize=(5.5, 2.8), layout="constrained", about=about)
    axis = figure.subplots()
    axis.hist(values.tolist(), bins=40, range=(0, 1), density=True, color=COLOURS[4], label=f"{len(values):,} draws")
    x = torch.linspace(0, 0.99, 200)
    axis.plot(x.tolist(), density(x).tolist(), color=COLOURS[5], label="density")
    axis.set_xlabel(xlabel)
    axis.set_ylabel("density")
    axis.legend(fontsize=8, frameon=False)
    return figure


def lines(series: dict[str, list[float]], xlabel: str, ylabel: str, x: list[float] | None = None) -> Figure:
    """Line plot of one to three named series over `x`, or over their index."""
    if not 1 <= len(series) <= len(STYLES):
        raise DimoError(f"series must hold 1 to {len(STYLES)} lines, got {len(series)}")
    ends = ", ".join(f"{name} from {values[0]:.3g} to {values[-1]:.3g}" for name, values in series.items() if values)
    figure = Figure(figsize=(7, 3), layout="constrained", about=f"{ylabel} over {xlabel}: {ends}")
    axis = figure.subplots()
    for (name, values), colour, style in zip(series.items(), COLOURS, STYLES):
        if x is not None and len(values) != len(x):
            raise DimoError(f"series[{name!r}] must have as many values as x ({len(x)}), got {len(values)}")
        places = range(len(values)) if x is None else x
        axis.plot(places, values, color=colour, label=name, linewidth=1.6, linestyle=style)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    return figure
