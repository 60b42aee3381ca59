"""Optimizers and schedules: AdamW, or Muon for the matrices inside the layers with AdamW for the rest."""

from __future__ import annotations

import itertools
import math

import torch

from dimo.config import Optim
from dimo.train.masters import MasterAdamW, copies_of
from dimo.ursa.cuda_graph import assign
from dimo.ursa.muon import Muon, is_for_muon


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
    inside = {name for name, p in named if is_for_muon(name, p)} if optim.optimizer == "muon" else set()
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
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
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
