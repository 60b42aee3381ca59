"""Find the run that a student belongs to, whose configuration it is sampled and evaluated with."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from dimo.config import Config, load_config, to_flat
from dimo.config.load import read_groups, values_of
from dimo.config.older import BEFORE
from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.run.sources import PROMPTS, TEACHER, is_other_teacher, require_same_meaning, require_same_sources
from dimo.worlds import built_in_worlds

log = logging.getLogger(__name__)
PLACES = (TEACHER, PROMPTS)  # keys of paths that sampling and evaluation need
NAMES = ("world", *built_in_worlds())  # values that are not paths


def run_of(student: str | Path) -> Path | None:
    """The run folder that `student` is, or whose checkpoints/ contains it; None if there is none.

    A config.yaml alone does not make a folder a run, since many projects have one.
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
    """The configuration of a run plus overrides.

    Relative paths in it refer to the folder where training was started. They are searched for there (inferred from
    output_dir and the location of the run), then in the working directory, then in the run folder and its parents.

    Raises:
        DimoError: config.yaml is damaged, or an override is invalid (see `load_config`).
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


def trained_steps(student: str | Path) -> int:
    """Number of passes that a student was trained for, 1 if it is in no run folder."""
    run = run_of(student)
    return run_config(run).distill.student_steps if run else 1


def require_comparable(student: str | Path, config: Config) -> None:
    """Check that a student can be put beside the teacher of `config`, as far as its run says what it was trained with.

    Warns where the videos have another size than those it was trained for.

    Raises:
        DimoError: see `require_same_meaning`.
    """
    run = run_of(student)
    if run is None:
        return
    require_same_meaning(run, config.distill.teacher_ckpt)
    trained, asked = (f"{d.num_frames}x{d.height}x{d.width}" for d in (run_config(run).distill, config.distill))
    if trained != asked:
        log.warning("the student was trained for videos of %s, and is evaluated at %s, which it has not learnt",
                    trained, asked)  # fmt: skip


def other_teacher(student: str | Path, teacher_ckpt: str) -> str:
    """distill.teacher_ckpt of the student's run, if it is known to have been another teacher; else empty."""
    run = run_of(student)
    if run is None or not is_other_teacher(run, teacher_ckpt):
        return ""
    return str(values_of(read_groups(run / "config.yaml"))[TEACHER])


def learns_from(run: Path, config: Config) -> bool:
    """Whether `config` uses the captions `run` was trained on: files with the same content, and the same minimums."""
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
    """Number of captions a run has never trained on: the minimum of evaluation.held_out over its history."""
    key = "evaluation.held_out"
    changes = [event["changes"] for event in RunFolder(run, writes=False).events() if "changes" in event]
    now = values_of(read_groups(run / "config.yaml")).get(key, BEFORE[key])
    return min([now, *(change[key][0] for change in changes if key in change)])
