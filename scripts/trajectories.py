"""Regression test of training: record twenty steps of the `dimo` command, and compare later versions with them.

    python scripts/trajectories.py record [NAME ...]     # writes tests/data/trajectories/NAME.json
    python scripts/trajectories.py check [NAME ...]      # trains again and compares; exit code 1 beyond the tolerance
    python scripts/trajectories.py record NAME --cpu MODEL   # a second recording, NAME@MODEL.json, beside the first

A file holds the command, the metrics of every step and, for each tensor of student, auxiliary and EMA after steps 3 and
20, its norm and its product with a fixed random vector. On the recording machine all steps are reproduced bit for bit.
On another CPU sums are rounded differently, until a token is sampled differently, so only the first three steps are
compared there. In bf16 even the first sampled tokens may differ between kinds of CPU: then there is a recording for
each, made from the same commit, and one of them has to agree. A commit with new recordings should say why the numbers
may change.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "tests" / "data" / "trajectories"
STEPS, LOOKED_AT = 20, (3, 20)  # number of steps, and those after which tensors are recorded
EVERYWHERE = 3  # number of steps that must agree on any machine
ALL = [
    "model.device=cpu", f"training.max_train_steps={STEPS}", "experiment.log_every=1", "experiment.save_every=3",
    "experiment.keep_last=9", "experiment.sample_every=1000000",
]  # fmt: skip
SMALL = ["-c", "shapes", "distill.batch_size_per_gpu=8"]
RUNS = {
    "shapes": SMALL,
    "literal": ["-c", "literal", "distill.batch_size_per_gpu=8"],
    "reinforce": [*SMALL, "distill.estimator=reinforce"],
    "tiny-ursa": [
        "-c", "distill_dimo", "distill.teacher_ckpt=tests/data/tiny-ursa", "distill.prompt_source=CAPTIONS",
        "distill.num_frames=5", "distill.height=16", "distill.width=16", "distill.max_prompt_length=16",
        "distill.batch_size_per_gpu=2", "distill.w_kd=0.1", "distill.t_power_start=0", "distill.t_per=frame",
        "optim.warmup_steps=2", "optim.ema_every=1",
    ],
    "parts": [*SMALL, "training.gradient_accumulation_steps=2"],
    "processes": [*SMALL, "training.num_processes=2"],
}  # fmt: skip
TOLERANCE = {"tiny-ursa": 1e-2}  # bf16
CAPTIONS = [f"{what} rolls over {where}" for what in ("a red ball", "a drum", "a wheel") for where in ("sand", "grass")]
CAPTIONS += [f"{what} in the rain" for what in ("two birds", "an old boat", "a small dog", "a bridge", "a cat")]


def recordings(name: str) -> list[dict]:
    """The recorded trajectories of a run, of one or several kinds of CPU."""
    files = [RECORDED / f"{name}.json", *sorted(RECORDED.glob(f"{name}@*.json"))]
    return [json.loads(file.read_text()) for file in files]


def run_python(words: list[str], **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], **more)


def follow(name: str, folder: Path, run: Callable = run_python, looked_at: tuple[int, ...] = LOOKED_AT) -> dict:
    """Train run `name` into `folder` by `run`, which takes what follows `python`; returns the trajectory, with tensors
    after the steps `looked_at`.
    """
    captions, out = folder / "captions.txt", folder / name
    captions.write_text("\n".join(CAPTIONS), encoding="utf-8")
    words = ["train", *RUNS[name], *ALL]
    given = [word.replace("CAPTIONS", str(captions)) for word in words] + [f"experiment.output_dir={out}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = run(["-m", "dimo", *given], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    apart = ("time/", "tokens_per_s", "memory/", "gap_by_t/")  # what is timed; parts of a gap that is compared
    metrics = [{k: v for k, v in row.items() if not k.startswith(apart) and k != "time"} for row in rows]
    tensors = {str(step): digest(out / "checkpoints" / f"step-{step:08d}") for step in looked_at}
    return {"command": "dimo " + " ".join(words), "metrics": metrics, "tensors": tensors}


def digest(checkpoint: Path) -> dict[str, tuple[float, float]]:
    """{network/tensor: (norm, product with a random vector of norm 1)}, in float64."""
    torch.set_num_threads(1)  # otherwise sums depend on the machine
    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            key, flat = f"{file.stem}/{name}", tensor.double().flatten()
            g = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            vector = torch.randn(len(flat), generator=g, dtype=torch.float64)
            found[key] = flat.norm().item(), (flat @ vector / vector.norm()).item()
    return found


def numbers(trajectory: dict, upto: int) -> dict[str, float]:
    """All numbers of a trajectory up to step `upto`, {description: value}."""
    found = {f"step {row['step']} {key}": value for row in trajectory["metrics"] if row["step"] <= upto
             for key, value in row.items()}  # fmt: skip
    for step, tensors in trajectory["tensors"].items():
        for key, pair in tensors.items() if int(step) <= upto else ():
            found |= {f"step {step} {key} {kind}": value for kind, value in zip(("norm", "projection"), pair)}
    return found


def compare(want: dict, got: dict, upto: int, tolerance: float) -> list[str]:
    """A sentence for each number that is missing, new, or differs by more than `tolerance` max(1, |recorded|)."""
    want, got, wrong = numbers(want, upto), numbers(got, upto), []
    wrong += [f"{key} is missing" for key in want if key not in got]
    wrong += [f"{key} is new" for key in got if key not in want]
    for key in (key for key in want if key in got):
        a, b = want[key], got[key]
        if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
            continue
        if not abs(a - b) <= tolerance * max(1.0, abs(a)):
            wrong.append(f"{key} is {b!r}, was {a!r}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--cpu", help="kind of this machine's CPU, for a recording beside the first")
    args = parser.parse_args()
    bad = False
    for name in args.names or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            got = follow(name, Path(folder))
        file = RECORDED / (f"{name}@{args.cpu}.json" if args.cpu else f"{name}.json")
        if args.action == "record":
            RECORDED.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(got, indent=1) + "\n")
            print(f"{name}: {len(numbers(got, STEPS))} numbers in {file.relative_to(ROOT)}", flush=True)
            continue
        want = min(recordings(name), key=lambda want: len(compare(want, got, STEPS, 0.0)))
        exact = compare(want, got, STEPS, 0.0)
        wrong = compare(want, got, EVERYWHERE, TOLERANCE.get(name, 1e-4))
        bad |= bool(wrong)
        print(f"{name}: {f'{len(exact)} numbers differ, first: {exact[0]}' if exact else 'equal bit for bit'}"
              f"{f'; BEYOND THE TOLERANCE: {wrong[0]}' if wrong else ''}", flush=True)  # fmt: skip
    sys.exit(bad)


if __name__ == "__main__":
    main()
