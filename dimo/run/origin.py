"""The run that a student lies in: what it was trained with, it is sampled and evaluated with."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from dimo.config import Config, load_config, to_flat
from dimo.config.load import read_groups, values_of
from dimo.config.older import BEFORE
from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.run.sources import PROMPTS, TEACHER, require_same_sources
from dimo.worlds import built_in_worlds

PLACES = (TEACHER, PROMPTS)  # what a student needs again
NAMES = ("world", *built_in_worlds())  # which are no places


def run_of(student: str | Path) -> Path | None:
    """The run folder that `student` is, or in whose checkpoints/ it lies; None where it is in none.

    A config.yaml alone makes no run: many projects have one.
    """
    for place in (Path(os.path.abspath(student)), Path(student).resolve()):  # checkpoints/ or the student may be links
        for folder in (place, *place.parents):
            if (folder == place or place.is_relative_to(folder / "checkpoints")) and _is_run(folder):
                return folder
    return None


def _is_run(folder: Path) -> bool:
    used = (folder / "status.json").exists() or (folder / "checkpoints").is_dir()
    return used and (folder / "config.yaml").is_file() and RunFolder(folder, writes=False).is_dimos()


def run_config(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run, then overrides.

    Its relative paths are from the folder in which training was started. They are looked for there, as far as the run's
    own place tells where that is, then in the folder one is in, then upwards from the run.

    Raises:
        DimoError: config.yaml is damaged, or as `load_config` does.
    """
    file = run / "config.yaml"
    own = to_flat(load_config(file))
    out = Path(own["experiment.output_dir"]).parts
    started = [Path(*run.parts[: -len(out)])] if run.parts[-len(out) :] == out else []
    found = []
    for key in PLACES:
        places = [folder / own[key] for folder in (*started, Path.cwd(), run, *run.parents)]
        there = next((place for place in places if place.exists()), None)
        if own[key] not in NAMES and there is not None:
            found.append(f"{key}={there}")
    return load_config(file, [*found, *overrides])


def learns_from(run: Path, config: Config) -> bool:
    """Whether `config` names the rows that `run` was trained on: the same files, by content, and the same minimums."""
    own = read_groups(run / "config.yaml")
    before, now = values_of(own), to_flat(config)
    minimums = [key for key in now if key.startswith("distill.min_")]
    if any(before.get(key) != now[key] for key in minimums):
        return False
    try:
        require_same_sources(run, own, own | {"distill": dataclasses.asdict(config.distill)}, [PROMPTS])
    except DimoError:
        return False
    return True


def held_out_by(run: Path) -> int:
    """How many captions a run has never trained on: the least that evaluation.held_out has been in it."""
    key = "evaluation.held_out"
    changes = [event["changes"] for event in RunFolder(run, writes=False).events() if "changes" in event]
    now = values_of(read_groups(run / "config.yaml")).get(key, BEFORE[key])
    return min([now, *(change[key][0] for change in changes if key in change)])
