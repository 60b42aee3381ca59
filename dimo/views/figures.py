"""Figures of training and of single steps; every axis has its unit, every colour scale is colour-blind-safe."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dimo.errors import DimoError, require_shape
from dimo.views.figure import Figure

# Okabe and Ito's palette, in an order whose neighbours differ in lightness too
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
PANELS = {
    "entropy (nats per token)": ("entropy/student", "entropy/aux", "entropy/teacher"),
    "loss (nats per token)": ("loss/aux", "loss/kd", "loss/distill"),
    "reward: minus Jeffreys' divergence (nats)": ("reward/mean", "reward/baseline"),
    "gap of auxiliary to teacher (total variation)": ("gap/aux_teacher_tv",),
    "gradient norm before clipping": ("grad_norm/student", "grad_norm/aux"),
    "weight of the entropy bonus": ("lambda_ent",),
}


def curves(rows: list[dict], smooth: int = 1) -> Figure:
    """The rows of metrics.jsonl as six panels over steps; `smooth` averages so many neighbouring rows."""
    if not rows:
        raise DimoError("rows must hold at least one logged step; has the run started?")
    if smooth < 1:
        raise DimoError(f"smooth must be at least 1, got {smooth}")
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(2, 3).flat, PANELS.items()):
        for name, colour in zip(names, COLOURS):
            points = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
            if points:
                steps, values = zip(*points)
                axis.plot(steps, _running_mean(values, smooth), color=colour, label=name, linewidth=1.2)
        if title.startswith("gradient"):
            axis.set_yscale("log")
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
    return figure


def _running_mean(values: tuple, width: int) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def token_maps(maps: dict[str, torch.Tensor], unit: str) -> Figure:
    """One row per named map (T, H, W) of per-token values, one panel per latent frame, one colour scale for all."""
    if not maps:
        raise DimoError("maps must name at least one map")
    frames = next(iter(maps.values())).shape[0]
    for name, values in maps.items():
        require_shape(f"maps[{name!r}]", values, (frames, "H", "W"))
    everything = torch.cat([m.flatten().float() for m in maps.values()])
    low, high = min(0.0, everything.min().item()), everything.max().item()
    figure = Figure(figsize=(1.5 + 1.7 * frames, 0.4 + 1.6 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), frames, squeeze=False)
    for r, (name, values) in enumerate(maps.items()):
        for f in range(frames):
            image = axes[r][f].imshow(values[f].float().cpu().numpy(), vmin=low, vmax=high, cmap="cividis")
            axes[r][f].set_xticks([])
            axes[r][f].set_yticks([])
            if r == 0:
                axes[r][f].set_title(f"latent frame {f}", fontsize=8)
        axes[r][0].set_ylabel(name, fontsize=8)
    figure.colorbar(image, ax=axes, label=unit)
    return figure


def input_map(input_ids: torch.Tensor, rope_pos: torch.Tensor, text_length: int) -> Figure:
    """One row's ids (S,) and positions (S, 3) over the sequence, and where the visual logits are read."""
    require_shape("input_ids", input_ids, ("S",))
    require_shape("rope_pos", rope_pos, (len(input_ids), 3))
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.scatter(range(len(input_ids)), input_ids.tolist(), s=12, color=COLOURS[0])
    top.set_ylabel("token id")
    for axis in (top, bottom):
        axis.axvspan(-0.5, text_length - 0.5, color=COLOURS[1], alpha=0.15, label="text")
        axis.axvspan(text_length - 0.5, text_length + 0.5, color=COLOURS[5], alpha=0.35, label="BOV")
    top.hlines(
        -1.5, text_length - 0.5, len(input_ids) - 1.5, color=COLOURS[2], linewidth=4, label="logits are read here"
    )
    top.legend(fontsize=8, frameon=False, ncols=3)
    for i, (name, colour) in enumerate(zip(("t", "y", "x"), COLOURS)):
        bottom.step(range(len(rope_pos)), rope_pos[:, i].tolist(), where="mid", color=colour, label=f"position {name}")
    bottom.set_ylabel("RoPE position")
    bottom.set_xlabel("place in the sequence")
    bottom.legend(fontsize=8, frameon=False, ncols=5)
    return figure


def histogram(values: torch.Tensor, density: Callable[[torch.Tensor], torch.Tensor], xlabel: str) -> Figure:
    """Draws (n,) in [0, 1) against the density that they should have."""
    require_shape("values", values, ("n",))
    figure = Figure(figsize=(5.5, 2.8), layout="constrained")
    axis = figure.subplots()
    axis.hist(values.tolist(), bins=40, range=(0, 1), density=True, color=COLOURS[4], label=f"{len(values):,} draws")
    x = torch.linspace(0, 0.99, 200)
    axis.plot(x.tolist(), density(x).tolist(), color=COLOURS[5], label="density")
    axis.set_xlabel(xlabel)
    axis.set_ylabel("density")
    axis.legend(fontsize=8, frameon=False)
    return figure


def lines(series: dict[str, list[float]], xlabel: str, ylabel: str) -> Figure:
    """Named series over their index."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    for (name, values), colour in zip(series.items(), COLOURS):
        axis.plot(values, color=colour, label=name, linewidth=1.3)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    return figure
