"""Check that compiled layers, chunked losses and bf16 learn the same as eager float32, on the built-in world.

`python scripts/numerics.py [--steps 200] [--seeds 4] [key=value ...] [--fast key=value ...]`, on a GPU; with
optim.optimizer=adamw the weights learn through bf16 copies (`dimo/train/masters.py`). Both variants use the same seeds,
but two runs diverge after the first code that is sampled differently. So metrics are averaged over windows of 20 steps,
and differences are compared with the spread between seeds. The exit code is 1 if a window differs by more than 3.5
standard errors.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import torch

from dimo.config import load_config
from dimo.train.trainer import Trainer

LOSSES = ("loss/aux", "reward/mean", "entropy/student", "gap/aux_teacher_tv")
WINDOW = 20


def losses_of(seed: int, steps: int, fast: bool, *more: str) -> torch.Tensor:
    """Metrics of a run, (steps, len(LOSSES))."""
    how = ["model.compile=true", "training.mixed_precision=bf16", "model.activation_checkpointing=selective"]
    with tempfile.TemporaryDirectory() as folder:
        same = [f"experiment.seed={seed}", f"experiment.output_dir={folder}", "experiment.log_every=1"]
        trainer = Trainer(load_config("shapes", [*same, *(how if fast else []), *more]))
    trainer.dense, rows = not fast, []
    for index in range(steps):
        step, _ = trainer.step(index)
        metrics = trainer.metrics(step)
        rows.append([metrics[name] for name in LOSSES])
    return torch.tensor(rows)


def compare(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Difference of the means over seeds, in standard errors: two (seeds, steps, losses) -> (windows, losses)."""
    means = [x.unflatten(1, (-1, WINDOW)).mean(2) for x in (reference, other)]
    spread = (means[0].var(0) + means[1].var(0)).div(len(reference)).sqrt()
    return (means[1].mean(0) - means[0].mean(0)).abs() / spread


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("keys", nargs="*", metavar="key=value", help="of both variants")
    parser.add_argument("--fast", nargs="*", metavar="key=value", default=[], help="of the fast variant alone")
    args = parser.parse_intermixed_args()
    variants = (False, args.keys), (True, [*args.keys, *args.fast])
    runs = [[losses_of(s, args.steps, fast, *keys) for s in range(args.seeds)] for fast, keys in variants]
    reference, other = (torch.stack(rows) for rows in runs)
    first = (reference - other)[:, :10].abs().amax((0, 1)).tolist()
    print("largest difference in the first 10 steps, same seed:", dict(zip(LOSSES, first)))
    distance = compare(reference, other)
    print(f"{'steps':>12} " + " ".join(f"{name:>34}" for name in LOSSES))
    for window, row in enumerate(distance):
        both = [x[:, window * WINDOW : (window + 1) * WINDOW].mean((0, 1)) for x in (reference, other)]
        cells = [f"{a:12.4f} {b:12.4f} {z:5.1f} s.e." for a, b, z in zip(*both, row)]
        print(f"{window * WINDOW:5} to {window * WINDOW + WINDOW - 1:3} " + " ".join(f"{cell:>34}" for cell in cells))
    print(f"largest distance: {distance.max():.1f} standard errors over {distance.numel()} windows")
    return int(distance.max() > 3.5)


if __name__ == "__main__":
    sys.exit(main())
