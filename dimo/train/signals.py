"""SIGTERM and Ctrl-C while training: the step is finished and saved, then the run stops."""

from __future__ import annotations

import signal
import threading
import time

PREEMPTED = 75  # exit code: EX_TEMPFAIL, try again later
SAME_KEYPRESS_S = 1.0  # a terminal and a launcher both pass one Ctrl-C on


class Preempted(KeyboardInterrupt):
    """The run stopped by a signal, its state saved; the same command continues it."""


class Signals:
    """`with Signals() as signals`: SIGTERM or SIGINT only sets `signals.received`, a second Ctrl-C interrupts at once.

    Python lets the main thread alone set handlers; in another thread nothing changes. The old handlers come back at
    the end, so that a notebook's kernel is interrupted as before.
    """

    def __init__(self):
        self.received: str | None = None
        self._since = 0.0
        self._old: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _receive(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._since > SAME_KEYPRESS_S:
            raise KeyboardInterrupt("stopped at once, without a last checkpoint")
