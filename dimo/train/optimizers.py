"""The optimizers of one network: AdamW, or Muon for the matrices inside its layers and AdamW for the rest."""

from __future__ import annotations

import itertools
import math

import torch

from dimo.config import Optim

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Muon's quintic: brings singular values near 1 in five rounds
STACK_ENTRIES = 2**24  # matrices of one shape are orthogonalised together, up to so many entries at once


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then the nearest orthogonal matrix, scaled to AdamW's usual root mean square of 0.2.

    The update of a matrix (m, n) is lr 0.2 sqrt(max(m, n)) U, U from five Newton-Schulz rounds (Jordan et al. 2024;
    scale: arXiv 2502.16982, eq. 4). It is `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but matrices of one
    shape go through as one batch: for small networks that is several times as fast.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            momentum, updates = group["momentum"], []
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                buffer.lerp_(p.grad, 1 - momentum)
                updates.append(p.grad.lerp(buffer, momentum))
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            order = sorted(range(len(params)), key=lambda i: tuple(params[i].shape))
            for shape, same in itertools.groupby(order, key=lambda i: tuple(params[i].shape)):
                same, most = list(same), max(1, STACK_ENTRIES // math.prod(shape))
                for some in (same[i : i + most] for i in range(0, len(same), most)):
                    step = orthogonalise(torch.stack([updates[i] for i in some]))
                    scale = -group["lr"] * 0.2 * math.sqrt(max(shape))
                    torch._foreach_add_([params[i] for i in some], list(step.unbind()), alpha=scale)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """(S, m, n) -> (S, m, n): the same singular vectors, every singular value near 1."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def make_optimizers(model: torch.nn.Module, lr: float, muon_lr: float, optim: Optim) -> list[torch.optim.Optimizer]:
    """One or two optimizers that together hold what learns, each parameter once; groups remember their `initial_lr`.

    Muon steps with the same strength along every direction of a matrix. A one-step student has to decide between
    videos sharply, from noise alone; AdamW sharpens it several times more slowly (docs/experiments.md).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = {name for name, p in named if ".layers." in name and p.dim() == 2} if optim.optimizer == "muon" else set()
    rest, decay = [p for name, p in named if name not in inside], optim.weight_decay
    made = [torch.optim.AdamW(rest, lr=lr, betas=(optim.beta1, optim.beta2), weight_decay=decay, fused=True)]
    if inside:
        made.append(
            Muon([p for name, p in named if name in inside], muon_lr, optim.muon_momentum, optim.muon_weight_decay)
        )
    for optimizer in made:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made


def set_lr_factor(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """lr = initial_lr * factor, everywhere."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def warm_ema_decay(decay: float, step: int) -> float:
    """The moving average's decay at a step: shorter at first, so that it does not hold on to where training began."""
    return min(decay, (1 + step) / (10 + step))


def lr_factor(optim: Optim, step: int, max_steps: int, least: float) -> float:
    """Linear warm-up, then the decay from 1 to `least` over max_steps.

    constant: none. linear, cosine: from the start. wsd: constant, then linear in the last fifth.
    """
    share = step / max_steps
    warm = min(1.0, (step + 1) / max(1, optim.warmup_steps))
    left = {
        "constant": 1.0,
        "linear": 1 - share,
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
        "wsd": min(1.0, (1 - share) / 0.2),
    }[optim.decay]
    return warm * (least + (1 - least) * left)
