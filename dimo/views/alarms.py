"""Alarms: patterns in a run's metrics that deserve a look."""

from __future__ import annotations

import bisect
import dataclasses
from collections import deque
from collections.abc import Callable

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
    log = Alarms()
    for row in rows:
        log.add(row)
    return log.found


class Alarms:
    """The alarms of a run that goes on: `add` its rows one after the other, at a cost that does not grow with them.

    Attributes:
        found: the alarms so far, in the order of steps (see `alarms`).
    """

    def __init__(self):
        self.found: list[Alarm] = []
        self._on: dict[str, int] = {}  # where in `found` the alarms are that ring now
        self._first: dict | None = None
        self._losses: deque[float | None] = deque(maxlen=WINDOW)  # of the auxiliary
        self._norms: deque[float | None] = deque(maxlen=MEMORY + 1)
        self._sorted: list[float] = []  # those of the norms that are not None
        self._least, self._skipped, self._most = float("inf"), 0, 0.0

    def add(self, row: dict) -> None:
        """Look at the next row of metrics.jsonl."""
        first = self._first = self._first or row
        step = row["step"]
        if row.get("non_finite"):
            self.found.append(Alarm(step, "non_finite", f"not finite: {', '.join(row['non_finite'])}"))
        if row.get("guard/skipped", 0) > self._skipped:
            skipped = row["guard/skipped"] - self._skipped
            self.found.append(Alarm(step, "steps_skipped", f"{skipped:g} steps were not finite"))
            self._skipped = row["guard/skipped"]
        bonus, low = row.get("lambda_ent"), first.get("lambda_ent")
        if bonus is not None and low is not None:
            self._ring(step, "entropy_floor", bonus > low, lambda: f"lambda_ent rose from {low:g} to {bonus:g}")
        if row.get("collapse/spread") is not None:
            figures = {key.removeprefix("collapse/"): value for key, value in row.items()}
            most = self._most = max(self._most, figures["mutual_information"])
            deaf = figures["mutual_information"] < DEAF * most
            self._ring(step, "collapsed", has_collapsed(figures) or deaf, lambda: _of_collapse(figures, most))
        self._look_at_auxiliary(step, row.get("loss/aux"))
        codes, all_codes = row.get("codes/used"), first.get("codes/used")
        if codes is not None and all_codes:
            self._ring(
                step, "codes_lost", codes < LOST * all_codes,
                lambda: f"a batch uses {codes:g} codes, the first one used {all_codes:g}",
                over=codes >= FOUND * all_codes,
            )  # fmt: skip
        spread, narrow = row.get("logits/std"), first.get("logits/std")
        if spread is not None and narrow:
            self._ring(
                step, "logits_run_away", spread > RUNAWAY * narrow,
                lambda: f"logits/std is {spread:.3g} nats, in the first row it was {narrow:.3g}",
            )  # fmt: skip
        self._look_at_gradient(step, row.get("grad_norm/student"))

    def _ring(self, step: int, name: str, now: bool, sentence: Callable[[], str], over: bool | None = None) -> None:
        """Add an alarm when the condition starts to hold, and none of its name until it is over."""
        if now and name not in self._on:
            self._on[name] = len(self.found)
            self.found.append(Alarm(step, name, sentence()))
        elif name in self._on and (not now if over is None else over):
            at = self._on.pop(name)
            self.found[at] = dataclasses.replace(self.found[at], over=step)

    def _look_at_auxiliary(self, step: int, loss: float | None) -> None:
        self._losses.append(loss)
        known = [value for value in self._losses if value is not None]
        if not known or len(self._losses) < WINDOW:
            return
        mean, least = sum(known) / len(known), self._least
        self._ring(
            step, "aux_lags", mean > max(AUX_LAG * least, least + AUX_NATS),
            lambda: f"loss/aux is {mean:.3g} nats per token, its minimum was {least:.3g}",
        )  # fmt: skip
        self._least = min(least, mean)

    def _look_at_gradient(self, step: int, norm: float | None) -> None:
        gone = self._norms[0] if len(self._norms) > MEMORY else None
        if gone is not None:
            del self._sorted[bisect.bisect_left(self._sorted, gone)]
        self._norms.append(norm)
        if norm is None:
            return
        bisect.insort(self._sorted, norm)
        if len(self._sorted) < WINDOW:
            return
        median = (self._sorted[len(self._sorted) // 2] + self._sorted[(len(self._sorted) - 1) // 2]) / 2
        self._ring(
            step, "gradient_spike", norm > SPIKE * median,
            lambda: f"grad_norm/student is {norm:.3g}, its median {median:.3g}",
        )  # fmt: skip


def _of_collapse(figures: dict, most: float) -> str:
    return (
        f"videos of a prompt spread {figures['spread']:.3g} in the codebook's space, the teacher's "
        f"{figures['teacher_spread']:.3g}, those of one prompt {figures['least_share']:.0%} of its; the entropy of "
        f"their codes is {figures['sampled_entropy']:.3g} nats, the teacher's {figures['teacher_entropy']:.3g}; "
        f"I(x_hat; noise) is {figures['mutual_information']:.3g}, its maximum was {most:.3g}; "
        f"{figures['distinct']:.0%} of the videos are distinct"
    )
