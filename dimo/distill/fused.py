"""The losses from hidden states and heads, a few tokens at a time: their values, and their exact gradients.

The gradient of every loss with respect to logits is known in closed form (`losses.py` is the readable reference), so
the gradients of hidden states and heads follow chunk by chunk, and full logits never exist. Inside a chunk everything
is float32; gradients of logits are rounded to the dtype of the hidden states for their products, as autograd's are.

Products with a head of 64,000 rows, per token: teacher and auxiliary at x_t, and the student at x_t where knowledge is
distilled, each once; two more for each gradient. The student's logits at x_init were needed once for x_hat, and are
made again only where its own probabilities enter the gradient (entropy bonus, policy gradient).
"""

from __future__ import annotations

import dataclasses

import torch

from dimo.errors import DimoError, require_finite, require_shape
from dimo.ursa.answer import Answer, logits_of
from dimo.ursa.chunks import chunks, on_device, tokens_at_once


@dataclasses.dataclass
class Gaps:
    """What teacher and auxiliary say at x_t and how far they are apart, per token (B, N), in nats."""

    forward: torch.Tensor  # KL(p_T || p_A)
    reverse: torch.Tensor  # KL(p_A || p_T)
    total_variation: torch.Tensor
    entropy_teacher: torch.Tensor
    entropy_aux: torch.Tensor
    log_ratio: torch.Tensor  # log p_T(x_hat) - log p_A(x_hat)


@dataclasses.dataclass
class Losses:
    """`total` carries the gradient; its parts do not. Scalars, in nats per token."""

    total: torch.Tensor
    distill: torch.Tensor
    kd: torch.Tensor | None
    gaps: Gaps


def student_losses(
    student: Answer,
    teacher: Answer,
    aux: Answer,
    x_hat: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    *,
    beta: float | torch.Tensor | None,
    student_at_t: Answer | None = None,
    advantage: torch.Tensor | None = None,
    known: Gaps | None = None,
    w_distill: float = 1.0,
    w_policy: float = 0.0,
    w_kd: float = 0.0,
    lambda_ent: float = 0.0,
) -> Losses:
    """Stages 7 to 9 in one pass: w_distill (L_token - w_policy mean(advantage log p)) + w_kd KL - lambda_ent H.

    Args:
        student: at x_init; teacher and aux: at x_t; student_at_t: the student at x_t, for KL(p_T || p_St).
        x_hat, logp, entropy: each (B, N), what `draw` gave of the student.
        beta: of D_beta, a number or (B, 1 or N); None leaves out the token-level gradient (estimator `reinforce`).
        advantage: (B, 1 or N), of the policy gradient.
        known: what `gaps` gave, where the advantage was made of it; then teacher and aux are compared only for beta.

    Raises:
        DimoError: shapes that do not fit each other, or no advantage; NonFiniteError: logits that are not finite.
    """
    shape, device = student.hidden.shape[:2], student.hidden.device
    for name, answer in (("teacher", teacher), ("aux", aux), ("student_at_t", student_at_t or student)):
        require_shape(f"{name}'s hidden", answer.hidden, (*shape, "D"))
    for name, tensor in (("x_hat", x_hat), ("logp", logp), ("entropy", entropy)):
        require_shape(name, tensor, tuple(shape))
    if w_policy and advantage is None:
        raise DimoError("advantage is needed where w_policy is not 0")
    if known is None and beta is None:
        known = gaps(teacher, aux, x_hat)

    def per_token(value):
        return None if value is None else torch.as_tensor(value, device=device).float().expand(shape).flatten()

    settings = _Settings(
        x_hat.flatten(), per_token(beta), per_token(advantage if w_policy else None),
        w_distill, w_policy, w_kd, torch.full((), lambda_ent, device=device) if lambda_ent else None,
    )  # fmt: skip
    felt, token, kd, rows = _StudentLosses.apply(
        student.hidden, None if student_at_t is None else student_at_t.hidden, student.weight,
        teacher.detach(), aux.detach(), settings,
    )  # fmt: skip
    known = known or Gaps(*rows.view(-1, *shape))
    require_finite("the teacher's logits", known.entropy_teacher)
    require_finite("the auxiliary's logits", known.entropy_aux)
    distill = token - w_policy * (advantage * logp).mean() if w_policy else token
    total = w_distill * distill + w_kd * kd - lambda_ent * entropy.mean()
    return Losses(felt + total.detach(), distill, None if student_at_t is None else kd, known)


@torch.no_grad()
def gaps(teacher: Answer, aux: Answer, x_hat: torch.Tensor) -> Gaps:
    """The comparison without gradients, for an advantage, which must be known before the gradient."""
    teacher, aux, rows = teacher.detach(), aux.detach(), []
    one, size = on_device(_compare, aux.hidden), tokens_at_once(len(aux.weight), x_hat.device)
    for h_t, h_a, x in chunks(size, _flat(teacher), _flat(aux), x_hat.flatten()):
        rows.append(one(logits_of(h_t, teacher.weight), logits_of(h_a, aux.weight), x, None, 1.0, h_a.dtype)[1])
    return Gaps(*torch.cat(rows, 1).view(-1, *x_hat.shape))


def denoising(answer: Answer, tokens: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy of the clean tokens (B, N), in nats per token; its gradient goes to the answer."""
    require_shape("tokens", tokens, tuple(answer.hidden.shape[:2]))
    one, dtype = on_device(_cross_entropy, answer.hidden), answer.hidden.dtype
    return _mean_loss(answer, lambda z, x: one(z, x, label_smoothing, dtype), tokens.flatten())


def jeffreys(teacher: Answer, aux: Answer) -> torch.Tensor:
    """Mean of KL(p_T || p_A) + KL(p_A || p_T); its gradient goes to the auxiliary."""
    fixed, one, dtype = teacher.detach(), on_device(_jeffreys, aux.hidden), aux.hidden.dtype
    return _mean_loss(aux, lambda z, h: one(logits_of(h, fixed.weight), z, dtype), _flat(fixed))


def kl(teacher: Answer, student: Answer) -> torch.Tensor:
    """Mean of KL(p_T || p_S); its gradient goes to the student."""
    fixed, one, dtype = teacher.detach(), on_device(_kl, student.hidden), student.hidden.dtype
    return _mean_loss(student, lambda z, h: one(logits_of(h, fixed.weight), z, dtype), _flat(fixed))


def _mean_loss(answer: Answer, function, row: torch.Tensor) -> torch.Tensor:
    return _MeanLoss.apply(answer.hidden, answer.weight, function, row)


class _MeanLoss(torch.autograd.Function):
    """The mean over tokens of one network's loss: function(logits (n, K), row (n, ...)) gives d_z and values (n,)."""

    @staticmethod
    def forward(ctx, hidden, weight, function, row):
        learns = any(ctx.needs_input_grad)
        own, flat = weight.detach().to(hidden.dtype), hidden.detach().flatten(0, 1)
        d_hidden, d_weight = torch.empty_like(flat), _gradient_of(weight, ctx.needs_input_grad[1])
        values = []
        for h, d_h, r in chunks(tokens_at_once(len(own), own.device), flat, d_hidden, row):
            d_z, value = function(logits_of(h, own), r)
            values.append(value.sum())
            if learns:
                torch.mm(d_z, own, out=d_h)
                _add_product(d_weight, d_z, h, 1 / len(flat))
        if learns:
            ctx.gradients = [d_hidden.mul_(1 / len(flat)).view_as(hidden), d_weight]
        return torch.stack(values).sum() / len(flat)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(grad) for g in gradients), None, None


@dataclasses.dataclass
class _Settings:
    """What `_StudentLosses` reads beside the networks; x_hat, beta and advantage are (B N,)."""

    x_hat: torch.Tensor
    beta: torch.Tensor | None
    advantage: torch.Tensor | None
    w_distill: float
    w_policy: float
    w_kd: float
    lambda_ent: torch.Tensor | None


class _StudentLosses(torch.autograd.Function):
    """0 with the gradient of everything, then without one: <g, z_S> and KL, means, and the rows of `Gaps` (6, B N).

    A chunk's gradients of logits are in units of one token's loss; 1 / (B N) comes after the product.
    """

    @staticmethod
    def forward(ctx, hidden, hidden_at_t, weight, teacher: Answer, aux: Answer, s: _Settings):
        own, zero = weight.detach().to(hidden.dtype), torch.zeros((), device=weight.device)
        flat, flat_at_t = (None if x is None else x.detach().flatten(0, 1) for x in (hidden, hidden_at_t))
        d_flat, d_flat_at_t = (None if x is None else torch.zeros_like(x) for x in (flat, flat_at_t))
        d_weight = _gradient_of(weight, ctx.needs_input_grad[2])
        compare, with_own, distil = (on_device(f, flat) for f in (_compare, _own, _kl))
        share, token, kd, rows = 1 / len(flat), [zero], [zero], []
        pieces = chunks(
            tokens_at_once(len(own), own.device), flat, flat_at_t, d_flat, d_flat_at_t, _flat(teacher), _flat(aux),
            s.x_hat, s.beta, s.advantage,
        )  # fmt: skip
        for h, h_at_t, d_h, d_h_at_t, h_t, h_a, x, beta, advantage in pieces:
            needs_teacher = beta is not None or h_at_t is not None
            z_t, d_z = logits_of(h_t, teacher.weight) if needs_teacher else None, None
            if beta is not None:
                d_z, row = compare(z_t, logits_of(h_a, aux.weight), x, beta, s.w_distill, h.dtype)
                rows.append(row)
            if s.lambda_ent is not None or advantage is not None:
                z = logits_of(h, own)
                d_z, value = with_own(z, d_z, x, advantage, s.w_distill * s.w_policy, s.lambda_ent, h.dtype)
                token.append(value.sum())
                torch.mm(d_z, own, out=d_h)
            elif d_z is not None:
                torch.mm(d_z, own, out=d_h)
                token.append((d_h.float() * h.float()).sum())  # <g, h W^T> = <g W, h>
            if d_z is not None:
                _add_product(d_weight, d_z, h, share)
            if h_at_t is not None:
                d_z, value = distil(z_t, logits_of(h_at_t, own), h.dtype)
                kd.append(value.sum())
                torch.mm(d_z, own, out=d_h_at_t)
                _add_product(d_weight, d_z, h_at_t, share * s.w_kd)
        d_flat_at_t = None if flat_at_t is None else d_flat_at_t.mul_(share * s.w_kd).view_as(hidden_at_t)
        ctx.gradients = [d_flat.mul_(share).view_as(hidden), d_flat_at_t, d_weight]
        token = torch.stack(token).sum() * share / (s.w_distill or 1.0)
        outputs = zero, token, torch.stack(kd).sum() * share, torch.cat(rows, 1) if rows else zero.clone()
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(grad) for g in gradients), None, None, None


def _flat(answer: Answer) -> torch.Tensor:
    return answer.hidden.flatten(0, 1)


def _gradient_of(weight: torch.Tensor, learns: bool) -> torch.Tensor | None:
    """Zeros to add to in float32; None for a head that stays as it is."""
    return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if learns else None


def _add_product(total: torch.Tensor | None, d_z: torch.Tensor, hidden: torch.Tensor, scale: float) -> None:
    """total (K, D) float32 += scale d_z^T hidden, summed in float32; nothing where total is None."""
    if total is None:
        return
    if d_z.is_cuda and d_z.dtype != torch.float32:
        torch.addmm(total, d_z.T, hidden, torch.float32, alpha=scale, out=total)
    else:
        total.addmm_(d_z.T.float(), hidden.float(), alpha=scale)


# What follows works on a chunk: float32 logits (n, K) in, gradients (n, K) in `dtype` and values (n,) out.


def _log_softmax(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = z - z.logsumexp(-1, keepdim=True)
    return log_p, log_p.exp()


def _compare(z_t, z_a, x, beta, w_distill, dtype):
    """w_distill times the gradient of D_beta on the auxiliary's logits (beta None: no gradient), and `Gaps`' rows."""
    log_t, p_t = _log_softmax(z_t)
    log_a, p_a = _log_softmax(z_a)
    ratio = log_a - log_t
    forward, reverse = -(p_t * ratio).sum(-1), (p_a * ratio).sum(-1)
    log_ratio = -ratio.gather(-1, x.unsqueeze(-1)).squeeze(-1)
    rows = [
        forward,
        reverse,
        0.5 * (p_t - p_a).abs().sum(-1),
        -(p_t * log_t).sum(-1),
        -(p_a * log_a).sum(-1),
        log_ratio,
    ]
    d_z = None
    if beta is not None:
        beta = beta.unsqueeze(-1)
        d_z = (1 - beta) * (p_a - p_t) + beta * p_a * (ratio - reverse.unsqueeze(-1))
        d_z = (w_distill * d_z).to(dtype)
    return d_z, torch.stack(rows)


def _own(z, d_z, x, advantage, w_policy, lambda_ent, dtype):
    """What the student's own probabilities add to d_z, and <d_z, z> of what came in."""
    log_p, p = _log_softmax(z)
    value = z.new_zeros(len(z)) if d_z is None else (d_z.float() * z).sum(-1)
    total = 0.0 if d_z is None else d_z.float()
    if advantage is not None:
        chosen = torch.arange(z.shape[-1], device=z.device) == x.unsqueeze(-1)
        total = total - w_policy * advantage.unsqueeze(-1) * (chosen.float() - p)
    if lambda_ent is not None:
        entropy = -(p * log_p).sum(-1, keepdim=True)
        total = total + lambda_ent * p * (log_p + entropy)
    return total.to(dtype), value


def _kl(z_t, z, dtype):
    log_t, p_t = _log_softmax(z_t)
    log_p, p = _log_softmax(z)
    return (p - p_t).to(dtype), (p_t * (log_t - log_p)).sum(-1)


def _jeffreys(z_t, z_a, dtype):
    log_t, p_t = _log_softmax(z_t)
    log_a, p_a = _log_softmax(z_a)
    ratio = log_a - log_t
    reverse = (p_a * ratio).sum(-1)
    d_z = p_a - p_t + p_a * (ratio - reverse.unsqueeze(-1))
    return d_z.to(dtype), reverse - (p_t * ratio).sum(-1)


def _cross_entropy(z, x, label_smoothing, dtype):
    log_p, p = _log_softmax(z)
    chosen = torch.arange(z.shape[-1], device=z.device) == x.unsqueeze(-1)
    target = (1 - label_smoothing) * chosen.float() + label_smoothing / z.shape[-1]
    return (p - target).to(dtype), -(target * log_p).sum(-1)
