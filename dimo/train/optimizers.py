"""The optimizers of one network: AdamW, or Muon for the matrices inside its layers and AdamW for the rest."""

from __future__ import annotations

import math

import torch

from dimo.train.config import Optim


def make_optimizers(model: torch.nn.Module, lr: float, muon_lr: float, optim: Optim) -> list[torch.optim.Optimizer]:
    """One or two optimizers that together hold every parameter once; their groups remember their `initial_lr`.

    `muon` (Jordan et al. 2024, with the learning rate matched to AdamW's by root mean square, arXiv 2502.16982, eq. 4)
    steps with the same strength along every direction of a matrix. A one-step student has to decide between videos
    sharply from noise; AdamW sharpens it several times more slowly (docs/experiments.md).
    """
    betas = (optim.beta1, optim.beta2)
    named = list(model.named_parameters())
    chosen = [p for name, p in named if ".layers." in name and p.dim() == 2] if optim.optimizer == "muon" else []
    rest = [p for _, p in named if not any(p is c for c in chosen)]
    made = [torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=optim.weight_decay, fused=True)]
    if chosen:
        muon = {"momentum": optim.muon_momentum, "weight_decay": optim.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        made.append(torch.optim.Muon(chosen, lr=muon_lr, **muon))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made


def set_lr_factor(optimizers: list, factor: float) -> None:
    """lr = initial_lr * factor, everywhere."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def lr_factor(optim: Optim, step: int, max_steps: int) -> float:
    """Linear warm-up, then the decay from 1 to `min_lr_share` over max_steps.

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
    return warm * (optim.min_lr_share + (1 - optim.min_lr_share) * left)
