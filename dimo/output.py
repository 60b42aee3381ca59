"""What is printed may be lost, and the work goes on: a closed terminal or pipe ends no training."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

GONE = {errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF, errno.ECONNRESET, errno.ESTALE}  # nobody will ever read it


class LastingStream:
    """A text stream whose failures are nobody's end. Where its reader is gone, its descriptor leads to nowhere from
    then on, so that what writes past this object (a library's own handle, a child) fails no more either.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.lost: list[OSError] = []  # the first failure of another kind: a full disk, which may have room again later

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:  # a terminal that is ASCII only
            self.write(text.encode("ascii", "replace").decode())
        except (OSError, ValueError) as error:
            self._fail(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def isatty(self) -> bool:
        try:
            return self.stream.isatty()
        except (OSError, ValueError):
            return False

    def end(self) -> None:
        """Flush for the last time: what Python itself could not flush at its end would be the process's exit code."""
        self.flush()
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._lead_to_nowhere()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno not in GONE:
            self.lost = self.lost or [error]
        elif isinstance(error, OSError):
            self._lead_to_nowhere()

    def _lead_to_nowhere(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting_output() -> Iterator[list[OSError]]:
    """Inside, neither stdout nor stderr can fail, closed ones included. At the end the list that it yields holds what
    went wrong other than that nobody reads any more: a full disk, say.
    """
    _open_descriptors()
    before, lost = (sys.stdout, sys.stderr), []
    ours = [stream if isinstance(stream, LastingStream) else LastingStream(stream or _nowhere()) for stream in before]
    sys.stdout, sys.stderr = ours
    try:
        yield lost
    finally:
        for name, old, new in zip(("stdout", "stderr"), before, ours):
            if new is not old:
                new.end()
                lost += new.lost
                if getattr(sys, name) is new:
                    setattr(sys, name, old)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _open_descriptors() -> None:
    """Where a shell closed 0, 1 or 2 (`2>&-`), the next file that is opened would take the number, and with it all that
    libraries print."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
