"""The nine stages of a training step, one function each, and the `Step` that carries what they produced.

A notebook calls them one by one and looks at every tensor; `dimo.train.trainer` calls the same functions in the same
order. B samples, L text tokens, N visual tokens, K codes throughout. Source: Di[M]O, arXiv 2503.15457.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from dimo.distill import losses
from dimo.distill.schedules import Baseline, XInit, sample_t_curriculum
from dimo.errors import DimoError, require_finite, require_shape
from dimo.ursa import MetricPath, MixturePath, UrsaTransformer, draw_codes, guide, visual_logits

Grid = tuple[int, int, int]


@dataclasses.dataclass
class Step:
    """What one training step produced, stage by stage; logits keep their graph where the student must learn."""

    txt_ids: torch.Tensor | None = None  # 1: (B, L)
    x_init: torch.Tensor | None = None  # 2: (B, N)
    corrupted: torch.Tensor | None = None  # 2: (B,) bool
    student_logits: torch.Tensor | None = None  # 3: z_S (B, N, K)
    x_hat: torch.Tensor | None = None  # 3: (B, N)
    logp: torch.Tensor | None = None  # 3: (B, N)
    entropy: torch.Tensor | None = None  # 3: (B, N), nats
    t: torch.Tensor | None = None  # 4: (B,) or (B, N)
    x_t: torch.Tensor | None = None  # 4: (B, N)
    teacher_logits: torch.Tensor | None = None  # 5: (B, N, K)
    aux_losses: list[torch.Tensor] = dataclasses.field(default_factory=list)  # 6
    aux_logits: torch.Tensor | None = None  # 6: (B, N, K), after the auxiliary's updates
    kd: torch.Tensor | None = None  # 7: scalar
    reward: torch.Tensor | None = None  # 8: (B,) or (B, N)
    baseline: torch.Tensor | None = None  # 8: scalar
    distill: torch.Tensor | None = None  # 8: scalar
    loss: torch.Tensor | None = None  # 9: scalar


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


def student_pass(step: Step, student: UrsaTransformer, grid: Grid, temperature: float = 1.0, generator=None) -> None:
    """Stage 3: one pass at x_init; x_hat ~ softmax(z_S / temperature), its log-probability and entropy per token."""
    step.student_logits = visual_logits(student, step.txt_ids, step.x_init, grid)
    require_finite("the student's logits", step.student_logits)
    with torch.no_grad():
        step.x_hat = draw_codes(step.student_logits, generator, temperature)
    step.logp = losses.log_prob(step.student_logits, step.x_hat)
    step.entropy = losses.token_entropy(step.student_logits)


def draw_t(
    batch: int, grid: Grid, step_index: int, curriculum_steps: int, t_per: str, generator=None, device=None
) -> torch.Tensor:
    """Times of stage 4: one per sample (B,), or one per latent frame spread over its tokens (B, N)."""
    if t_per == "sample":
        return sample_t_curriculum(batch, step_index, curriculum_steps, generator, device)
    if t_per != "frame":
        raise DimoError(f"t_per must be 'sample' or 'frame', got {t_per!r}")
    t = sample_t_curriculum((batch, grid[0]), step_index, curriculum_steps, generator, device)
    return t.repeat_interleave(grid[1] * grid[2], 1)


def renoise(step: Step, path: MetricPath | MixturePath, t: torch.Tensor, generator=None) -> None:
    """Stage 4: x_t ~ p_t(. | x_hat)."""
    step.t, step.x_t = t, path.sample(step.x_hat, t, generator)


@torch.no_grad()
def teacher_pass(
    step: Step,
    teacher: UrsaTransformer,
    grid: Grid,
    guidance_scale: float = 1.0,
    guidance_trunc: float = 0.9,
    uncond_ids: torch.Tensor | None = None,
) -> None:
    """Stage 5: the frozen teacher at x_t, guided as u + w (c - u), w = 1 where t >= guidance_trunc."""
    if guidance_scale == 1:
        step.teacher_logits = visual_logits(teacher, step.txt_ids, step.x_t, grid)
    else:
        if uncond_ids is None:
            raise DimoError("uncond_ids is needed when guidance_scale is not 1: the ids of the empty prompt, (1, L)")
        ids = torch.cat([step.txt_ids, uncond_ids.expand_as(step.txt_ids)])
        cond, uncond = visual_logits(teacher, ids, step.x_t.repeat(2, 1), grid).chunk(2)
        w = torch.where(step.t < guidance_trunc, guidance_scale, 1.0)
        step.teacher_logits = guide(cond, uncond, w.view(len(cond), -1, 1))
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
) -> Iterator[torch.Tensor]:
    """Stage 6: the auxiliary's losses, one at a time, to be stepped on before the next is asked for.

    `denoise` fits it to the student: cross-entropy of x_hat at a fresh re-noising of it, t uniform, some prompts
    empty. `match_teacher` (preset `literal`) pulls it to the teacher: Jeffreys' divergence at x_t.
    """
    if objective not in ("denoise", "match_teacher"):
        raise DimoError(f"aux_objective must be 'denoise' or 'match_teacher', got {objective!r}")
    batch, device = len(step.txt_ids), step.txt_ids.device
    for _ in range(aux_steps):
        if objective == "match_teacher":
            logits = visual_logits(aux, step.txt_ids, step.x_t, grid)
            loss = losses.jeffreys(step.teacher_logits, logits).mean()
        else:
            t = sample_t_curriculum(batch, 0, 0, generator, device)
            txt_ids = step.txt_ids
            if empty_ids is not None and empty_share > 0:
                drop = torch.rand(batch, generator=generator, device=device) < empty_share
                txt_ids = torch.where(drop[:, None], empty_ids, txt_ids)
            logits = visual_logits(aux, txt_ids, path.sample(step.x_hat, t, generator), grid)
            loss = losses.denoising(logits, step.x_hat, label_smoothing)
        step.aux_losses.append(loss.detach())
        yield loss


@torch.no_grad()
def auxiliary_pass(step: Step, aux: UrsaTransformer, grid: Grid) -> None:
    """Stage 6, its end: the updated auxiliary at x_t."""
    step.aux_logits = visual_logits(aux, step.txt_ids, step.x_t, grid)
    require_finite("the auxiliary's logits", step.aux_logits)


def distil_knowledge(step: Step, student: UrsaTransformer, grid: Grid) -> None:
    """Stage 7: KL(p_T || p_St) with the student at x_t, mean over tokens."""
    step.kd = losses.kl(step.teacher_logits, visual_logits(student, step.txt_ids, step.x_t, grid)).mean()


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
    """
    require_shape("aux_logits", step.aux_logits, tuple(step.student_logits.shape))
    with torch.no_grad():
        step.reward = -losses.jeffreys(step.teacher_logits, step.aux_logits).mean(1)
    if estimator == "reinforce":
        advantage, step.baseline = _advantage(step.reward, baseline)
        step.distill = -(advantage[:, None] * step.logp).mean()
        return
    if estimator != "dimo":
        raise DimoError(f"estimator must be 'dimo' or 'reinforce', got {estimator!r}")
    if beta == "time":
        beta = step.t.view(len(step.t), -1, 1)  # (B, 1 or N, 1)
    gradient = losses.token_gradient(step.teacher_logits, step.aux_logits, beta)
    step.distill = (gradient * step.student_logits).sum(-1).mean()
    if w_reinforce > 0:
        with torch.no_grad():
            ratio = losses.log_prob(step.teacher_logits, step.x_hat) - losses.log_prob(step.aux_logits, step.x_hat)
        step.distill = step.distill - w_reinforce * (losses.leave_one_out(ratio) * step.logp).mean()


def _advantage(reward: torch.Tensor, baseline: Baseline | None) -> tuple[torch.Tensor, torch.Tensor]:
    if baseline is None:
        return losses.leave_one_out(reward), reward.mean()
    value = baseline(reward)
    return reward - value, value


def total_loss(step: Step, w_distill: float = 1.0, w_kd: float = 0.0, lambda_ent: float | torch.Tensor = 0.0) -> None:
    """Stage 9: L = w_distill L_8 + w_kd L_7 - lambda_ent H, whose gradient updates the student."""
    step.loss = w_distill * step.distill - lambda_ent * step.entropy.mean()
    if step.kd is not None:
        step.loss = step.loss + w_kd * step.kd
    require_finite("the student's loss", step.loss)
