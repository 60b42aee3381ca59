"""Signals that ask a run to stop, such as SIGTERM and Ctrl-C: it finishes the step, saves a checkpoint and exits."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

PREEMPTED = 75  # exit code EX_TEMPFAIL: try again later
SAME_KEYPRESS_S = 1.0  # terminal and launcher may both deliver the same Ctrl-C
# closing a terminal sends SIGHUP; schedulers send SIGUSR1, SIGUSR2 or SIGXCPU some time before they kill
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOPPING = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class Preempted(KeyboardInterrupt):
    """A signal stopped the run after its state was saved; the same command continues it."""

    def _render_traceback_(self) -> list[str]:
        """IPython's hook, as in `DimoError`."""
        return [str(self)]


@contextlib.contextmanager
def handling(handler: Callable) -> Iterator[None]:
    """Install `handler` for all signals in STOPPING and restore the old handlers on exit, as a notebook kernel needs.

    Ignored signals stay ignored, such as SIGHUP under nohup, except SIGINT: shells ignore it for background jobs, but
    whoever sends it to a process means it. Outside the main thread, where Python cannot set handlers, nothing happens.
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
    """While there is nothing to save: a signal raises `Preempted` at once, for exit code 75."""

    def stop(number: int, _) -> None:
        raise Preempted(f"{signal.Signals(number).name} before the first step; the same command continues")

    return handling(stop)


class Signals:
    """In this context, a signal only sets `received` to its name; a second Ctrl-C raises KeyboardInterrupt at once."""

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


@contextlib.contextmanager
def stopping_at(deadline: float | None) -> Iterator[None]:
    """In this context, from `deadline` on, this process gets SIGTERM every second, upon which a training run saves.

    It may come, from outside as well, while no run has its own handler: then nothing happens, and the next one, a
    second later, ends the run.
    """
    if deadline is None:
        yield
        return
    over, told = threading.Event(), threading.Event()

    def ring(deadline: float) -> None:
        while not over.wait(1.0):
            if told.is_set() or time.time() > deadline:
                os.kill(os.getpid(), signal.SIGTERM)

    def pass_over(number: int, _) -> None:
        if number != signal.SIGTERM:
            raise KeyboardInterrupt
        told.set()  # by another process, perhaps

    with handling(pass_over):
        clock = threading.Thread(target=ring, args=(deadline,), daemon=True)
        clock.start()
        try:
            yield
        finally:
            over.set()
            clock.join()
