"""The dashboard's figure: panels of what one run has logged, or several runs over each other, and their alarms."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.run.overview import existing_run
from dimo.views.figure import Figure
from dimo.views.fonts import legible
from dimo.views.history import History, running_mean, thin
from dimo.views.plots import COLOURS

DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MOST_RUNS = math.lcm(len(COLOURS), len(DASHES))  # each a colour with a dash of its own
SMALL, NORMAL = 9, 10  # points, at 100 dots per inch
WIDTH, ACROSS = 10.56, 3  # inches, panels
LEFT, RIGHT, ABOVE, BELOW, HEIGHT = 0.62, 0.8, 0.42, 0.3, 1.5  # inches around and of a panel's axes
LINE, CHARACTERS = 0.19, 150  # inches of a line of text, and what fits into it
ALARM, MOST_ALARMS, MOST_EVENTS = "#D55E00", 12, 8
Runs = str | Path | RunFolder | Sequence[str | Path | RunFolder]
BONUS = {"entropy_bonus_raised", "entropy_bonus_lowered"}


@dataclasses.dataclass(frozen=True)
class Panel:
    """Lines {metric: label}, the alarms that are marked, and whether the axis begins at 0, or is logarithmic."""

    what: str
    unit: str
    lines: dict[str, str]
    alarms: frozenset[str] = frozenset()
    zero: bool = False
    log: bool = False


PANELS = (
    Panel("entropy", "nats per token",
          {"entropy/student": "student", "entropy/aux": "auxiliary", "entropy/teacher": "teacher"},
          zero=True),
    Panel("reward: minus Jeffreys", "nats", {"reward/mean": "mean", "reward/baseline": "baseline"}),
    Panel("loss", "nats per token", {"loss/aux": "auxiliary", "loss/distill": "distill"},
          frozenset({"aux_lags", "non_finite", "steps_skipped"})),
    Panel("auxiliary to teacher", "total variation", {"gap/aux_teacher_tv": "gap"}),
    Panel("gap by t", "total variation",
          {"gap_by_t/0.00": "t < .25", "gap_by_t/0.25": ".25 to .5", "gap_by_t/0.50": ".5 to .75",
           "gap_by_t/0.75": "t > .75"}),
    Panel("teacher to student at x_t", "KL, nats", {"gap/student_teacher_kl": "gap"}),
    Panel("gradient norm before clipping", "", {"grad_norm/student": "student", "grad_norm/aux": "auxiliary"},
          frozenset({"gradient_spike"}), log=True),
    Panel("x_init from earlier samples", "share", {"x_init/corrupt_share": "share"}, zero=True),
    Panel("weight of the entropy bonus", "", {"lambda_ent": "lambda_ent"}, frozenset({"entropy_floor"})),
    Panel("over noises", "nats per token",
          {"collapse/mutual_information": "I", "collapse/mean_entropy": "mean H(p)",
           "collapse/teacher_entropy": "teacher"}, frozenset({"collapsed"}), zero=True),
    Panel("spread of videos", "sq. distance", {"collapse/spread": "student", "collapse/teacher_spread": "teacher"},
          frozenset({"collapsed"}), zero=True),
    Panel("distinct videos", "share", {"collapse/distinct": "student", "collapse/teacher_distinct": "teacher"},
          frozenset({"collapsed"}), zero=True),
    Panel("codes used in a batch", "", {"codes/used": "codes"}, frozenset({"codes_lost"}), zero=True),
    Panel("student's logits", "std, nats", {"logits/std": "std"}, frozenset({"logits_run_away"})),
    Panel("time of a step", "s", {"time/step_s": "step"}, zero=True),
    Panel("memory, peak", "GiB", {"memory/peak_gib": "peak"}, zero=True),
)  # fmt: skip
NAMES = tuple(name for panel in PANELS for name in panel.lines)
SETTINGS = {"lambda_ent", "x_init/corrupt_share"}  # a panel of nothing else is drawn only where they change


def dashboard_figure(runs: Runs) -> Figure:
    """What one run has logged, or several over each other, running or finished, as a figure that shows itself.

    One run has a colour for each network, several a colour and a dash for each run and a panel for each metric.

    Args:
        runs: a run folder, or up to 12.

    Raises:
        DimoError: there is no such run, none of them has logged a step yet, or there are too many.
    """
    histories = attach(runs)
    for history in histories:
        history.refresh()
    if not any(len(history.steps) for history in histories):
        about = "; ".join(f"{history.run.path.resolve()}: {history.progress()}" for history in histories)
        raise DimoError(f"no step has been logged yet ({about})")
    return draw(histories)


def attach(runs: Runs) -> list[History]:
    """The histories of a run or several, of which nothing has been read yet.

    Raises:
        DimoError: there is no such run, or there are none or too many.
    """
    several = [runs] if isinstance(runs, str | Path | RunFolder) else runs
    found = [run if isinstance(run, RunFolder) else existing_run(run) for run in several]
    if not 1 <= len(found) <= MOST_RUNS:
        raise DimoError(f"a dashboard shows 1 to {MOST_RUNS} runs, got {len(found)}")
    return [History(run, NAMES) for run in found]


def draw(histories: list[History]) -> Figure:
    """The figure of what `histories` have read."""
    panels = [panel for whole in PANELS for panel in _shown(whole, histories)]
    notes = _notes(histories)
    rows = math.ceil(len(panels) / ACROSS)
    top, bottom = 0.1 + 0.22 * len(histories), 0.3 + LINE * len(notes)
    height = top + rows * (ABOVE + HEIGHT + BELOW) + bottom
    figure = Figure(figsize=(WIDTH, height), about=_alt(panels, histories))
    handles = [Line2D([], [], color=colour, linestyle=dash, linewidth=1.8)
               for colour, dash in map(_look, range(len(histories)))]  # fmt: skip
    about = [f"{label}{h.run.path.resolve().name}: {h.progress()}" for label, h in zip(_labels(histories), histories)]
    legend = figure.legend(handles, [legible(line) for line in about], loc="upper left", fontsize=NORMAL, frameon=False,
                           bbox_to_anchor=(0, 1), borderaxespad=0.2, labelspacing=0.25,
                           handlelength=3 if len(histories) > 1 else 0)  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    for i, panel in enumerate(panels):
        wide = WIDTH / ACROSS
        x = (i % ACROSS * wide + LEFT) / WIDTH
        y = 1 - (top + (i // ACROSS + 1) * (ABOVE + HEIGHT + BELOW) - BELOW) / height
        axis = figure.add_axes((x, y, (wide - LEFT - RIGHT) / WIDTH, HEIGHT / height))
        _draw_panel(axis, panel, histories)
    figure.text(0.1 / WIDTH, (bottom - 0.12) / height, "\n".join(notes), fontsize=SMALL, va="top", parse_math=False,
                linespacing=1.5)  # fmt: skip
    return figure


def _alt(panels: list[Panel], histories: list[History]) -> str:
    runs = ", ".join(f"{h.run.path.resolve().name} ({h.progress()})" for h in histories)
    rang = sum(len(h.alarms.found) for h in histories)
    return f"Curves of {runs}: {', '.join(panel.what for panel in panels)}; {rang or 'no'} alarms"


def _look(i: int) -> tuple:
    return COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]


def _labels(histories: list[History]) -> list[str]:
    return [f"{i}  " for i in range(1, len(histories) + 1)] if len(histories) > 1 else [""]


def _shown(panel: Panel, histories: list[History]) -> list[Panel]:
    """The panel without the lines that tell nothing; of several runs, a panel for each line."""
    lines = {name: label for name, label in panel.lines.items() if any(len(h.points(name)[0]) for h in histories)}
    if "reward/baseline" in lines and all(_same(h, "reward/baseline", "reward/mean") for h in histories):
        del lines["reward/baseline"]  # without a baseline the rows repeat the reward
    if not lines or (lines.keys() <= SETTINGS and all(_is_constant(h, n) for h in histories for n in lines)
                     and len({v for h in histories for n in lines for v in h.points(n)[1][:1]}) <= 1):  # fmt: skip
        return []
    if len(histories) == 1:
        return [dataclasses.replace(panel, lines=lines)]
    several = len(panel.lines) > 1
    return [
        dataclasses.replace(panel, what=f"{panel.what}, {label}" if several else panel.what, lines={name: label})
        for name, label in lines.items()
    ]


def _same(history: History, a: str, b: str) -> bool:
    return np.array_equal(history.columns[a], history.columns[b], equal_nan=True)


def _is_constant(history: History, name: str) -> bool:
    values = history.points(name)[1]
    return not len(values) or bool((values == values[0]).all())


def _draw_panel(axis: Axes, panel: Panel, histories: list[History]) -> None:
    pixels = max(1, round(axis.get_window_extent().width))
    ends = []
    for i, (history, number) in enumerate(zip(histories, _labels(histories))):
        for j, (name, label) in enumerate(panel.lines.items()):
            colour, dash = _look(i if len(histories) > 1 else j)
            steps, values = history.points(name)
            if panel.log:
                steps, values = steps[values > 0], values[values > 0]
            if not len(steps):
                continue
            smooth = _smooth(values, panel, _width(len(values)))
            if smooth is not values:
                axis.plot(*thin(steps, values, pixels), color=colour, linewidth=0.8, alpha=0.3)
            dot = "o" if len(steps) == 1 else None  # a single point makes no line
            axis.plot(*thin(steps, smooth, pixels), color=colour, linestyle=dash, linewidth=1.6, marker=dot,
                      label=f"{number}{label}", gid=i)  # fmt: skip
            ends.append((float(smooth[-1]), number.strip() or label, colour))
    if panel.log:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        low, high = axis.get_ylim()
        few = high < 100 * low  # hardly a power of ten in it: 2 and 5 are labelled, too
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if few else "auto"))
        axis.yaxis.set_minor_formatter("{x:g}" if few else NullFormatter())
    else:
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.locator_params(axis="y", nbins=5)
    axis.locator_params(axis="x", nbins=4, integer=True)
    if panel.what.startswith("entropy"):
        _draw_bound(axis, histories)
    if panel.zero:
        low, high = min(0, axis.get_ylim()[0]), axis.get_ylim()[1]
        axis.set_ylim(low, high + 0.04 * (high - low))  # else a line near the top is cut off
    if len(histories) == 1:
        _mark(axis, panel, histories[0])
    axis.set_title(f"{panel.what} ({panel.unit})" if panel.unit else panel.what, fontsize=NORMAL, loc="left")
    axis.tick_params(which="both", labelsize=SMALL)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if len(ends) > 1:
        _label_ends(axis, ends)


def _smooth(values: np.ndarray, panel: Panel, width: int) -> np.ndarray:
    """The running mean, a geometric one on a logarithmic axis; lambda_ent jumps, and is drawn as it is."""
    if "lambda_ent" in panel.lines or width == 1:
        return values
    return np.exp(running_mean(np.log(values), width)) if panel.log else running_mean(values, width)


def _width(rows: int) -> int:
    """Rows of the running mean."""
    return max(1, min(rows // 20, 500))


def _draw_bound(axis: Axes, histories: list[History]) -> None:
    """log K, which no entropy exceeds; the label of all is above the highest, the one place without curves."""
    bounds = sorted({math.log(size) for history in histories if (size := history.codebook_size())})
    for bound in bounds:
        axis.axhline(bound, color="0.5", linewidth=1)
    if bounds:
        axis.annotate(
            f"log K = {', '.join(f'{bound:.2f}' for bound in bounds)}", (0.98, bounds[-1]), (0, 2), fontsize=SMALL,
            ha="right", va="bottom", color="0.35", xycoords=axis.get_yaxis_transform(), textcoords="offset points",
        )  # fmt: skip
        axis.set_ylim(top=max(axis.get_ylim()[1], bounds[-1] / (1 - (1.3 * SMALL + 2) / (72 * HEIGHT))))


def _mark(axis: Axes, panel: Panel, history: History) -> None:
    """Shade the steps at which an alarm of the panel rang; dotted lines at the switches of lambda_ent."""
    last, least = history.steps[-1], (history.steps[-1] - history.steps[0]) / 200
    spans: list[tuple[float, float]] = []
    for alarm in history.alarms.found:
        if alarm.name in panel.alarms:
            end = max(alarm.over or last, alarm.step + least)
            if spans and alarm.step <= sum(spans[-1]):
                begin = spans.pop()[0]
            else:
                begin = alarm.step
            spans.append((begin, end - begin))
    if spans:
        axis.broken_barh(spans, (0, 1), transform=axis.get_xaxis_transform(), color=ALARM, alpha=0.18, linewidth=0)
    if "lambda_ent" in panel.lines:
        at = [event["step"] for event in history.events if event.get("event") in BONUS]
        axis.vlines(at, 0, 1, transform=axis.get_xaxis_transform(), color="0.4", linestyle=":", linewidth=1)


def _label_ends(axis: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write the names of lines beside their ends, moved apart where they would lie on each other."""
    axis.get_ylim()  # settles the limits, which transData would not
    to_axes = axis.transData - axis.transAxes
    places = [to_axes.transform((0, y))[1] for y, _, _ in ends]
    for place, (_, name, colour) in zip(apart(places, 0.135), ends):
        axis.text(1.02, place, name, color=colour, fontsize=SMALL, va="center", transform=axis.transAxes)


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1], moved as far as needed so that neighbours differ by `gap`, in the same order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    gap = min(gap, 1 / max(1, len(places) - 1))
    up = [min(max(places[i], 0.0), 1.0) for i in order]
    down = list(up)
    for i in range(1, len(up)):
        up[i] = max(up[i], up[i - 1] + gap)
        down[-1 - i] = min(down[-1 - i], down[-i] - gap)
    up = [min(y, 1 - gap * (len(up) - 1 - i)) for i, y in enumerate(up)]
    down = [max(y, gap * i) for i, y in enumerate(down)]
    return [(up[i] + down[i]) / 2 for i in map(order.index, range(len(places)))]  # half of the way each


def _notes(histories: list[History]) -> list[str]:
    """Lines about the figure, the alarms and the events."""
    logged = max(len(h.steps) for h in histories)
    lines = [f"x: training step. Faint: every logged row, thick: mean of {_width(logged)} rows." if _width(logged) > 1
             else "x: training step."]  # fmt: skip
    for label, history in zip(_labels(histories), histories):
        found = history.alarms.found
        ringing = [a for a in found if a.over is None][-MOST_ALARMS:]
        over = [a for a in found if a.over is not None]
        most = max(0, MOST_ALARMS - len(ringing))
        shown = sorted([*ringing, *(over[-most:] if most else [])], key=lambda a: a.step)
        left_out = f", the last {len(shown)} of them" if len(shown) < len(found) else ""
        lines.append(f"{label}{len(found) or 'no'} alarms in {len(history.steps):,} logged rows{left_out}")
        for alarm in shown:
            when = f"step {alarm.step}" + (f" to {alarm.over}" if alarm.over else " on")
            lines += textwrap.wrap(f"{when}  {alarm.name}: {alarm.sentence}", CHARACTERS, initial_indent="    ",
                                   subsequent_indent="        ")  # fmt: skip
        events = history.events[-MOST_EVENTS:]
        if events:
            told = "; ".join(f"step {e['step']} {str(e.get('event', '')).replace('_', ' ')}" for e in events)
            lines += textwrap.wrap(f"{label}events: {told}", CHARACTERS, subsequent_indent="        ")
    return lines
