"""Train one-step students of the built-in world to convergence on a GPU, with each step replayed as a CUDA graph.

`python scripts/recipe.py SEED [SEED ...] [--minutes M] [KEY=VALUE ...]` trains preset `shapes_long`. A step consists of
some 2,000 small kernels and is bound by their launches; replayed as a graph it takes a tenth of the time. The graphs of
several seeds run concurrently, each on its own stream. First a few steps are compared with `Trainer.step`. Writes
runs/recipe-SEED/student-EMA, the student as in `checkpoints/final`, and report-EMA.json; and at every evaluation
runs/recipe-SEEDS.safetensors, from which the same command resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dimo.config import load_config
from dimo.distill.schedules import XInit, fade
from dimo.distill.stages import Step
from dimo.distill.step import nine_stages
from dimo.evaluation.evaluate import evaluate
from dimo.files import whole_file
from dimo.train.optimizers import Muon, lr_factor, orthogonalise, warm_ema_decay
from dimo.train.trainer import Trainer
from dimo.ursa import save_student
from dimo.worlds import load_world
from dimo.worlds.protocol import World

CHECKED = 3  # number of steps to compare between graph and trainer


class GraphLearner:
    """A `Learner` whose learning rate is a tensor, so that its update can be captured in a graph."""

    def __init__(self, learner):
        self.learner, self.factor = learner, torch.ones((), device=next(learner.model.parameters()).device)

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        """Accumulate the gradient of the loss."""
        loss.backward()

    def gradient_norm(self) -> torch.Tensor:
        """The norm of the gradient."""
        return self.learner.gradient_norm()

    @torch.no_grad()
    def update(self, norm: torch.Tensor) -> None:
        """Clip, step with `factor` times the initial learning rate, and drop the gradient."""
        learner = self.learner
        torch._foreach_mul_(learner.gradients, (learner.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for optimizer in learner.optimizers:
            for group in optimizer.param_groups:
                rate = self.factor * group["initial_lr"]
                if isinstance(optimizer, Muon):
                    self._muon(optimizer, group, rate)
                else:
                    self._adamw(optimizer, group, rate)
        for p in learner.model.parameters():
            p.grad = None

    @staticmethod
    def _muon(optimizer, group: dict, rate: torch.Tensor) -> None:
        params, momentum = [p for p in group["params"] if p.grad is not None], group["momentum"]
        torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
        for shape in sorted({tuple(p.shape) for p in params}):
            same = [p for p in params if tuple(p.shape) == shape]
            updates = []
            for p in same:
                buffer = optimizer.state[p]["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - momentum)
                updates.append(p.grad.lerp(buffer, momentum))
            steps = orthogonalise(torch.stack(updates)) * (rate * -0.2 * math.sqrt(max(shape)))
            torch._foreach_add_(same, list(steps.unbind()))

    @staticmethod
    def _adamw(optimizer, group: dict, rate: torch.Tensor) -> None:
        (beta1, beta2), params = group["betas"], [p for p in group["params"] if p.grad is not None]
        for p in params:
            state = optimizer.state[p]
            state["step"].add_(1)
            p.mul_(1 - rate * group["weight_decay"])
            state["exp_avg"].lerp_(p.grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            least = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt().add_(group["eps"])
            p.sub_(rate / (1 - beta1 ** state["step"]) * state["exp_avg"] / least)


class GraphMemory(XInit):
    """An `XInit` whose memory is full and is updated in place."""

    def remember(self, x_hat: torch.Tensor, txt_ids: torch.Tensor) -> None:
        """Replace the oldest samples."""
        for kept, new in ((self.x_hat, x_hat), (self.txt_ids, txt_ids)):
            kept.copy_(torch.cat([new, kept])[: len(kept)])


class Graph:
    """A trainer's step as a CUDA graph; values that change from step to step are tensors, set before a replay."""

    def __init__(self, trainer: Trainer, emas: list[float]):
        self.trainer, c = trainer, trainer.config
        d, samples = c.distill, c.distill.batch_size_per_gpu
        assert d.w_kd == d.lambda_ent == d.t_curriculum_steps == 0 and d.guidance_scale == 1 and trainer.dense
        assert d.estimator == "dimo" and c.training.gradient_accumulation_steps == 1
        self.emas = emas
        self.keep = [torch.zeros((), device=self.device) for _ in emas]
        self.loss = torch.zeros((), device=self.device)
        self.first = math.ceil(trainer.x_init.capacity / samples)
        for index in range(self.first):  # fills the memory of x_init and creates the optimizer states
            trainer.step(index)
        n = trainer.networks
        pairs = zip(n.ema.parameters(), n.student.parameters())
        self.averaged, self.learning = zip(*((e, s.detach()) for e, s in pairs if s.requires_grad))
        self.averages = [[p.detach().clone() for p in self.averaged] for _ in emas]
        self.student, self.aux = GraphLearner(trainer.student), GraphLearner(trainer.aux)
        self.x_init = GraphMemory(trainer.path.codebook_size, d.p_corrupt, d.corrupt_ratio, trainer.x_init.capacity)
        self.x_init.load_state_dict({name: kept.clone() for name, kept in trainer.x_init.state_dict().items()})
        self.x_init.fade = self.fade = torch.zeros((), device=self.device)
        before = self._snapshot()
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        self.graph.register_generator_state(trainer.generator)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self._step()
        torch.cuda.synchronize()
        # relaxed, since chunks query free memory; an own stream, since concurrent graphs must not share a workspace
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="relaxed"):
            self._step()
        self._restore(before)
        self.before = before

    def _step(self) -> None:
        for _, step in nine_stages(self, self.first, [Step()], {}):  # noqa: B007
            pass
        self.loss.copy_(step.loss.detach())

    def __getattr__(self, name: str):
        """Everything else that `nine_stages` needs is the trainer's: networks, path, grid, settings, prompts, ..."""
        return getattr(self.__dict__["trainer"], name)

    def agreed(self) -> contextlib.nullcontext:
        """A single process needs no agreement."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def update_ema(self, index: int) -> None:
        """Update every moving average with its own decay."""
        for average, keep in zip(self.averages, self.keep):
            torch._foreach_mul_(average, keep)
            torch._foreach_add_(average, torch._foreach_mul(self.learning, 1 - keep))

    def _tensors(self) -> list[torch.Tensor]:
        t = self.trainer
        held = [o.state[p] for learner in (t.student, t.aux) for o in learner.optimizers for p in list(o.state)]
        found = [p.detach() for net in (t.networks.student, t.networks.aux) for p in net.parameters()]
        found += [value for state in held for value in state.values() if isinstance(value, torch.Tensor)]
        return [*found, *(x for average in self.averages for x in average), self.x_init.x_hat, self.x_init.txt_ids]

    def _snapshot(self) -> list[torch.Tensor]:
        return [x.clone() for x in self._tensors()]

    @torch.no_grad()
    def _restore(self, values: list[torch.Tensor]) -> None:
        for x, value in zip(self._tensors(), values, strict=True):
            x.copy_(value)

    def step(self, index: int, last: int) -> None:
        """Start step `index` of `last`, equivalent to `Trainer.step`, without waiting for it."""
        c = self.trainer.config
        with torch.cuda.stream(self.stream):
            self.trainer.generator.manual_seed(self.trainer.seed_of(index))
            self.student.factor.fill_(lr_factor(c.optim, index, last, c.optim.min_lr_share))
            self.aux.factor.fill_(lr_factor(c.optim, index, last, c.optim.aux_min_lr_share))
            self.fade.fill_(fade(index, 0, c.distill.p_corrupt_fade * last))
            for keep, decay in zip(self.keep, self.emas):
                keep.fill_(warm_ema_decay(decay, index))
            self.graph.replay()

    def check(self) -> float:
        """Largest difference of the student's weights from the trainer's after a few steps, relative to the change."""
        last = self.trainer.config.training.max_train_steps
        for index in range(self.first, self.first + CHECKED):
            self.step(index, last)
        torch.cuda.synchronize()
        got = [p.detach().clone() for p in self.trainer.networks.student.parameters()]
        self._restore(self.before)
        memory = self.trainer.x_init.state_dict()
        for index in range(self.first, self.first + CHECKED):
            self.trainer.step(index)
        want = [p.detach() for p in self.trainer.networks.student.parameters()]
        moved = max((a - b).abs().max().item() for a, b in zip(want, self.before))
        error = max((a - b).abs().max().item() for a, b in zip(got, want)) / moved
        self.trainer.x_init.load_state_dict(memory)
        self._restore(self.before)
        return error

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors that a step changes, as {"seed/number": tensor}; random draws depend only on the step's index."""
        return dict(zip(self._names(), self._snapshot(), strict=True))

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._restore([state[name] for name in self._names()])

    def _names(self) -> list[str]:
        return [f"{self.trainer.config.experiment.seed}/{i}" for i in range(len(self._tensors()))]

    def scores(self, world: World, out: Path, at: int, last: int) -> None:
        """Evaluate the student of every moving average after `at` of `last` steps; write it and its metrics."""
        t, final = self.trainer, copy.deepcopy(self.trainer.networks.ema)
        for decay, average in zip(self.emas, self.averages):
            for p, value in zip(self.averaged, average):
                p.data.copy_(value)
            final.load_state_dict(t.final_weights())
            rows, _ = evaluate(world, t.ursa, final, teacher_steps=())
            keys = ("validity", "adherence", "coverage", "coverage_detail")
            row = {name: {k: rows[name][k] for k in keys} for name in ("student_1", "student_1_argmax")}
            line = {"seed": t.config.experiment.seed, "step": at, "of": last, "ema": decay} | row
            print(json.dumps(line), flush=True)
            save_student(out / f"student-{decay:g}", final)
            (out / f"report-{decay:g}.json").write_text(json.dumps(line))


def resume(saved: Path, graphs: Iterable[Graph], keys: list[str]) -> tuple[int, int]:
    """Restore the state of an earlier run with the same keys; returns (steps done, total steps)."""
    with safe_open(saved, "pt") as file:
        about = file.metadata()
    if about["keys"] != " ".join(keys):
        raise SystemExit(f"{saved} is from a run with other keys ({about['keys']}): move it or give another --name")
    state = load_file(saved)
    for graph in graphs:
        graph.load_state(state)
    print(f"resumed at step {about['at']} of {about['of']}", flush=True)
    return int(about["at"]), int(about["of"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="+", metavar="SEED | KEY=VALUE")
    parser.add_argument("--minutes", type=float, help="train for this time, not for training.max_train_steps")
    parser.add_argument("--emas", default="", help="more EMA decays to evaluate, as 0.9998,0.9999; 0: the weights")
    parser.add_argument("--evaluations", type=int, default=5, help="number of evaluations (default: 5)")
    parser.add_argument("--name", default="recipe")
    args = parser.parse_intermixed_args()
    keys, seeds = ([word for word in args.words if ("=" in word) == is_key] for is_key in (True, False))
    if not seeds:
        parser.error("give at least one seed")
    begin, graphs = time.time(), {}
    saved = Path("runs") / f"{args.name}-{'-'.join(seeds)}.safetensors"
    torch._dynamo.config.recompile_limit = 64  # the networks of each seed are compiled separately
    for seed in seeds:
        out = Path("runs") / f"{args.name}-{seed}"
        own = [f"experiment.seed={seed}", f"experiment.output_dir={out}"]
        config = load_config("shapes_long", own + keys)
        emas = [config.optim.ema_decay, *(float(x) for x in args.emas.split(",") if x)]
        graphs[out] = graph = Graph(Trainer(config), emas)
        print(f"seed {seed}: {CHECKED} steps differ by {graph.check():.1e} of the weights' change", flush=True)
    world, index, last = load_world(graph.trainer.ursa.folder), graph.first, config.training.max_train_steps
    if saved.exists():
        index, last = resume(saved, graphs.values(), keys)

    def score(at: int) -> None:
        torch.cuda.synchronize()
        for out, graph in graphs.items():
            graph.scores(world, out, at, last)
        state = {name: x for graph in graphs.values() for name, x in graph.state().items()}
        about = {"at": str(at), "of": str(last), "keys": " ".join(keys)}
        with whole_file(saved) as beside:
            save_file(state, beside, about)

    first, measured_after = time.time(), 500
    while index < last:
        for graph in graphs.values():
            graph.step(index, last)
        index += 1
        if index % 20 == 0:
            torch.cuda.synchronize()  # keeps the CPU from running far ahead of the GPU
        if index == measured_after:
            each = (time.time() - first) / (measured_after - graph.first)
            if args.minutes:
                scoring = 1.0 * len(graphs) * len(graph.emas) * args.evaluations
                last = max(index, int((60 * args.minutes - (time.time() - begin) - scoring) / each))
            print(f"{1e3 * each:.2f} ms per step of {len(graphs)} seeds, {last} steps", flush=True)
        if index > measured_after and index % max(1, last // args.evaluations) == 0 and index < last - 100:
            score(index)
    score(last)
    assert all(math.isfinite(graph.loss.item()) for graph in graphs.values())


if __name__ == "__main__":
    main()
