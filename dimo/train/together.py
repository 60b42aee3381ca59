"""Train one run, or several in one process, a step of each in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from dimo.errors import Diverged
from dimo.output import lasting_output
from dimo.run.folder import RunFolder
from dimo.run.signals import Preempted, Signals
from dimo.train.loop import training

if TYPE_CHECKING:
    from dimo.train.trainer import Trainer

Going = dict[int, Generator[None, None, RunFolder]]
End = RunFolder | BaseException  # of a run


def train_together(trainers: Sequence[Trainer], progress: bool = True) -> list[RunFolder]:
    """Train every run to its end, resuming those that have begun.

    Under training.cuda_graph the steps run side by side on one GPU, each trainer's on its own stream. A signal stops
    all runs, each saved. If one cannot start, none does; if one fails later, the others go on.

    Args:
        trainers: each with its own experiment.output_dir.
        progress: show the progress of the first.

    Returns:
        The run folders, in order.

    Raises:
        Preempted: a signal asked to stop; the step was finished and saved, and each run's status is "preempted".
        DimoError: a run folder or its checkpoints cannot be used, or writing failed. If several runs failed, the error
            is that of the first to fail; the others' are in their folders.
    """
    ends, failed = _train_all(trainers, progress)
    if failed:
        raise next((error for error in failed if not isinstance(error, Preempted)), failed[0])
    return [end for end in ends if isinstance(end, RunFolder)]


def train_and_compare(trainers: Sequence[Trainer]) -> list[Diverged | None]:
    """As `train_together`, where a run that diverges is a result: for each, why it did, or None."""
    ends, failed = _train_all(trainers, progress=False)
    for error in failed:
        if not isinstance(error, Diverged):
            raise error
    return [end if isinstance(end, Diverged) else None for end in ends]


def _train_all(trainers: Sequence[Trainer], progress: bool) -> tuple[list[End], list[BaseException]]:
    """How each run ended, in order; and the errors among these, in the order in which they came."""
    ends: dict[int, End] = {}
    failed: list[BaseException] = []
    with lasting_output(), Signals() as signals:
        going = {i: training(trainer, signals, progress and i == 0) for i, trainer in enumerate(trainers)}
        try:
            _take(going, trainers, ends, failed)  # in its first turn a run opens its folder and loads its checkpoint
            if failed:
                _stop(going, Preempted("stopped before the first step, since another run could not start"))
            while going:
                _take(going, trainers, ends, failed)
        except BaseException as error:  # a second Ctrl-C
            _stop(going, error)
            raise
    return [ends[i] for i in sorted(ends)], failed


def _take(going: Going, trainers: Sequence[Trainer], ends: dict[int, End], failed: list[BaseException]) -> None:
    """A turn of each run; those that end move from `going` to `ends`, errors to `failed` as well."""
    for i, steps in list(going.items()):
        try:
            with trainers[i].stream():
                next(steps)
        except StopIteration as end:
            ends[i] = end.value
            del going[i]
        except (Exception, Preempted) as error:
            ends[i] = error
            failed.append(error)
            del going[i]


def _stop(going: Going, error: BaseException) -> None:
    """Raise `error` in all runs, each of which records it and ends."""
    for steps in going.values():
        with contextlib.suppress(BaseException):
            steps.throw(error)
    going.clear()
