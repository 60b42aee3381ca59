"""Metrics of a training step, and their means over the steps between two lines of metrics.jsonl."""

from __future__ import annotations

import torch

from dimo.distill.stages import Step

MEASURED = (
    "loss/total", "loss/distill", "loss/aux", "loss/kd", "entropy/student", "entropy/aux", "entropy/teacher",
    "reward/mean", "reward/std", "reward/baseline", "gap/aux_teacher_tv", "gap/student_teacher_kl", "t/mean",
    "x_init/corrupt_share", "codes/used", "logits/std",
)  # fmt: skip


def measured(step: Step) -> dict[str, torch.Tensor]:
    """Metrics that need no computation beyond the step itself, as scalar tensors."""
    gaps = step.gaps
    assert gaps is not None  # stage 9 has made them
    values = {
        "loss/total": step.loss,
        "loss/distill": step.distill,
        "loss/aux": torch.stack(step.aux_losses).mean(),
        "entropy/student": step.entropy.mean(),
        "logits/std": step.logits_std,
        "reward/mean": step.reward.mean(),
        "reward/square": step.reward.square().mean(),
        "reward/baseline": step.baseline if step.baseline is not None else step.reward.mean(),
        "t/mean": step.t.mean(),
        "x_init/corrupt_share": step.corrupted.float().mean(),
        "entropy/teacher": gaps.entropy_teacher.mean(),
        "entropy/aux": gaps.entropy_aux.mean(),
        "gap/aux_teacher_tv": gaps.total_variation.mean(),
    }
    return values if step.kd is None else values | {"gap/student_teacher_kl": step.kd}


class Averages:
    """Running means since the last `take`. The sums stay on the device, so `add` does not synchronise."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add the scalars of one step or micro-batch."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, torch.Tensor]:
        """Return {name: mean} and reset."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict:
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])
