"""Divergences between teacher and auxiliary per token, and their exact gradients; all in float32, small, readable.

Notation: p_T, p_A are the softmax of the teacher's and the auxiliary's logits (B, N, K) at the same x_t. The family is
    D_beta = (1 - beta) KL(p_T || p_A) + beta KL(p_A || p_T):
beta = 0 is the forward KL, 1 the reverse KL, 0.5 half of Jeffreys' divergence (Di[M]O, arXiv 2503.15457, eq. 8-10).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dimo.errors import DimoError, require_ids, require_shape
from dimo.ursa.chunks import by_tokens

BETA = {"forward": 0.0, "jeffreys": 0.5, "reverse": 1.0}


def beta_of(divergence: str | float) -> float | str:
    """The beta of a divergence given by name or by number in [0, 1]; "time" stays "time": beta = t, token by token."""
    if divergence == "time":
        return divergence
    beta = BETA.get(divergence, divergence) if isinstance(divergence, str) else divergence
    try:
        beta = float(beta)
    except ValueError:
        raise DimoError(f"divergence must be one of time, {', '.join(BETA)} or a number, got {divergence!r}") from None
    if not 0 <= beta <= 1:
        raise DimoError(f"divergence as a number must lie in [0, 1], got {beta}")
    return beta


def kl(logits_p: torch.Tensor, logits_q: torch.Tensor) -> torch.Tensor:
    """KL(softmax(p) || softmax(q)) per token: (B, N, K) twice -> (B, N), in nats."""
    require_shape("logits_q", logits_q, tuple(logits_p.shape))

    def one(p, q):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    return by_tokens(one, logits_p, logits_q)


def total_variation(logits_p: torch.Tensor, logits_q: torch.Tensor) -> torch.Tensor:
    """Half the L1 distance of softmax(p) and softmax(q) per token: (B, N, K) twice -> (B, N), in [0, 1]."""
    require_shape("logits_q", logits_q, tuple(logits_p.shape))
    distance = lambda p, q: 0.5 * (p.float().softmax(-1) - q.float().softmax(-1)).abs().sum(-1)  # noqa: E731
    return by_tokens(distance, logits_p, logits_q)


def divergence(teacher: torch.Tensor, aux: torch.Tensor, beta: float) -> torch.Tensor:
    """D_beta per token: logits (B, N, K) twice -> (B, N), in nats."""
    return (1 - beta) * kl(teacher, aux) + beta * kl(aux, teacher)


def jeffreys(teacher: torch.Tensor, aux: torch.Tensor) -> torch.Tensor:
    """KL(p_T || p_A) + KL(p_A || p_T) per token, (B, N)."""
    return 2 * divergence(teacher, aux, 0.5)


def token_gradient(teacher: torch.Tensor, aux: torch.Tensor, beta: float | torch.Tensor) -> torch.Tensor:
    """dD_beta / d(auxiliary's logits) per token: logits (B, N, K) twice, beta a number or (B, 1 or N, 1) -> (B, N, K).

    (1-beta)(p_A - p_T) + beta p_A (log p_A - log p_T - KL(p_A || p_T)). Rows sum to zero.
    """
    require_shape("aux", aux, tuple(teacher.shape))
    beta = torch.as_tensor(beta, dtype=torch.float32, device=aux.device).expand(*aux.shape[:2], 1)

    def one(zt, za, beta):
        log_t, log_a = zt.float().log_softmax(-1), za.float().log_softmax(-1)
        p_t, p_a = log_t.exp(), log_a.exp()
        ratio = log_a - log_t
        return (1 - beta) * (p_a - p_t) + beta * p_a * (ratio - (p_a * ratio).sum(-1, keepdim=True))

    return by_tokens(one, teacher, aux, beta)


def token_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of softmax(logits) per token: (B, N, K) -> (B, N), in nats."""

    def one(z):
        log_p = z.float().log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    return by_tokens(one, logits)


def log_prob(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[tokens]: (B, N, K) and (B, N) -> (B, N), in nats."""
    require_shape("tokens", tokens, tuple(logits.shape[:-1]))
    require_ids("tokens", tokens, logits.shape[-1])
    chosen = lambda z, x: z.float().log_softmax(-1).gather(-1, x.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    return by_tokens(chosen, logits, tokens)


def denoising(logits: torch.Tensor, tokens: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy of the clean tokens (B, N) under logits (B, N, K), in nats per token."""
    require_shape("tokens", tokens, tuple(logits.shape[:-1]))
    require_ids("tokens", tokens, logits.shape[-1])

    def one(z, x):
        z, x = z.float().flatten(0, -2), x.flatten()
        return F.cross_entropy(z, x, label_smoothing=label_smoothing, reduction="none")

    return by_tokens(one, logits, tokens).mean()


def leave_one_out(reward: torch.Tensor) -> torch.Tensor:
    """Reward (B, ...) minus the mean over the other samples: an advantage with no baseline to keep."""
    if len(reward) < 2:
        raise DimoError("a leave-one-out baseline needs a batch of at least 2")
    return (reward - reward.mean(0)) * (len(reward) / (len(reward) - 1))
