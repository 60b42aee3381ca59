"""The nine stages of a training step, one function each (stage 6 has two), and the `Step` that carries their results.

`dimo.distill.step` calls them in order; a notebook can call them one by one and inspect every tensor. Shapes: B
samples, L text tokens, N visual tokens, K codes, R draws of t per sample. Source: Di[M]O, arXiv 2503.15457.

Stages 7 and 8 compute no loss; they prepare what stage 9 needs. It computes all terms and gradients in one pass over
chunks of tokens (`losses.student_loss`), so the logits over 64,000 codes are never held for all tokens at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from dimo.distill import losses
from dimo.distill.exact_target import exact_denoising
from dimo.distill.schedules import Baseline, XInit, draw_t
from dimo.errors import DimoError, capturing, require_finite
from dimo.ursa import Chunked, Dense, MetricPath, MixturePath, Prediction, UrsaTransformer, predict, predict_guided
from dimo.ursa.lower import Lower, going_on, keeping
from dimo.ursa.token_losses import denoising

Grid = tuple[int, int, int]
LOOKED_AT = 128  # number of tokens of the first sample over which `logits_std` is measured
LATER: Any = None  # placeholder of a step's fields until their stage has run


@dataclasses.dataclass(repr=False)
class Step:
    """The results of one training step, stage by stage.

    `student` and `student_at_t` carry the student's autograd graph until the backward pass of stage 9. With `dense`,
    predictions store logits; otherwise they compute them from hidden states on demand (`dimo.ursa.prediction`).
    """

    dense: bool = True
    txt_ids: torch.Tensor = LATER  # 1: (B, L)
    x_init: torch.Tensor = LATER  # 2: (B, N)
    corrupted: torch.Tensor = LATER  # 2: (B,) bool
    student_step: torch.Tensor | None = None  # 2: (B,), the pass that x_init is for, if the student makes several
    student: Dense | Chunked = LATER  # 3: at x_init, (B, N, K)
    x_hat: torch.Tensor = LATER  # 3: (B, N)
    logp: torch.Tensor = LATER  # 3: (B, N), nats
    entropy: torch.Tensor = LATER  # 3: (B, N), nats
    logits_std: torch.Tensor = LATER  # 3: scalar, nats; standard deviation over the codes, for a few tokens
    t: torch.Tensor = LATER  # 4: (R B,) or (R B, N)
    x_t: torch.Tensor = LATER  # 4: (R B, N), all samples of the first draw of t, then of the second, ...
    teacher: Prediction = LATER  # 5: at x_t, (R B, N, K)
    lower: Lower | None = None  # 5: the teacher's hidden states at x_t, (R B, L + 1 + N, D), for the auxiliary
    aux_losses: list[torch.Tensor] = dataclasses.field(default_factory=list)  # 6: scalars, nats per token
    aux: Prediction = LATER  # 6: at x_t, (R B, N, K)
    student_at_t: Dense | Chunked | None = None  # 7: at x_t, (R B, N, K), if stage 7 runs
    beta: float | torch.Tensor | None = None  # 8: of D_beta, a number or (R B, 1 or N); None: no token-level gradient
    w_policy: float = 0.0  # 8: weight of the policy gradient, multiplied by w_distill
    advantage: torch.Tensor | None = None  # 8: (R B, 1 or N), for the policy gradient
    baseline: torch.Tensor | None = None  # 8: scalar
    gaps: losses.Gaps | None = None  # 9, or 8 if the advantage needs them
    reward: torch.Tensor = LATER  # 9: (B,), nats per token
    distill: torch.Tensor = LATER  # 9: scalar
    kd: torch.Tensor | None = None  # 9: scalar, if stage 7 runs
    loss: torch.Tensor = LATER  # 9: scalar, carries the gradient

    def __repr__(self) -> str:
        """Names and shapes of the results so far."""
        shown = {field.name: _shown(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return f"Step({', '.join(f'{name}={text}' for name, text in shown.items() if text)})"

    @property
    def txt_ids_at_t(self) -> torch.Tensor:
        """(R B, L): the prompts of the rows of x_t."""
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
    """Repeat `value` (B, ...) to match the rows of `at_t` (R B, ...), once for each draw of t."""
    draws = len(at_t) // len(value)
    return value if draws == 1 else value.repeat(draws, *[1] * (value.dim() - 1))


def over_draws(value: torch.Tensor, samples: int) -> torch.Tensor:
    """Mean over the draws of t, (R B, ...) -> (B, ...), where B is `samples`."""
    return value if len(value) == samples else value.view(-1, samples, *value.shape[1:]).mean(0)


def _require_finite(name: str, prediction: Prediction) -> None:
    """Check dense logits; chunked ones are checked in stage 9, where they are computed."""
    if isinstance(prediction, Dense):
        require_finite(name, prediction.states)


def tokenise(tokenize, prompts: list[str], max_prompt_length: int) -> torch.Tensor:
    """Stage 1: prompts to txt_ids (B, max_prompt_length), padded on the left; `tokenize` is `Ursa.tokenize`."""
    if not prompts:
        raise DimoError("prompts must not be empty")
    if max_prompt_length < 1:
        raise DimoError(f"max_prompt_length must be at least 1, got {max_prompt_length}")
    return tokenize(prompts, max_prompt_length)


def draw_x_init(step: Step, x_init: XInit, num_visual_tokens: int, generator=None) -> None:
    """Stage 2: x_init, uniform codes or a corrupted earlier sample, together with the prompt it was made for."""
    step.x_init, step.txt_ids, step.corrupted = x_init(step.txt_ids, num_visual_tokens, generator)


def student_pass(step: Step, student: UrsaTransformer, grid: Grid, generator=None) -> None:
    """Stage 3: one student pass at x_init; draws x_hat ~ softmax(z_S), with log-probability and entropy per token."""
    step.student = predict(student, step.txt_ids, step.x_init, grid, step.dense)
    fixed = step.student.detach()  # so that the head is cast once, for sampling and for logits_std
    step.x_hat, step.logp, step.entropy = fixed.sample(generator)
    step.logits_std = fixed.logits(slice(0, min(LOOKED_AT, step.x_hat.shape[1]))).std(-1).mean()
    require_finite("the student's logits", step.entropy)


def renoise(step: Step, path: MetricPath | MixturePath, t: torch.Tensor, generator=None) -> None:
    """Stage 4: x_t ~ p_t(. | x_hat) for t (R B,) or (R B, N).

    The student's gradient is an expectation over t and x_t. Several draws (R > 1) reduce the variance of its estimate
    at the price of one teacher pass and one auxiliary pass each, without a further student pass.
    """
    if len(t) % len(step.x_hat):
        raise DimoError(f"the rows of t must be a multiple of those of x_hat ({len(step.x_hat)}), got {len(t)}")
    step.t, step.x_t = t, path.sample(for_each_draw(step.x_hat, t), t, generator)


@torch.no_grad()
def teacher_pass(
    step: Step,
    teacher: UrsaTransformer,
    grid: Grid,
    guidance_scale: float = 1.0,
    guidance_trunc: float = 0.9,
    uncond_ids: torch.Tensor | None = None,
    shared_layers: int = 0,
) -> None:
    """Stage 5: the frozen teacher at x_t with classifier-free guidance, u + w (c - u).

    Conditional and unconditional passes form one batch. If any t < guidance_trunc the unconditional half runs for all
    rows, not just the guided ones: a compiled teacher then sees only two batch sizes. In a CUDA graph it always runs.

    Args:
        guidance_scale: w; 1 is no guidance.
        guidance_trunc: w = 1 where t >= this.
        uncond_ids: (1, L) ids of the negative prompt; required if guidance_scale is not 1.
        shared_layers: keep the conditional hidden states after so many layers, from which the auxiliary goes on.
    """
    if guidance_scale != 1 and uncond_ids is None:
        raise DimoError("uncond_ids, the ids (1, L) of the negative prompt, are required if guidance_scale is not 1")
    txt_ids = step.txt_ids_at_t
    with keeping(shared_layers) as lower:
        if guidance_scale != 1 and (capturing(step.t) or bool((step.t < guidance_trunc).any())):
            w = torch.where(step.t < guidance_trunc, guidance_scale, 1.0).view(len(step.t), -1, 1)
            step.teacher = predict_guided(teacher, txt_ids, uncond_ids, step.x_t, grid, w, step.dense, step.t)
        else:
            step.teacher = predict(teacher, txt_ids, step.x_t, grid, step.dense, step.t)
    if lower is not None:
        step.lower = lower.first(len(step.x_t))  # not of the unconditional half
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
    shift: float = 1.0,
    aux_target: str = "sampled",
) -> Iterator[torch.Tensor]:
    """Stage 6: the losses of the auxiliary's updates. Update the auxiliary before asking for the next loss.

    Args:
        objective: "denoise" fits the auxiliary to the student's samples: cross-entropy of x_hat given a newly
            re-noised x_hat. "match_teacher" (preset `literal`) fits it to the teacher: Jeffreys' divergence at x_t.
        aux_steps: number of updates.
        label_smoothing: of the cross-entropy.
        empty_share: probability that a prompt is replaced by the empty one; never in an update at x_t itself.
        empty_ids: (1, L) ids of the empty prompt.
        share_x_t: run the first update at x_t itself (with several draws of t: one update per draw) and keep its
            prediction, made before the update, as the auxiliary's prediction at x_t. Saves `auxiliary_pass`.
        t_per, shift: of `draw_t`; should be those of stage 4, since the auxiliary is evaluated at such x_t.
        aux_target: of "denoise": "sampled" fits it to x_hat itself, "exact" to its distribution given x_t and x_init
            (`exact_denoising`), which needs `step.student`.

    Fits at x_t itself go on from `step.lower`, if the auxiliary shares layers with the teacher (`dimo.ursa.lower`).

    Yields:
        Scalar losses with gradient, in nats per token.

    Raises:
        DimoError: unknown objective, or share_x_t with fewer updates than draws of t.
    """
    if objective not in ("denoise", "match_teacher"):
        raise DimoError(f"aux_objective must be 'denoise' or 'match_teacher', got {objective!r}")
    if aux_target not in ("sampled", "exact"):
        raise DimoError(f"aux_target must be 'sampled' or 'exact', got {aux_target!r}")
    batch, device = len(step.txt_ids), step.txt_ids.device
    draws = [slice(start, start + batch) for start in range(0, len(step.x_t), batch)] if share_x_t else []
    if objective == "match_teacher":
        draws = [slice(None)] * aux_steps  # every update uses all draws
    if len(draws) > aux_steps:
        raise DimoError(f"aux_steps must be at least {len(draws)}, one per draw of t, to share x_t, got {aux_steps}")
    kept: list[Dense | Chunked] = []
    for index in range(aux_steps):
        rows = draws[index] if index < len(draws) else None
        if rows is not None:
            x, t, lower = step.x_t[rows], step.t[rows], step.lower and step.lower.of(rows)
            txt_ids = for_each_draw(step.txt_ids, x)
        else:
            lower = None  # another x_t than the teacher's
            txt_ids, t = step.txt_ids, draw_t(batch, grid, 0, 0, t_per, 1.0, 1, generator, device, shift)
            if empty_ids is not None and empty_share > 0:
                drop = torch.rand(batch, generator=generator, device=device) < empty_share
                txt_ids = torch.where(drop[:, None], empty_ids, txt_ids)
            x = path.sample(step.x_hat, t, generator)
        with going_on(lower):
            prediction = predict(aux, txt_ids, x, grid, step.dense)
        if share_x_t and rows is not None:
            fixed = prediction.detach(copy=True)
            kept = [fixed] if objective == "match_teacher" else [*kept, fixed]
            # the draws as one prediction, under the latest head, should heads be trained
            step.aux = fixed if len(kept) == 1 else fixed.with_states(torch.cat([one.states for one in kept]))
        if objective == "match_teacher":
            loss = losses.jeffreys(step.teacher, prediction)
        elif aux_target == "exact":
            loss = exact_denoising(prediction, step.student, path, x, t, label_smoothing)
        else:
            loss = denoising(prediction, step.x_hat, label_smoothing)
        step.aux_losses.append(loss.detach())
        yield loss


@torch.no_grad()
def auxiliary_pass(step: Step, aux: UrsaTransformer, grid: Grid) -> None:
    """End of stage 6: the prediction of the updated auxiliary at x_t."""
    with going_on(step.lower):
        step.aux = predict(aux, step.txt_ids_at_t, step.x_t, grid, step.dense)
    _require_finite("the auxiliary's logits", step.aux)


def distil_knowledge(step: Step, student: UrsaTransformer, grid: Grid) -> None:
    """Stage 7: the student's prediction at x_t, for the knowledge distillation term KL(p_T || p_St) of stage 9."""
    step.student_at_t = predict(student, step.txt_ids_at_t, step.x_t, grid, step.dense)


def distillation_signal(
    step: Step, estimator: str, beta: float | str, baseline: Baseline | None, w_reinforce: float = 0.0
) -> None:
    """Stage 8: choose the gradient that stage 9 applies to the student's logits z_S, averaged over the draws of t.

    Args:
        estimator: "dimo" takes the exact gradient of D_beta on the auxiliary's logits as that of z_S, per token
            (arXiv 2503.15457, eq. 8-10). "reinforce" uses a policy gradient with reward -Jeffreys(p_T, p_A) per sample.
        beta: of D_beta, a number in [0, 1], or "time" for beta = t: forward KL near the noise, where mode coverage is
            decided, reverse KL near the data, where tokens must be consistent. Used by "dimo" only.
        baseline: EMA baseline of "reinforce"; None means leave-one-out.
        w_reinforce: weight of a policy gradient added to "dimo", with reward log p_T(x_hat) - log p_A(x_hat) per
            token and a leave-one-out baseline.
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


# Values of `distill.estimator`. Each may set the step's `beta` (left at None: no token-level gradient) and, for a
# policy gradient, its `w_policy`, `advantage` and `baseline`. The key's help in dimo/config/schema.py lists them.
ESTIMATORS = {"dimo": _dimo, "reinforce": _reinforce}


def require_estimator(name: str) -> None:
    """Raise DimoError for an unknown estimator."""
    if name not in ESTIMATORS:
        raise DimoError(f"distill.estimator must be one of {', '.join(ESTIMATORS)}, got {name!r}")


def reward_of(gaps: losses.Gaps, samples: int) -> torch.Tensor:
    """-Jeffreys(p_T, p_A), averaged over tokens and draws of t: (B,), in nats per token; B is `samples`."""
    return over_draws(-(gaps.forward + gaps.reverse).mean(1), samples)


def total_loss(step: Step, w_distill: float = 1.0, w_kd: float = 0.0, lambda_ent: float | torch.Tensor = 0.0) -> None:
    """Stage 9: the student's loss, w_distill L_8 + w_kd L_7 - lambda_ent H.

    L_8 is the distillation loss chosen by stage 8, L_7 is KL(p_T || p_St) at x_t, H is the mean token entropy.
    """
    # once per draw of t: rows of the student then match those of x_t, and a mean over rows is one over draws too
    draws = len(step.x_t) // len(step.x_hat)
    x_hat, logp, entropy = (for_each_draw(x, step.x_t) for x in (step.x_hat, step.logp, step.entropy))
    made = losses.student_loss(
        step.student.repeat(draws), step.teacher, step.aux, x_hat, logp, entropy, beta=step.beta,
        student_at_t=step.student_at_t, advantage=step.advantage, known=step.gaps, w_distill=w_distill,
        w_policy=step.w_policy, w_kd=w_kd, lambda_ent=lambda_ent,
    )  # fmt: skip
    step.loss, step.distill, step.kd, step.gaps = made.total, made.distill, made.kd, made.gaps
    step.reward = reward_of(made.gaps, len(step.x_hat))
