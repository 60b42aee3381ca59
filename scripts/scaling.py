"""Time a step of URSA's sizes on one GPU or several, random weights, under an engine; prints a line.

    python scripts/scaling.py                                                    # one GPU
    accelerate launch --config_file dimo/config/presets/accelerate/ddp.yaml --num_processes 2 scripts/scaling.py
    accelerate launch --config_file dimo/config/presets/accelerate/ddp.yaml --num_processes 2 scripts/scaling.py \\
      --preset distill_dimo_full training.sequence_parallel=2

Steps from `--first` on count. Batch and passes of a GPU are the preset's, so the efficiency of N GPUs is the time of
one over the time of N, or under training.sequence_parallel=N, that over N.
"""

from __future__ import annotations

import argparse
import os
import statistics

from engines import peak_gib, process, timed_steps

from dimo.bench.sizes import random_prompts, random_ursa, strides_for
from dimo.config import load_config
from dimo.train.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="distill_dimo")
    parser.add_argument("--size", default="1.7B")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--first", type=int, default=10, help="steps before it are not counted")
    parser.add_argument("keys", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if args.first >= args.steps:
        parser.error(f"--first must be below --steps, got {args.first} and {args.steps}")
    (device, _), gpus = process(), int(os.environ.get("WORLD_SIZE", 1))
    own = ["distill.max_prompt_length=320", "optim.warmup_steps=1", f"training.num_processes={gpus}"]
    config = load_config(args.preset, [*own, "experiment.output_dir=/nowhere", *args.keys])
    ursa = random_ursa(args.size, device, strides_for(config.distill.num_frames))
    trainer, seconds = Trainer(config, ursa, random_prompts(ursa, config.distill.max_prompt_length)), []
    del ursa
    for _, values, took in timed_steps(trainer, args.steps):
        seconds.append(took)
        if len(seconds) == 1:
            first = f"first step {took:.1f} s, grad_norm/student {float(values['grad_norm/student']):.6f}"
        if values["guard/skipped"]:
            raise SystemExit(f"step {len(seconds) - 1} was skipped")
    if trainer.engine.rank == 0:
        counted = sorted(1e3 * s for s in seconds[args.first :])
        print(
            f"{args.preset}, {trainer.engine.kind}, {gpus} GPU(s), {' '.join(args.keys) or 'no keys'}: "
            f"{statistics.median(counted):.1f} ms a step ({counted[0]:.1f} to {counted[-1]:.1f}), "
            f"{peak_gib() or 0:.1f} GiB; {first}"
        )


if __name__ == "__main__":
    main()
