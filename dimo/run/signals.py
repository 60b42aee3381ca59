"""SIGTERM, Ctrl-C and what else asks a run to stop: the step is finished and saved, then it stops."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

PREEMPTED = 75  # exit code: EX_TEMPFAIL, try again later
SAME_KEYPRESS_S = 1.0  # a terminal and a launcher both pass one Ctrl-C on
# a terminal that is closed sends SIGHUP; schedulers send SIGUSR1, SIGUSR2 or SIGXCPU a while before they kill
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOPPING = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Preempted(KeyboardInterrupt):
    """The run stopped by a signal, its state saved; the same command continues it."""


@contextlib.contextmanager
def handling(handler: Callable) -> Iterator[None]:
    """`handler` for every signal of STOPPING; the old handlers come back at the end, as a notebook's kernel needs.

    What was ignored stays so: nohup ignores SIGHUP. Not SIGINT, which a shell ignores for whatever it starts with `&`;
    who sends it to one process means it. Python lets the main thread alone set handlers; in another nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPPING}
    before = {number: old for number, old in before.items() if old is not signal.SIG_IGN or number == signal.SIGINT}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)


def stopping_at_once() -> contextlib.AbstractContextManager[None]:
    """While nothing is there to save: what asks to stop raises `Preempted`, and who sent it sees exit code 75."""

    def stop(number: int, _) -> None:
        raise Preempted(f"{signal.Signals(number).name} before the first step; the same command continues")

    return handling(stop)


class Signals:
    """`with Signals() as signals`: a signal only sets `signals.received`, a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.received: str | None = None
        self._since = 0.0
        self._handling = handling(self._receive)

    def __enter__(self) -> Signals:
        self._handling.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._handling.__exit__(*error)

    def _receive(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._since > SAME_KEYPRESS_S:
            raise KeyboardInterrupt("stopped at once, without a last checkpoint")
