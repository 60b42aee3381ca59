"""The jobs of an evaluation, here or in several processes, each job's result a file: a killed evaluation goes on.

Processes share nothing but the folder. Each loads the networks onto a GPU of its own and does every n-th job.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dimo.errors import DimoError
from dimo.evaluation.comparison import Comparison, Job
from dimo.files import save_file, whole_file, write_text
from dimo.run.folder import OWN_INSIDE
from dimo.run.progress import CostBar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ABOUT = "about.json"
OWN = OWN_INSIDE["evaluation_jobs"]  # in its folder


class Parts:
    """A folder of finished jobs. `about` says of what, and jobs of anything else are thrown away; None: as it lies.

    Raises:
        OSError: jobs of something else cannot be thrown away, or nothing can be written there.
    """

    def __init__(self, folder: Path, about: dict | None = None):
        self.folder = folder
        text, file = json.dumps(about, indent=2, sort_keys=True) + "\n", folder / ABOUT
        if about is not None and not (file.is_file() and file.read_bytes() == text.encode()):
            self.remove()
            write_text(file, text)

    def file(self, job: Job) -> Path:
        return self.folder / f"{job.name}.safetensors"

    def missing(self, jobs: list[Job]) -> list[Job]:
        return [job for job in jobs if not self.file(job).exists()]

    def save(self, job: Job, made: dict[str, torch.Tensor]) -> None:
        with whole_file(self.file(job)) as beside:
            save_file({name: value.contiguous() for name, value in made.items()}, beside)

    def load(self, jobs: list[Job]) -> dict[Job, dict[str, torch.Tensor]]:
        """What all of them gave.

        Raises:
            DimoError: the disk has damaged a file; it is removed, so that its job is done again.
        """
        return {job: self._load(self.file(job)) for job in jobs}

    def _load(self, file: Path) -> dict[str, torch.Tensor]:
        try:
            return load_file(file)
        except SafetensorError as error:
            file.unlink()
            raise DimoError(f"{file} was damaged ({error}) and is removed; the same command makes it again") from error

    def remove(self) -> None:
        """What was written here, and nothing else."""
        for file in [file for pattern in OWN for file in self.folder.glob(pattern)]:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there; or not empty, and the rest is somebody's
            self.folder.rmdir()


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold the folder that an evaluation writes into; the kernel lets it go when the process dies, by kill -9 too.

    The folder itself is locked: no file stays behind, and a training in it goes on.

    Raises:
        DimoError: another process evaluates into it.
    """
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DimoError(
                f"another process writes an evaluation into {out}; wait for it, or give another --out_dir"
            ) from None
        except OSError:
            pass  # a network file system without locks
        yield
    finally:
        os.close(handle)


def run_here(comparison: Comparison, jobs: list[Job], parts: Parts, progress: bool = True) -> None:
    """Do the jobs that are missing, one after the other."""
    with _bar(jobs, progress) as bar:
        for job in parts.missing(jobs):
            _show(bar, jobs, parts)
            parts.save(job, comparison.run(job))
        _show(bar, jobs, parts)


def run_in_processes(
    words: Callable[[int, int], list[str]], jobs: list[Job], parts: Parts, processes: int, progress: bool = True
) -> None:
    """Do the missing jobs in `processes` children, each on a GPU of its own where there are GPUs.

    Args:
        words: (rank, of how many) -> the child's command line, which ends in `take_share`.

    Raises:
        DimoError: a child failed; the others are ended, what is finished stays.
    """
    gpus, children = _visible_gpus(), []
    logs = [parts.folder / f"process-{rank}.log" for rank in range(processes)]
    try:
        for rank, log in enumerate(logs):
            own = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": gpus[rank]} if gpus else {})
            with open(log, "wb") as file:
                command = words(rank, processes)
                children.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=own))
        with _bar(jobs, progress) as bar:
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


def _bar(jobs: list[Job], shown: bool) -> CostBar:
    return CostBar("evaluate", sum(job.cost for job in jobs), "passes", shown)


def _show(bar: CostBar, jobs: list[Job], parts: Parts) -> None:
    missing = parts.missing(jobs)
    bar.show(bar.total - sum(job.cost for job in missing), missing[0].row if missing else "done")


def take_share(comparison: Comparison, parts: Parts, rank: int, of: int) -> None:
    """In a child: every `of`-th job, from `rank` on."""
    for job in comparison.jobs()[rank::of]:
        if not parts.file(job).exists():
            parts.save(job, comparison.run(job))


def _visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, one for each GPU that this process sees; without touching any of them."""
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
                f"process {rank} of the evaluation {how}{f': {said[-1]}' if said else ''} ({logs[rank]}); "
                "what is finished stays, the same command continues"
            )
