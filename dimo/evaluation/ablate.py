"""The recipe against the alternatives: same steps, same learning rates to choose from, same seeds."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from dimo.config import PRESETS, Config, load_config, to_yaml
from dimo.config.load import read_groups
from dimo.errors import DimoError
from dimo.evaluation.evaluate import evaluate_to_folder
from dimo.files import write_text
from dimo.train.trainer import Trainer
from dimo.worlds import checkpoint_folder, is_world

TUNING_SEED = 100  # never among the seeds that are reported
PLAIN = ["model.logit_gain=1", "model.final_logit_gain=1"]  # the student as it is, where it is to match the teacher


def _keys_of(preset: str) -> list[str]:
    """A preset as overrides, without what concerns its run folder."""
    groups = read_groups(PRESETS / f"{preset}.yaml")
    return [f"{g}.{key}={value}" for g, keys in groups.items() if g != "experiment" for key, value in keys.items()]


METHODS = {
    "recipe": [],
    "no x_init mix": ["distill.p_corrupt=0"],
    "x_init mix to the end": ["distill.p_corrupt_fade=0"],
    "t curriculum": ["distill.t_curriculum_steps={half}"],
    "entropy bonus": ["distill.lambda_ent=0.01"],
    "AdamW": ["optim.optimizer=adamw"],
    "one draw of t": ["distill.t_draws=1"],
    "forward KL": ["distill.divergence=forward"],
    "Jeffreys": ["distill.divergence=jeffreys"],
    "own pass": ["distill.aux_pass=own"],
    "embeddings kept": ["model.train_embeddings=false"],
    "head trained": ["model.train_head=true", *PLAIN],
    "gain 1": PLAIN,
    "KD beside": ["distill.w_kd=0.1"],
    "KD every 4th": ["distill.w_kd=0.1", "distill.kd_every=4"],
    "reinforce": ["distill.estimator=reinforce"],
    "KD alone": ["distill.w_distill=0", "distill.w_kd=1", *PLAIN],
    "literal": _keys_of("literal"),
}
COLUMNS = ("validity", "adherence", "coverage")
COVERAGE_FLOOR = 0.8  # students that lost no positions or shades have kept .84 and more, those that did .71 and less
RULE = (
    f"lr: the highest validity on seed {TUNING_SEED} among the rates whose coverage there is at least "
    f"{COVERAGE_FLOOR}, as a collapsed student's videos can all be valid; * no rate reached that: the highest validity "
    "times coverage"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a method at a learning rate and a seed, in `folder`. `config` and `overrides` are the command's."""

    method: str
    lr: float
    seed: int
    folder: Path
    config: str | None
    overrides: tuple[str, ...]

    def settings(self) -> Config:
        """The method's, with all rates in the proportions of the command's own configuration."""
        base = load_config(self.config, list(self.overrides))
        o, half = base.optim, base.training.max_train_steps // 2
        rates = {"lr": self.lr, "aux_lr": self.lr * o.aux_lr / o.lr, "muon_lr": self.lr * o.muon_lr / o.lr}
        own = [switch.format(half=half) for switch in METHODS[self.method]]
        own += [f"optim.{name}={rate}" for name, rate in rates.items()] + [f"experiment.seed={self.seed}"]
        own += [f"experiment.output_dir={self.folder}", "experiment.name=ablation", "evaluation.teacher_steps=[1]"]
        return load_config(self.config, [*self.overrides, *own])

    def __call__(self) -> dict:
        """Train and score, unless that is done already; the student's row."""
        settings, report, done = self.settings(), self.folder / "report.json", self.folder / "config.yaml"
        if not report.exists() or done.read_text(encoding="utf-8") != to_yaml(settings):
            Trainer(settings).train(progress=False)
            evaluate_to_folder(settings, self.folder / "checkpoints" / "final", self.folder, progress=False)
        return json.loads(report.read_text(encoding="utf-8"))["student_1"]


def ablate(
    out: Path, config: str | None, overrides: list[str], lrs: list[float], seeds: int, methods=None, jobs: int = 1
) -> str:
    """Tune every method's learning rate on one seed, report it on others; returns the table, writes ablation.json.

    A rate is chosen by `RULE`. The auxiliary's rate and Muon's keep their ratios to the student's. A finished run is
    not run again, so the command may be killed and repeated. `validity` is the one-step student's, sampled; coverage is
    of the seeds on which it is defined. `jobs` runs go side by side, each a process with its share of the cores.

    Raises:
        DimoError: no such method, numbers out of range, or a teacher that is no world's, whose videos nothing scores.
    """
    methods = list(methods or METHODS)
    for method in methods:
        if method not in METHODS:
            raise DimoError(f"there is no method {method!r}; there is {', '.join(METHODS)}")
    if seeds < 1 or jobs < 1 or not lrs or min(lrs) <= 0:
        raise DimoError(f"seeds and jobs must be at least 1 and lrs positive, got {seeds}, {jobs} and {lrs}")

    teacher = load_config(config, overrides).distill.teacher_ckpt
    if not is_world(checkpoint_folder(teacher)):
        raise DimoError(f"methods are compared by what only a built-in world's oracle knows, and {teacher} is none")

    def run(method: str, lr: float, seed: int) -> Run:
        folder = out / f"{method.replace(' ', '_')}-lr{lr:g}-seed{seed}"
        return Run(method, lr, seed, folder, config, tuple(overrides))

    with tqdm(total=len(methods) * (len(lrs) + seeds), desc="ablate", unit="run") as bar:
        found = _all([run(method, lr, TUNING_SEED) for method in methods for lr in lrs], jobs, bar)
        tuning = {method: dict(zip(lrs, found[i * len(lrs) :])) for i, method in enumerate(methods)}
        best = {method: max(lrs, key=lambda lr: worth(tuning[method][lr])) for method in methods}
        found = _all([run(method, best[method], seed) for method in methods for seed in range(seeds)], jobs, bar)
    result = {
        method: {
            "lr": best[method],
            "tuning": {f"{lr:g}": {c: row[c] for c in COLUMNS} for lr, row in tuning[method].items()},
            "seeds": found[i * seeds : (i + 1) * seeds],
        }
        for i, method in enumerate(methods)
    }
    write_text(out / "ablation.json", json.dumps(result, indent=2) + "\n")
    return format_ablation(result)


def worth(row: dict) -> tuple[bool, float, float]:
    """What `RULE` compares of a tuning run; a coverage that is undefined is none."""
    validity, coverage = row["validity"], row["coverage"] or 0.0
    kept = coverage >= COVERAGE_FLOOR
    return kept, validity if kept else validity * coverage, validity


def _all(runs: list[Run], jobs: int, bar: tqdm) -> list[dict]:
    """The row of every run, in order."""
    if jobs == 1:
        rows = []
        for one in runs:
            rows.append(one())
            bar.update()
        return rows
    threads = max(1, (os.cpu_count() or 1) // jobs)
    spawn = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (threads,)) as pool:
        futures = [pool.submit(run) for run in runs]
        try:
            for future in as_completed(futures):
                future.result()  # the first that fails ends them all
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def format_ablation(result: dict) -> str:
    """Mean and standard deviation over seeds, as text; of fewer seeds where a figure is undefined on some.

    Under the table stands how a rate was chosen.
    """
    lines = [f"{'method':16}{'lr':>8} " + "".join(f"{c:>26}" for c in COLUMNS)]
    for method, row in result.items():
        cells = []
        for column in COLUMNS:
            values = [seed[column] for seed in row["seeds"] if seed[column] is not None]
            some = f" ({len(values)} of {len(row['seeds'])})" if len(values) < len(row["seeds"]) else ""
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} +- {spread:.3f}{some}" if values else "undefined")
        star = "" if worth(row["tuning"][f"{row['lr']:g}"])[0] else "*"
        lines.append(f"{method:16}{row['lr']:>8g}{star:1}" + "".join(f"{c:>26}" for c in cells))
    return "\n".join([*lines, RULE])
