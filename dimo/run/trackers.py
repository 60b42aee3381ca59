"""Logging to TensorBoard, W&B and trackio through accelerate, selected by `experiment.trackers`."""

from __future__ import annotations

import hashlib

from accelerate import Accelerator
from accelerate.tracking import filter_trackers, get_available_trackers

from dimo.config import Config, to_flat
from dimo.errors import DimoError
from dimo.run.folder import RunFolder


def require_trackers(names: list[str]) -> None:
    """Raise DimoError, saying what to install, unless all these trackers are installed."""
    there = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    for name in names:
        if name not in there:
            raise DimoError(f"experiment.trackers includes {name}, which is not installed: pip install {name}")


def open_trackers(accelerator: Accelerator, config: Config, run: RunFolder) -> None:
    """Set up `accelerator.log` for the trackers in `experiment.trackers`; without any it does nothing.

    A resumed run continues the same W&B and trackio run. TensorBoard files are written to `<run>/tensorboard`.

    Raises:
        DimoError: a tracker is not installed.
    """
    names = config.experiment.trackers
    require_trackers(names)
    if not names:
        return
    began = f"{run.path.resolve()} {run.status().get('started')}"
    identity = f"{config.experiment.name}-{hashlib.sha256(began.encode()).hexdigest()[:8]}"
    accelerator.project_configuration.logging_dir = str(run.path / "tensorboard")
    accelerator.log_with = filter_trackers(names, accelerator.logging_dir)
    accelerator.init_trackers(
        "dimo",
        config={key: _plain(value) for key, value in to_flat(config).items()},
        init_kwargs={
            "wandb": {"name": config.experiment.name, "id": identity, "resume": "allow", "dir": str(run.path)},
            "trackio": {"name": identity, "resume": "allow"},
        },
    )


def close_trackers(accelerator: Accelerator) -> None:
    """Finish all trackers. accelerate's `end_training` would also destroy the process group, which notebooks reuse."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []


def _plain(value):
    """A value TensorBoard accepts: numbers and strings unchanged, anything else as a string."""
    return value if isinstance(value, int | float | str) else str(value)
