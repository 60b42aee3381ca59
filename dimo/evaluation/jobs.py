"""Run the jobs of an evaluation in one or several processes; each result is a file, so a killed evaluation resumes.

Processes share only the folder of results. Each loads the networks onto its own GPU and runs every n-th job.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from dimo.errors import DimoError
from dimo.evaluation.comparison import Comparison, Job
from dimo.files import locked, save_file, whole_file, write_text
from dimo.run.folder import OWN_INSIDE
from dimo.run.progress import CostBar

log = logging.getLogger(__name__)
ABOUT = "about.json"
LONG = 10**13  # multiplications, from which on a CPU core is busy for an hour or so
FEWEST = 'evaluation.videos_per_prompt=1 evaluation.judged_videos=0 "evaluation.teacher_steps=[1]"'
OWN = OWN_INSIDE["evaluation_jobs"]  # patterns of the files written to that folder


class Finished(Protocol):
    """What is finished of some jobs, and the folder of their processes' logs."""

    folder: Path

    def missing(self, jobs: list[Job]) -> list[Job]: ...


class Parts:
    """A folder of finished jobs.

    Args:
        about: identifies the evaluation; jobs of a different one are deleted. None: use the folder as it is.
        teachers: where the jobs of rows that do not depend on the student are kept (`dimo.evaluation.kept`); None: in
            `folder`, as the others are.

    Raises:
        OSError: outdated jobs cannot be deleted, or the folder is not writable.
    """

    def __init__(self, folder: Path, about: dict | None = None, teachers: Path | None = None):
        self.folder, self.teachers = folder, teachers
        text, file = json.dumps(about, indent=2, sort_keys=True) + "\n", folder / ABOUT
        if about is not None and not (file.is_file() and file.read_bytes() == text.encode()):
            self.remove()
            write_text(file, text)

    def file(self, job: Job) -> Path:
        folder = self.folder if job.row.startswith("student_") else self.teachers or self.folder
        return folder / f"{job.name}.safetensors"

    def missing(self, jobs: list[Job]) -> list[Job]:
        return [job for job in jobs if not self.file(job).exists()]

    def forget_damaged(self, jobs: list[Job]) -> None:
        """Delete the files of these jobs that are cut off or no safetensors, so that they count as missing."""
        for file in (self.file(job) for job in jobs):
            try:
                if file.exists():
                    with safe_open(file, "pt"):
                        pass
            except SafetensorError as error:
                log.warning("%s is damaged (%s) and is made again", file, error)
                file.unlink(missing_ok=True)

    def save(self, job: Job, made: dict[str, torch.Tensor]) -> None:
        with whole_file(self.file(job)) as beside:
            save_file({name: value.contiguous() for name, value in made.items()}, beside)

    def load(self, jobs: list[Job]) -> dict[Job, dict[str, torch.Tensor]]:
        """The results of finished jobs.

        Raises:
            DimoError: a file is gone, or damaged and so deleted, so that the job runs again next time.
        """
        return {job: self._load(self.file(job)) for job in jobs}

    def _load(self, file: Path) -> dict[str, torch.Tensor]:
        try:
            return load_file(file)
        except SafetensorError as error:
            file.unlink()
            raise DimoError(f"{file} was damaged ({error}) and was deleted; run the same command again") from error
        except FileNotFoundError as error:
            raise DimoError(f"{file} was deleted meanwhile; run the same command again") from error

    def remove(self) -> None:
        """Delete what this class wrote, but for what is kept, and the folder if nothing else is in it."""
        for file in [file for pattern in OWN for file in self.folder.glob(pattern)]:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it does not exist, or has files of someone else
            self.folder.rmdir()


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Lock the output folder of an evaluation.

    The lock is on the folder itself, so it leaves no file and does not interfere with a training run there.

    Raises:
        DimoError: another process evaluates into the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    refusal = f"another process is writing an evaluation to {out}; wait for it, or give another --out_dir"
    with locked(out, refusal):
        yield


def announce(comparison: Comparison, jobs: list[Job], missing: list[Job], processes: int, kept: Path | None) -> None:
    """Print how much there is to do, and of what takes long on a CPU, what there is to leave out."""
    passes = sum(job.cost for job in missing)
    text = f"evaluate: {comparison.count()} videos in {len(comparison.rows)} rows, "
    text += f"{passes} passes" + (f" in {processes} processes" if processes > 1 else "")
    if len(missing) < len(jobs):
        text += f"; {len(jobs) - len(missing)} of {len(jobs)} jobs were finished before"
        text += f", the teacher's are kept in {kept}" if kept else ""
    weights = sum(weight.numel() for weight in comparison.ursa.transformer.parameters())
    if comparison.ursa.path.device.type == "cpu" and passes * math.prod(comparison.grid) * weights > LONG:
        text += f"\nOn a CPU this may take hours; with the fewest videos that there can be it is quicker: {FEWEST}"
    print(text, file=sys.stderr, flush=True)


def run_here(comparison: Comparison, jobs: list[Job], parts: Parts, progress: bool = True) -> None:
    """Run the missing jobs one after the other."""
    with CostBar("evaluate", sum(job.cost for job in jobs), "passes", progress) as bar:
        for job in parts.missing(jobs):
            _show(bar, jobs, parts)
            parts.save(job, comparison.run(job))
        _show(bar, jobs, parts)


def run_in_processes(
    words: Callable[[int, int], list[str]],
    jobs: list[Job],
    parts: Finished,
    processes: int,
    progress: bool = True,
    what: tuple[str, str] = ("evaluate", "passes"),
) -> None:
    """Run the missing jobs in child processes, each on its own GPU if there are as many GPUs.

    Args:
        words: (rank, number of processes) -> command line of the child, which calls `take_share`.
        what: name and unit of the progress bar.

    Raises:
        DimoError: a child failed; the others are killed, and finished jobs are kept.
    """
    gpus, children = visible_gpus(), []
    logs = [parts.folder / f"process-{rank}.log" for rank in range(processes)]
    try:
        for rank, said in enumerate(logs):
            own = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)]} if gpus else {})
            with open(said, "wb") as file:
                command = words(rank, processes)
                children.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=own))
        name, unit = what
        with CostBar(name, sum(job.cost for job in jobs), unit, progress) as bar:
            while any(child.poll() is None for child in children):
                _require_success(children, logs)
                _show(bar, jobs, parts)
                time.sleep(0.2)
            _require_success(children, logs)
            _show(bar, jobs, parts)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()


def _show(bar: CostBar, jobs: list[Job], parts: Finished) -> None:
    missing = parts.missing(jobs)
    bar.show(bar.total - sum(job.cost for job in missing), missing[0].row if missing else "done")


def take_share(comparison: Comparison, parts: Parts, rank: int, of: int) -> None:
    """In child `rank` of `of`: run every `of`-th job, starting at job `rank`."""
    for job in comparison.jobs()[rank::of]:
        if not parts.file(job).exists():
            parts.save(job, comparison.run(job))


def visible_gpus() -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES for the children, one per visible GPU, without initialising CUDA."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def _require_success(children: list[subprocess.Popen], logs: list[Path]) -> None:
    for rank, child in enumerate(children):
        if child.poll():
            said = logs[rank].read_text(encoding="utf-8", errors="replace").strip().splitlines()
            how = f"was killed by signal {-child.returncode}" if child.returncode < 0 else "failed"
            raise DimoError(
                f"process {rank} {how}{f': {said[-1]}' if said else ''} ({logs[rank]}); "
                "finished jobs are kept, and the same command continues"
            )
