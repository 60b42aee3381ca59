"""Metrics of a training step, and their means over the steps between two lines of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dimo.distill.stages import Step

MEASURED = (
    "loss/total", "loss/distill", "loss/aux", "loss/kd", "entropy/student", "entropy/aux", "entropy/teacher",
    "reward/mean", "reward/std", "reward/baseline", "gap/aux_teacher_tv", "gap/student_teacher_kl", "t/mean",
    "x_init/corrupt_share", "codes/used", "logits/std",
)  # fmt: skip
QUARTERS = ("0.00", "0.25", "0.50", "0.75")  # where quarters of t begin
BY_T, SHARE_OF_T = "gap_by_t/", "share_of_t/"  # sums over a quarter's tokens, and its share of all tokens


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
    values |= _by_quarter(gaps.total_variation, step.t)
    return values if step.kd is None else values | {"gap/student_teacher_kl": step.kd}


def _by_quarter(gap: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums of gap (R B, N) over the tokens with t (R B,) or (R B, N) in each quarter, and their shares of all tokens.

    Both are divided by the number of all tokens, so that they can be averaged over steps before `gaps_by_t` divides.
    """
    quarter = (t * len(QUARTERS)).long().clamp(max=len(QUARTERS) - 1)
    quarter = (quarter if t.dim() == 2 else quarter[:, None]).expand_as(gap).flatten()
    inside = (quarter[:, None] == torch.arange(len(QUARTERS), device=t.device)).float()
    sums, shares = (inside * gap.flatten()[:, None]).mean(0), inside.mean(0)
    return {BY_T + q: x for q, x in zip(QUARTERS, sums)} | {SHARE_OF_T + q: x for q, x in zip(QUARTERS, shares)}


def gaps_by_t(means: dict[str, float]) -> dict[str, float]:
    """`means` with the mean gap of every quarter of t in place of sums and shares; none where t never was."""
    made = {name: value for name, value in means.items() if not name.startswith((BY_T, SHARE_OF_T))}
    there = [q for q in QUARTERS if means.get(SHARE_OF_T + q, 0.0) > 0]
    return made | {BY_T + q: means[BY_T + q] / means[SHARE_OF_T + q] for q in there}


class Averages:
    """Running means since the last `take`. The sums stay on the device, so `add` does not synchronise.

    `add` is `accumulate`, which a CUDA graph can contain, and `count`, which its replay must be followed by.
    """

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add the scalars of one step or micro-batch."""
        self.accumulate(values)
        self.count(values)

    def accumulate(self, values: dict[str, torch.Tensor]) -> None:
        """Add scalars to the sums, in place."""
        for name, value in values.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((), device=value.device)
        torch._foreach_add_([self.sums[name] for name in values], [v.detach().float() for v in values.values()])

    def count(self, names: Iterable[str]) -> None:
        """Count what `accumulate` has added."""
        for name in names:
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, torch.Tensor]:
        """Return {name: mean} and reset."""
        means = {name: self.sums[name] / count for name, count in self.counts.items()}
        for total in self.sums.values():
            total.zero_()
        self.counts = {}
        return means

    def state_dict(self) -> dict:
        return {"sums": {name: self.sums[name] for name in self.counts}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.sums = {name: value.to(device, copy=True) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])
