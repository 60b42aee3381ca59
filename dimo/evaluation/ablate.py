"""`dimo ablate`: train and score every student of a grid (`dimo.evaluation.grid`), and write one table with intervals.

For each world and arm the learning rate is chosen on tuning seeds and reported on others. A finished run keeps its
report, its student and its metrics and is not repeated, so the command can be killed and run again, on another machine
too if the output folder moves along.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dimo.config import Config, device_of, load_config, to_flat
from dimo.config.changes import FREE_KEYS
from dimo.errors import DimoError, Diverged
from dimo.evaluation.evaluate import evaluate_teacher, evaluate_to_folder, student_row
from dimo.evaluation.grid import TEACHER_STEPS, Grid, Place
from dimo.evaluation.intervals import format_grid
from dimo.evaluation.jobs import visible_gpus
from dimo.evaluation.kept import KEPT
from dimo.files import write_text
from dimo.run.lifeline import end_with_parent
from dimo.run.signals import PREEMPTED, Preempted, handling, stopping_at
from dimo.train.together import train_and_compare
from dimo.train.trainer import Trainer
from dimo.ursa.weights import read_json
from dimo.worlds.teacher import make_teacher

TEACHERS = {  # keys that decide what a teacher makes, beside those of the evaluation and its folder
    f"distill.{key}" for key in ("teacher", "guidance_scale", "guidance_trunc", "negative_prompt", "max_prompt_length")
}
COVERAGE_FLOOR = 0.8  # students without mode collapse had a coverage of at least .84, collapsed ones of at most .71
RULE = (
    "lr: the rate with the highest validity on the tuning seeds among those with a coverage of at least "
    f"{COVERAGE_FLOOR}, since a collapsed student can have valid videos only; * none reached that coverage, so the one "
    "with the highest product of validity and coverage. Mean +- half of the 95% t-interval over seeds (their number); "
    "coverage_of_teacher: coverage_near relative to that of the teacher's 25 passes, guided if the arm guides it."
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run in `folder`, of a grid in `out`: a preset or file, and overrides."""

    folder: Path
    preset: str | None
    words: tuple[str, ...]
    out: Path

    def settings(self, *more: str) -> Config:
        return load_config(self.preset, [*self.words, *more])

    def result(self) -> dict | None:
        """Its metrics, or why it diverged; None if it is not finished, or another configuration's."""
        report, config = self.folder / "report.json", self.folder / "config.yaml"
        if not (report.exists() and config.exists() and _same(load_config(config), self.settings())):
            return None
        rows = _read(report)
        if "diverged" in rows:
            return rows
        teacher = teacher_scores(self.settings(), self.out).get("coverage_near")
        row = rows[student_row(rows)]
        of_teacher = row["coverage_near"] / teacher if teacher and row["coverage_near"] is not None else None
        return row | {"coverage_of_teacher": of_teacher}

    def size(self) -> int:
        """What it costs, up to a factor that arms differ little in."""
        c = self.settings()
        d = c.distill
        return c.training.max_train_steps * d.batch_size_per_gpu * d.num_frames * d.height * d.width

    def finish(self, diverged: Diverged | None) -> None:
        """Write the report, and keep little else."""
        if diverged:
            write_text(self.folder / "report.json", json.dumps({"diverged": str(diverged)}, indent=2) + "\n")
        else:
            evaluate_to_folder(self.settings(), self.folder / "checkpoints" / "final", self.folder, progress=False)
        self.tidy()

    def tidy(self) -> None:
        """Remove what only a run that goes on needs."""
        for old in [*(self.folder / "checkpoints").glob("step-*"), self.folder / "samples", self.folder / "slices"]:
            shutil.rmtree(old, ignore_errors=True)
        (self.folder / "checkpoints" / "final" / "student.pt").unlink(missing_ok=True)  # student/ has the same weights


def _read(file: Path) -> dict[str, Any]:
    """What a file of the grid holds that an earlier command wrote."""
    try:
        return read_json(file)
    except DimoError as error:
        raise DimoError(f"{error}; delete it, and the same command makes it again") from error


def _same(was: Config, now: Config) -> bool:
    """Whether two configurations train and score the same; folders, devices, and what the teacher judges may differ."""
    one, other = to_flat(was), to_flat(now)
    return all(one[key] == other[key] for key in one if key not in FREE_KEYS)


def ablate(grid: Grid, out: Path, jobs: int = 1, together: int = 1, minutes: float | None = None) -> str:
    """Train and score all runs of a grid; write grid.json and grid.md into `out`.

    Args:
        out: folder of the worlds, the runs and the table.
        jobs: number of processes; each has a GPU, if there are any, and its share of the CPU cores.
        together: number of runs that a process trains at a time.
        minutes: stop after so long; the run in progress saves its state.

    Returns:
        The table of `format_grid`, with `RULE` below.

    Raises:
        Preempted: the time is up; the table of what there is has been written.
        DimoError: numbers out of range, or see `Grid.require_sense`.
    """
    if jobs < 1 or together < 1 or (minutes is not None and not minutes > 0):
        raise DimoError(f"jobs and together must be at least 1 and minutes positive, got {jobs}, {together}, {minutes}")
    grid.require_sense(out)
    deadline = time.time() + 60 * minutes if minutes else None
    pairs = [(place, arm) for place in grid.places.values() for arm in grid.arms]

    def run(place: Place, arm: str, rate: float | None, seed: int) -> Run:
        folder, words = grid.run(place, arm, rate, seed, out)
        return Run(folder, grid.preset, tuple(words), out)

    with _workers(jobs) as call:
        base = load_config(grid.preset, [*grid.words, *grid.overrides])
        how = out, device_of(base).type, base.evaluation.videos_per_prompt or 64, deadline
        call(_make_world, [(place, *how) for place in grid.places.values() if place.recipe], "worlds")
        any_of = {teacher_folder(one.settings(), out): one for one in (run(*p, None, grid.seeds[0]) for p in pairs)}
        call(_score_teacher, [(one, deadline) for one in any_of.values()], "teachers")
        rates = grid.rates if len(grid.rates) > 1 else ()
        tried = {pair: {r: [run(*pair, r, s) for s in grid.tuning_seeds] for r in rates} for pair in pairs}
        every = [[one for runs in by_rate.values() for one in runs] for by_rate in tried.values()]
        call(_train, _batches(every, together, deadline), "tuning")
        found = {}
        for pair, by_rate in tried.items():
            rows = {rate: [one.result() for one in runs] for rate, runs in by_rate.items()}
            tuned = all(row is not None for some in rows.values() for row in some)
            best = max(rows, key=lambda rate: worth(rows[rate])) if rows else next(iter(grid.rates), None)  # noqa: B023
            found[pair] = best, rows, [run(*pair, best, seed) for seed in grid.seeds] if tuned else []
        call(_train, _batches([runs for *_, runs in found.values()], together, deadline), "seeds")
    result: dict[str, dict] = {}
    for (place, arm), (rate, rows, runs) in found.items():
        results = [one.result() for one in runs]
        result.setdefault(place.name, {})[arm] = {
            "rate": rate * place.rate_scale if rate and runs else None,
            "starred": rate in rows and bool(runs) and not worth(rows[rate])[0],
            "tuning": {f"{r:g}": some for r, some in rows.items()},
            "seeds": [row for row in results if row is not None],
        }
    table = f"{format_grid(result)}\n{RULE}\n"
    write_text(out / "grid.json", json.dumps(result, indent=2) + "\n")
    write_text(out / "grid.md", table)
    done = sum(len(row["seeds"]) for arms in result.values() for row in arms.values())
    if done < len(pairs) * len(grid.seeds):
        print(table)
        part = f"{done} of {len(pairs) * len(grid.seeds)} reported runs"
        raise Preempted(f"the time is up ({minutes or 0:g} minutes) with {part} finished; the same command goes on")
    return table


def worth(rows: list[dict | None]) -> tuple[bool, float, float, float]:
    """Sort key of a rate's tuning runs by `RULE`; a coverage that is undefined, or a run that diverged, counts as 0."""

    def mean(name: str, instead: str = "") -> float:
        values = [(row or {}).get(name) for row in rows]
        values = [(row or {}).get(instead) if value is None else value for value, row in zip(values, rows)]
        return statistics.mean([value or 0.0 for value in values])

    validity, coverage = mean("validity"), mean("coverage", "coverage_near")
    kept = coverage >= COVERAGE_FLOOR
    return kept, validity if kept else validity * coverage, validity, mean("token_accuracy")


def _batches(arms: list[list[Run]], together: int, deadline: float | None) -> list[tuple]:
    """Arguments of `_train`, of one arm on one world each, the longest first, so that no process waits for it alone."""
    batches = [runs[i : i + together] for runs in arms for i in range(0, len(runs), together)]
    batches.sort(key=lambda runs: -sum(one.size() for one in runs))
    return [(runs, deadline) for runs in batches]


def _train(runs: list[Run], deadline: float | None) -> None:
    """Train and score those of the runs that are not finished, in this process; stop when the time is up."""
    finished = [one for one in runs if one.result() is not None]
    for one in finished:
        one.tidy()  # a kill may have come between the report and this
    runs = [one for one in runs if one not in finished]
    if not runs or _is_late(deadline):
        return
    for one in runs:
        (one.folder / "report.json").unlink(missing_ok=True)  # of another configuration
    try:
        with stopping_at(deadline):
            trainers = [Trainer(one.settings()) for one in runs]
            for trainer in trainers:
                trainer.sheets = False  # `tidy` would remove them
            ends = train_and_compare(trainers)
    except Preempted:
        if not _is_late(deadline):
            raise  # a signal from outside
        return
    for one, diverged in zip(runs, ends):
        if not _is_late(deadline):
            one.finish(diverged)


def _make_world(place: Place, out: Path, device: str, videos_per_prompt: int, deadline: float | None) -> None:
    """Make the teacher of a world, unless it is there; what it was made by and its scores are in a file beside it."""
    assert place.world and place.recipe
    folder = Path(place.folder(out))
    about, sizes = folder.with_name(f"{folder.name}.json"), dataclasses.asdict(place.world)
    wanted = {"world": place.world.name} | sizes | dataclasses.asdict(place.recipe)
    if about.exists():
        if _read(about).get("by") != wanted:
            raise DimoError(f"{folder} was made by another recipe than the grid's {place.name}; give another --out")
        return
    if _is_late(deadline):
        return
    table = make_teacher(place.world, dataclasses.replace(place.recipe, device=device), folder, videos_per_prompt)
    write_text(about, json.dumps({"by": wanted, "scores": table.splitlines()}, indent=2) + "\n")


def teacher_folder(config: Config, out: Path) -> Path:
    """Where a grid in `out` has the scores of a run's teacher, for all runs whose teacher makes the same videos.

    A teacher that was made there goes by its name, since the grid's folder may move.
    """
    keys = {key: value for key, value in to_flat(config).items() if key in TEACHERS or key.startswith("evaluation.")}
    folder = Path(config.distill.teacher_ckpt)
    name = folder.name if folder.resolve().parent == out.resolve() else str(folder)
    text = json.dumps([name, sorted(keys.items())], default=str)
    return out / f"teacher-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def teacher_scores(config: Config, out: Path) -> dict:
    """The metrics of the teacher's TEACHER_STEPS passes; empty if it has not been scored."""
    report = teacher_folder(config, out) / "report.json"
    rows = _read(report) if report.exists() else {}
    return rows.get(f"teacher_{TEACHER_STEPS}", {})


def _score_teacher(run: Run, deadline: float | None) -> None:
    """Score the teacher of a run."""
    config = run.settings(f"evaluation.teacher_steps=[{TEACHER_STEPS}]")
    if teacher_scores(run.settings(), run.out) or _is_late(deadline):
        return
    rows = evaluate_teacher(config, run.out / KEPT)
    write_text(teacher_folder(run.settings(), run.out) / "report.json", json.dumps(rows, indent=2) + "\n")


def _is_late(deadline: float | None) -> bool:
    return deadline is not None and time.time() > deadline


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[Callable]:
    """Yields call(function, list of its arguments, name of the progress bar), which runs in `jobs` processes."""
    if jobs == 1:

        def here(function: Callable, arguments: list[tuple], name: str) -> None:
            for some in tqdm(arguments, desc=name, unit="job", disable=not arguments):
                function(*some)

        yield here
        return
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    numbers: Any = spawn.Queue()
    for number in range(jobs):
        numbers.put(number)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, spawn, _begin_worker, (numbers, visible_gpus(), threads, os.getpid())) as pool:

        def there(function: Callable, arguments: list[tuple], name: str) -> None:
            futures = [pool.submit(_do, os.getpid(), function, some) for some in arguments]
            try:
                for future in tqdm(
                    as_completed(futures), desc=name, unit="job", total=len(futures), disable=not futures
                ):
                    future.result()  # the first failure cancels the rest
            except BaseException as error:
                for process in multiprocessing.active_children():
                    process.terminate()  # upon which its training runs save
                pool.shutdown(cancel_futures=True)
                if isinstance(error, BrokenProcessPool):
                    raise DimoError("a process of the grid was killed; the same command goes on") from error
                raise

        with handling(_stop):
            yield there


def _stop(number: int, _) -> None:
    raise Preempted(f"{signal.Signals(number).name}: runs in progress were saved; the same command goes on")


def _do(parent: int, function: Callable, arguments: tuple) -> None:
    """In a worker: a job, and none after it if a signal stopped this one or the command is gone."""
    try:
        function(*arguments)
    except Preempted:
        os._exit(PREEMPTED)  # an exception would let it take the next job, which may be on its way already
    finally:
        if os.getppid() != parent:
            os._exit(PREEMPTED)


def _begin_worker(numbers: Any, gpus: list[str], threads: int, parent: int) -> None:
    """In a new process: take a GPU, and end with the command, whose training run then saves."""
    number = numbers.get()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    torch.set_num_threads(threads)
    end_with_parent(signal.SIGTERM, parent, grace_s=60.0)
