"""The nine stages of a training step, one function each, and the `Step` that carries what they produced.

A notebook calls them one by one and looks at every tensor; `dimo.distill.step` calls them in order. B samples, L text
tokens, N visual tokens, K codes, R draws of t throughout. Source: Di[M]O, arXiv 2503.15457.

Stages 7 and 8 say what the student is to be told, and stage 9 makes all its losses and gradients in one pass over
chunks of tokens (`losses.student_loss`), so that logits of 64,000 codes are never held for all tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from dimo.distill import losses
from dimo.distill.schedules import Baseline, XInit, sample_t_curriculum
from dimo.errors import DimoError, require_finite
from dimo.ursa import Chunked, Dense, MetricPath, MixturePath, Prediction, UrsaTransformer, predict

Grid = tuple[int, int, int]
LOOKED_AT = 128  # tokens of the first sample whose logits are measured


@dataclasses.dataclass(repr=False)
class Step:
    """What one training step produced, stage by stage.

    `student` and `student_at_t` carry the graph through which the student learns until stage 9 has used it; `dense`
    says that predictions hold logits, else they make them from hidden states when asked (`dimo.ursa.prediction`).
    """

    dense: bool = True
    txt_ids: torch.Tensor | None = None  # 1: (B, L)
    x_init: torch.Tensor | None = None  # 2: (B, N)
    corrupted: torch.Tensor | None = None  # 2: (B,) bool
    student: Dense | Chunked | None = None  # 3: at x_init, (B, N, K)
    x_hat: torch.Tensor | None = None  # 3: (B, N)
    logp: torch.Tensor | None = None  # 3: (B, N), nats
    entropy: torch.Tensor | None = None  # 3: (B, N), nats
    logits_std: torch.Tensor | None = None  # 3: scalar, nats; of a few tokens, over the codes
    t: torch.Tensor | None = None  # 4: (R B,) or (R B, N)
    x_t: torch.Tensor | None = None  # 4: (R B, N), all samples once for each draw of t
    teacher: Prediction | None = None  # 5: at x_t, (R B, N, K)
    aux_losses: list[torch.Tensor] = dataclasses.field(default_factory=list)  # 6: scalars, nats per token
    aux: Prediction | None = None  # 6: at x_t, (R B, N, K)
    student_at_t: Dense | Chunked | None = None  # 7: at x_t, (R B, N, K), where stage 7 runs
    beta: float | torch.Tensor | None = None  # 8: of D_beta, a number or (R B, 1 or N); None: no token-level gradient
    w_policy: float = 0.0  # 8: weight of the policy gradient, inside w_distill
    advantage: torch.Tensor | None = None  # 8: (R B, 1 or N), of the policy gradient
    baseline: torch.Tensor | None = None  # 8: scalar
    gaps: losses.Gaps | None = None  # 9, or 8 where the advantage needs them
    reward: torch.Tensor | None = None  # 9: (B,), nats per token
    distill: torch.Tensor | None = None  # 9: scalar
    kd: torch.Tensor | None = None  # 9: scalar, where stage 7 runs
    loss: torch.Tensor | None = None  # 9: scalar, with the gradient

    def __repr__(self) -> str:
        """Names and shapes; of what is not there yet, nothing."""
        shown = {field.name: _shown(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return f"Step({', '.join(f'{name}={text}' for name, text in shown.items() if text)})"

    @property
    def txt_ids_at_t(self) -> torch.Tensor:
        """(R B, L): the prompts as x_t has its rows."""
        return for_each_draw(self.txt_ids, self.x_t)


def _shown(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.item():.4g}" if value.dim() == 0 and not value.is_cuda else str(tuple(value.shape))
    if isinstance(value, losses.Gaps):
        return f"Gaps{tuple(value.forward.shape)}"
    if isinstance(value, list):
        return f"{len(value)} values" if value else ""
    return "" if value is None else repr(value)


def for_each_draw(value: torch.Tensor, at_t: torch.Tensor) -> torch.Tensor:
    """`value` (B, ...) once for each draw of t, as `at_t` (R B, ...) has its rows."""
    draws = len(at_t) // len(value)
    return value if draws == 1 else value.repeat(draws, *[1] * (value.dim() - 1))


def over_draws(value: torch.Tensor, samples: int) -> torch.Tensor:
    """The mean over the draws of t: (R B, ...) -> (B, ...)."""
    return value if len(value) == samples else value.view(-1, samples, *value.shape[1:]).mean(0)


def _require_finite(name: str, prediction: Prediction) -> None:
    """Of logits that are there; others are looked at in stage 9, where they are made."""
    if isinstance(prediction, Dense):
        require_finite(name, prediction.states)


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
    step.student = predict(student, step.txt_ids, step.x_init, grid, step.dense)
    fixed = step.student.detach()  # the head is rounded once for both
    step.x_hat, step.logp, step.entropy = fixed.sample(generator)
    step.logits_std = fixed.logits(slice(0, min(LOOKED_AT, step.x_hat.shape[1]))).std(-1).mean()
    require_finite("the student's logits", step.entropy)


def draw_t(
    batch: int,
    grid: Grid,
    step_index: int,
    curriculum_steps: int,
    t_per: str,
    t_power: float,
    draws: int,
    generator=None,
    device=None,
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
    txt_ids = step.txt_ids_at_t
    if guidance_scale == 1 or not bool((step.t < guidance_trunc).any()):
        step.teacher = predict(teacher, txt_ids, step.x_t, grid, step.dense)
    else:
        ids = torch.cat([txt_ids, uncond_ids.expand_as(txt_ids)])
        cond, uncond = predict(teacher, ids, step.x_t.repeat(2, 1), grid, step.dense).chunk(2)
        w = torch.where(step.t < guidance_trunc, guidance_scale, 1.0)
        step.teacher = cond.guided(uncond, w.view(len(w), -1, 1))
    _require_finite("the teacher's logits", step.teacher)


def auxiliary_losses(
    step: Step,
    aux: UrsaTransformer,
    path: MetricPath | MixturePath,
    grid: Grid,
    objective: str = "denoise",
    aux_steps: int = 2,
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
    step's own prompts, and what it predicts before the update stands for the auxiliary there: `auxiliary_pass` is not
    needed.
    """
    if objective not in ("denoise", "match_teacher"):
        raise DimoError(f"aux_objective must be 'denoise' or 'match_teacher', got {objective!r}")
    batch, device = len(step.txt_ids), step.txt_ids.device
    draws, kept = step.x_t.split(batch) if share_x_t else (), []
    if objective == "match_teacher":
        draws = [step.x_t] * aux_steps  # all draws in every fit
    if len(draws) > aux_steps:
        raise DimoError(f"aux_steps must be at least {len(draws)}, x_t's draws, where x_t is shared, got {aux_steps}")
    for index in range(aux_steps):
        at_x_t = index < len(draws)
        if at_x_t:
            x, txt_ids = draws[index], for_each_draw(step.txt_ids, draws[index])
        else:
            txt_ids, t = step.txt_ids, draw_t(batch, grid, 0, 0, t_per, 1.0, 1, generator, device)
            if empty_ids is not None and empty_share > 0:
                drop = torch.rand(batch, generator=generator, device=device) < empty_share
                txt_ids = torch.where(drop[:, None], empty_ids, txt_ids)
            x = path.sample(step.x_hat, t, generator)
        prediction = predict(aux, txt_ids, x, grid, step.dense)
        if share_x_t and at_x_t:
            fixed = prediction.detach(copy=True)
            kept = [fixed] if objective == "match_teacher" else [*kept, fixed]
            # of several draws as one, under the head as it is now where that learns
            step.aux = fixed if len(kept) == 1 else fixed.with_states(torch.cat([one.states for one in kept]))
        if objective == "match_teacher":
            loss = losses.jeffreys(step.teacher, prediction)
        else:
            loss = losses.denoising(prediction, step.x_hat, label_smoothing)
        step.aux_losses.append(loss.detach())
        yield loss


@torch.no_grad()
def auxiliary_pass(step: Step, aux: UrsaTransformer, grid: Grid) -> None:
    """Stage 6, its end: the updated auxiliary at x_t."""
    step.aux = predict(aux, step.txt_ids_at_t, step.x_t, grid, step.dense)
    _require_finite("the auxiliary's logits", step.aux)


def distil_knowledge(step: Step, student: UrsaTransformer, grid: Grid) -> None:
    """Stage 7: the student at x_t, for KL(p_T || p_St), which stage 9 adds as a mean over tokens."""
    step.student_at_t = predict(student, step.txt_ids_at_t, step.x_t, grid, step.dense)


def distillation_signal(
    step: Step,
    estimator: str,
    beta: float | str,
    baseline: Baseline | None,
    w_reinforce: float = 0.0,
) -> None:
    """Stage 8: which gradient stage 9 sends to the student's logits z_S at x_init.

    `dimo`: the exact gradient of D_beta on the auxiliary's logits, per token; beta a number, or "time": beta = t,
    forward KL near the noise, where all videos are open and coverage is decided, reverse KL near the data, where tokens
    must agree. `w_reinforce` adds a policy gradient whose reward per token is log p_T(x_hat) - log p_A(x_hat).
    `reinforce`: the policy gradient with reward -Jeffreys(p_T, p_A) per sample, and an EMA baseline or (baseline None)
    leave-one-out. Gradients and rewards are means over the draws of t.
    """
    require_estimator(estimator)
    ESTIMATORS[estimator](step, beta, baseline, w_reinforce)


def _dimo(step: Step, beta: float | str, baseline: Baseline | None, w_reinforce: float) -> None:
    step.beta = step.t.view(len(step.t), -1) if beta == "time" else beta
    if w_reinforce > 0:
        step.gaps = losses.gaps(step.teacher, step.aux, for_each_draw(step.x_hat, step.x_t))
        advantage = losses.leave_one_out(over_draws(step.gaps.log_ratio, len(step.x_hat)))
        step.w_policy, step.advantage = w_reinforce, for_each_draw(advantage, step.x_t)


def _reinforce(step: Step, beta: float | str, baseline: Baseline | None, w_reinforce: float) -> None:
    step.gaps = losses.gaps(step.teacher, step.aux, for_each_draw(step.x_hat, step.x_t))
    reward = reward_of(step.gaps, len(step.x_hat))
    if baseline is None:
        advantage, step.baseline = losses.leave_one_out(reward), reward.mean()
    else:
        step.baseline = baseline(reward)
        advantage = reward - step.baseline
    step.w_policy, step.advantage = 1.0, for_each_draw(advantage[:, None], step.x_t)


# What `distill.estimator` may name. Each sets the step's `beta` (None leaves out the token-level gradient) and, for a
# policy gradient, its `w_policy`, `advantage` and `baseline`.
ESTIMATORS = {"dimo": _dimo, "reinforce": _reinforce}


def require_estimator(name: str) -> None:
    """Raise unless there is such an estimator."""
    if name not in ESTIMATORS:
        raise DimoError(f"distill.estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}")


def reward_of(gaps: losses.Gaps, samples: int) -> torch.Tensor:
    """(B,): -Jeffreys(p_T, p_A), the mean over tokens and draws of t, in nats per token."""
    return over_draws(-(gaps.forward + gaps.reverse).mean(1), samples)


def total_loss(step: Step, w_distill: float = 1.0, w_kd: float = 0.0, lambda_ent: float | torch.Tensor = 0.0) -> None:
    """Stage 9: L = w_distill L_8 + w_kd L_7 - lambda_ent H, whose gradient updates the student."""
    # of several draws of t each meets the student's prediction, so that the means over samples are over draws too
    draws = len(step.x_t) // len(step.x_hat)
    x_hat, logp, entropy = (for_each_draw(x, step.x_t) for x in (step.x_hat, step.logp, step.entropy))
    made = losses.student_loss(
        step.student.repeat(draws), step.teacher, step.aux, x_hat, logp, entropy, beta=step.beta,
        student_at_t=step.student_at_t, advantage=step.advantage, known=step.gaps, w_distill=w_distill,
        w_policy=step.w_policy, w_kd=w_kd, lambda_ent=float(lambda_ent),
    )  # fmt: skip
    step.loss, step.distill, step.kd, step.gaps = made.total, made.distill, made.kd, made.gaps
    step.reward = reward_of(made.gaps, len(step.x_hat))
