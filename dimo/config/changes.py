"""Which configuration keys may change when a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dimo.config import config_keys, default_of
from dimo.config.load import groups_in
from dimo.config.older import begun_with, flat
from dimo.config.values import write_yaml
from dimo.errors import DimoError

# keys that affect neither what is learnt nor the order of the data; max_train_steps may only grow
FREE_KEYS = {f"experiment.{k}" for k in ("name", "output_dir", "log_every", "save_every", "sample_every", "keep_last")}
FREE_KEYS |= {f"experiment.{k}" for k in ("keep_every", "resume", "overwrite", "student_dtype", "trackers")}
FREE_KEYS |= {"model.device", "model.compile", "model.activation_checkpointing", "model.attention"}
FREE_KEYS |= {"training.num_processes", "training.engine", "training.max_bad_steps", "training.cuda_graph"}
FREE_KEYS |= {"training.sequence_parallel"}
FREE_KEYS |= {"evaluation.judged_videos"}
FREE_KEYS |= {"distill.teacher_ckpt", "distill.prompt_source"}  # paths; dimo.run.sources compares the content
GROWING_KEYS = {"training.max_train_steps"}
SILENT_KEYS = {"experiment.resume", "experiment.overwrite"}
START_OVER = "use another experiment.name (experiment.overwrite=true would DELETE this run, checkpoints included)"


def changes_of(path: Path, old: dict[str, dict], new: str) -> list[tuple[str, Any, Any]]:
    """The permitted changes between the configuration of a run and a new one.

    Args:
        path: the run folder.
        old: groups of keys of the run's config.yaml; keys introduced since may be missing.
        new: the new configuration as YAML.

    Returns:
        A list of (key, old value, new value).

    Raises:
        DimoError: a key differs that must not change.
    """
    known, old = {key: default_of(field) for key, field in config_keys().items()}, flat(old)
    was, now = known | begun_with(old) | old, known | flat(groups_in(new, path / "config.yaml"))
    differ = [(k, was.get(k), now.get(k)) for k in sorted(was.keys() | now.keys()) if was.get(k) != now.get(k)]
    differ = [change for change in differ if change[0] not in SILENT_KEYS and change[0] != "experiment.output_dir"]
    refused = [change for change in differ if not _may(*change)]
    if refused:
        raise DimoError(
            f"{path} belongs to a run with another configuration ({spell(refused[:3])}); "
            f"to continue it unchanged, run `dimo train -c {path / 'config.yaml'}`; otherwise {START_OVER}"
        )
    return differ


def _may(key: str, old: Any, new: Any) -> bool:
    free = key in FREE_KEYS or key.startswith("evaluation.")
    return free or (key in GROWING_KEYS and isinstance(old, int) and new >= old)


def without_later_keys(old: dict[str, dict], new: str) -> tuple[str, str]:
    """Remove keys that were introduced after a run began, so that later changes of their defaults do not affect it.

    Args:
        old: groups of keys of the run's config.yaml.
        new: the new configuration as YAML.

    Returns:
        (YAML to write to config.yaml, "key=value, ..." of the removed keys whose value differs from the default).
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
    """Changes as text for messages."""
    return "; ".join(f"{key} was {was!r}, is {now!r}" for key, was, now in changes)
