"""Progress on stderr: a bar in a terminal, occasional lines elsewhere."""

from __future__ import annotations

import re
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator

from tqdm import tqdm

RECENT = 50  # steps for the median duration, which ignores compiling and saving
EVERY_S = 10.0  # seconds between lines of a `CostBar`
A_LINE = re.compile(r"[a-z][a-z ]*? \d+/\d+ ")  # how a line of `Progress` or `CostBar` begins


class Progress:
    """Iterates over steps first..last-1 with a progress bar; call `show(done, metrics)` at every logged step."""

    def __init__(self, first: int, last: int, shown: bool = True):
        self.first, self.last, self.shown = first, last, shown
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            range(first, last), initial=first, total=last, desc="distil", unit="step", dynamic_ncols=True,
            disable=not (shown and self.is_terminal),
        )  # fmt: skip
        self.seconds: deque[float] = deque(maxlen=RECENT)
        self.since = time.perf_counter()

    def __iter__(self) -> Iterator[int]:
        self.since = time.perf_counter()
        for index in self.bar:
            yield index
            self._count()

    def _count(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.since)
        self.since = now

    def show(self, done: int, metrics: dict[str, float]) -> None:
        """Show loss, entropy (nats per token) and reward of step `done`; a line also has the speed and an ETA."""
        parts = {"loss": metrics["loss/total"], "entropy": metrics["entropy/student"], "reward": metrics["reward/mean"]}
        if self.is_terminal:
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in parts.items()}, refresh=False)
            return
        if self.shown:
            latest = time.perf_counter() - self.since  # duration of the current step
            seconds = statistics.median([*self.seconds, latest])
            figures = "  ".join(f"{name} {value:.3f}" for name, value in parts.items())
            left = tqdm.format_interval(seconds * (self.last - done))
            line = f"step {done}/{self.last}  {figures}  {_speed(seconds)}  ETA {left}"
            print(line, file=sys.stderr, flush=True)


class CostBar:
    """Progress of work in pieces of different cost: `with CostBar("evaluate", total, "pass") as bar: bar.show(done)`.

    Work done before the first `show` was done earlier, and is ignored for the ETA.
    """

    def __init__(self, name: str, total: int, unit: str, shown: bool = True):
        self.name, self.total, self.unit, self.shown = name, total, unit, shown
        self.is_terminal = sys.stderr.isatty()
        self.begin: tuple[float, int] | None = None
        self.printed = (-EVERY_S, -1)  # (time, done) of the last line

    def __enter__(self) -> CostBar:
        terminal = self.shown and self.is_terminal
        self.bar = tqdm(total=self.total, desc=self.name, unit=self.unit, dynamic_ncols=True, disable=not terminal)
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def show(self, done: int, what: str = "") -> None:
        """Show that `done` of `total` is finished; `what` describes the current piece."""
        now = time.perf_counter()
        if self.begin is None or self.begin[1] == done:
            self.begin = (now, done)
            self.bar.initial, self.bar.n, self.bar.start_t = done, done, time.time()
        if self.is_terminal:
            self.bar.set_postfix_str(what, refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.shown and done != self.printed[1] and (now - self.printed[0] >= EVERY_S or done == self.total):
            self.printed = (now, done)
            worked = done - self.begin[1]
            left = (now - self.begin[0]) / worked * (self.total - done) if worked else None
            eta = "" if left is None else f"  ETA {tqdm.format_interval(left)}"
            print(f"{self.name} {done}/{self.total} {self.unit}  {what}{eta}", file=sys.stderr, flush=True)


class OneLine:
    """stderr for the lines of progress of another process, a kernel or a worker: in a terminal each replaces the last.

    Everything else is passed on, and so is everything where stderr is no terminal.
    """

    def __init__(self) -> None:
        self.is_open = False  # the cursor is behind a line of progress

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True) if sys.stderr.isatty() else [text]:
            self.clear()
            self.is_open = sys.stderr.isatty() and bool(A_LINE.match(line))
            if self.is_open:
                line = line.rstrip("\n")[: shutil.get_terminal_size().columns - 1]
            sys.stderr.write(line)
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def clear(self) -> None:
        """Take away the line of progress, for what is printed next."""
        if self.is_open:
            sys.stderr.write("\r\x1b[K")
            self.is_open = False


def _speed(seconds: float) -> str:
    return f"{1 / seconds:.2f} steps/s" if seconds < 1 else f"{seconds:.1f} s/step"
