"""What a run has logged so far, as arrays that grow with it, and how to draw many values on few pixels."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from dimo.config.load import read_groups
from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.run.overview import progress_of
from dimo.run.rows import RowReader
from dimo.ursa.config import UrsaConfig
from dimo.ursa.weights import read_json
from dimo.views.alarms import Alarms
from dimo.worlds import checkpoint_folder

RECENT = 50  # rows over which the speed is taken


class History:
    """The metrics, events and alarms of a run, of which `refresh` reads what is new.

    Args:
        run: its folder, in which nothing needs to be yet.
        names: the metrics to keep.

    Attributes:
        steps: (n,) the logged steps.
        columns: {metric: (n,) values}, NaN where a row has none.
        events: the rows of events.jsonl.
        alarms: see `dimo.views.alarms`.
    """

    def __init__(self, run: RunFolder, names: Iterable[str]):
        self.run, self.names = run, tuple(dict.fromkeys([*names, "time/step_s"]))
        self._rows, self._event_rows = RowReader(run.path / "metrics.jsonl"), RowReader(run.path / "events.jsonl")
        self._start_over()
        self.events: list[dict] = []
        self._codebook_size: int | None = None

    def _start_over(self) -> None:
        self.steps = np.empty(0)
        self.columns = {name: np.empty(0) for name in self.names}
        self.alarms = Alarms()

    def refresh(self) -> bool:
        """Read what the run has logged since the last call; returns whether there was anything, or less than before.

        Raises:
            DimoError: a value in metrics.jsonl is not a number.
        """
        rows, again = self._rows.read()
        events, events_again = self._event_rows.read()
        if again:  # a resumed run has dropped the rows after its checkpoint
            self._start_over()
        self.events = ([] if events_again else self.events) + events
        try:
            self._add(rows)
        except (TypeError, ValueError, KeyError) as error:
            file, self._rows = self._rows.file, RowReader(self._rows.file)
            self._start_over()  # and the next time it is said again
            raise DimoError(f"{file} holds a value that dimo has not written: {error}") from error
        return bool(rows or events or again or events_again)

    def _add(self, rows: list[dict]) -> None:
        self.steps = np.concatenate([self.steps, _numbers(rows, "step")])
        for name in self.names:
            self.columns[name] = np.concatenate([self.columns[name], _numbers(rows, name)])
        for row in rows:
            self.alarms.add(row)

    def points(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric where it was logged and finite."""
        values = self.columns[name]
        there = np.isfinite(values)
        return self.steps[there], values[there]

    def progress(self) -> str:
        """How far the run is, in words, with its speed and, while it trains, the time that is left."""
        try:
            status, words = self.run.status(), progress_of(self.run)
        except DimoError as damaged:
            return str(damaged)
        seconds = self.points("time/step_s")[1][-RECENT:]
        if not len(seconds):
            return words
        typical = float(np.median(seconds))
        words += f", {1 / typical:.3g} steps/s" if 0 < typical < 1 else f", {typical:.3g} s per step"
        step, last = status.get("step"), status.get("max_steps")
        if status.get("state") == "running" and self.run.is_held() and step is not None and last is not None:
            words += f", ETA {tqdm.format_interval(typical * (last - step))}"
        return words

    def codebook_size(self) -> int | None:
        """K of the run's checkpoint; None where that is not here any more."""
        if self._codebook_size is None:
            try:
                teacher = read_groups(self.run.path / "config.yaml")["distill"]["teacher_ckpt"]
                file = checkpoint_folder(teacher) / "transformer" / "config.json"
                self._codebook_size = UrsaConfig.from_dict(read_json(file)).codebook_size
            except (DimoError, OSError, KeyError, TypeError):
                return None
        return self._codebook_size


def _numbers(rows: list[dict], name: str) -> np.ndarray:
    try:
        found = list(map(operator.itemgetter(name), rows))  # an order of magnitude faster
    except KeyError:
        found = [row.get(name) for row in rows]
    return np.array(found, dtype=float)  # None becomes NaN


def thin(steps: np.ndarray, values: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Leave of every pixel column the lowest and the highest value, in the order of steps: a line looks as before.

    Args:
        steps: (n,), ascending.
        values: (n,), finite.
        columns: pixel columns that the line covers, at least 1.

    Returns:
        At most 2 * columns + 2 of the points, the first and the last always.
    """
    if steps.shape != values.shape or steps.ndim != 1 or columns < 1:
        raise DimoError(
            f"steps and values must be of one length and columns at least 1, got {steps.shape}, {values.shape} and "
            f"{columns}"
        )
    if len(steps) <= 2 * columns + 2:
        return steps, values
    extent = max(steps[-1] - steps[0], 1e-9)
    column = np.minimum((steps - steps[0]) / extent * columns, columns - 1).astype(int)  # ascending, as steps are
    begins = np.flatnonzero(np.diff(column, prepend=-1))
    sizes, kept = np.diff(begins, append=len(column)), [np.array([0, len(steps) - 1])]
    for extreme in (np.minimum, np.maximum):
        there = np.flatnonzero(values == np.repeat(extreme.reduceat(values, begins), sizes))
        kept.append(there[np.diff(column[there], prepend=-1) > 0])  # the first of several in a column
    chosen = np.unique(np.concatenate(kept))
    return steps[chosen], values[chosen]


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of every value and up to width - 1 before it, (n,) -> (n,)."""
    if width < 1:
        raise DimoError(f"width must be at least 1, got {width}")
    if width == 1 or not len(values):
        return values
    sums = np.concatenate([[0.0], np.cumsum(values - values[0])])  # so that equal values have this mean exactly
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - width, 0)
    return values[0] + (sums[end] - sums[begin]) / (end - begin)
