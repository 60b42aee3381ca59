"""Mean losses over tokens whose logits are computed chunk by chunk, and the cross-entropy of clean tokens.

The gradient with respect to the logits is known in closed form, so the gradients of hidden states and heads are
accumulated chunk by chunk and the full logits are never materialised.
"""

from __future__ import annotations

import math

import torch

from dimo.errors import require_ids, require_shape
from dimo.ursa.prediction import Chunked, Dense


def denoising(prediction: Dense | Chunked, tokens: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy of the clean tokens (B, N), in nats per token, differentiable in the prediction."""
    require_shape("tokens", tokens, prediction.shape)
    require_ids("tokens", tokens, prediction.codebook_size)
    one, dtype, x = prediction.kernel(_cross_entropy), prediction.states.dtype, prediction.part.own(tokens).flatten()
    return mean_loss(prediction, lambda z, rows: one(z, x[rows], label_smoothing, dtype))


def mean_loss(prediction: Dense | Chunked, function) -> torch.Tensor:
    """The mean over tokens of function(logits (n, K), rows) -> (logit gradient (n, K), values (n,))."""
    return _MeanLoss.apply(prediction.states, prediction.head, prediction.detach(), function)


class _MeanLoss(torch.autograd.Function):
    """Mean over tokens of a loss on one network; function(logits (n, K), rows) -> (logit gradient, values (n,))."""

    @staticmethod
    def forward(ctx, states, head, fixed: Dense | Chunked, function):
        learns, count, values = any(ctx.needs_input_grad), math.prod(fixed.shape), []
        d_flat = torch.empty_like(fixed.states.flatten(0, 1)) if learns else None
        d_head = zeros_of(head, ctx.needs_input_grad[1])
        for rows in fixed.row_chunks():
            d_z, value = function(fixed.logits(rows), rows)
            values.append(value.sum())
            if learns:
                fixed.pull_back(d_z, rows, d_flat, d_head, 1 / count)
        ctx.save_for_backward(None if d_flat is None else d_flat.mul_(1 / count).view_as(states), d_head)
        return fixed.part.total(torch.stack(values).sum()) / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *(None if g is None else g * grad for g in ctx.saved_tensors), None, None


def zeros_of(head: torch.Tensor | None, learns: bool) -> torch.Tensor | None:
    """A gradient accumulator of at least float32; None if the head is frozen or there is none."""
    if head is None or not learns:
        return None
    return torch.zeros(head.shape, dtype=torch.promote_types(head.dtype, torch.float32), device=head.device)


def log_softmax_of(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = z - z.logsumexp(-1, keepdim=True)
    return log_p, log_p.exp()


def _cross_entropy(z, x, label_smoothing, dtype):
    log_p, p = log_softmax_of(z)
    chosen = torch.arange(z.shape[-1], device=z.device) == x.unsqueeze(-1)
    target = (1 - label_smoothing) * chosen.float() + label_smoothing / z.shape[-1]
    return (p - target).to(dtype), -(target * log_p).sum(-1)
