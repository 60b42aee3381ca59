"""The table of checks at the end of every notebook, which fails if any of them failed."""

from __future__ import annotations

from dimo.errors import DimoError


class Checks:
    """Collects named checks with measured values; `finish` prints all of them and raises DimoError if any failed."""

    def __init__(self):
        self.rows: list[tuple[str, bool, str]] = []

    def add(self, name: str, passed: bool, measured: object = "") -> None:
        self.rows.append((name, bool(passed), f"{measured:.4g}" if isinstance(measured, float) else str(measured)))

    def finish(self) -> None:
        if not self.rows:
            raise DimoError("no checks were added")
        width = max(len(name) for name, _, _ in self.rows)
        for name, passed, measured in self.rows:
            print(f"{'ok  ' if passed else 'FAIL'} {name:{width}}  {measured}")
        failed = [name for name, passed, _ in self.rows if not passed]
        if failed:
            raise DimoError(f"{len(failed)} of {len(self.rows)} checks failed: {'; '.join(failed)}")
