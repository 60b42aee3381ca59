"""The table of checks at the end of every notebook, which fails if any of them failed."""

from __future__ import annotations

import textwrap

from dimo.errors import DimoError

LINE, NAME = 88, 62  # characters of a line that a notebook's page shows, and of a name before its value


class Checks:
    """Collects named checks with measured values; `finish` prints all of them and raises DimoError if any failed.

    A check of the same name takes the place of the earlier one, so that a cell can be run again.
    """

    def __init__(self):
        self.rows: dict[str, tuple[bool | None, str]] = {}
        self.advice: dict[str, str] = {}

    def add(self, name: str, passed: bool | None, measured: object = "", turn: str = "") -> None:
        """Add a check.

        Args:
            passed: None where it cannot be told, which is shown and fails nothing.
            measured: shown beside it.
            turn: what to look at or to turn where it did not pass, in a sentence.
        """
        outcome = None if passed is None else bool(passed)  # may be of numpy
        self.rows[name] = outcome, f"{measured:.4g}" if isinstance(measured, float) else str(measured)
        self.advice[name] = turn

    def finish(self) -> None:
        if not self.rows:
            raise DimoError("no checks were added")
        width = min(NAME, max(len(name) for name in self.rows))
        for name, (passed, measured) in self.rows.items():
            mark = "?   " if passed is None else "ok  " if passed else "FAIL"
            said = [f"{mark} {name:{width}}  {measured}".rstrip()]
            if len(said[0]) > LINE:  # below the name, so that columns of short values stay
                said = [f"{mark} {name}", *_below(measured)]
            if not passed and self.advice[name]:
                said += _below(f"-> {self.advice[name]}")
            print(*said, sep="\n")
        failed = [f"{name}{measured and f' ({measured})'}" for name, (passed, measured) in self.rows.items()
                  if passed is False]  # fmt: skip
        if failed:
            raise DimoError(f"{len(failed)} of {len(self.rows)} checks failed: {'; '.join(failed)}")


def _below(text: str) -> list[str]:
    return textwrap.wrap(text, LINE, initial_indent=" " * 9, subsequent_indent=" " * 9)
