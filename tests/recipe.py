"""A one-step student of the built-in world, trained to its end on a GPU: the trainer's stages as one CUDA graph.

`python tests/recipe.py SEED [--minutes M] [KEY=VALUE ...]` trains preset `shapes_long`, a step of which is some 2,000
small kernels that a GPU waits for; replayed as a graph they take a tenth of the time. First a few steps are
compared with `Trainer.step`. Several seeds may share a GPU. Writes runs/recipe-SEED/student-EMA and report-EMA.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

from dimo.distill import stages
from dimo.distill.stages import Step
from dimo.evaluation.evaluate import evaluate
from dimo.train.config import load_config
from dimo.train.optimizers import Muon, lr_factor, orthogonalise, warm_ema_decay
from dimo.train.trainer import Trainer
from dimo.ursa import save_student
from dimo.worlds import load_world

CHECKED = 3  # steps that graph and trainer both make


class Graph:
    """A trainer's step as a CUDA graph; learning rates and the EMAs' weights are tensors, set before a replay."""

    def __init__(self, trainer: Trainer, emas: list[float]):
        self.trainer, c = trainer, trainer.config
        self.device, self.samples = trainer.device, c.distill.batch_size_per_gpu
        assert c.distill.aux_pass == "own" and c.distill.w_kd == 0 and c.distill.lambda_ent == 0 and not trainer.fused
        assert self.samples >= trainer.x_init.capacity, "the memory of x_hat must be full after one step"
        self.factors = {name: torch.ones((), device=self.device) for name in ("student", "aux")}
        self.emas = emas
        self.keep = [torch.zeros((), device=self.device) for _ in emas]
        self.loss = torch.zeros((), device=self.device)
        trainer.step(0)  # fills the optimizers' state and the memory of x_hat
        self.averages = [[p.detach().clone() for p in trainer.networks.ema.parameters()] for _ in emas]
        self.memory = trainer.x_init
        before = self._snapshot()
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(trainer.generator)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, capture_error_mode="relaxed"):  # chunks ask for free memory
            self._step()
        self._restore(before)
        self.before = before

    def _step(self) -> None:
        t, d = self.trainer, self.trainer.config.distill
        n, g, grid, step = t.networks, t.generator, t.grid, Step()
        step.txt_ids = t.prompts.batch(self.samples, g)
        stages.draw_x_init(step, t.x_init, t.num_visual_tokens, g)
        stages.student_pass(step, n.student, grid, g)
        time_ = stages.draw_t(self.samples, grid, 10**9, 0, d.t_per, g, self.device, d.t_power)
        stages.renoise(step, t.path, time_, g)
        stages.teacher_pass(step, n.teacher, grid)
        fits = stages.auxiliary_losses(
            step, n.aux, t.path, grid, d.aux_objective, d.aux_steps, d.label_smoothing, d.empty_prompt_share,
            t.empty_ids, g, False, d.t_per,
        )  # fmt: skip
        for loss in fits:
            loss.backward()
            self._update(t.aux, self.factors["aux"])
        stages.auxiliary_pass(step, n.aux, grid)
        stages.distillation_loss(step, d.estimator, t.beta, None, d.w_reinforce)
        stages.total_loss(step, d.w_distill)
        step.loss.backward()
        self._update(t.student, self.factors["student"])
        with torch.no_grad():
            self.loss.copy_(step.loss)
            self.memory.x_hat.copy_(step.x_hat[: self.memory.capacity])
            self.memory.txt_ids.copy_(step.txt_ids[: self.memory.capacity])
            student = [p.detach() for p in n.student.parameters()]
            for average, keep in zip(self.averages, self.keep):
                torch._foreach_mul_(average, keep)
                torch._foreach_add_(average, torch._foreach_mul(student, 1 - keep))

    @torch.no_grad()
    def _update(self, learner, factor: torch.Tensor) -> None:
        norm = learner.gradient_norm()
        torch._foreach_mul_(learner.gradients, (learner.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for optimizer in learner.optimizers:
            for group in optimizer.param_groups:
                rate = factor * group["initial_lr"]
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

    def _tensors(self) -> list[torch.Tensor]:
        t = self.trainer
        held = [o.state[p] for learner in (t.student, t.aux) for o in learner.optimizers for p in list(o.state)]
        found = [p.detach() for net in (t.networks.student, t.networks.aux) for p in net.parameters()]
        found += [value for state in held for value in state.values() if isinstance(value, torch.Tensor)]
        return [*found, *(x for average in self.averages for x in average), self.memory.x_hat, self.memory.txt_ids]

    def _snapshot(self) -> list[torch.Tensor]:
        return [x.clone() for x in self._tensors()]

    @torch.no_grad()
    def _restore(self, values: list[torch.Tensor]) -> None:
        for x, value in zip(self._tensors(), values, strict=True):
            x.copy_(value)

    def step(self, index: int, last: int) -> None:
        """Step `index` of `last`, as `Trainer.step` makes it."""
        c = self.trainer.config
        self.trainer.generator.manual_seed(self.trainer.seed_of(index))
        self.factors["student"].fill_(lr_factor(c.optim, index, last, c.optim.min_lr_share))
        self.factors["aux"].fill_(lr_factor(c.optim, index, last, c.optim.aux_min_lr_share))
        for keep, decay in zip(self.keep, self.emas):
            keep.fill_(warm_ema_decay(decay, index))
        self.graph.replay()

    def check(self) -> float:
        """The largest difference of the student's weights after a few steps from what the trainer makes of them."""
        last = self.trainer.config.training.max_train_steps
        for index in range(1, 1 + CHECKED):
            self.step(index, last)
        got = [p.detach().clone() for p in self.trainer.networks.student.parameters()]
        self._restore(self.before)
        memory = self.memory.state_dict()
        for index in range(1, 1 + CHECKED):
            self.trainer.step(index)
        want = [p.detach() for p in self.trainer.networks.student.parameters()]
        moved = max((a - b).abs().max().item() for a, b in zip(want, self.before))
        error = max((a - b).abs().max().item() for a, b in zip(got, want)) / moved
        self.memory.load_state_dict(memory)
        self._restore(self.before)
        return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seed", type=int)
    parser.add_argument("--minutes", type=float, help="as many steps as fit, in place of training.max_train_steps")
    parser.add_argument("--emas", default="", help="further moving averages to score: 0.9998,0.9999; 0: the weights")
    parser.add_argument("--evaluations", type=int, default=5, help="how often on the way (default: 5)")
    parser.add_argument("--name", default="recipe")
    parser.add_argument("keys", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    begin = time.time()
    out = Path("runs") / f"{args.name}-{args.seed}"
    config = load_config("shapes_long", [f"experiment.seed={args.seed}", f"experiment.output_dir={out}", *args.keys])
    trainer = Trainer(config)
    emas = [config.optim.ema_decay, *(float(x) for x in args.emas.split(",") if x)]
    graph, last = Graph(trainer, emas), config.training.max_train_steps
    print(f"seed {args.seed}: {CHECKED} steps differ by {graph.check():.1e} of what they moved", flush=True)
    world, first = load_world(trainer.ursa.folder), time.time()

    def scores(at: int) -> None:
        for decay, average in zip(emas, graph.averages):
            for p, value in zip(trainer.networks.ema.parameters(), average):
                p.data.copy_(value)
            rows, _ = evaluate(world, trainer.ursa, trainer.networks.ema, teacher_steps=(), progress=False)
            keys = ("validity", "adherence", "coverage")
            row = {name: {k: rows[name][k] for k in keys} for name in ("student_1", "student_1_argmax")}
            line = {"seed": args.seed, "step": at, "of": last, "ema": decay, "seconds": time.time() - begin} | row
            print(json.dumps(line), flush=True)
            save_student(out / f"student-{decay:g}", trainer.networks.ema)
            (out / f"report-{decay:g}.json").write_text(json.dumps(line))

    index = 1
    while index < last:
        graph.step(index, last)
        index += 1
        if index == 500:
            torch.cuda.synchronize()
            each = (time.time() - first) / 499
            if args.minutes:
                last = int((60 * args.minutes - (time.time() - begin) - 15) / each)
            print(f"seed {args.seed}: {1e3 * each:.2f} ms a step, {last} steps", flush=True)
        if index > 500 and index % max(1, last // args.evaluations) == 0 and index < last - 100:
            scores(index)
    scores(last)
    assert math.isfinite(graph.loss.item())


if __name__ == "__main__":
    main()
