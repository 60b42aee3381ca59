"""Alarms: patterns in a run's metrics that deserve a look."""

from __future__ import annotations

import dataclasses
import statistics

from dimo.views.collapse import has_collapsed

WINDOW = 10  # rows over which loss/aux is averaged; also the fewest rows for a median
MEMORY = 200  # rows over whose median a gradient norm is compared
AUX_LAG, SPIKE, RUNAWAY = 1.3, 10.0, 30.0
AUX_NATS = 0.05  # per token, by which the auxiliary must lag as well: where nothing is left to predict, 30% is nothing
LOST, FOUND = 0.5, 0.75  # of the codes of the first batch
DEAF = 0.5  # of the most mutual information that the run has had


@dataclasses.dataclass(frozen=True)
class Alarm:
    """What happened at a step; `over`: the later step from which on it no longer held, None if there is none."""

    step: int
    name: str
    sentence: str
    over: int | None = None


def alarms(rows: list[dict]) -> list[Alarm]:
    """The alarms in the rows of metrics.jsonl, in the order of steps. No alarm does not prove that all is well.

    non_finite: a metric was NaN or infinite.
    steps_skipped: steps were skipped for values that are not finite, in this row or between rows.
    entropy_floor: the entropy bonus was raised.
    collapsed: the videos of one prompt spread, or the codes of all vary, less than 40% as much as the teacher's, or
        I(x_hat; noise) is below half of the highest value that the run has had (`dimo.views.collapse`).
    aux_lags: the smoothed loss of the auxiliary is 30% and 0.05 nats above its minimum, so it no longer follows the
        student.
    codes_lost: a batch uses less than half as many codes as the first one; again only after three quarters were used.
    logits_run_away: the standard deviation of the student's logits is 30 times that of the first row, so the decision
        for a token can hardly be reversed any more (see `model.train_head`).
    gradient_spike: the student's gradient norm is more than 10 times its median over the last 200 rows.
    """
    found: list[Alarm] = []
    on: dict[str, int] = {}  # where in `found` the alarms are that ring now

    def ring(name: str, now: bool, sentence: str, over: bool | None = None) -> None:
        """Add an alarm when the condition starts to hold, and none of its name until it is over."""
        if now and name not in on:
            on[name] = len(found)
            found.append(Alarm(step, name, sentence))
        elif name in on and (not now if over is None else over):
            at = on.pop(name)
            found[at] = dataclasses.replace(found[at], over=step)

    least, skipped, most = float("inf"), 0, 0.0
    for i, row in enumerate(rows):
        step, window = row["step"], rows[max(0, i - WINDOW + 1) : i + 1]
        if row.get("non_finite"):
            found.append(Alarm(step, "non_finite", f"not finite: {', '.join(row['non_finite'])}"))
        if row.get("guard/skipped", 0) > skipped:
            found.append(Alarm(step, "steps_skipped", f"{row['guard/skipped'] - skipped:g} steps were not finite"))
            skipped = row["guard/skipped"]
        bonus, first = row.get("lambda_ent"), rows[0].get("lambda_ent")
        if bonus is not None and first is not None:
            ring("entropy_floor", bonus > first, f"lambda_ent rose from {first:g} to {bonus:g}")
        if row.get("collapse/spread") is not None:
            figures = {key.removeprefix("collapse/"): value for key, value in row.items()}
            most = max(most, figures["mutual_information"])
            deaf = figures["mutual_information"] < DEAF * most
            ring("collapsed", has_collapsed(figures) or deaf, _of_collapse(figures, most))
        aux = _mean(window, "loss/aux")
        if aux is not None and i + 1 >= WINDOW:
            lags = f"loss/aux is {aux:.3g} nats per token, its minimum was {least:.3g}"
            ring("aux_lags", aux > max(AUX_LAG * least, least + AUX_NATS), lags)
            least = min(least, aux)
        codes, first = row.get("codes/used"), rows[0].get("codes/used")
        if codes is not None and first:
            lost = f"a batch uses {codes:g} codes, the first one used {first:g}"
            ring("codes_lost", codes < LOST * first, lost, over=codes >= FOUND * first)
        spread, first = row.get("logits/std"), rows[0].get("logits/std")
        if spread is not None and first:
            wide = f"logits/std is {spread:.3g} nats, in the first row it was {first:.3g}"
            ring("logits_run_away", spread > RUNAWAY * first, wide)
        norms = [
            r["grad_norm/student"] for r in rows[max(0, i - MEMORY) : i + 1] if r.get("grad_norm/student") is not None
        ]
        if len(norms) >= WINDOW:
            median = statistics.median(norms)
            spike = f"grad_norm/student is {norms[-1]:.3g}, its median {median:.3g}"
            ring("gradient_spike", norms[-1] > SPIKE * median, spike)
    return found


def _of_collapse(figures: dict, most: float) -> str:
    return (
        f"videos of a prompt spread {figures['spread']:.3g} in the codebook's space, the teacher's "
        f"{figures['teacher_spread']:.3g}, those of one prompt {figures['least_share']:.0%} of its; the entropy of "
        f"their codes is {figures['sampled_entropy']:.3g} nats, the teacher's {figures['teacher_entropy']:.3g}; "
        f"I(x_hat; noise) is {figures['mutual_information']:.3g}, its maximum was {most:.3g}; "
        f"{figures['distinct']:.0%} of the videos are distinct"
    )


def _mean(rows: list[dict], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None
