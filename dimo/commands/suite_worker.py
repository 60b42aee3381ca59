"""`python -m dimo.commands.suite_worker PARENT OUT RANK OF`: one of the processes that sample a suite."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from dimo.commands.suite import take_share
from dimo.errors import DimoError, reason
from dimo.run.lifeline import end_with_parent


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0; 2 for bad input, with a one-sentence message."""
    parent, out, rank, of = arguments
    end_with_parent(signal.SIGKILL, int(parent))  # safe, since files are written atomically
    try:
        take_share(Path(out), int(rank), int(of))
    except (DimoError, OSError) as error:
        print(f"dimo: {error if isinstance(error, DimoError) else reason(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
