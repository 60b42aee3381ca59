"""Where the time of an evaluation went: a table that adds up to the time on the wall."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dimo.evaluation.comparison import Comparison, Job

Made = dict[Job, dict[str, torch.Tensor]]
NETWORKS = {"student": "the student's passes", "untrained": "what it started from", "teacher": "the teacher's passes"}
STAGES = {
    "judge_seconds": "the teacher as a judge",
    "decode_seconds": "decoding, and measuring pixels",
    "first_pass_seconds": "first passes",
    "first_decode_seconds": "first passes",
}


def seconds_of_jobs(comparison: Comparison, made: Made, jobs: Iterable[Job]) -> dict[str, float]:
    """Seconds of every part of some jobs, summed over them, {what: seconds}."""
    spent = {what: 0.0 for what in (*NETWORKS.values(), *STAGES.values())}
    for job in jobs:
        found = made[job]
        spent[NETWORKS[comparison.rows[job.row].network]] += found["seconds"].item()
        for name, what in STAGES.items():
            spent[what] += found[name].item() if name in found else 0.0
    return spent


def format_spent(in_jobs: dict[str, float], jobs: float, around: dict[str, float], processes: int) -> str:
    """Lines of what took how long.

    Args:
        in_jobs: `seconds_of_jobs` of the processes together; each has its share of them.
        jobs: seconds from the start of the processes to the end of the last job.
        around: seconds of what is done before and after, {what: seconds}.
        processes: their number.
    """
    shares = {what: seconds / processes for what, seconds in in_jobs.items()}
    waiting = "starting, loading and waiting for the last job" if processes > 1 else "between the jobs"
    lines = shares | {waiting: max(0.0, jobs - sum(shares.values()))} | around
    total = sum(lines.values())
    of = f" in {processes} processes, each line a mean over them" if processes > 1 else ""
    return "\n".join(
        [f"time: {total:.1f} s{of}"]
        + [
            f"  {what:48}{seconds:10.1f} s{seconds / max(total, 1e-9):7.0%}"
            for what, seconds in sorted(lines.items(), key=lambda line: -line[1])
            if seconds > 0
        ]
    )
