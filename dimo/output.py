"""Printing must never stop training: output to a closed terminal or pipe is dropped."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

# the reader is gone for good
GONE = {errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF, errno.ECONNRESET, errno.ESTALE}


class LastingStream:
    """A text stream whose write errors are swallowed.

    Once the reader is gone, the file descriptor is redirected to /dev/null, so that writers that bypass this object (a
    library's own handle, a child process) do not fail either.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.lost: list[OSError] = []  # the first other error, such as a full disk, which may recover

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
        """Final flush. If Python's own flush at exit failed, it would change the exit code of the process."""
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
    """In this context writes to stdout and stderr never fail, even if they are closed.

    Yields a list that on exit receives the errors other than a lost reader, such as a full disk.
    """
    _open_descriptors()
    before = sys.stdout, sys.stderr
    lost: list[OSError] = []
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
    """Open descriptors 0, 1 and 2 on /dev/null where the shell closed them (`2>&-`): otherwise the next opened file
    would get that number, and whatever libraries print would end up in it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
