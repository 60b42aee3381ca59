"""What may differ between the run that began a folder and the command that resumes it, key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dimo.config import config_keys, default_of
from dimo.config.load import groups_in
from dimo.config.older import begun_with, flat
from dimo.config.values import write_yaml
from dimo.errors import DimoError

# it changes neither what is learnt nor in which order; max_train_steps may grow
FREE_KEYS = {f"experiment.{k}" for k in ("name", "output_dir", "log_every", "save_every", "sample_every", "keep_last")}
FREE_KEYS |= {f"experiment.{k}" for k in ("resume", "overwrite", "student_dtype", "trackers")}
FREE_KEYS |= {"model.device", "model.compile", "model.activation_checkpointing"}
FREE_KEYS |= {"training.num_processes", "training.engine", "training.max_bad_steps"}
FREE_KEYS |= {"distill.teacher_ckpt", "distill.prompt_source"}  # where they lie; what is in them is looked at besides
GROWING_KEYS = {"training.max_train_steps"}
SILENT_KEYS = {"experiment.resume", "experiment.overwrite"}
START_OVER = (
    "use another experiment.name; experiment.overwrite=true would start over here and DELETE this run, checkpoints too"
)


def changes_of(path: Path, old: dict[str, dict], new: str) -> list[tuple[str, Any, Any]]:
    """(key, was, is) of what differs and may. `old`, of the run in `path`, may lack keys that came later.

    Raises:
        DimoError: what differs may not.
    """
    known, old = {key: default_of(field) for key, field in config_keys().items()}, flat(old)
    was, now = known | begun_with(old) | old, known | flat(groups_in(new, path / "config.yaml"))
    differ = [(k, was.get(k), now.get(k)) for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)]
    differ = [change for change in differ if change[0] not in SILENT_KEYS and change[0] != "experiment.output_dir"]
    refused = [change for change in differ if not _may(*change)]
    if refused:
        raise DimoError(
            f"{path} belongs to a run with another configuration ({spell(refused[:3])}); "
            f"`dimo train -c {path / 'config.yaml'}` continues it as it began; else {START_OVER}"
        )
    return differ


def _may(key: str, old: Any, new: Any) -> bool:
    free = key in FREE_KEYS or key.startswith("evaluation.")
    return free or (key in GROWING_KEYS and isinstance(old, int) and new >= old)


def without_later_keys(old: dict[str, dict], new: str) -> tuple[str, str]:
    """(the configuration to keep for a run, what is to be said of it). Keys that the run is too old for stay unwritten:
    what they are to it does not change when their defaults do.
    """
    groups, later = yaml.safe_load(new), begun_with(flat(old))
    if not later:
        return new, ""
    groups = {
        group: {key: value for key, value in keys.items() if f"{group}.{key}" not in later}
        for group, keys in groups.items()
    }
    kept = {key: value for key, value in later.items() if value != default_of(config_keys()[key])}
    said = ", ".join(f"{key}={value}" for key, value in sorted(kept.items()))
    return write_yaml(groups), said


def spell(changes: list[tuple[str, Any, Any]]) -> str:
    """As text."""
    return "; ".join(f"{key} was {was!r}, is {now!r}" for key, was, now in changes)
