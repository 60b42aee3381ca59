"""`dimo runs`: list the runs under a folder and whether they are alive."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from dimo.errors import DimoError
from dimo.run.checkpoints import STEP
from dimo.run.folder import RunFolder
from dimo.ursa.layout import student_file

DEPTH = ("", "*/", "*/*/")  # a run itself, runs/<name>, runs/<ablation>/<name>
UNITS = ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))


@dataclasses.dataclass
class Run:
    """One row of `dimo runs`. `state` is that of status.json, or `dead` if it says running but no process does."""

    name: str
    state: str
    step: int | None
    max_steps: int | None
    steps_per_s: float | None
    age_s: float
    error: str | None


def list_runs(folder: str | Path) -> list[Run]:
    """The runs in `folder` and up to two levels below, most recently updated last.

    Raises:
        DimoError: `folder` does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DimoError(f"{folder} is not a folder; `dimo train` creates runs/<name>")
    found = [file for depth in DEPTH for file in folder.glob(f"{depth}status.json")]
    return sorted((_look(file, folder) for file in found), key=lambda run: -run.age_s)


def _look(file: Path, folder: Path) -> Run:
    run, age = RunFolder(file.parent), 0.0
    name = str(file.parent.relative_to(folder)) if file.parent != folder else str(folder)
    try:
        age = max(0.0, time.time() - file.stat().st_mtime)
        status = run.status()
        state, step, most, error = (status.get(key) for key in ("state", "step", "max_steps", "error"))
        if not isinstance(state, str) or not isinstance(error, str | None):
            raise ValueError("not a status.json of dimo")
    except (OSError, ValueError):
        return Run(name, "unreadable", None, None, None, age, "status.json cannot be read")
    if state in ("starting", "running") and not run.is_held():
        state = "dead"
    return Run(name, state, step, most, _speed(run), age, error)


def _speed(run: RunFolder) -> float | None:
    """Steps per second at the last logged step; None if unknown."""
    try:
        return 1 / run.metrics()[-1]["time/step_s"]
    except (OSError, ValueError, LookupError, TypeError, ZeroDivisionError):
        return None


def format_runs(runs: list[Run]) -> str:
    """A table with state, step/max, steps/s, time since the last update and name; a failed run's error below it."""
    if not runs:
        return "no runs; `dimo run -c shapes` makes the first"
    rows = [("state", "step", "steps/s", "age", "name")]
    for run in runs:
        speed = "-" if run.steps_per_s is None else f"{run.steps_per_s:.3g}"
        rows.append((run.state, _steps(run), speed, _age(run.age_s), run.name))
    wide = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join([row[0].ljust(wide[0]), *(row[i].rjust(wide[i]) for i in (1, 2, 3)), row[4]]) for row in rows]
    for i, run in reversed(list(enumerate(runs, 1))):
        if run.error:
            lines.insert(i + 1, f"    {run.error.splitlines()[0]}")
    return "\n".join(lines)


def _steps(run: Run) -> str:
    return "-" if run.step is None else f"{run.step}/{run.max_steps if run.max_steps is not None else '?'}"


def _age(seconds: float) -> str:
    size, unit = next(((size, unit) for size, unit in UNITS if seconds >= size), (1, "s"))
    return f"{int(seconds // size)}{unit}"


def existing_run(path: str | Path) -> RunFolder:
    """The run in a folder.

    Raises:
        DimoError: there is none; the message has the absolute path, and the runs beside it.
    """
    run, beside = RunFolder(path, writes=False), Path(path).resolve().parent
    if any((run.path / name).exists() for name in ("status.json", "metrics.jsonl", "config.yaml")):
        return run
    others = list_runs(beside) if beside.is_dir() else []
    there = "; ".join(f"{beside / other.name} ({other.state}, step {_steps(other)})" for other in others[::-1])
    raise DimoError(
        f"there is no run in {run.path.resolve()}; "
        + (f"those beside it, newest first: {there}" if there else f"{beside} has no runs")
        + ". Train it with notebook 03 or dimo train, or give another folder"
    )


def progress_of(run: RunFolder) -> str:
    """How far a run is, in words: "still training, step 75 of 600"."""
    status = run.status()
    state, step, last = (status.get(key) for key in ("state", "step", "max_steps"))
    words = {"finished": "finished", "failed": "failed", "preempted": "stopped"}
    if state in ("starting", "running"):
        words[state] = "still training" if run.is_held() else "dead, no process trains it"
    at = "" if step is None else f", step {step} of {last}"
    return words.get(str(state), "not begun") + at


def newest_student(run: RunFolder) -> tuple[Path, str]:
    """The newest weights of a run's student for `load_network`, and a sentence that says which.

    Those of checkpoints/final once training has ended, else the moving average in the newest checkpoint.

    Raises:
        DimoError: there is no checkpoint yet.
    """
    final, progress = run.path / "checkpoints" / "final", progress_of(run)
    steps = sorted(run.path.glob(f"checkpoints/{STEP}/ema.safetensors"))
    if final.is_dir() and (run.status().get("state") == "finished" or not steps):
        return student_file(final), f"the student is checkpoints/final ({progress})"
    if not steps:
        raise DimoError(f"{run.path.resolve()}: {progress}, and no checkpoint yet (experiment.save_every says when)")
    about = f"the student is the moving average in {steps[-1].parent.name}, without model.final_logit_gain"
    return steps[-1], f"{progress}: {about}"
