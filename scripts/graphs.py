"""Check training.cuda_graph on a GPU, and time it.

    python scripts/graphs.py                  # all checks, then times; exit code 1 if a check fails
    python scripts/graphs.py steps time       # some of them: steps tiles eager resume seeds nan time
    python scripts/graphs.py time --compile   # with model.compile=true

Preset shapes_long in small runs, and for `tiles` a world of 320 tokens x 1,000 codes, whose logits are made in chunks;
scripts/steps.py times such worlds. "off by" is the norm of the difference of the weights of student, auxiliary and EMA,
as a share of what the weights have moved. A sampled token that flips changes more than rounding, so what is compared is
first compared with itself: a second run of the ordinary steps gives the noise, which the graphs may exceed threefold.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file
from steps import make_tiles

from dimo.config import load_config
from dimo.errors import DimoError, trusted_values
from dimo.run.folder import RunFolder
from dimo.train.together import train_together
from dimo.train.trainer import Trainer

OFF = 1e-4  # share of the movement by which replays may differ from the same steps without capture
OFF_EAGER = 1e-2  # from those of a run without training.cuda_graph, which round learning rates otherwise
COMPILE: list[str] = []
CASES = {  # 40 steps of training, of which the first STEPS are made
    "the recipe": [],
    "stabilisers": [
        "distill.t_curriculum_steps=7", "distill.lambda_ent=0.02", "distill.lambda_ent_high=0.2",
        "distill.entropy_floor=0.9999", "distill.ent_anneal_to=30", "distill.p_corrupt_fade=1",
    ],
    "guidance 3": ["distill.guidance_scale=3"],
    "a time per frame": ["distill.t_per=frame"],
    "stabilisers, guidance 3, a time per frame": [
        "distill.t_curriculum_steps=7", "distill.lambda_ent=0.02", "distill.lambda_ent_high=0.2",
        "distill.entropy_floor=0.9999", "distill.guidance_scale=3", "distill.t_per=frame",
    ],
    "stage 7 in every second step": ["distill.w_kd=0.5", "distill.kd_every=2"],
    "reinforce": ["distill.estimator=reinforce"],
    "forward KL, AdamW": ["distill.divergence=forward", "optim.optimizer=adamw", "distill.w_reinforce=0.1"],
}  # fmt: skip
TILES = {
    "exact teacher and target": ["distill.teacher=exact", "distill.aux_target=exact"],
    "exact teacher, stabilisers, guidance 3, mixed times": [
        "distill.teacher=exact", "distill.t_curriculum_steps=7", "distill.lambda_ent=0.02", "distill.t_shift=law",
        "distill.t_power_start=6", "distill.lambda_ent_high=0.2", "distill.entropy_floor=0.9999",
        "distill.guidance_scale=3", "distill.t_per=mixed",
    ],
    "network as teacher, guidance 3, exact target": ["distill.guidance_scale=3", "distill.aux_target=exact"],
    "exact teacher, bf16": ["distill.teacher=exact", "training.mixed_precision=bf16"],
    "exact teacher, bf16, AdamW": [
        "distill.teacher=exact", "training.mixed_precision=bf16", "optim.optimizer=adamw", "optim.ema_every=3",
    ],
    "network as teacher, bf16, guidance 3": ["distill.guidance_scale=3", "training.mixed_precision=bf16"],
}  # fmt: skip
STEPS = 14  # three ordinary ones of each kind, then replays
SMALL = [
    "distill.batch_size_per_gpu=64", "optim.warmup_steps=2", "training.max_train_steps=40",
    "experiment.sample_every=1000000", "experiment.log_every=8", "experiment.save_every=12",
]  # fmt: skip


def trainer_for(folder: Path, *more: str, graph: bool = True) -> Trainer:
    words = [*SMALL, f"training.cuda_graph={str(graph).lower()}", f"experiment.output_dir={folder}", *COMPILE, *more]
    return Trainer(load_config("shapes_long", words))


def weights_of(trainer: Trainer) -> torch.Tensor:
    n = trainer.networks
    return torch.cat([p.detach().flatten().double() for net in (n.student, n.aux, n.ema) for p in net.parameters()])


def saved_weights(folder: Path, step: int) -> torch.Tensor:
    files = [folder / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors" for name in ("student", "aux", "ema")]
    return torch.cat([w.flatten().double() for file in files for _, w in sorted(load_file(file).items())])


def off(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor) -> float:
    """Difference of b from a, as a share of the way from start to a."""
    return ((a - b).norm() / (a - start).norm()).item()


def report(what: str, by: float, most: float) -> bool:
    print(f"{'ok  ' if by <= most else 'FAIL'} {what}: off by {by:.1e} (at most {most:.1e})", flush=True)
    return by <= most


def without_capture(trainer: Trainer, steps: int) -> None:
    """The same steps, with rates and fades in tensors, none of them captured."""
    with trainer.stream(), trusted_values():
        for index in range(steps):
            for _ in trainer.walk(index):
                pass
    torch.cuda.synchronize()


def tiles(folder: Path) -> bool:
    """The same of a larger world, whose teacher has learnt nothing."""
    keys = make_tiles(folder / "world", 320, 1_000)
    return steps(folder, {name: [*keys, *more] for name, more in TILES.items()})


def steps(folder: Path, cases: dict[str, list[str]] = CASES) -> bool:
    """Replays against the same steps without capture; metrics, memory and events too."""
    good = True
    for name, more in cases.items():
        made: list[tuple[Trainer, torch.Tensor]] = []
        for capture in (False, False, True):
            trainer = trainer_for(folder / "steps", *more)
            start = weights_of(trainer)
            if capture:
                for index in range(STEPS):
                    step, _ = trainer.step(index)
            else:
                without_capture(trainer, STEPS)
            assert trainer.graphs is not None
            trainer.look()
            made.append((trainer, weights_of(trainer)))
        (plain, a), (again, a_again), (replayed, b) = made
        noise = off(a, a_again, start)
        good &= report(f"{name}, {STEPS} steps, noise {noise:.1e}", off(a, b, start), max(OFF, 3 * noise))
        kinds = {replayed.graphs.kind(index) for index in range(STEPS)}
        good &= say(f"    {len(kinds)} kinds of step are captured", replayed.graphs.captured.keys() == kinds)
        others = (again.x_init.x_hat, replayed.x_init.x_hat)
        least, differ = ((plain.x_init.x_hat != x_hat).float().mean().item() for x_hat in others)
        text = f"    {100 * differ:.2f}% of the tokens in memory differ, between ordinary runs {100 * least:.2f}%"
        good &= say(text, differ <= max(0.02, 1.5 * least))
        want, twice, got = (trainer.averages.take() for trainer, _ in made)
        least, by = (
            max(abs(float(other[k]) - float(want[k])) / (1e-3 + abs(float(want[k]))) for k in want)
            for other in (twice, got)
        )
        text = f"    metrics are off by {by:.1e}, between ordinary runs {least:.1e}"
        good &= say(text, got.keys() == want.keys() and by < max(0.01, 3 * least))
        if "distill.lambda_ent=0.02" in more:
            weights = [float(trainer.lambda_ent) for trainer in (plain, replayed)]
            switches = [event["event"] for event in replayed.events]
            good &= say(f"    lambda_ent is {weights[1]:g}, noticed: {switches}", weights[0] == weights[1])
        values = replayed.metrics(step)
        good &= say("    all metrics are finite", all(v == v and abs(v) < float("inf") for v in values.values()))
    return good


def say(what: str, fine: bool) -> bool:
    print(what if fine else f"FAIL {what.strip()}", flush=True)
    return fine


def eager(folder: Path) -> bool:
    """Replays against a run without training.cuda_graph."""
    good = True
    for name in ("the recipe", "stabilisers, guidance 3, a time per frame"):
        plain, again, replayed = (trainer_for(folder / "eager", *CASES[name], graph=g) for g in (False, False, True))
        start = weights_of(plain)
        for index in range(STEPS):
            for trainer in (plain, again, replayed):
                trainer.step(index)
        torch.cuda.synchronize()
        a, b, c = (weights_of(trainer) for trainer in (plain, again, replayed))
        noise = off(a, b, start)
        good &= report(f"{name}, without cuda_graph, noise {noise:.1e}", off(a, c, start), max(OFF_EAGER, 3 * noise))
    return good


def resume(folder: Path) -> bool:
    """A run that fails between two checkpoints and goes on, against one that does not."""
    # not "stabilisers": its bonus switches at a threshold that rounding can cross
    more = [*CASES["stabilisers, guidance 3, a time per frame"], "training.max_train_steps=24"]
    for name in ("whole", "twice"):
        trainer_for(folder / name, *more).train(progress=False)
    broken = trainer_for(folder / "resumed", *more)
    inner = broken.step

    def step(index):
        if index == 17:
            raise DimoError("stopped on purpose")
        return inner(index)

    broken.step = step  # type: ignore[method-assign]
    try:
        broken.train(progress=False)
    except DimoError as error:
        assert "on purpose" in str(error), error
    trainer_for(folder / "resumed", *more).train(progress=False)
    whole, twice, resumed = (saved_weights(folder / name, 24) for name in ("whole", "twice", "resumed"))
    moved = (saved_weights(folder / "whole", 12) - whole).norm()
    noise = ((whole - twice).norm() / moved).item()
    by = ((whole - resumed).norm() / moved).item()
    rows = RunFolder(folder / "resumed").metrics()
    good = say(f"metrics at steps {[row['step'] for row in rows]}", [row["step"] for row in rows] == [8, 16, 24])
    return report(f"a resumed run, noise {noise:.1e}", by, max(OFF, 3 * noise)) and good


def seeds(folder: Path) -> bool:
    """Two seeds side by side against each alone."""
    more, good = ["training.max_train_steps=24", *CASES["stabilisers, guidance 3, a time per frame"]], True
    both = [trainer_for(folder / f"both-{seed}", *more, f"experiment.seed={seed}") for seed in (1, 2)]
    train_together(both, progress=False)
    for seed in (1, 2):
        for name in ("alone", "again"):
            trainer_for(folder / f"{name}-{seed}", *more, f"experiment.seed={seed}").train(progress=False)
        alone, again, beside = (saved_weights(folder / f"{name}-{seed}", 24) for name in ("alone", "again", "both"))
        moved = (saved_weights(folder / f"alone-{seed}", 12) - alone).norm()
        noise = ((alone - again).norm() / moved).item()
        by = ((alone - beside).norm() / moved).item()
        good &= report(f"seed {seed} beside another, noise {noise:.1e}", by, max(OFF, 3 * noise))
    one, two = (saved_weights(folder / f"both-{seed}", 24) for seed in (1, 2))
    return say("the seeds differ", not torch.equal(one, two)) and good


def nan(folder: Path) -> bool:
    """A value that is not finite ends the run at the next line of metrics."""
    trainer = trainer_for(folder / "nan")
    inner = trainer.step

    def step(index):
        if index == 18:
            trainer.networks.teacher.model.norm.weight.data.fill_(torch.nan)
        return inner(index)

    trainer.step = step  # type: ignore[method-assign]
    try:
        trainer.train(progress=False)
    except DimoError as error:
        run = RunFolder(folder / "nan")
        return say(str(error), "step 19 met" in str(error) and "step-00000012" in str(error)) and say(
            "nothing was written", [row["step"] for row in run.metrics()] == [8, 16]
            and [f.name for f in (folder / "nan" / "checkpoints").iterdir()] == ["step-00000012"],
        )  # fmt: skip
    return say("the run did not stop", False)


def times(folder: Path) -> bool:
    """Milliseconds per step of 256 videos."""
    large = ["distill.batch_size_per_gpu=256", "training.max_train_steps=100000"]

    def measure(trainers: list[Trainer], warm: int, count: int) -> float:
        for index in range(warm + count):
            if index == warm:
                torch.cuda.synchronize()
                begin = time.perf_counter()
            for trainer in trainers:
                with trainer.stream():
                    trainer.step(index)
        torch.cuda.synchronize()
        for trainer in trainers:
            trainer.look()
        return 1e3 * (time.perf_counter() - begin) / count

    plain = measure([trainer_for(folder / "time", *large, graph=False)], 5, 20)
    print(f"without graphs                {plain:8.2f} ms", flush=True)
    for name, more in (("", []), (", three stabilisers, guided", CASES["stabilisers, guidance 3, a time per frame"])):
        for count in (1, 3):
            trainers = [trainer_for(folder / "time", *large, *more, f"experiment.seed={s}") for s in range(count)]
            took = measure(trainers, 12, 200)
            memory = torch.cuda.max_memory_allocated() / 2**30
            print(f"{count} with graphs{name:28} {took:8.2f} ms, {took / count:.2f} each, {memory:.1f} GiB", flush=True)
            del trainers
    return True


CHECKS = {"steps": steps, "tiles": tiles, "eager": eager, "resume": resume, "seeds": seeds, "nan": nan, "time": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--compile", action="store_true", help="with model.compile=true")
    args = parser.parse_args()
    for name in args.names:
        if name not in CHECKS:
            parser.error(f"{name} is not one of {', '.join(CHECKS)}")
    if not torch.cuda.is_available():
        parser.exit(2, "graphs.py: PyTorch finds no GPU\n")
    COMPILE.extend(["model.compile=true"] if args.compile else [])
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}{', compiled' if args.compile else ''}", flush=True
    )
    failed = []
    for name in args.names or CHECKS:
        print(f"--- {name}", flush=True)
        begin = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as folder:
                good = CHECKS[name](Path(folder))
        except Exception:
            traceback.print_exc(file=sys.stdout)
            good = False
        print(f"    {time.perf_counter() - begin:.0f} s", flush=True)
        failed += [] if good else [name]
        gc.collect()
        torch.cuda.empty_cache()
    print(f"FAILED: {', '.join(failed)}" if failed else "all good", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
