"""`python -m dimo.evaluation.worker PARENT FOLDER WEIGHTS RANK OF`: one of the processes of an evaluation."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from dimo.config import load_config
from dimo.errors import DimoError, reason
from dimo.evaluation.evaluate import open_comparison
from dimo.evaluation.jobs import Parts, take_share
from dimo.run.lifeline import end_with_parent


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0; 2 for bad input, with a one-sentence message."""
    parent, folder, weights, rank, of = arguments
    end_with_parent(signal.SIGKILL, int(parent))  # safe, since files are written atomically
    try:
        comparison, _ = open_comparison(load_config(Path(folder) / "config.yaml"), weights)
        take_share(comparison, Parts(Path(folder)), int(rank), int(of))
    except (DimoError, OSError) as error:
        print(f"dimo: {error if isinstance(error, DimoError) else reason(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
