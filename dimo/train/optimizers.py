"""Optimizers and schedules: AdamW, or Muon for the matrices inside the layers with AdamW for the rest."""

from __future__ import annotations

import itertools
import math

import torch

from dimo.config import Optim
from dimo.train.masters import MasterAdamW, copies_of
from dimo.ursa.cuda_graph import assign

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Muon's quintic: brings singular values close to 1 in five iterations
STACK_ENTRIES = 2**24  # matrices of equal shape are orthogonalised in batches of up to so many entries


class Muon(torch.optim.Optimizer):
    """Muon: the Nesterov momentum, orthogonalised and scaled to the typical RMS of AdamW's update, 0.2.

    The update of a matrix (m, n) is lr 0.2 sqrt(max(m, n)) U, with U from five Newton-Schulz iterations (Jordan et al.
    2024; scale: arXiv 2502.16982, eq. 4). Equals `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but
    matrices of equal shape are processed as one batch, several times as fast for small networks, and the learning rate
    may be a scalar tensor.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            momentum, updates = group["momentum"], []
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = self.state[p]["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - momentum)
                updates.append(p.grad.lerp(buffer, momentum))
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            order = sorted(range(len(params)), key=lambda i: tuple(params[i].shape))
            for shape, members in itertools.groupby(order, key=lambda i: tuple(params[i].shape)):
                same, most = list(members), max(1, STACK_ENTRIES // math.prod(shape))
                for some in (same[i : i + most] for i in range(0, len(same), most)):
                    step = orthogonalise(torch.stack([updates[i] for i in some]))
                    scale = -group["lr"] * 0.2 * math.sqrt(max(shape))
                    if isinstance(scale, torch.Tensor):  # which `alpha` would read back
                        step, scale = step * scale, 1.0
                    torch._foreach_add_([params[i] for i in some], list(step.unbind()), alpha=scale)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Matrices (S, m, n) with the same singular vectors and all singular values close to 1."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def make_optimizers(model: torch.nn.Module, lr: float, muon_lr: float, optim: Optim) -> list[torch.optim.Optimizer]:
    """The one or two optimizers of all trainable parameters; each parameter group stores its `initial_lr`.

    Muon's update is equally strong in all directions of a matrix. A one-step student must choose one video from noise
    alone, which takes sharp distributions; AdamW sharpens them several times more slowly (docs/experiments.md).

    Args:
        lr: AdamW's learning rate.
        muon_lr: Muon's learning rate, if optim.optimizer is muon.
        optim: the other settings.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = {name for name, p in named if ".layers." in name and p.dim() == 2} if optim.optimizer == "muon" else set()
    rest = [(name, p) for name, p in named if name not in inside]
    settings = {"lr": lr, "betas": (optim.beta1, optim.beta2), "weight_decay": optim.weight_decay}
    copies = copies_of(model)
    if copies:  # layer by layer, since the compiled update of one serves all
        layers = itertools.groupby(rest, key=lambda row: row[0].split(".layers.")[-1].split(".")[0])
        groups = [{"params": [p for _, p in rows]} for _, rows in layers]
        made: list[torch.optim.Optimizer] = [MasterAdamW(groups, copies, **settings)]
    else:
        made = [torch.optim.AdamW([p for _, p in rest], **settings, fused=True)]
    if inside:
        made.append(
            Muon([p for name, p in named if name in inside], muon_lr, optim.muon_momentum, optim.muon_weight_decay)
        )
    for optimizer in made:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made


def set_lr_factor(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set the learning rate of every parameter group to initial_lr * factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = assign(group["lr"], group["initial_lr"] * factor)


def warm_ema_decay(decay: float, step: int) -> float:
    """EMA decay with warm-up, min(decay, (1 + step) / (10 + step)), so that the initial weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


def ema_decay_at(decay: float, step: int, every: int) -> float:
    """The decay of an update of the EMA at a step: that of the `every` steps up to it, or 1 between updates."""
    if (step + 1) % every:
        return 1.0
    return math.prod(warm_ema_decay(decay, one) for one in range(step + 1 - every, step + 1))


def lr_factor(optim: Optim, step: int, max_steps: int, least: float) -> float:
    """Learning rate factor at a step: linear warm-up times a decay from 1 to `least` over max_steps.

    `optim.decay`: constant (no decay), linear, cosine, or wsd (constant, then linear over the last fifth).
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
