"""Lines of a UTF-8 text file of any size."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from pathlib import Path

LONGEST = 1 << 24  # bytes: where a line never ends, memory would
# wherever in a file, as where files were put together
POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
CONFLICT = (b"<<<<<<< ", b">>>>>>> ")
logger = logging.getLogger(__name__)


def read_lines(file: Path, kept: list[str] | None = None) -> Iterator[str]:
    """Lines with their ends, which are \\n alone, without a byte-order mark; each is also added to `kept`.

    Raises:
        OSError, and ValueError, which names the line, for what no UTF-8 text holds.
    """
    number = 0
    with open(file, "rb", buffering=1 << 18) as opened:
        while data := opened.readline(LONGEST):
            number += 1
            if len(data) == LONGEST:
                raise ValueError(f"line {number} is longer than {LONGEST:,} bytes")
            if data.startswith(POINTERS):
                raise ValueError(f"line {number} begins a Git LFS pointer in place of a file's text: run git lfs pull")
            if data.startswith(CONFLICT):
                raise ValueError(f"line {number} is git's mark of a conflict: resolve it")
            if b"\0" in data:
                raise ValueError(f"line {number} holds a NUL byte: it is no text, or UTF-16 (save it as UTF-8)")
            try:
                line = data.decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data" and number > 1:  # a line's end would be no such
                    warn_once(file, f"the last line, {number}, is cut off within a character and left out")
                    return
                byte = data[error.start]
                raise ValueError(f"line {number} is not UTF-8 text, it has the byte {byte:#04x}") from error
            if number == 1:
                line = line.removeprefix("\ufeff")
            if kept is not None:
                kept.append(line)
            yield line


@functools.cache
def warn_once(file: Path, what: str) -> None:
    """Not in every epoch again."""
    logger.warning("%s: %s", file, what)
