"""Time the training step on worlds of tiles, on a GPU: ordinary steps, CUDA graphs, and runs side by side.

    python scripts/steps.py                             # 48, 320 and 1,280 tokens, exact teacher and network
    python scripts/steps.py --tokens 320 --together 1 4 --keys distill.guidance_scale=3 model.compile=true
    python scripts/steps.py --tokens 5120 --codes 64000 --batch 2 --together 1 --precision bf16

Each line: milliseconds for a step of every run beside each other, the same for one of them, the most memory that was
in use, and the seconds until the first timed step, in which kernels are compiled. The networks are new ones of the
default size.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import tempfile
import time
from pathlib import Path

import torch

from dimo.config import load_config
from dimo.errors import DimoError
from dimo.train.trainer import Trainer
from dimo.ursa import UrsaTransformer
from dimo.worlds import size_of
from dimo.worlds.teacher import TeacherRecipe, initialise, ursa_config, write_checkpoint
from dimo.worlds.tiles import TilesWorld

WARM, MOST = 8, 100  # steps before a measurement, at least, and in it, at most
LONG = 1.0  # seconds after which a measurement ends sooner


def make_tiles(folder: Path, tokens: int, codes: int) -> list[str]:
    """Write a world of so many tokens, with a teacher that has learnt nothing; returns its keys."""
    world, recipe = TilesWorld.of_size(tokens, codes=codes, palettes=4, strays=25), TeacherRecipe(c=3.0)
    torch.manual_seed(0)
    teacher = UrsaTransformer(ursa_config(world, recipe))
    initialise(teacher, world.codebook())
    write_checkpoint(folder, world, teacher, recipe.alpha, recipe.c)
    size = zip(("num_frames", "height", "width"), size_of(world.latents_shape))
    return [f"distill.teacher_ckpt={folder}", *(f"distill.{key}={n}" for key, n in size)]


def measure(trainers: list[Trainer]) -> tuple[float, float, float]:
    """(milliseconds of a step of all trainers, GiB at most, seconds before)."""
    torch.cuda.reset_peak_memory_stats()
    start, index = time.perf_counter(), 0

    def step() -> None:
        nonlocal index
        for trainer in trainers:
            with trainer.stream():
                trainer.step(index)
        index += 1

    while index < WARM or any(t.graphs is not None and not t.graphs.captured for t in trainers):
        step()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    while index < WARM + MOST and (time.perf_counter() - begin < LONG or index < WARM + 3):
        step()
    torch.cuda.synchronize()
    for trainer in trainers:
        trainer.look()
    took = 1e3 * (time.perf_counter() - begin) / (index - WARM)
    return took, torch.cuda.max_memory_allocated() / 2**30, begin - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[48, 320, 1280])
    parser.add_argument("--codes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--teacher", nargs="+", default=["exact", "network"])
    parser.add_argument("--precision", nargs="+", default=["no", "bf16"])
    parser.add_argument("--together", nargs="+", type=int, default=[0, 1, 3], help="runs as graphs; 0: one without")
    parser.add_argument("--seconds", type=float, default=1e9, help="measure nothing that would begin later")
    parser.add_argument("--keys", nargs="+", default=[], help="of all runs")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "steps.py: PyTorch finds no GPU\n")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__} {' '.join(args.keys)}", flush=True)
    print(f"{'N':>5} {'K':>6} batch teacher precision how        ms      each  peak GiB  before s", flush=True)
    begin, failed = time.perf_counter(), False
    with tempfile.TemporaryDirectory() as folder:
        worlds = {n: make_tiles(Path(folder) / str(n), n, args.codes) for n in args.tokens}
        for n, precision, teacher, runs in itertools.product(worlds, args.precision, args.teacher, args.together):
            head = f"{n:5} {args.codes:6} {args.batch:5} {teacher:7} {precision:9}"
            if time.perf_counter() - begin > args.seconds:
                print(f"{head} {runs} left out, since the time is up", flush=True)
                continue
            words = [
                *worlds[n], f"distill.batch_size_per_gpu={args.batch}", f"distill.teacher={teacher}",
                f"training.mixed_precision={precision}", f"training.cuda_graph={str(runs > 0).lower()}",
                f"experiment.output_dir={folder}/run", "training.max_train_steps=100000", *args.keys,
            ]  # fmt: skip
            try:
                config = [load_config("tiles", [*words, f"experiment.seed={seed}"]) for seed in range(max(1, runs))]
                ms, gib, before = measure([Trainer(one) for one in config])
            except (DimoError, RuntimeError) as error:  # RuntimeError: too little memory, or a kernel's failure
                failed = True
                print(f"{head} {runs} FAILED: {str(error).strip().splitlines()[0]}", flush=True)
            else:
                how = f"{runs} graphs" if runs else "ordinary"
                print(f"{head} {how:9}{ms:9.2f} {ms / max(1, runs):8.2f} {gib:9.2f} {before:9.1f}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    sys.exit(failed)


if __name__ == "__main__":
    main()
