"""The nine stages of a training step, one function each, and the `Step` that carries what they produced.

A notebook calls them one by one and looks at every tensor; `dimo.train.trainer` calls the same functions in the same
order. B samples, L text tokens, N visual tokens, K codes throughout. Source: Di[M]O, arXiv 2503.15457.

Two forms, by `Step.fused`. Plain: logits are tensors, and autograd differentiates the readable `losses`. Fused, for
64,000 codes: a step holds hidden states, stage 9 makes all losses and gradients of the student in one pass over chunks
of tokens (`fused`), and `step.student_logits` and the like are made when looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from dimo.distill import fused, losses
from dimo.distill.schedules import Baseline, XInit, sample_t_curriculum
from dimo.errors import DimoError, require_finite, require_shape
from dimo.ursa import MetricPath, MixturePath, UrsaTransformer, draw_codes, guide, visual_logits
from dimo.ursa.answer import Answer, draw, guide_answer, visual_answer

Grid = tuple[int, int, int]
LOOKED_AT = 128  # tokens of the first sample whose logits are measured


@dataclasses.dataclass
class Step:
    """What one training step produced, stage by stage; logits keep their graph where the student must learn.

    A logits field may be set to an `Answer` (hidden states and head): reading it gives logits, `answers` the answer.
    """

    fused: bool = False
    txt_ids: torch.Tensor | None = None  # 1: (B, L)
    x_init: torch.Tensor | None = None  # 2: (B, N)
    corrupted: torch.Tensor | None = None  # 2: (B,) bool
    student_logits: torch.Tensor | None = None  # 3: z_S (B, N, K)
    x_hat: torch.Tensor | None = None  # 3: (B, N)
    logp: torch.Tensor | None = None  # 3: (B, N)
    entropy: torch.Tensor | None = None  # 3: (B, N), nats
    logits_std: torch.Tensor | None = None  # 3: scalar, nats; of a few tokens, over the codes
    t: torch.Tensor | None = None  # 4: (R B,) or (R B, N), R = distill.t_draws
    x_t: torch.Tensor | None = None  # 4: (R B, N), all samples once for each draw of t
    teacher_logits: torch.Tensor | None = None  # 5: (R B, N, K)
    aux_losses: list[torch.Tensor] = dataclasses.field(default_factory=list)  # 6
    aux_logits: torch.Tensor | None = None  # 6: (R B, N, K), after the auxiliary's updates
    student_at_t: Answer | None = None  # 7: fused only
    kd: torch.Tensor | None = None  # 7: scalar; fused: after 9
    felt: dict = dataclasses.field(default_factory=dict)  # 8: fused only, what `fused.student_losses` is to do
    gaps: fused.Gaps | None = None  # 9: fused only
    reward: torch.Tensor | None = None  # 8: (B,); fused: after 9
    baseline: torch.Tensor | None = None  # 8: scalar
    distill: torch.Tensor | None = None  # 8: scalar; fused: after 9
    loss: torch.Tensor | None = None  # 9: scalar

    @property
    def answers(self) -> dict[str, torch.Tensor | Answer]:
        """{"student": ..., "teacher": ..., "aux": ...}, as set: logits, or an `Answer`."""
        return self.__dict__.setdefault("_answers", {})

    @property
    def txt_ids_at_t(self) -> torch.Tensor:
        """(R B, L): the prompts as x_t has its rows."""
        return for_each_draw(self.txt_ids, self.x_t)


def _logits_of(name: str) -> property:
    def read(step: Step) -> torch.Tensor | None:
        kept = step.answers.get(name)
        return kept.logits if isinstance(kept, Answer) else kept

    return property(read, lambda step, value: step.answers.__setitem__(name, value))


for _name in ("student", "teacher", "aux"):
    setattr(Step, f"{_name}_logits", _logits_of(_name))


def for_each_draw(value: torch.Tensor, at_t: torch.Tensor) -> torch.Tensor:
    """`value` (B, ...) once for each draw of t, as `at_t` (R B, ...) has its rows."""
    draws = len(at_t) // len(value)
    return value if draws == 1 else value.repeat(draws, *[1] * (value.dim() - 1))


def over_draws(value: torch.Tensor, samples: int) -> torch.Tensor:
    """The mean over the draws of t: (R B, ...) -> (B, ...)."""
    return value if len(value) == samples else value.view(-1, samples, *value.shape[1:]).mean(0)


def tokenise(tokenize, prompts: list[str], max_prompt_length: int) -> torch.Tensor:
    """Stage 1: prompts -> txt_ids (B, max_prompt_length), padded on the left; `tokenize` is `Ursa.tokenize`."""
    if not prompts:
        raise DimoError("prompts must not be empty")
    if max_prompt_length < 1:
        raise DimoError(f"max_prompt_length must be at least 1, got {max_prompt_length}")
    return tokenize(prompts, max_prompt_length)


def draw_x_init(step: Step, x_init: XInit, num_visual_tokens: int, generator=None) -> None:
    """Stage 2: uniform noise, or a corrupted earlier sample together with its own prompt."""
    step.x_init, step.txt_ids, step.corrupted = x_init(step.txt_ids, num_visual_tokens, generator)


def student_pass(step: Step, student: UrsaTransformer, grid: Grid, generator=None) -> None:
    """Stage 3: one pass at x_init; x_hat ~ softmax(z_S), its log-probability and entropy per token."""
    if step.fused:
        step.student_logits = answer = visual_answer(student, step.txt_ids, step.x_init, grid)
        fixed = answer.detach()  # the head is rounded once for both
        step.x_hat, step.logp, step.entropy = draw(fixed, generator)
        step.logits_std = Answer(fixed.hidden[:1, :LOOKED_AT], fixed.weight).logits.std(-1).mean()
        return require_finite("the student's logits", step.entropy)
    step.student_logits = visual_logits(student, step.txt_ids, step.x_init, grid)
    require_finite("the student's logits", step.student_logits)
    with torch.no_grad():
        step.x_hat = draw_codes(step.student_logits, generator)
    step.logp = losses.log_prob(step.student_logits, step.x_hat)
    step.entropy = losses.token_entropy(step.student_logits)
    step.logits_std = step.student_logits[:1, :LOOKED_AT].detach().std(-1).mean()


def draw_t(
    batch: int,
    grid: Grid,
    step_index: int,
    curriculum_steps: int,
    t_per: str,
    generator=None,
    device=None,
    t_power: float = 1.0,
    draws: int = 1,
) -> torch.Tensor:
    """Times of stage 4: one per sample (R B,), or one per latent frame spread over its tokens (R B, N), R = draws.

    They are the curriculum's, stratified over the draws of a sample, raised to `t_power`: above 1 more of them lie near
    the noise, where the videos of a prompt are all open and their shares are decided.
    """
    if not t_power > 0:
        raise DimoError(f"t_power must be positive, got {t_power}")
    if t_per == "sample":
        return sample_t_curriculum(batch, step_index, curriculum_steps, generator, device, draws) ** t_power
    if t_per != "frame":
        raise DimoError(f"t_per must be 'sample' or 'frame', got {t_per!r}")
    t = sample_t_curriculum((batch, grid[0]), step_index, curriculum_steps, generator, device, draws) ** t_power
    return t.repeat_interleave(grid[1] * grid[2], 1)


def renoise(step: Step, path: MetricPath | MixturePath, t: torch.Tensor, generator=None) -> None:
    """Stage 4: x_t ~ p_t(. | x_hat), for t (B,) or (B, N), or R times as many rows: R draws for every x_hat.

    The gradient on x_hat is a mean over t and x_t; one draw of them is a noisy estimate of it, and a further one costs
    a pass of the teacher and of the auxiliary, the cheapest of the step.
    """
    if len(t) % len(step.x_hat):
        raise DimoError(f"t must have a multiple of {len(step.x_hat)} rows, as x_hat has, got {len(t)}")
    step.t, step.x_t = t, path.sample(for_each_draw(step.x_hat, t), t, generator)


@torch.no_grad()
def teacher_pass(
    step: Step,
    teacher: UrsaTransformer,
    grid: Grid,
    guidance_scale: float = 1.0,
    guidance_trunc: float = 0.9,
    uncond_ids: torch.Tensor | None = None,
) -> None:
    """Stage 5: the frozen teacher at x_t, guided as u + w (c - u), w = 1 where t >= guidance_trunc.

    Both passes go in one batch. Where no sample's t calls for guidance the unconditional one is left out: all or none,
    so that a compiled teacher knows two batch sizes and not one for every number of guided samples.
    """
    if guidance_scale != 1 and uncond_ids is None:
        raise DimoError("uncond_ids is needed when guidance_scale is not 1: the ids of the empty prompt, (1, L)")
    ask, combine = (visual_answer, guide_answer) if step.fused else (visual_logits, guide)
    txt_ids = step.txt_ids_at_t
    if guidance_scale == 1 or not bool((step.t < guidance_trunc).any()):
        step.teacher_logits = ask(teacher, txt_ids, step.x_t, grid)
    else:
        ids = torch.cat([txt_ids, uncond_ids.expand_as(txt_ids)])
        cond, uncond = ask(teacher, ids, step.x_t.repeat(2, 1), grid).chunk(2)
        w = torch.where(step.t < guidance_trunc, guidance_scale, 1.0)
        step.teacher_logits = combine(cond, uncond, w.view(len(w), -1, 1))
    if not step.fused:  # else found in stage 9, where the logits are made
        require_finite("the teacher's logits", step.teacher_logits)


def auxiliary_losses(
    step: Step,
    aux: UrsaTransformer,
    path: MetricPath | MixturePath,
    grid: Grid,
    objective: str = "denoise",
    aux_steps: int = 1,
    label_smoothing: float = 0.0,
    empty_share: float = 0.1,
    empty_ids: torch.Tensor | None = None,
    generator=None,
    share_x_t: bool = False,
    t_per: str = "sample",
) -> Iterator[torch.Tensor]:
    """Stage 6: the auxiliary's losses, one at a time, to be stepped on before the next is asked for.

    `denoise` fits it to the student: cross-entropy of x_hat at a fresh re-noising of it, some prompts empty; t is
    uniform, and per sample or per frame as stage 4's, since the answer at x_t is only as good as the fit there.
    `match_teacher` (preset `literal`) pulls it to the teacher: Jeffreys' divergence at x_t.

    With `share_x_t` the first pass is at x_t itself (of several draws of t, the first passes are, one each), under the
    step's own prompts, and its logits, from before the update, are the auxiliary's answer there: `auxiliary_pass` is
    not needed.
    """
    if objective not in ("denoise", "match_teacher"):
        raise DimoError(f"aux_objective must be 'denoise' or 'match_teacher', got {objective!r}")
    ask, one = (visual_answer, fused) if step.fused else (visual_logits, losses)
    batch, device = len(step.txt_ids), step.txt_ids.device
    draws, answers = step.x_t.split(batch) if share_x_t else (), []
    if objective == "match_teacher":
        draws = [step.x_t] * aux_steps  # all draws in every fit
    if len(draws) > aux_steps:
        raise DimoError(f"aux_steps must be at least {len(draws)}, x_t's draws, where x_t is shared, got {aux_steps}")
    for index in range(aux_steps):
        at_x_t = index < len(draws)
        if at_x_t:
            x, txt_ids = draws[index], for_each_draw(step.txt_ids, draws[index])
        else:
            txt_ids, t = step.txt_ids, draw_t(batch, grid, 0, 0, t_per, generator, device)
            if empty_ids is not None and empty_share > 0:
                drop = torch.rand(batch, generator=generator, device=device) < empty_share
                txt_ids = torch.where(drop[:, None], empty_ids, txt_ids)
            x = path.sample(step.x_hat, t, generator)
        answer = ask(aux, txt_ids, x, grid)
        if share_x_t and at_x_t:
            kept = answer.detach(copy=True) if step.fused else answer.detach()
            answers = [kept] if objective == "match_teacher" else [*answers, kept]
            step.aux_logits = _join(answers)
        if objective == "match_teacher":
            loss = one.jeffreys(step.answers["teacher"], answer).mean()
        else:
            loss = one.denoising(answer, step.x_hat, label_smoothing)
        step.aux_losses.append(loss.detach())
        yield loss


def _join(answers: list[torch.Tensor] | list[Answer]) -> torch.Tensor | Answer:
    """The auxiliary's answers at the draws of t as one; of a head that learns, under its last state."""
    if len(answers) == 1:
        return answers[0]
    if isinstance(answers[0], Answer):
        return Answer(torch.cat([answer.hidden for answer in answers]), answers[-1].weight)
    return torch.cat(answers)


@torch.no_grad()
def auxiliary_pass(step: Step, aux: UrsaTransformer, grid: Grid) -> None:
    """Stage 6, its end: the updated auxiliary at x_t."""
    step.aux_logits = (visual_answer if step.fused else visual_logits)(aux, step.txt_ids_at_t, step.x_t, grid)
    if not step.fused:
        require_finite("the auxiliary's logits", step.aux_logits)


def distil_knowledge(step: Step, student: UrsaTransformer, grid: Grid) -> None:
    """Stage 7: KL(p_T || p_St) with the student at x_t, mean over tokens."""
    if step.fused:
        step.student_at_t = visual_answer(student, step.txt_ids_at_t, step.x_t, grid)
        return
    step.kd = losses.kl(step.teacher_logits, visual_logits(student, step.txt_ids_at_t, step.x_t, grid)).mean()


def distillation_loss(
    step: Step,
    estimator: str = "dimo",
    beta: float | str = 0.5,
    baseline: Baseline | None = None,
    w_reinforce: float = 0.0,
) -> None:
    """Stage 8: a scalar whose gradient on z_S is the distillation gradient.

    `dimo`: <stopgrad(g), z_S> with g the exact gradient of D_beta on the auxiliary's logits, per token; beta a number,
    or "time": beta = t, forward KL near the noise, where all videos are open and coverage is decided, reverse KL near
    the data, where tokens must agree. `w_reinforce` adds a policy gradient whose reward per token is
    log p_T(x_hat) - log p_A(x_hat).
    `reinforce`: reward per sample -Jeffreys(p_T, p_A), with an EMA baseline or (baseline None) leave-one-out.
    Gradients and rewards are means over the draws of t.
    """
    if estimator not in ("dimo", "reinforce"):
        raise DimoError(f"estimator must be 'dimo' or 'reinforce', got {estimator!r}")
    if beta == "time":
        beta = step.t.view(len(step.t), -1, 1)  # (R B, 1 or N, 1)
    if step.fused:
        _choose(step, estimator, beta, baseline, w_reinforce)
        return
    samples = len(step.student_logits)
    require_shape("aux_logits", step.aux_logits, (len(step.teacher_logits), *step.student_logits.shape[1:]))
    with torch.no_grad():
        step.reward = over_draws(-losses.jeffreys(step.teacher_logits, step.aux_logits).mean(1), samples)
    if estimator == "reinforce":
        advantage, step.baseline = _advantage(step.reward, baseline)
        step.distill = -(advantage[:, None] * step.logp).mean()
        return
    gradient = over_draws(losses.token_gradient(step.teacher_logits, step.aux_logits, beta), samples)
    step.distill = (gradient * step.student_logits).sum(-1).mean()
    if w_reinforce > 0:
        with torch.no_grad():
            x_hat = for_each_draw(step.x_hat, step.teacher_logits)
            ratio = losses.log_prob(step.teacher_logits, x_hat) - losses.log_prob(step.aux_logits, x_hat)
            ratio = over_draws(ratio, samples)
        step.distill = step.distill - w_reinforce * (losses.leave_one_out(ratio) * step.logp).mean()


def _choose(step: Step, estimator: str, beta, baseline: Baseline | None, w_reinforce: float) -> None:
    """Stage 8, fused: what stage 9 is to compute, and the advantage, which must be known before any gradient."""
    by_policy = estimator == "reinforce"
    step.felt = {"w_policy": 1.0 if by_policy else w_reinforce}
    step.felt["beta"] = None if by_policy else beta.squeeze(-1) if isinstance(beta, torch.Tensor) else beta
    if by_policy or w_reinforce > 0:
        x_hat, samples = for_each_draw(step.x_hat, step.answers["teacher"].hidden), len(step.x_hat)
        step.felt["known"] = gaps = fused.gaps(step.answers["teacher"], step.answers["aux"], x_hat)
        if by_policy:
            advantage, step.baseline = _advantage(_reward(gaps, samples), baseline)
            advantage = advantage[:, None]
        else:
            advantage = losses.leave_one_out(over_draws(gaps.log_ratio, samples))
        step.felt["advantage"] = for_each_draw(advantage, x_hat)


def _reward(gaps: fused.Gaps, samples: int) -> torch.Tensor:
    """(B,): -Jeffreys(p_T, p_A), the mean over tokens and draws of t."""
    return over_draws(-(gaps.forward + gaps.reverse).mean(1), samples)


def _advantage(reward: torch.Tensor, baseline: Baseline | None) -> tuple[torch.Tensor, torch.Tensor]:
    if baseline is None:
        return losses.leave_one_out(reward), reward.mean()
    value = baseline(reward)
    return reward - value, value


def total_loss(step: Step, w_distill: float = 1.0, w_kd: float = 0.0, lambda_ent: float | torch.Tensor = 0.0) -> None:
    """Stage 9: L = w_distill L_8 + w_kd L_7 - lambda_ent H, whose gradient updates the student."""
    if step.fused:
        student, teacher, aux = (step.answers[name] for name in ("student", "teacher", "aux"))
        # of several draws of t each meets the student's answer, so that the means over samples are over draws too
        of_student = (student.hidden, step.x_hat, step.logp, step.entropy)
        hidden, x_hat, logp, entropy = (for_each_draw(x, teacher.hidden) for x in of_student)
        made = fused.student_losses(
            Answer(hidden, student.weight), teacher, aux, x_hat, logp, entropy,
            student_at_t=step.student_at_t, w_distill=w_distill, w_kd=w_kd, lambda_ent=float(lambda_ent), **step.felt,
        )  # fmt: skip
        step.loss, step.distill, step.kd, step.gaps = made.total, made.distill, made.kd, made.gaps
        step.reward = _reward(made.gaps, len(step.x_hat))
    else:
        step.loss = w_distill * step.distill - lambda_ent * step.entropy.mean()
        if step.kd is not None:
            step.loss = step.loss + w_kd * step.kd
    require_finite("the student's loss", step.loss)


@torch.no_grad()
def gap_metrics(step: Step, student: UrsaTransformer, grid: Grid) -> dict[str, torch.Tensor]:
    """Entropies of teacher and auxiliary at x_t, their total variation, and the student's KL there, means over tokens.

    The KL costs a pass of the student where stage 7 has not run.
    """
    if step.fused:
        teacher, aux, tv = step.gaps.entropy_teacher, step.gaps.entropy_aux, step.gaps.total_variation
    else:
        teacher, aux = losses.token_entropy(step.teacher_logits), losses.token_entropy(step.aux_logits)
        tv = losses.total_variation(step.teacher_logits, step.aux_logits)
    ask, one = (visual_answer, fused) if step.fused else (visual_logits, losses)
    kd = step.kd
    if kd is None:
        kd = one.kl(step.answers["teacher"], ask(student, step.txt_ids_at_t, step.x_t, grid))
    return {
        "entropy/teacher": teacher.mean(),
        "entropy/aux": aux.mean(),
        "gap/aux_teacher_tv": tv.mean(),
        "gap/student_teacher_kl": kd.mean(),
    }
