"""`python scripts/kill.py`: kill runs with SIGKILL at random moments; resumed, they must give bit-identical results.

For each number of processes there is one undisturbed run of 40 steps, and `--points` runs that are killed and resumed,
half of them while a checkpoint is being written, some of them twice. Weights, optimizer states, memories of x_init and
metrics must be equal bit for bit. The processes are forked from this one, so a restart does not repeat the imports.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # accelerate would set a number of its own, on which floating-point sums depend

import torch
from safetensors.torch import load_file

import dimo.train.trainer
from dimo.config import load_config
from dimo.run.folder import RunFolder
from dimo.worlds import checkpoint_folder, load_world

SAVE_EVERY = 3
# uses every stateful component: prompt stream, x_init memory, entropy controller, time curriculum, EMA baseline
SMALL = [
    "model.device=cpu", "distill.batch_size_per_gpu=2", "distill.p_corrupt=0.5", "distill.lambda_ent=0.01",
    "distill.entropy_floor=1.0", "distill.t_curriculum_steps=10", "distill.w_kd=0.1", "distill.w_reinforce=0.1",
    "distill.shuffle_buffer=16", "distill.aux_steps=1", f"experiment.save_every={SAVE_EVERY}", "experiment.log_every=2",
    "experiment.sample_every=1000",
]  # fmt: skip


def start(folder: Path, captions: Path, steps: int, processes: int) -> list[int]:
    """Fork the ranks of a run; returns their process ids."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [_fork(rank, folder, captions, steps, processes, port) for rank in range(processes)]


def _fork(rank: int, folder: Path, captions: Path, steps: int, processes: int, port: int) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = os.open(f"{folder}.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own = [f"experiment.output_dir={folder}", f"training.max_train_steps={steps}"]
        own += ["distill.estimator=reinforce"] if processes > 1 else []  # with a baseline
        config = load_config("smoke", [*SMALL, *own, f"distill.prompt_source={captions}"])
        dimo.train.trainer.Trainer(config).train(progress=False)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end(ranks: list[int], within: float | None = None) -> list[int]:
    """Wait at most `within` seconds for the ranks, then kill them; returns their exit codes, -9 if killed."""
    until, codes = time.monotonic() + (1e9 if within is None else within), {}
    while len(codes) < len(ranks):
        for rank in ranks:
            if rank not in codes:
                if time.monotonic() > until:
                    os.kill(rank, signal.SIGKILL)
                found, status = os.waitpid(rank, os.WNOHANG)
                if found:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return [codes[rank] for rank in ranks]


def wait_until(happened, within: float) -> None:
    until = time.monotonic() + within
    while not happened() and time.monotonic() < until:
        time.sleep(0.001)


def kill_at_random(ranks: list[int], folder: Path, steps: int, draw: random.Random, writing: bool) -> str:
    """Kill all ranks around a random step, or with `writing` during the next writing of a checkpoint.

    One in ten runs is killed while it is still loading. Returns a description.
    """

    def reached() -> bool:
        status = RunFolder(folder).status()
        return status.get("pid") == ranks[0] and status["state"] != "starting" and status.get("step", -1) >= target

    target = draw.randrange(steps - 3)
    if draw.random() < 0.9:
        wait_until(reached, 120)
    time.sleep(draw.uniform(0, 0.1))
    if writing:
        wait_until(lambda: any(folder.glob("checkpoints/.step-*.partial")), 10)
        time.sleep(draw.uniform(0, 0.01))
    for rank in draw.sample(ranks, len(ranks)):
        os.kill(rank, signal.SIGKILL)
    codes = end(ranks)
    left = any(folder.glob("checkpoints/.step-*.partial"))
    saved = [f.name for f in sorted(folder.glob("checkpoints/step-*"))[-1:]]
    return f"{'partial checkpoint left, ' if left else ''}newest {saved[0] if saved else 'none'}, exit codes {codes}"


def outcome(folder: Path) -> dict:
    """The results of a run that must not depend on kills."""
    last = sorted(folder.glob("checkpoints/step-*"))[-1]
    files = {f.name: load_file(f) for f in last.glob("*.safetensors")}
    files |= {f.name: torch.load(f, weights_only=True) for f in last.glob("*.pt")}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time/", "tokens_per_s", "memory")
    rows = [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows]
    student = torch.load(folder / "checkpoints" / "final" / "student.pt", weights_only=True)
    return {"last": last.name, "files": files, "metrics": rows, "student.pt": student}


def difference(a, b, where: str = "") -> str | None:
    """The first place where two outcomes are not equal bit for bit, or None."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next((d for d in (difference(a[k], b[k], f"{where}.{k}") for k in a) if d), None)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return next((d for d in (difference(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b))) if d), None)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else where
    return None if type(a) is type(b) and a == b else where


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    import dimo.train.trainer  # noqa: F401 - imported once, for all forked processes

    draw, failures = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as temporary:
        captions = Path(temporary, "captions.txt")
        captions.write_text("\n".join(load_world(checkpoint_folder("shapes")).prompts), encoding="utf-8")
        for processes in args.processes:
            undisturbed = Path(temporary, f"undisturbed-{processes}")
            codes = end(start(undisturbed, captions, args.steps, processes))
            assert codes == [0] * processes, Path(f"{undisturbed}.0.txt").read_text()
            expected = outcome(undisturbed)
            for point in range(args.points):
                folder, kills = Path(temporary, f"killed-{processes}-{point}"), []
                for steps in draw.choice(([args.steps], [args.steps], [args.steps // 2, args.steps])):
                    ranks = start(folder, captions, args.steps, processes)
                    kills.append(kill_at_random(ranks, folder, steps, draw, writing=point % 2 == 0))
                codes = end(start(folder, captions, args.steps, processes))
                if codes == [0] * processes:
                    differs = difference(expected, outcome(folder))
                else:
                    differs = f"exit codes {codes}: " + Path(f"{folder}.0.txt").read_text()[-2000:]
                failures += differs is not None
                said = "bit-equal" if differs is None else f"DIFFERS at {differs}"
                print(f"{processes} process(es), point {point + 1}: {said}; {'; then '.join(kills)}", flush=True)
                shutil.rmtree(folder)
    print(f"{failures} of {args.points * len(args.processes)} killed runs differ from the undisturbed run")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
