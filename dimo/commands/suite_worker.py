"""`python -m dimo.commands.suite_worker PARENT OUT RANK OF`: one of the processes that sample a suite."""

from __future__ import annotations

import sys
from pathlib import Path

from dimo.commands.suite import take_share
from dimo.run.lifeline import share_work


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0; 2 for bad input, with a one-sentence message."""
    parent, out, rank, of = arguments
    return share_work(int(parent), lambda: take_share(Path(out), int(rank), int(of)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
