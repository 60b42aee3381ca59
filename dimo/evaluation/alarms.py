"""Alarms: patterns in a run's metrics that deserve a look."""

from __future__ import annotations

import dataclasses
import statistics

WINDOW = 10  # rows over which loss/aux is averaged; also the fewest rows for a median
MEMORY = 200  # rows over whose median a gradient norm is compared
AUX_LAG, SPIKE, RUNAWAY = 1.3, 10.0, 30.0


@dataclasses.dataclass(frozen=True)
class Alarm:
    step: int
    name: str
    sentence: str


def alarms(rows: list[dict]) -> list[Alarm]:
    """The alarms in the rows of metrics.jsonl, in the order of steps. No alarm does not prove that all is well.

    non_finite: a metric was NaN or infinite.
    steps_skipped: steps were skipped for values that are not finite, in this row or between rows.
    entropy_floor: the entropy bonus was raised.
    aux_lags: the smoothed loss of the auxiliary is 30% above its minimum, so it no longer follows the student.
    codes_lost: a batch uses less than half as many codes as the first one.
    logits_run_away: the standard deviation of the student's logits is 30 times that of the first row, so the decision
        for a token can hardly be reversed any more (see `model.train_head`).
    gradient_spike: the student's gradient norm is more than 10 times its median over the last 200 rows.
    """
    found: list[Alarm] = []
    on: set[str] = set()  # names that ring now

    def ring(name: str, now: bool, sentence: str) -> None:
        """Add an alarm when the condition starts to hold, not again while it lasts."""
        if now and name not in on:
            found.append(Alarm(step, name, sentence))
        (on.add if now else on.discard)(name)

    least, skipped = float("inf"), 0
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
        aux = _mean(window, "loss/aux")
        if aux is not None and i + 1 >= WINDOW:
            lags = f"loss/aux is {aux:.3g} nats per token, its minimum was {least:.3g}"
            ring("aux_lags", aux > AUX_LAG * least, lags)
            least = min(least, aux)
        codes, first = row.get("codes/used"), rows[0].get("codes/used")
        if codes is not None and first:
            ring("codes_lost", codes < first / 2, f"a batch uses {codes:g} codes, the first one used {first:g}")
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


def _mean(rows: list[dict], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None
