"""The auxiliary's exact target: the distribution of x_hat given x_t and x_init, in the place of a sample of it.

Given x_init (and the prompt) the student draws every token by itself, and noise falls on every token by itself. So what
x_t tells of token i is what its own noisy code tells, and by Bayes' rule
    q_i(x_1) = p(x_hat_i = x_1 | x_t, x_init) = softmax_x1(z_S,i(x_1) + log p_t(x_t,i | x_1)),
with z_S the student's logits from which x_hat was drawn and p_t(x_t | x_1) the path's forward kernel. Cross-entropy is
linear in its target: the loss and the gradient to q_i are the means, over all x_hat that could have led to this x_t, of
those to x_hat itself. They have the same expectation and less variance (Rao-Blackwell).
"""

from __future__ import annotations

import torch

from dimo.errors import require_shape
from dimo.ursa import Chunked, Dense, MetricPath, MixturePath
from dimo.ursa.prediction import require_same_tokens
from dimo.ursa.probability_path import time_like
from dimo.ursa.token_losses import log_softmax_of, mean_loss


def exact_denoising(
    prediction: Dense | Chunked,
    student: Dense | Chunked,
    path: MetricPath | MixturePath,
    x_t: torch.Tensor,
    t: torch.Tensor | float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Mean cross-entropy to q, in nats per token, differentiable in the prediction; one more product with a head.

    Args:
        prediction: the auxiliary's, at x_t.
        student: the student's at x_init, from which x_hat was drawn; no gradient reaches it.
        x_t: (B, N), x_hat re-noised at t.
        t: a number, (B,) or (B, N), at most 0.999.
    """
    require_same_tokens("student", student, prediction)
    require_shape("x_t", x_t, prediction.shape)
    one, fixed, dtype = prediction.kernel(_cross_entropy_to), student.detach(), prediction.states.dtype
    noisy, times = (prediction.part.own(value).flatten() for value in (x_t, time_like(t, x_t)))

    def to_target(z: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        likelihood = path.log_likelihood(noisy[rows], times[rows])
        return one(z, fixed.logits(rows), likelihood, label_smoothing, dtype)

    return mean_loss(prediction, to_target)


def _cross_entropy_to(z, z_student, log_likelihood, label_smoothing, dtype):
    """Logits (n, K) of auxiliary and student, log p_t(x_t | .) (n, K) -> (logit gradient, cross-entropy (n,))."""
    log_p, p = log_softmax_of(z)
    target = (1 - label_smoothing) * (z_student + log_likelihood).softmax(-1) + label_smoothing / z.shape[-1]
    return (p - target).to(dtype), -(target * log_p).sum(-1)
