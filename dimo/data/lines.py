"""Lines of a UTF-8 text file of any size."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from pathlib import Path

LONGEST = 1 << 24  # bytes; bounds memory on a file without line breaks
# looked for in every line, since files may have been concatenated
POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
CONFLICT = (b"<<<<<<< ", b">>>>>>> ")
logger = logging.getLogger(__name__)


def read_lines(file: Path, kept: list[str] | None = None) -> Iterator[str]:
    """Yield the lines of a file, split at \\n only, with their line ends and without a byte-order mark.

    Args:
        kept: list to which every line is appended as well.

    Raises:
        OSError: the file cannot be read.
        ValueError: not UTF-8 text; the message gives the line number.
    """
    number = 0
    with open(file, "rb", buffering=1 << 18) as opened:
        while data := opened.readline(LONGEST):
            number += 1
            if len(data) == LONGEST:
                raise ValueError(f"line {number} is longer than {LONGEST:,} bytes")
            if data.startswith(POINTERS):
                raise ValueError(
                    f"line {number} begins a Git LFS pointer instead of the file's content: run git lfs pull"
                )
            if data.startswith(CONFLICT):
                raise ValueError(f"line {number} is a git conflict marker: resolve the conflict")
            if b"\0" in data:
                raise ValueError(
                    f"line {number} contains a NUL byte: the file is not text, or UTF-16 (save it as UTF-8)"
                )
            try:
                line = data.decode()
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data" and number > 1:  # only possible without a line end
                    warn_once(file, f"the last line, {number}, ends within a character and is skipped")
                    return
                byte = data[error.start]
                raise ValueError(f"line {number} is not UTF-8 text, it contains the byte {byte:#04x}") from error
            if number == 1:
                line = line.removeprefix("\ufeff")
            if kept is not None:
                kept.append(line)
            yield line


@functools.cache
def warn_once(file: Path, what: str) -> None:
    """Log a warning once per process rather than in every epoch."""
    logger.warning("%s: %s", file, what)
