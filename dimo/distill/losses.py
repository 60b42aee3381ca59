"""The losses of a training step with closed-form gradients, computed over chunks of tokens.

Notation: p_T and p_A are the predictions of teacher and auxiliary at the same x_t, p_S is the student's at x_init.
The divergences form a family (Di[M]O, arXiv 2503.15457, eq. 8-10):
    D_beta = (1 - beta) KL(p_T || p_A) + beta KL(p_A || p_T)
beta = 0 is the forward KL, beta = 1 the reverse KL, beta = 0.5 half of Jeffreys' divergence.

The gradient of every loss with respect to the logits is known in closed form, so the gradients of hidden states and
heads are accumulated chunk by chunk and the full logits are never materialised. Inside a chunk everything is float32;
logit gradients are rounded to the dtype of the hidden states before the matrix products, as autograd would do.

Matrix products with the head (64,000 rows) per token: one for the teacher and one for the auxiliary at x_t, one for the
student at x_t if knowledge distillation is on, and two more for each gradient. The student's logits at x_init are
recomputed only if its own probabilities enter the gradient (entropy bonus, policy gradient).
"""

from __future__ import annotations

import dataclasses
import math

import torch

from dimo.errors import DimoError, NonFiniteError, require_finite, require_shape
from dimo.ursa.prediction import Chunked, Dense, Prediction, require_same_tokens
from dimo.ursa.token_losses import log_softmax_of, mean_loss, zeros_of


@dataclasses.dataclass
class Gaps:
    """Entropies of teacher and auxiliary at x_t and the distances between them, per token (B, N), in nats."""

    forward: torch.Tensor  # KL(p_T || p_A)
    reverse: torch.Tensor  # KL(p_A || p_T)
    total_variation: torch.Tensor  # in [0, 1]
    entropy_teacher: torch.Tensor
    entropy_aux: torch.Tensor
    log_ratio: torch.Tensor  # log p_T(x_hat) - log p_A(x_hat)


@dataclasses.dataclass
class StudentLoss:
    """The student's loss: scalars in nats per token. Only `total` carries a gradient."""

    total: torch.Tensor
    distill: torch.Tensor
    kd: torch.Tensor | None
    gaps: Gaps


def student_loss(
    student: Dense | Chunked,
    teacher: Prediction,
    aux: Prediction,
    x_hat: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    *,
    beta: float | torch.Tensor | None,
    student_at_t: Dense | Chunked | None = None,
    advantage: torch.Tensor | None = None,
    known: Gaps | None = None,
    w_distill: float = 1.0,
    w_policy: float = 0.0,
    w_kd: float = 0.0,
    lambda_ent: float | torch.Tensor = 0.0,
) -> StudentLoss:
    """The losses of stages 7 to 9 and their gradients, in one pass over the tokens.

    total = w_distill (L_token - w_policy mean(advantage log p_S)) + w_kd KL(p_T || p_St) - lambda_ent H, where p_St is
    the student's prediction at x_t and H the mean token entropy. L_token = mean <stopgrad(dD_beta / dz_A), z_S> is a
    surrogate: its gradient with respect to the student's logits z_S equals the gradient of D_beta with respect to the
    auxiliary's logits z_A, (1 - beta)(p_A - p_T) + beta p_A (log p_A - log p_T - KL(p_A || p_T)).

    Args:
        student: prediction at x_init.
        teacher: prediction at x_t.
        aux: prediction at x_t.
        x_hat: (B, N) codes from `student.sample`.
        logp: (B, N) log-probabilities of x_hat, in nats.
        entropy: (B, N) entropies of the student at x_init, in nats.
        beta: of D_beta, a number or (B, 1 or N); None omits the token-level gradient (estimator `reinforce`).
        student_at_t: the student's prediction at x_t, with the same head as `student`.
        advantage: (B, 1 or N), for the policy gradient.
        known: the result of `gaps`, if it was computed for the advantage; saves comparing again if beta is None.
        lambda_ent: a number, or a scalar tensor, whose value is not read back.

    Returns:
        The loss; call `total.backward()`.

    Raises:
        DimoError: mismatching shapes, or the advantage is missing.
        NonFiniteError: logits that are not finite.
    """
    for name, prediction in (("teacher", teacher), ("aux", aux), ("student_at_t", student_at_t or student)):
        require_same_tokens(name, prediction, student)
    for name, tensor in (("x_hat", x_hat), ("logp", logp), ("entropy", entropy)):
        require_shape(name, tensor, student.shape)
    if w_policy and advantage is None:
        raise DimoError("advantage is needed if w_policy is not 0")
    if known is None and beta is None:
        known = gaps(teacher, aux, x_hat)

    settings = _Settings(
        _codes(x_hat, student), _per_token(beta, student), _per_token(advantage if w_policy else None, student),
        w_distill, w_policy, w_kd, _bonus(lambda_ent, x_hat.device),
    )  # fmt: skip
    fixed = student.detach()  # casts the head to the states' dtype once, for both predictions
    at_t = None if student_at_t is None else fixed.with_states(student_at_t.states.detach())
    felt, token, kd, rows = _StudentLoss.apply(
        student.states, None if student_at_t is None else student_at_t.states, student.head,
        fixed, at_t, teacher.detach(), aux.detach(), settings,
    )  # fmt: skip
    known = known or Gaps(*rows.view(-1, *x_hat.shape))
    distill = token - w_policy * (advantage * logp).mean() if w_policy else token
    total = w_distill * distill + w_kd * kd - (lambda_ent * entropy.mean()).float()
    try:
        require_finite("the student's loss", total)  # a single check; its cause is searched for only if it fails
    except NonFiniteError:
        require_finite("the teacher's logits", known.entropy_teacher)
        require_finite("the auxiliary's logits", known.entropy_aux)
        raise
    return StudentLoss(felt + total.detach(), distill, None if at_t is None else kd, known)


def _codes(x: torch.Tensor, of: Prediction) -> torch.Tensor:
    """The codes (B, N) of the rows of a prediction, (B n,)."""
    return of.part.own(x).flatten()


def _per_token(value, of: Prediction) -> torch.Tensor | None:
    """A number or (B, 1 or N), as float32 for each row of a prediction, (B n,); None stays None."""
    if value is None:
        return None
    if not isinstance(value, torch.Tensor):
        # not a copy from the host, which no CUDA graph can contain
        return torch.full((), float(value), device=of.device).expand(of.held).flatten()
    return of.part.own(value.float()).expand(of.held).flatten()


def _bonus(lambda_ent: float | torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """The weight as a float64 scalar; None for the number 0."""
    if isinstance(lambda_ent, torch.Tensor):
        return lambda_ent.double()
    return torch.full((), lambda_ent, dtype=torch.float64, device=device) if lambda_ent else None


@torch.no_grad()
def gaps(teacher: Prediction, aux: Prediction, x_hat: torch.Tensor) -> Gaps:
    """Compare teacher and auxiliary at x_t without gradients, for an advantage; x_hat is (B, N)."""
    require_same_tokens("aux", aux, teacher)
    require_shape("x_hat", x_hat, teacher.shape)
    teacher, aux, x = teacher.detach(), aux.detach(), _codes(x_hat, aux)
    one = aux.kernel(compare_logits)
    rows = [one(teacher.logits(r), aux.logits(r), x[r], None, torch.float32)[1] for r in aux.row_chunks()]
    return Gaps(*_whole(torch.cat(rows, 1), aux).view(-1, *x_hat.shape))


def _whole(rows: torch.Tensor, of: Prediction) -> torch.Tensor:
    """Values (V, B n) of the rows held here, as those (V, B N) of all tokens."""
    return of.part.whole(rows.reshape(-1, of.held[1])).view(len(rows), -1)


def jeffreys(teacher: Prediction, aux: Dense | Chunked) -> torch.Tensor:
    """Mean of KL(p_T || p_A) + KL(p_A || p_T), in nats per token, differentiable in the auxiliary's prediction."""
    return _mean_to(teacher, aux, _jeffreys)


def kl(teacher: Prediction, student: Dense | Chunked) -> torch.Tensor:
    """Mean of KL(p_T || p_S), in nats per token, differentiable in the student's prediction."""
    return _mean_to(teacher, student, _kl)


def leave_one_out(reward: torch.Tensor) -> torch.Tensor:
    """Leave-one-out advantage: the reward (B, ...) minus the mean reward of the other samples of the batch."""
    if len(reward) < 2:
        raise DimoError("a leave-one-out baseline needs a batch of at least 2")
    return (reward - reward.mean(0)) * (len(reward) / (len(reward) - 1))


def _mean_to(teacher: Prediction, learning: Dense | Chunked, function) -> torch.Tensor:
    require_same_tokens("the teacher", teacher, learning)
    fixed, one, dtype = teacher.detach(), learning.kernel(function), learning.states.dtype
    return mean_loss(learning, lambda z, rows: one(fixed.logits(rows), z, dtype))


@dataclasses.dataclass
class _Settings:
    """Inputs of `_StudentLoss` other than predictions; x_hat, beta and advantage are (B N,)."""

    x_hat: torch.Tensor
    beta: torch.Tensor | None
    advantage: torch.Tensor | None
    w_distill: float
    w_policy: float
    w_kd: float
    lambda_ent: torch.Tensor | None


class _StudentLoss(torch.autograd.Function):
    """Returns (0 carrying the gradient of the total loss, mean <g, z_S>, mean KL, rows of `Gaps` (6, B N)).

    Only the first output is differentiable. Logit gradients of a chunk are those of the sum over its tokens; weights
    and the factor 1 / (B N) are applied after the matrix products.
    """

    @staticmethod
    def forward(ctx, states, states_at_t, head, student, at_t, teacher, aux, s: _Settings):
        flat = student.states.flatten(0, 1)
        d_flat, d_flat_at_t = torch.zeros_like(flat), None if at_t is None else torch.zeros_like(flat)
        d_head, share = zeros_of(head, ctx.needs_input_grad[2]), 1 / math.prod(student.shape)
        compare, with_own, distil = (student.kernel(f) for f in (compare_logits, _own, _kl))
        zero = torch.zeros((), device=flat.device)
        token, kd, gap_rows = [zero], [zero], []
        own = s.lambda_ent is not None or s.advantage is not None
        for rows in student.row_chunks():
            x = s.x_hat[rows]
            z_t = teacher.logits(rows) if s.beta is not None or at_t is not None else None
            d_z = None
            if s.beta is not None:
                d_z, row = compare(z_t, aux.logits(rows), x, s.beta[rows], flat.dtype)
                gap_rows.append(row)
            if own:
                advantage = None if s.advantage is None else s.advantage[rows]
                z = student.logits(rows)
                d_z, value = with_own(z, d_z, x, advantage, s.w_distill, s.w_policy, s.lambda_ent, flat.dtype)
                token.append(value.sum())
            if d_z is not None:
                student.pull_back(d_z, rows, d_flat, d_head, share if own else share * s.w_distill)
                if not own:
                    token.append((d_flat[rows].float() * flat[rows].float()).sum())  # <g, h W^T> = <g W, h>
            if at_t is not None:
                d_z, value = distil(z_t, at_t.logits(rows), flat.dtype)
                kd.append(value.sum())
                at_t.pull_back(d_z, rows, d_flat_at_t, d_head, share * s.w_kd)
        d_states = d_flat.mul_(share if own else share * s.w_distill).view_as(states)
        d_at_t = None if d_flat_at_t is None else d_flat_at_t.mul_(share * s.w_kd).view_as(states_at_t)
        ctx.save_for_backward(d_states, d_at_t, d_head)
        token, kd = (student.part.total(torch.stack(values).sum()) * share for values in (token, kd))
        outputs = zero, token, kd, _whole(torch.cat(gap_rows, 1), student) if gap_rows else zero.clone()
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        return *(None if g is None else g * grad for g in ctx.saved_tensors), None, None, None, None, None


# The functions below work on a chunk: float32 logits (n, K) -> logit gradients (n, K) in `dtype`, values (n,).


def compare_logits(z_t, z_a, x, beta, dtype):
    """(gradient of D_beta with respect to the auxiliary's logits, or None if beta is None; the rows of `Gaps`)."""
    log_t, p_t = log_softmax_of(z_t)
    log_a, p_a = log_softmax_of(z_a)
    ratio = log_a - log_t
    forward, reverse = -(p_t * ratio).sum(-1), (p_a * ratio).sum(-1)
    log_ratio = -ratio.gather(-1, x.unsqueeze(-1)).squeeze(-1)
    total_variation = 0.5 * (p_t - p_a).abs().sum(-1)
    entropies = -(p_t * log_t).sum(-1), -(p_a * log_a).sum(-1)
    rows = [forward, reverse, total_variation, *entropies, log_ratio]
    d_z = None
    if beta is not None:
        beta = beta.unsqueeze(-1)
        d_z = (1 - beta) * (p_a - p_t) + beta * p_a * (ratio - reverse.unsqueeze(-1))
        d_z = d_z.to(dtype)
    return d_z, torch.stack(rows)


def _own(z, d_z, x, advantage, w_distill, w_policy, lambda_ent, dtype):
    """(w_distill (d_z + policy gradient) + gradient of the entropy bonus, <d_z, z> of the given d_z)."""
    log_p, p = log_softmax_of(z)
    value = z.new_zeros(len(z)) if d_z is None else (d_z.float() * z).sum(-1)
    total = z.new_zeros(()) if d_z is None else w_distill * d_z.float()
    if advantage is not None:
        chosen = torch.arange(z.shape[-1], device=z.device) == x.unsqueeze(-1)
        total = total - w_distill * w_policy * advantage.unsqueeze(-1) * (chosen.float() - p)
    if lambda_ent is not None:
        entropy = -(p * log_p).sum(-1, keepdim=True)
        total = total + lambda_ent * p * (log_p + entropy)
    return total.to(dtype), value


def _kl(z_t, z, dtype):
    log_t, p_t = log_softmax_of(z_t)
    log_p, p = log_softmax_of(z)
    return (p - p_t).to(dtype), (p_t * (log_t - log_p)).sum(-1)


def _jeffreys(z_t, z_a, dtype):
    log_t, p_t = log_softmax_of(z_t)
    log_a, p_a = log_softmax_of(z_a)
    ratio = log_a - log_t
    reverse = (p_a * ratio).sum(-1)
    d_z = p_a - p_t + p_a * (ratio - reverse.unsqueeze(-1))
    return d_z.to(dtype), reverse - (p_t * ratio).sum(-1)
