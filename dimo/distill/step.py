"""One training step: the nine stages in the order of the README's table.

Independent of files, captions, progress bars and the number of processes, which a `Distillation` provides.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from dimo.config.schema import Distill
from dimo.distill import stages
from dimo.distill.few_steps import draft_x_init
from dimo.distill.schedules import Baseline, XInit
from dimo.distill.stages import Grid, Step
from dimo.ursa import MetricPath, MixturePath, UrsaTransformer


@dataclasses.dataclass
class Networks:
    """Teacher (frozen), student, auxiliary, and the EMA of the student (no gradient)."""

    teacher: Any  # a transformer, or whatever `dimo.ursa.predict` may ask
    student: UrsaTransformer
    aux: UrsaTransformer
    ema: UrsaTransformer


class Learner(Protocol):
    """A network with its optimizer."""

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        """Accumulate the gradient of the loss; `last`: no further backward pass before the update."""

    def gradient_norm(self) -> torch.Tensor:
        """The norm of the gradient averaged over all processes, a scalar."""

    def update(self, norm: torch.Tensor, name: str) -> None:
        """Clip the gradient to the maximal norm, step the optimizers and zero the gradient.

        Raises NonFiniteError with the network's `name`, and changes no weight, if the norm is not finite.
        """


class Distillation(Protocol):
    """What a training step reads and changes; implemented by `dimo.train.trainer.Trainer`."""

    networks: Networks
    shared_layers: int  # of teacher and auxiliary, the first ones
    path: MetricPath | MixturePath
    grid: Grid
    num_visual_tokens: int
    settings: Distill
    beta: float | str  # of D_beta
    t_power: float | torch.Tensor  # of stage 4
    t_shift: float  # of stage 4 and of the auxiliary's fits
    x_init: XInit
    student_times: list[float]  # of the student's passes
    draft_gain: float  # on the logits of those before the last
    baseline: Baseline | None
    lambda_ent: float | torch.Tensor  # changed during the step by `set_entropy_bonus`
    empty_ids: torch.Tensor  # (1, L): the empty prompt
    uncond_ids: torch.Tensor  # (1, L): the negative prompt of guidance
    generator: torch.Generator

    @property
    def student(self) -> Learner:
        """The student with its optimizer."""

    @property
    def aux(self) -> Learner:
        """The auxiliary with its optimizer."""

    def draw_prompts(self) -> torch.Tensor:
        """Stage 1: txt_ids (B, L)."""

    def set_entropy_bonus(self, index: int, entropy: torch.Tensor) -> None:
        """Set `lambda_ent` according to the student's mean token entropy, a scalar in nats."""

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over all processes."""

    def autocast(self) -> contextlib.AbstractContextManager:
        """The autocast context of the forward passes."""

    def agreed(self) -> contextlib.AbstractContextManager:
        """Context around stages: a NonFiniteError in one process is raised in all."""


def nine_stages(run: Distillation, index: int, steps: list[Step], norms: dict[str, torch.Tensor]) -> Iterator[tuple]:
    """Run training step `index`, pausing after each stage; yields (stage number, the `Step` so far).

    `steps` has one empty `Step` per micro-batch of gradient accumulation. Stages 1 to 5 run for each; then stage 6
    updates the auxiliary on all; then its prediction and stages 7 to 9 run for each; then the student is updated.
    Numbers 1 to 8 come once per micro-batch, 9 once, with the last. `norms` receives grad_norm/student and
    grad_norm/aux. Autocast is active only inside the stages, so it does not leak to the caller.
    Raises NonFiniteError if any process meets a value that is not finite.
    """
    d, n, g, grid = run.settings, run.networks, run.generator, run.grid
    before_pass, entropy, parts = [], 0.0, len(steps)
    for step in steps:
        with run.agreed():
            # 1 prompts; if the teacher is guided, the student must learn the empty prompt as well
            step.txt_ids = run.draw_prompts()
            if d.guidance_scale != 1 and d.empty_prompt_share > 0:
                drop = torch.rand(len(step.txt_ids), generator=g, device=step.txt_ids.device) < d.empty_prompt_share
                step.txt_ids = torch.where(drop[:, None], run.empty_ids, step.txt_ids)
            yield 1, step
            # 2 x_init
            _draw_x_init(run, step)
            yield 2, step
            # 3 student pass; of several micro-batches only x_hat stays, and the pass is repeated after the updates of 6
            if parts > 1:
                before_pass.append(g.get_state())
            passed = step if parts == 1 else dataclasses.replace(step)
            with run.autocast(), torch.set_grad_enabled(parts == 1):
                stages.student_pass(passed, n.student, grid, g)
            step.x_hat, entropy = passed.x_hat, entropy + passed.entropy.mean() / parts
            step.student = passed.student if d.aux_target == "exact" else step.student
            run.x_init.remember(step.x_hat, step.txt_ids)
            yield 3, step
            # 4 x_t
            how = d.t_curriculum_steps, d.t_per, run.t_power, d.t_draws, g, step.x_hat.device, run.t_shift
            stages.renoise(step, run.path, stages.draw_t(len(step.x_hat), grid, index, *how), g)
            yield 4, step
            # 5 teacher pass
            with run.autocast():
                guidance = d.guidance_scale, d.guidance_trunc, run.uncond_ids
                stages.teacher_pass(step, n.teacher, grid, *guidance, run.shared_layers)
            yield 5, step
    # 6 auxiliary: its updates, then (below) its prediction at x_t
    what = d.aux_objective, d.aux_steps, d.label_smoothing, d.empty_prompt_share
    fit = d.aux_pass == "shared", d.t_per, run.t_shift, d.aux_target
    fits = [stages.auxiliary_losses(s, n.aux, run.path, grid, *what, run.empty_ids, g, *fit) for s in steps]
    for _ in range(d.aux_steps):
        for part, losses in enumerate(fits):
            with run.autocast():
                loss = next(losses)
            run.aux.backward(loss / parts, last=part == parts - 1)
        norms["grad_norm/aux"] = _update(run.aux, "auxiliary")
    if d.lambda_ent > 0:
        run.set_entropy_bonus(index, entropy)
    for part, step in enumerate(steps):
        if parts > 1:
            again = torch.Generator(g.device)
            again.set_state(before_pass[part])
            with run.agreed(), run.autocast():
                stages.student_pass(step, n.student, grid, again)
        if d.aux_pass == "own":
            with run.agreed(), run.autocast():
                stages.auxiliary_pass(step, n.aux, grid)
        yield 6, step
        with run.agreed():
            # 7 knowledge distillation, only on steps where its loss is used
            if d.w_kd > 0 and index % d.kd_every == 0:
                with run.autocast():
                    stages.distil_knowledge(step, n.student, grid)
            yield 7, step
            # 8 distillation signal
            stages.distillation_signal(step, d.estimator, run.beta, run.baseline, d.w_reinforce)
            yield 8, step
            # 9 student's loss
            stages.total_loss(step, d.w_distill, d.w_kd, run.lambda_ent)
        run.student.backward(step.loss / parts, last=part == parts - 1)
    norms["grad_norm/student"] = _update(run.student, "student")
    if run.baseline and run.baseline.value is not None:
        run.baseline.value.copy_(run.mean(run.baseline.value))  # all processes share one baseline
    yield 9, steps[-1]


def _draw_x_init(run: Distillation, step: Step) -> None:
    """Stage 2; the drafts of a student of several passes are made by the student as it is before its update."""
    stages.draw_x_init(step, run.x_init, run.num_visual_tokens, run.generator)
    if len(run.student_times) > 1:
        with run.autocast():
            draft_x_init(
                step, run.networks.student, run.path, run.grid, run.student_times, run.draft_gain, run.generator
            )


def _update(learner: Learner, name: str) -> torch.Tensor:
    norm = learner.gradient_norm()  # the same in every process
    learner.update(norm, name)
    return norm
