"""`dimo train`: a training run in this process or through accelerate's launcher."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dimo.config import Config
from dimo.config.load import validate
from dimo.data.listing import list_files
from dimo.distill.stages import require_estimator
from dimo.errors import DimoError, enough_memory
from dimo.run.folder import RunFolder
from dimo.run.launch import launch, launch_command, launch_file, needs_launch
from dimo.run.signals import PREEMPTED, Preempted, stopping_at_once
from dimo.run.trackers import require_trackers
from dimo.worlds import checkpoint_folder


def train(config: Config, progress: bool = True) -> RunFolder:
    """Train in this process if a single one is enough, else through `launch`.

    Args:
        progress: print it to stderr; the processes of `launch` always do.

    Raises:
        Preempted: a signal asked to stop, and a checkpoint was saved.
        DimoError: bad input, or training failed; the run folder has the details.
    """
    refuse_early(config)
    if not needs_launch(config):
        from dimo.train.trainer import Trainer

        with stopping_at_once(), enough_memory():
            trainer = Trainer(config)
        return trainer.train(progress)
    code = launch(config)
    run = RunFolder(config.experiment.output_dir, writes=False)
    if code == PREEMPTED:
        raise Preempted(f"stopped at step {run.status().get('step')} of {run.path}; the same command continues")
    if code != 0:
        reason = run.status().get("error") or "see its output"
        raise DimoError(f"training ended with exit code {code}: {reason} ({launch_file(config, 'log')})")
    return run


def train_seeds(config: Config, seeds: Sequence[int]) -> list[RunFolder]:
    """Train one run per seed, all in this process, a step of each in turn: see `dimo.train.together`.

    Args:
        config: of all runs, but for the seed and for the run folder, which is <experiment.output_dir>-<seed>.

    Raises:
        Preempted: a signal asked to stop, and checkpoints were saved.
        DimoError: bad input, or a training failed; its run folder has the details.
    """
    if len(set(seeds)) < len(seeds):
        raise DimoError(f"--seeds must differ, got {', '.join(map(str, seeds))}")
    if needs_launch(config):
        raise DimoError(
            f"--seeds trains in a single process, but training.num_processes is {config.training.num_processes}"
        )
    configs = [_with_seed(config, seed) for seed in seeds]
    for each in configs:
        validate(each)
        refuse_early(each)
    from dimo.train.together import train_together
    from dimo.train.trainer import Trainer

    with stopping_at_once(), enough_memory():
        trainers = [Trainer(each) for each in configs]
    return train_together(trainers)


def _with_seed(config: Config, seed: int) -> Config:
    e, folder = config.experiment, Path(config.experiment.output_dir)
    own = dataclasses.replace(e, seed=seed, name=f"{e.name}-{seed}", output_dir=f"{folder}-{seed}")
    return dataclasses.replace(config, experiment=own)


def refuse_early(config: Config) -> None:
    """Check what can be checked before anything starts.

    Raises:
        DimoError: the teacher, caption source, estimator, tracker or engine does not exist, a caption folder has other
            files in it, or there are more processes than GPUs.
    """
    source = config.distill.prompt_source
    checkpoint_folder(config.distill.teacher_ckpt)
    require_estimator(config.distill.estimator)
    if source != "world" and not Path(source).exists():
        raise DimoError(f"distill.prompt_source must be world, a file or a folder, but {source!r} does not exist")
    if source != "world":
        list_files(source)  # the content is checked when it is read
    require_trackers(config.experiment.trackers)
    if needs_launch(config):
        launch_command(config)
