"""Ablations: the recipe against its alternatives, with equal steps, learning rate grids and seeds."""

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

TUNING_SEED = 100  # not among the reported seeds
PLAIN = ["model.logit_gain=1", "model.final_logit_gain=1"]  # no gain on the student's logits


def _keys_of(preset: str) -> list[str]:
    """The keys of a preset as overrides, without those of `experiment`."""
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
COVERAGE_FLOOR = 0.8  # students without mode collapse had a coverage of at least .84, collapsed ones of at most .71
RULE = (
    f"lr: the learning rate with the highest validity on seed {TUNING_SEED} among those with a coverage of at least "
    f"{COVERAGE_FLOOR}, since a collapsed student can have valid videos only; * none reached that coverage, so the one "
    "with the highest product of validity and coverage"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a method, with a learning rate and a seed, in `folder`.

    `config` (a preset or file) and `overrides` are those of the command, common to all runs.
    """

    method: str
    lr: float
    seed: int
    folder: Path
    config: str | None
    overrides: tuple[str, ...]

    def settings(self) -> Config:
        """The run's configuration; aux_lr and muon_lr keep their ratios to lr in the command's configuration."""
        base = load_config(self.config, list(self.overrides))
        o, half = base.optim, base.training.max_train_steps // 2
        rates = {"lr": self.lr, "aux_lr": self.lr * o.aux_lr / o.lr, "muon_lr": self.lr * o.muon_lr / o.lr}
        own = [switch.format(half=half) for switch in METHODS[self.method]]
        own += [f"optim.{name}={rate}" for name, rate in rates.items()] + [f"experiment.seed={self.seed}"]
        own += [f"experiment.output_dir={self.folder}", "experiment.name=ablation", "evaluation.teacher_steps=[1]"]
        return load_config(self.config, [*self.overrides, *own])

    def __call__(self) -> dict:
        """Train and evaluate, unless already done; returns the metrics of student_1."""
        settings, report, done = self.settings(), self.folder / "report.json", self.folder / "config.yaml"
        if not report.exists() or done.read_text(encoding="utf-8") != to_yaml(settings):
            Trainer(settings).train(progress=False)
            evaluate_to_folder(settings, self.folder / "checkpoints" / "final", self.folder, progress=False)
        return json.loads(report.read_text(encoding="utf-8"))["student_1"]


def ablate(
    out: Path, config: str | None, overrides: list[str], lrs: list[float], seeds: int, methods=None, jobs: int = 1
) -> str:
    """Tune each method's learning rate on one seed (see `RULE`), evaluate it on others and write ablation.json.

    Metrics are those of the sampled one-step student. Finished runs are not repeated, so the command can be killed and
    run again.

    Args:
        out: folder of the runs and of ablation.json.
        config: preset or YAML file, common to all runs.
        overrides: key=value settings, common to all runs.
        lrs: learning rates to choose from, for the student; those of the auxiliary and of Muon keep their ratio to it.
        seeds: number of seeds to report.
        methods: keys of METHODS; default: all.
        jobs: number of runs at a time, each a process with its share of the CPU cores.

    Returns:
        The table of `format_ablation`.

    Raises:
        DimoError: an unknown method, numbers out of range, or a teacher that belongs to no world and cannot be scored.
    """
    methods = list(methods or METHODS)
    for method in methods:
        if method not in METHODS:
            raise DimoError(f"methods must be among {', '.join(METHODS)}, got {method!r}")
    if seeds < 1 or jobs < 1 or not lrs or min(lrs) <= 0:
        raise DimoError(f"seeds and jobs must be at least 1 and lrs positive, got {seeds}, {jobs} and {lrs}")

    teacher = load_config(config, overrides).distill.teacher_ckpt
    if not is_world(checkpoint_folder(teacher)):
        raise DimoError(f"ablations need a built-in world, whose oracle scores the videos, but {teacher} is not one")

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
    """Sort key of a tuning run by `RULE`; an undefined coverage counts as 0."""
    validity, coverage = row["validity"], row["coverage"] or 0.0
    kept = coverage >= COVERAGE_FLOOR
    return kept, validity if kept else validity * coverage, validity


def _all(runs: list[Run], jobs: int, bar: tqdm) -> list[dict]:
    """Metrics of all runs, in order."""
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
                future.result()  # the first failure cancels the rest
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def format_ablation(result: dict) -> str:
    """The ablation as a text table, with `RULE` below: mean and standard deviation over seeds.

    Seeds on which a metric is undefined are left out, and their number is shown.
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
