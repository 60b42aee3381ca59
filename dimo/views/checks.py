"""The table of checks at the end of every notebook, which fails if any of them failed."""

from __future__ import annotations

from dimo.errors import DimoError


class Checks:
    """Collects named checks with measured values; `finish` prints all of them and raises DimoError if any failed.

    A check of the same name takes the place of the earlier one, so that a cell can be run again.
    """

    def __init__(self):
        self.rows: dict[str, tuple[bool, str]] = {}

    def add(self, name: str, passed: bool, measured: object = "") -> None:
        self.rows[name] = bool(passed), f"{measured:.4g}" if isinstance(measured, float) else str(measured)

    def finish(self) -> None:
        if not self.rows:
            raise DimoError("no checks were added")
        width = max(len(name) for name in self.rows)
        for name, (passed, measured) in self.rows.items():
            print(f"{'ok  ' if passed else 'FAIL'} {name:{width}}  {measured}")
        failed = [f"{name}{measured and f' ({measured})'}" for name, (passed, measured) in self.rows.items()
                  if not passed]  # fmt: skip
        if failed:
            raise DimoError(f"{len(failed)} of {len(self.rows)} checks failed: {'; '.join(failed)}")
