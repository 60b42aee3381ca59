"""How long the steps of a run take, without what the run stops for between them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class StepClock:
    """Wall-clock seconds of the steps after step `first`, and of the pauses between them.

    Steps of runs that are trained together take turns, so each lasts as long as one of every run.
    """

    def __init__(self, first: int, device: torch.device):
        self.device = device
        self.restart(first)

    def restart(self, done: int) -> None:
        """Begin to measure after step `done`, without what was before."""
        self._since, self._done = time.perf_counter(), done
        self._pauses: dict[str, float] = {}

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """What is done in this context counts as time/<name>_s and not as time of the steps."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # queued steps are not part of the pause
        key, began = f"time/{name}_s", time.perf_counter()
        yield
        self._pauses[key] = self._pauses.get(key, 0.0) + time.perf_counter() - began

    def figures(self, done: int) -> dict[str, float]:
        """time/step_s, the mean over the steps to `done`, and the seconds of each kind of pause, if there was one."""
        whole = time.perf_counter() - self._since
        return {"time/step_s": (whole - sum(self._pauses.values())) / (done - self._done), **self._pauses}
