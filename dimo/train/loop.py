"""The training loop, which writes a run folder and can be killed and resumed at any moment."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
import traceback
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dimo.config import to_flat, to_yaml
from dimo.errors import DimoError, Diverged, are_finite, enough_memory
from dimo.files import write_text
from dimo.run.checkpoints import Checkpoints
from dimo.run.folder import RunFolder
from dimo.run.progress import Progress
from dimo.run.ranks import count_ranks, everywhere, raise_everywhere
from dimo.run.signals import Preempted, Signals
from dimo.run.trackers import close_trackers, open_trackers
from dimo.train.clock import StepClock
from dimo.train.results import write_final, write_samples, write_student
from dimo.train.watch import Watch

if TYPE_CHECKING:
    from dimo.train.trainer import Trainer

SLOW = (
    "these settings are meant for a GPU: most CPUs are slow at bf16; for a look at a few steps: "
    "training.mixed_precision=no distill.batch_size_per_gpu=1 experiment.name=look"
)
FAILED = ".failed-rank-{}"  # the error of a rank other than 0
SEEN_WITHIN_S = 60.0  # a network file system may show new files with a delay
# keys that may differ between the machines of a run; with different values of log_every, say, ranks would deadlock
OWN_TO_A_MACHINE = {"experiment.output_dir", "experiment.resume", "experiment.overwrite", "training.engine"}
OWN_TO_A_MACHINE |= {"distill.teacher_ckpt", "distill.prompt_source"}


def training(trainer: Trainer, signals: Signals, progress: bool = True) -> Generator[None, None, RunFolder]:
    """Train to max_train_steps, resuming from the newest valid checkpoint of the run folder; write checkpoints/final.

    Pauses before the first step and after each, and returns the run folder; `dimo.train.together` goes through it.

    Raises:
        Preempted: a signal asked to stop; the step was finished and saved, and the run's status is "preempted".
        DimoError: the run folder or its checkpoints cannot be used, writing failed, or the GPU's memory is full.
    """
    c = trainer.config.experiment
    run = _open(trainer)
    checkpoints = Checkpoints(run.path / "checkpoints", c.keep_last, trainer.accelerator.process_index)
    try:
        with enough_memory():
            yield from _train(trainer, run, checkpoints, signals, progress)
    except BaseException as error:  # Ctrl-C, too: the run folder must record how the run ended
        if isinstance(error, Exception) and trainer.accelerator.num_processes == 1:  # else a rank may be missing
            with contextlib.suppress(DimoError):
                _say_saved(run, checkpoints.finish())
        _record_end(c.output_dir, error, trainer.accelerator.process_index)
        raise
    finally:
        run.close()
    return run


def _open(trainer: Trainer) -> RunFolder:
    """Open the run folder, locked by the main process; an error is raised on all ranks."""
    c, run, error = trainer.config.experiment, None, None
    if trainer.accelerator.is_main_process:
        try:
            run = RunFolder.open(c.output_dir, to_yaml(trainer.config), c.resume, c.overwrite, hold=True)
            for old in run.path.glob(FAILED.format("*")):
                old.unlink()
            run.write_status(state="starting", error=None, last_lines=None)
        except (DimoError, OSError) as refused:
            error = refused
            if run:
                run.close()
    raise_everywhere(error)
    return run or RunFolder(c.output_dir, writes=False)


def _require_one_run(trainer: Trainer) -> None:
    """Raise on all ranks if one of them has a different configuration or does not see the run folder."""
    file, error = Path(trainer.config.experiment.output_dir) / "config.yaml", None
    mine = {k: v for k, v in to_flat(trainer.config).items() if k not in OWN_TO_A_MACHINE}
    first = everywhere(mine)[0]
    differ = [f"{key} is {mine[key]!r}, not {first[key]!r}" for key in mine if mine[key] != first[key]]
    until = time.monotonic() + SEEN_WITHIN_S
    while not differ and not file.exists() and time.monotonic() < until:
        time.sleep(0.2)
    if differ:
        error = DimoError(f"the configuration differs from rank 0's: {'; '.join(differ[:3])}")
    elif not file.exists():
        error = DimoError(f"{file.parent} on {socket.gethostname()} is not the folder that rank 0 writes to")
    raise_everywhere(error)


def _train(
    trainer: Trainer, run: RunFolder, checkpoints: Checkpoints, signals: Signals, progress: bool
) -> Iterator[None]:
    c, last = trainer.config.experiment, trainer.config.training.max_train_steps
    _require_one_run(trainer)
    first = _resume(trainer, run, checkpoints)
    if progress and run.writes:
        grid = "x".join(map(str, trainer.grid))
        begin = f"steps {first} to {last} of {run.path}, each of {trainer.tokens_per_step:,} tokens ({grid} a video)"
        print(f"dimo: {begin}; Ctrl-C saves and stops, the same command goes on", file=sys.stderr, flush=True)
        if trainer.device.type == "cpu" and trainer.config.training.mixed_precision == "bf16":
            print(f"dimo: {SLOW}", file=sys.stderr, flush=True)
    if trainer.prompts.about:
        run.say(trainer.prompts.about)
    run.say(trainer.attention.about, aloud=trainer.attention.surprises)
    _say_alignment(trainer, run)
    run.cut_at(first)
    run.write_environment()
    run.write_status(state="running", step=first, max_steps=last)
    open_trackers(trainer.accelerator, trainer.config, run)
    yield
    watch = Watch(trainer, run)
    bar = Progress(first, last, shown=progress and run.writes)
    clock = StepClock(first, trainer.device)
    trainer.cold_start.mark("networks and checks")
    for index in bar:
        try:
            step, extra = trainer.step(index)
        finally:
            _drain_events(trainer, run)
        done = index + 1
        if index == first:
            run.say(trainer.cold_start.end())
        # one small all-reduce: has any rank received a signal, and have all ranks written their files of a checkpoint
        told, written = count_ranks([signals.received is not None, checkpoints.written()], trainer.device)
        if written == trainer.accelerator.num_processes:
            with clock.pause("checkpoint"):
                _say_saved(run, checkpoints.finish())
        if done % c.log_every == 0 or done == last or watch.is_due(done):
            values = trainer.metrics(step) | {k: float(v) for k, v in extra.items()}
            _drain_events(trainer, run)
            values |= clock.figures(done) | trainer.cold_start.once()
            values["tokens_per_s"] = trainer.tokens_per_step / values["time/step_s"]
            if watch.is_due(done):
                values |= watch.measure()
            if trainer.device.type == "cuda":
                values["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            run.log({"step": done, **values})
            run.write_status(state="running", step=done, max_steps=last)
            trainer.accelerator.log(values, step=done)
            bar.show(done, values)
            clock.restart(done)
        if done % c.save_every == 0 or done == last or told:
            with clock.pause("checkpoint"):
                _save(trainer, run, checkpoints, done)
        if c.keep_every and done % c.keep_every == 0:
            with clock.pause("checkpoint"):
                write_student(trainer, run, run.path / "checkpoints" / f"milestone-{done:08d}")
        if done % c.sample_every == 0 or done == last:
            with clock.pause("samples"):
                write_samples(trainer, run, done)
        if told and done < last:
            _say_saved(run, checkpoints.finish())
            name = next(name for name in everywhere(signals.received) if name)
            run.write_status(step=done)
            raise Preempted(f"{name} after step {done}, which is saved; the same command continues")
        yield
    _say_saved(run, checkpoints.finish())
    write_final(trainer, run)
    if trainer.guard.skipped:
        run.say(f"{trainer.guard.skipped} of {last} steps were skipped for values that are not finite", aloud=True)
    run.say(f"finished: step {last}")
    run.write_status(state="finished", step=last, max_steps=last)
    close_trackers(trainer.accelerator)


def _say_alignment(trainer: Trainer, run: RunFolder) -> None:
    """Raise on all ranks if the logits slice is misread; the machines of a run may keep different clean tokens."""
    error = None
    try:
        sentence, is_right = trainer.require_aligned()
        run.say(sentence if is_right else f"the logits slice: {sentence}", aloud=not is_right)
    except DimoError as misread:
        error = misread
    raise_everywhere(error)


def _resume(trainer: Trainer, run: RunFolder, checkpoints: Checkpoints) -> int:
    """Load the newest valid checkpoint, if any; returns the number of steps done."""
    folder: Path | None = None
    damaged: dict[Path, str] = {}
    error: Exception | None = None
    if run.writes:
        try:
            checkpoints.remove_partials()
            folder, damaged = checkpoints.newest()
        except (DimoError, OSError) as refused:
            error = refused
    raise_everywhere(error)
    for bad, wrong in damaged.items():
        run.say(f"{bad} is damaged and skipped: {wrong}", aloud=True)
        run.event({"step": int(bad.name[5:]), "event": "damaged_checkpoint", "checkpoint": bad.name, "why": wrong})
    folder = everywhere(folder)[0]
    if folder is None:
        run.say(f"start: step 0 of {trainer.config.training.max_train_steps}")
        return 0
    try:
        tensors, state, rank_state = checkpoints.load(folder)
        trainer.load_state(tensors, state, rank_state)
    except DimoError as refused:
        error = refused
    raise_everywhere(error)
    first, before, now = state["step"], state["num_processes"], trainer.accelerator.num_processes
    run.say(f"resumed: step {first} of {trainer.config.training.max_train_steps}, from {folder.name}")
    run.event({"step": first, "event": "resumed", "checkpoint": folder.name})
    if before != now:
        per_process = trainer.config.distill.batch_size_per_gpu
        run.say(
            f"{folder.name} was written by {before} processes and is continued by {now}: {per_process * now} samples "
            f"per step instead of {per_process * before}, different random draws, and each process takes over the "
            "memory of x_init of one of the old ones",
            aloud=True,
        )
        run.event({"step": first, "event": "processes_changed", "was": before, "is": now})
    return first


def _drain_events(trainer: Trainer, run: RunFolder) -> None:
    for event in trainer.events:
        run.event(event)
        run.say(", ".join(f"{key} {value}" for key, value in event.items()))
    trainer.events.clear()


def _save(trainer: Trainer, run: RunFolder, checkpoints: Checkpoints, done: int) -> None:
    """Begin to write a checkpoint, after ending the one before."""
    _say_saved(run, checkpoints.finish())
    tensors, state = trainer.state()
    _require_finite_weights(tensors, done)
    about = {"step": done, "num_processes": trainer.accelerator.num_processes}
    checkpoints.save(done, tensors, state | about, trainer.rank_state())


def _require_finite_weights(tensors: dict[str, dict[str, torch.Tensor]], done: int) -> None:
    """Raise on all ranks before NaNs are saved as the newest valid checkpoint; one rank may hold all the weights."""
    bad = [f"{name} of the {network}" for network, weights in tensors.items()
           for name, weight in weights.items() if not are_finite(weight)]  # fmt: skip
    error = Diverged(
        f"after step {done} {bad[0]} is not finite ({len(bad)} tensors in total), so nothing was saved; the last "
        "checkpoint is kept. Lower optim.lr or optim.aux_lr"
    ) if bad else None  # fmt: skip
    raise_everywhere(error)


def _say_saved(run: RunFolder, folder: Path | None) -> None:
    if folder is not None:
        run.say(f"saved: {folder.name}")


def _record_end(folder: str, error: BaseException, rank: int) -> None:
    """Record in status.json and train.log how the run ended; of several ranks, the one that caused it is reported."""
    run, stopped = RunFolder(folder), isinstance(error, KeyboardInterrupt)
    text = str(error) if isinstance(error, DimoError) else f"{type(error).__name__}: {error}"
    trace = "" if isinstance(error, DimoError) else "".join(traceback.format_exception(error))
    run.free_reserve()
    try:
        if stopped and rank == 0:
            run.say(f"stopped: {error}")
            run.write_status(state="preempted", error=None if isinstance(error, Preempted) else text)
        elif not stopped and rank > 0:
            # in a separate file first, since rank 0 may be writing the status at this moment
            write_text(run.path / FAILED.format(rank), f"rank {rank}: {text}")
            run.say(f"{trace}failed: rank {rank}: {text}")
            if run.status().get("state") == "running":  # rank 0 may be blocked, waiting for this rank
                run.write_status(state="failed", error=f"rank {rank}: {text}", last_lines=run.last_lines())
        elif not stopped:
            others = sorted(run.path.glob(FAILED.format("*")))
            if others and not isinstance(error, DimoError):  # a broken connection: another rank has the reason
                text = others[0].read_text(encoding="utf-8")
            run.say(f"{trace}failed: {text}")
            run.write_status(state="failed", error=text, last_lines=run.last_lines())
    except (DimoError, OSError) as also:  # the folder was removed, or the disk is full
        print(f"dimo: {also}", file=sys.stderr)
