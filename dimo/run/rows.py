"""The rows of a file that a run appends to, each of them read once."""

from __future__ import annotations

import json
import os
from pathlib import Path


class RowReader:
    """Reads what was appended to metrics.jsonl or events.jsonl since the last time.

    A row that is still being written is read once it is whole. A resumed run replaces the file by one without the rows
    after its checkpoint (`RunFolder.cut_at`): then everything is read anew. That is noticed by the last row, which no
    longer is where it was; a file's size says nothing once the run has gone on, and its inode little on a network.

    Attributes:
        file: what is read. It may not exist yet.
    """

    def __init__(self, file: Path):
        self.file = file
        self._end, self._last = 0, b""  # of what was read: its size in bytes, and its last line

    def read(self) -> tuple[list[dict], bool]:
        """The rows since the last call, and whether those of before no longer count. Stops at a damaged line.

        Raises:
            OSError: the file exists but cannot be read.
        """
        try:
            with open(self.file, "rb") as file:
                again = not self._continues(file)
                if again:
                    self._end, self._last = 0, b""
                file.seek(self._end)
                text = file.read()
        except FileNotFoundError:
            again = self._end > 0
            self._end, self._last = 0, b""
            return [], again
        lines = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)
        rows = _parse(lines)
        if rows:
            self._end += sum(map(len, lines[: len(rows)]))
            self._last = lines[len(rows) - 1]
        return rows, again

    def _continues(self, file) -> bool:
        """Whether the last line that was read still is where it was."""
        if os.fstat(file.fileno()).st_size < self._end:
            return False
        file.seek(self._end - len(self._last))
        return file.read(len(self._last)) == self._last


def _parse(lines: list[bytes]) -> list[dict]:
    """The rows in the lines, up to the first that is not one."""
    try:  # at once, in half the time of one after the other
        rows = json.loads(b"[%b]" % b",".join(lines))
    except ValueError:
        rows = []
    if len(rows) != len(lines):
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    bad = (i for i, row in enumerate(rows) if not isinstance(row, dict) or "step" not in row)
    return rows[: next(bad, len(rows))]
