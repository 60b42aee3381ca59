"""The way from the command to the first step: how long it took, and compiled layers that are kept for the next run."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil
import torch

COMMAND_BEGAN = "DIMO_COMMAND_BEGAN"  # seconds since 1970; `launch` tells its workers when its own process started
COMPILED = "TORCHINDUCTOR_CACHE_DIR"  # of torch.compile: graphs, and below it Triton's kernels


class ColdStart:
    """Wall-clock seconds from the start of the process, or of the one that launched it, to the first step, by parts.

    Where there is a GPU, compiled layers are kept for the next run (`keep_compiled`).
    """

    def __init__(self):
        if torch.cuda.is_available():
            keep_compiled()
        self.parts: dict[str, float] = {}
        self._since, self._ended = command_began(), False
        self.mark("until the trainer")

    def mark(self, part: str) -> None:
        """End a part of the way."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.time()
        self.parts[part], self._since = self.parts.get(part, 0.0) + now - self._since, now

    def end(self) -> str:
        """End the way, after the first step; returns a sentence for the log."""
        self.mark("first step")
        self._ended = True
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        return f"{sum(self.parts.values()):.1f} s from the start of the process to the end of the first step: {parts}"

    def once(self) -> dict[str, float]:
        """The whole way as a metric, the first time that this is called after `end`; then nothing."""
        ended, self._ended = self._ended, False
        return {"time/first_step_s": sum(self.parts.values())} if ended else {}


def command_began() -> float:
    """When the command started, in seconds since 1970."""
    with contextlib.suppress(KeyError, ValueError):
        return float(os.environ[COMMAND_BEGAN])
    return psutil.Process().create_time()


def keep_compiled() -> None:
    """Let torch.compile keep its results in dimo/compiled of the user's caches (XDG_CACHE_HOME, else ~/.cache).

    Its own place is in /tmp, which many clusters empty between jobs. Without effect where the environment names another
    folder, or that one cannot be written to.
    """
    if COMPILED in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dimo" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ[COMPILED] = str(folder)
