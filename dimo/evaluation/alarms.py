"""What in a run's metrics should make a person look: sentences, with the step."""

from __future__ import annotations

import dataclasses
import statistics

WINDOW = 10  # rows averaged before anything is compared
MEMORY = 200  # rows whose median a spike is compared with
AUX_LAG, SPIKE, RUNAWAY = 1.3, 10.0, 30.0


@dataclasses.dataclass(frozen=True)
class Alarm:
    step: int
    name: str
    sentence: str


def alarms(rows: list[dict]) -> list[Alarm]:
    """Alarms of a run's metrics rows, in order of steps. An empty list is good news; it is not proof.

    non_finite: a metric was NaN or infinite. entropy_floor: the entropy bonus was raised. aux_lags: the auxiliary's
    loss rose by 30% over its least smoothed value, so it follows the student no more. codes_lost: a batch uses less
    than half as many codes as the first did. logits_run_away: the student's logits spread 30 times as far as at first,
    so that a token's decision is hardly reversed any more (`model.train_head`). gradient_spike: ten times the median of
    the last 200 rows. steps_skipped: values that are not finite kept steps from updating, also between the rows.
    """
    found, on = [], set()

    def ring(name: str, now: bool, sentence: str) -> None:
        """Once for as long as it is so."""
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
            lags = f"loss/aux is {aux:.3g}, its least was {least:.3g} nats per token"
            ring("aux_lags", aux > AUX_LAG * least, lags)
            least = min(least, aux)
        codes, first = row.get("codes/used"), rows[0].get("codes/used")
        if codes is not None and first:
            ring("codes_lost", codes < first / 2, f"a batch uses {codes:g} codes, the first used {first:g}")
        spread, first = row.get("logits/std"), rows[0].get("logits/std")
        if spread is not None and first:
            wide = f"logits/std is {spread:.3g} nats, the first was {first:.3g}"
            ring("logits_run_away", spread > RUNAWAY * first, wide)
        norms = [
            r["grad_norm/student"] for r in rows[max(0, i - MEMORY) : i + 1] if r.get("grad_norm/student") is not None
        ]
        if len(norms) >= WINDOW:
            median = statistics.median(norms)
            spike = f"grad_norm/student is {norms[-1]:.3g}, median {median:.3g}"
            ring("gradient_spike", norms[-1] > SPIKE * median, spike)
    return found


def _mean(rows: list[dict], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None
