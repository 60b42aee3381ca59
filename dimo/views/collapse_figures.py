"""Figures of `dimo.views.collapse`: where a student is decided or open, and how that went over training."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes

from dimo.errors import DimoError, require_shape
from dimo.views.collapse import COLLAPSED, Grid, OverNoises, sampled_entropy
from dimo.views.figure import Figure
from dimo.views.plots import COLOURS, STYLES, token_maps


def collapse_maps(student: OverNoises, teacher: torch.Tensor, latents_shape: Grid) -> Figure:
    """Maps of H(mean p), its parts mean H(p) and I, and the entropies of student and teacher at equally many samples.

    I has a colour scale of its own, since at a large codebook it is at most log n, and H(mean p) is log K if untrained.
    Each pair shares one.

    Args:
        student: of P prompts, over which the maps are averaged.
        teacher: its codes in many passes, (P, m, M).
        latents_shape: (T', H', W') of the M tokens, from `choose_tokens`.
    """
    require_shape("teacher", teacher, (len(student.codes), "m", student.codes.shape[-1]))
    m = teacher.shape[1]
    maps = {
        "H(mean p)": student.entropy_of_mean,
        "= mean H(p), left open": student.mean_entropy,
        "+ I, decided by the noise": student.mutual_information,
        f"student, of {m} samples": sampled_entropy(student.codes[:, :m]),
        f"teacher, of {m} samples": sampled_entropy(teacher),
    }
    shown = {name: values.mean(0).view(latents_shape) for name, values in maps.items()}
    return token_maps(shown, "nats per token", together=(2, 1, 2))


def collapse_curves(rows: list[dict]) -> Figure:
    """Three panels over steps: entropies, variety relative to the teacher's, and the share of distinct videos.

    Args:
        rows: rows of metrics.jsonl, of which those with a measurement of collapse are drawn.
    """
    rows = [row for row in rows if row.get("collapse/spread") is not None]
    if not rows:
        raise DimoError("rows must hold at least one measurement of collapse, at a stop of experiment.sample_every")
    steps = [row["step"] for row in rows]

    def draw(axis: Axes, series: dict[str, list[float]]) -> None:
        for (name, values), colour, style in zip(series.items(), (COLOURS[0], COLOURS[1], "black"), STYLES):
            dot = "o" if len(steps) == 1 else None  # a single point makes no line
            axis.plot(steps, values, color=colour, linestyle=style, linewidth=1.6, marker=dot, label=name)
        axis.set_ylim(0, 1.05 * max(1e-9, *(value for values in series.values() for value in values)))
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.2), borderaxespad=0)

    def of(name: str) -> list[float]:
        return [row[f"collapse/{name}"] for row in rows]

    about = f"Entropies, variety and distinct videos over steps {steps[0]} to {steps[-1]}, beside the teacher's"
    figure = Figure(figsize=(13, 4.4), layout="constrained", about=about)
    entropies, spreads, videos = figure.subplots(1, 3)
    draw(entropies, {
        "I(x_hat; noise): decided by the noise": of("mutual_information"),
        "mean H(p): left open": of("mean_entropy"),
        "entropy of the teacher's samples": of("teacher_entropy"),
    })  # fmt: skip
    bound = rows[-1]["collapse/log_m"]
    entropies.axhline(bound, color="0.6", linewidth=1)
    entropies.set_ylim(0, 1.05 * max(bound, *(value for line in entropies.lines[:3] for value in line.get_ydata())))
    across = entropies.get_yaxis_transform()
    entropies.text(0.02, 0.99 * bound, "log m, the bound of m samples", transform=across, va="top", fontsize=9)
    entropies.set_title("entropy (nats per token)", fontsize=10, loc="left")
    share = {
        "spread of the videos of a prompt": [a / max(b, 1e-9) for a, b in zip(of("spread"), of("teacher_spread"))],
        "the same, of the least varied prompt": of("least_share"),
        "entropy of the samples": [a / max(b, 1e-9) for a, b in zip(of("sampled_entropy"), of("teacher_entropy"))],
    }
    draw(spreads, share)
    spreads.set_ylim(0, 1.05 * max(1.0, *(value for values in share.values() for value in values)))
    spreads.axhspan(0, COLLAPSED, color="0.85", zorder=0)
    spreads.text(0.02, COLLAPSED / 2, "collapsed", transform=spreads.get_yaxis_transform(), va="center", fontsize=9)
    spreads.set_title("variety (share of the teacher's)", fontsize=10, loc="left")
    draw(videos, {"student": of("distinct"), "teacher": of("teacher_distinct")})
    videos.set_title("distinct videos of a prompt (share)", fontsize=10, loc="left")
    return figure
