"""`python -m dimo.evaluation.worker PARENT FOLDER KEPT WEIGHTS RANK OF`: one of the processes of an evaluation."""

from __future__ import annotations

import sys
from pathlib import Path

from dimo.config import load_config
from dimo.evaluation.evaluate import open_comparison
from dimo.evaluation.jobs import Parts, take_share
from dimo.run.lifeline import share_work


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0; 2 for bad input, with a one-sentence message."""
    parent, folder, kept, weights, rank, of = arguments

    def work() -> None:
        comparison, _ = open_comparison(load_config(Path(folder) / "config.yaml"), weights)
        take_share(comparison, Parts(Path(folder), teachers=Path(kept) if kept else None), int(rank), int(of))

    return share_work(int(parent), work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
