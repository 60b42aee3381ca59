"""Check that DDP, FSDP2 and DeepSpeed ZeRO-2 train alike: twenty steps from random weights under each, compared.

Run `accelerate launch --config_file dimo/config/presets/accelerate/E.yaml --num_processes 2 scripts/engines.py OUT`
for E in ddp, fsdp2, deepspeed_zero2, then `python scripts/engines.py OUT`, without a launcher, for the comparison. In
the first step the sampled codes must be equal, and losses and gradient norms equal up to bf16 rounding. After the
first update different codes are sampled, as with another seed, so steps 2 to 20 are compared by their means, in
standard errors. The exit code is 1 if the first step or a mean differs by more than that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dimo.bench import bench_config
from dimo.bench.sizes import random_prompts, random_ursa
from dimo.distill.stages import Step
from dimo.train.trainer import Trainer

KEYS = ("loss/aux", "loss/total", "grad_norm/aux", "grad_norm/student")
WRITTEN = 2000  # number of codes of x_hat to compare


def process() -> tuple[torch.device, int]:
    """(device, rank) of this process, which a launcher may have started."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if not torch.cuda.is_available():
        return torch.device("cpu"), rank
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank), rank


def timed_steps(trainer: Trainer, steps: int) -> Iterator[tuple[Step, dict, float]]:
    """Train; yields (results, metrics, seconds) of every step."""
    for index in range(steps):
        begin = time.perf_counter()
        step, values = trainer.step(index)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        yield step, values, time.perf_counter() - begin


def peak_gib() -> float | None:
    """The most GPU memory that was in use; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def train(out: Path, size: str, steps: int, keys: list[str]) -> None:
    """Train and write OUT/<engine>.json: metrics of every step, median seconds per step, peak memory of rank 0."""
    device, rank = process()
    own = ["optim.lr=1e-4", "optim.aux_lr=2e-4", "optim.warmup_steps=1", "model.compile=false"]
    config = bench_config(None, size, [*own, f"experiment.output_dir={out}", *keys])
    ursa = random_ursa(size, device)
    trainer = Trainer(config, ursa, random_prompts(ursa, config.distill.max_prompt_length))
    rows, seconds = [], []
    for step, norms, took in timed_steps(trainer, steps):
        seconds.append(took)
        losses = torch.stack([torch.stack(step.aux_losses).mean(), step.loss.detach()]).float()
        values = [*trainer.engine.mean(losses).tolist(), *(float(norms[key]) for key in KEYS[2:])]
        rows.append({"x_hat": step.x_hat.flatten()[:WRITTEN].tolist(), **dict(zip(KEYS, values))})
    if rank == 0:
        report = {"seconds": statistics.median(seconds[2:] or seconds), "peak_gib": peak_gib(), "rows": rows}
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{trainer.engine.kind}.json").write_text(json.dumps(report))


def compare(out: Path, noise: float = 1e-3) -> int:
    """Print the comparison of every engine with DDP; returns 1 if one differs, else 0."""
    runs, wrong = {file.stem: json.loads(file.read_text()) for file in sorted(out.glob("*.json"))}, 0
    for engine, run in runs.items():
        first, base = run["rows"][0], runs["ddp"]["rows"][0]
        same = first["x_hat"] == base["x_hat"]
        off = {key: abs(first[key] / base[key] - 1) for key in KEYS}
        peak = "" if run["peak_gib"] is None else f", peak {run['peak_gib']:.1f} GiB"
        print(
            f"{engine}: {1e3 * run['seconds']:.0f} ms per step{peak}; first step: codes {'equal' if same else 'DIFFER'}"
        )
        wrong += not same or max(off.values()) > noise
        for key in KEYS:
            ours, theirs = ([row[key] for row in runs[name]["rows"][1:]] for name in (engine, "ddp"))
            error = ((statistics.variance(ours) + statistics.variance(theirs)) / len(ours)) ** 0.5
            distance = abs(statistics.mean(ours) - statistics.mean(theirs)) / error
            wrong += distance > 3.5
            print(f"    {key:20} first step off by {off[key]:.1e}; then mean {statistics.mean(ours):8.4f}, "
                  f"{distance:.1f} standard errors from DDP's")  # fmt: skip
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="0.6B")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if "LOCAL_RANK" not in os.environ:
        return compare(args.out)
    train(args.out, args.size, args.steps, args.keys)
    return 0


if __name__ == "__main__":
    sys.exit(main())
