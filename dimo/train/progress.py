"""How a run goes, on stderr: a bar in a terminal, a line per logged step everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from tqdm import tqdm


class Progress:
    """`for index in Progress(first, last)`, with `show(done, metrics)` at every logged step."""

    def __init__(self, first: int, last: int, shown: bool = True):
        self.first, self.last, self.shown = first, last, shown
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            range(first, last), initial=first, total=last, desc="distil", unit="step", dynamic_ncols=True,
            disable=not (shown and self.is_terminal),
        )  # fmt: skip
        self.started = time.perf_counter()

    def __iter__(self) -> Iterator[int]:
        return iter(self.bar)

    def show(self, done: int, metrics: dict[str, float]) -> None:
        """Loss, entropy (nats per token) and reward of step `done`; in a line also steps/s and the time to the end."""
        parts = {
            "loss": metrics["loss/total"],
            "entropy": metrics["entropy/student"],
            "reward": metrics["reward/mean"],
        }
        if self.is_terminal:
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in parts.items()}, refresh=False)
            return
        if self.shown:
            seconds = (time.perf_counter() - self.started) / (done - self.first)
            figures = "  ".join(f"{name} {value:.3f}" for name, value in parts.items())
            left = tqdm.format_interval(seconds * (self.last - done))
            line = f"step {done}/{self.last}  {figures}  {_speed(seconds)}  ETA {left}"
            print(line, file=sys.stderr, flush=True)


def _speed(seconds: float) -> str:
    return f"{1 / seconds:.2f} steps/s" if seconds < 1 else f"{seconds:.1f} s/step"
