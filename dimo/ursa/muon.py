"""Muon: an optimizer of matrices whose update is equally strong in all directions."""

from __future__ import annotations

import itertools
import math

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Muon's quintic: brings singular values close to 1 in five iterations
STACK_ENTRIES = 2**24  # matrices of equal shape are orthogonalised in batches of up to so many entries


def is_for_muon(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon is meant for a network's parameter of this name: the matrices inside its layers."""
    return ".layers." in name and parameter.dim() == 2


class Muon(torch.optim.Optimizer):
    """Muon: the Nesterov momentum, orthogonalised and scaled to the typical RMS of AdamW's update, 0.2.

    The update of a matrix (m, n) is lr 0.2 sqrt(max(m, n)) U, with U from five Newton-Schulz iterations (Jordan et al.
    2024; scale: arXiv 2502.16982, eq. 4). Equals `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but
    matrices of equal shape, tall ones transposed, are processed as one batch, several times as fast for small networks,
    and the learning rate may be a scalar tensor.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            momentum = group["momentum"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
            grads, buffers = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            updates = torch._foreach_lerp(grads, buffers, momentum)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            order = sorted(range(len(params)), key=lambda i: sorted(params[i].shape))
            for shape, members in itertools.groupby(order, key=lambda i: sorted(params[i].shape)):
                same, most = list(members), max(1, STACK_ENTRIES // math.prod(shape))
                for some in (same[i : i + most] for i in range(0, len(same), most)):
                    wide = torch.stack([_wide(updates[i]) for i in some])
                    steps, scale = orthogonalise(wide), -group["lr"] * 0.2 * math.sqrt(max(shape))
                    if isinstance(scale, torch.Tensor):  # which `alpha` would read back
                        steps, scale = steps * scale, 1.0
                    torch._foreach_add_([_wide(params[i]) for i in some], list(steps.unbind()), alpha=scale)


def _wide(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (..., m, n), or a view of their transposes if they are tall."""
    return matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (S, m, n) with the same singular vectors and all singular values close to 1."""
    a, b, c = NEWTON_SCHULZ
    x = _wide(matrices)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if x.shape == matrices.shape else x.mT
