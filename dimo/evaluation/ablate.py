"""The recipe against the alternatives: same steps, same learning rates to choose from, same seeds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from tqdm import tqdm

from dimo.errors import DimoError
from dimo.evaluation.evaluate import evaluate_to_folder
from dimo.files import write_text
from dimo.train.config import load_config
from dimo.train.trainer import Trainer

TUNING_SEED = 100  # never among the seeds that are reported
METHODS = {
    "recipe": [],
    "no x_init mix": ["distill.p_corrupt=0"],
    "t curriculum": ["distill.t_curriculum_steps={half}"],
    "entropy bonus": ["distill.lambda_ent=0.01"],
    "AdamW": ["optim.optimizer=adamw"],
    "forward KL": ["distill.divergence=forward"],
    "Jeffreys": ["distill.divergence=jeffreys"],
    "shared pass": ["distill.aux_pass=shared"],
    "embeddings kept": ["model.train_embeddings=false"],
    "KD beside": ["distill.w_kd=0.1"],
    "KD every 4th": ["distill.w_kd=0.1", "distill.kd_every=4"],
    "reinforce": ["distill.estimator=reinforce"],
    "KD alone": ["distill.w_distill=0", "distill.w_kd=1"],
    "literal": [
        "distill.estimator=reinforce", "distill.aux_objective=match_teacher", "distill.aux_steps=1", "distill.w_kd=1",
        "distill.lambda_ent=0.01", "distill.t_curriculum_steps=10000",
    ],
}  # fmt: skip
COLUMNS = ("validity", "adherence", "coverage")


def ablate(out: Path, config: str | None, overrides: list[str], lrs: list[float], seeds: int, methods=None) -> str:
    """Tune every method's learning rate on one seed, report it on others; returns the table, writes ablation.json.

    The auxiliary's rate and Muon's keep their ratios to the student's. A finished run is not run again, so the
    command may be killed and repeated. `validity` is the one-step student's, sampled; coverage counts as 0 where it is
    undefined.
    """
    methods = list(methods or METHODS)
    for method in methods:
        if method not in METHODS:
            raise DimoError(f"there is no method {method!r}; there is {', '.join(METHODS)}")
    if seeds < 1 or not lrs or min(lrs) <= 0:
        raise DimoError(f"seeds must be at least 1 and lrs positive, got {seeds} and {lrs}")
    base = load_config(config, overrides)
    o, half = base.optim, base.training.max_train_steps // 2
    result = {}
    bar = tqdm(total=len(methods) * (len(lrs) + seeds), desc="ablate", unit="run")

    def run(method: str, lr: float, seed: int) -> dict:
        folder = out / f"{method.replace(' ', '_')}-lr{lr:g}-seed{seed}"
        bar.set_postfix_str(folder.name)
        report = folder / "report.json"
        if not report.exists():
            switches = [switch.format(half=half) for switch in METHODS[method]]
            rates = {"lr": lr, "aux_lr": lr * o.aux_lr / o.lr, "muon_lr": lr * o.muon_lr / o.lr}
            own = [f"optim.{name}={rate}" for name, rate in rates.items()] + [f"experiment.seed={seed}"]
            own += [f"experiment.output_dir={folder}", "experiment.name=ablation", "evaluation.teacher_steps=[1]"]
            settings = load_config(config, [*overrides, *switches, *own])
            Trainer(settings).train(progress=False)
            evaluate_to_folder(settings, folder / "checkpoints" / "final", folder, progress=False)
        bar.update()
        return json.loads(report.read_text())["student_1"]

    for method in methods:
        tuning = {lr: run(method, lr, TUNING_SEED)["validity"] for lr in lrs}
        best = max(tuning, key=tuning.get)
        rows = [run(method, best, seed) for seed in range(seeds)]
        result[method] = {"lr": best, "tuning": {f"{lr:g}": v for lr, v in tuning.items()}, "seeds": rows}
        write_text(out / "ablation.json", json.dumps(result, indent=2) + "\n")
    bar.close()
    return format_ablation(result)


def format_ablation(result: dict) -> str:
    """Mean and standard deviation over seeds, as text."""
    lines = [f"{'method':16}{'lr':>8}" + "".join(f"{c:>18}" for c in COLUMNS)]
    for method, row in result.items():
        cells = []
        for column in COLUMNS:
            values = [seed[column] or 0.0 for seed in row["seeds"]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} +- {spread:.3f}")
        lines.append(f"{method:16}{row['lr']:>8g}" + "".join(f"{c:>18}" for c in cells))
    return "\n".join(lines)
