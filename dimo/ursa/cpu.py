"""Fast paths for small models on a CPU: attention and RMSNorm with hand-written gradients, and no returned memory.

At 53 tokens PyTorch's fused attention spends its time on thousands of tiny matrix products, the gradient of RMSNorm
takes a dozen passes over memory, and malloc returns every freed megabyte to the system only to request it again.
"""

from __future__ import annotations

import ctypes

import torch

SCORES = 2**24  # maximum attention scores per layer held in memory, 64 MiB
LONG = 256  # positions of a sequence, from which PyTorch's fused attention takes half as long
CACHED = 2**18  # scores per chunk, small enough for a core's cache
UNUSED = torch.empty(())  # baddbmm's first argument at beta = 0


def serves(x: torch.Tensor) -> bool:
    """Whether to use this module for `x`: float32 on a CPU, no autocast or compilation."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


def attends(q: torch.Tensor) -> bool:
    """Whether to use `Attend` for q (B, S, H, D): if served, of a short sequence, and not too many scores."""
    batch, length, heads, _ = q.shape
    return length < LONG and batch * heads * length**2 <= SCORES and serves(q)


class Norm(torch.autograd.Function):
    """RMSNorm: x / rms(x) * weight over the last axis."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = _inverse_rms(x, eps)
        x = x * scale
        ctx.save_for_backward(x, scale, weight)
        return x * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_norm_gradient(grad, *ctx.saved_tensors), None


class NormRotate(torch.autograd.Function):
    """Per-head RMSNorm, then RoPE: x (B, S, H, D), weight (D,), cos and sin (S, D) -> contiguous (B, H, S, D).

    `sin` is the signed sine of `rope_table`: the result is n cos + roll(n, D/2) sin with n = x / rms(x) * weight.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float):
        half, scale, x = x.shape[-1] // 2, _inverse_rms(x, eps).transpose(1, 2), x.transpose(1, 2)
        x = torch.mul(x, scale, out=torch.empty_like(x, memory_format=torch.contiguous_format))
        ctx.save_for_backward(x, scale, weight, cos, sin)
        return torch.addcmul(x * (cos * weight), x.roll(half, -1), sin * weight.roll(half))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, scale, weight, cos, sin = ctx.saved_tensors
        half = x.shape[-1] // 2
        grad = torch.addcmul(grad * cos, grad.roll(half, -1), sin.roll(half, -1))
        d_x, d_weight = _norm_gradient(grad, x, scale, weight)
        return d_x.transpose(1, 2), d_weight, None, None, None


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_gradient(grad, normed, scale, weight) -> tuple[torch.Tensor, torch.Tensor]:
    """d/dx and d/dweight of x scale weight with scale = 1 / rms(x), given normed = x scale."""
    product = grad * normed
    d_weight = product.flatten(0, -2).sum(0)
    mean = product.mul_(weight).mean(-1, keepdim=True)
    return (grad * weight).addcmul_(normed, mean, value=-1).mul_(scale), d_weight


class Attend(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v as two batched products: q (B, H, S, D); k, v (B, G, S, D), H a multiple of G.

    Queries that share a key head are stacked into one product, so keys need not be repeated.
    """

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.q_shape, ctx.k_shape, ctx.scale = q.shape, k.shape, q.shape[-1] ** -0.5
        k, v = (x.reshape(-1, *x.shape[-2:]) for x in (k, v))
        q = q.reshape(len(k), -1, q.shape[-1])
        heads, kept, out = max(1, CACHED // (q.shape[1] * k.shape[1])), [], torch.empty_like(q)
        for q_i, k_i, v_i, out_i in zip(*(x.split(heads) for x in (q, k, v, out))):
            p = torch.baddbmm(UNUSED, q_i, k_i.mT, beta=0, alpha=ctx.scale).softmax(-1)
            torch.bmm(p, v_i, out=out_i)
            if any(ctx.needs_input_grad):
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return out.view(ctx.q_shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *kept = ctx.saved_tensors
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        parts = (x.split(len(kept[0])) for x in (q, k, v, grad.reshape(q.shape), d_q, d_k, d_v))
        for p, q_i, k_i, v_i, grad_i, d_q_i, d_k_i, d_v_i in zip(kept, *parts):
            d_scores = torch.ops.aten._softmax_backward_data(torch.bmm(grad_i, v_i.mT), p, -1, p.dtype)
            torch.baddbmm(UNUSED, d_scores, k_i, beta=0, alpha=ctx.scale, out=d_q_i)
            torch.baddbmm(UNUSED, d_scores.mT, q_i, beta=0, alpha=ctx.scale, out=d_k_i)
            torch.bmm(p.mT, grad_i, out=d_v_i)
        return d_q.view(ctx.q_shape), d_k.view(ctx.k_shape), d_v.view(ctx.k_shape)


def keep_memory() -> None:
    """Make malloc keep freed memory instead of returning it to the system (glibc only)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt(mmap_threshold, 2**25)  # the maximum
    mallopt(trim_threshold, 2**31 - 1)
