"""Mode coverage of videos that a world's oracle has scored."""

from __future__ import annotations

import math

import torch

from dimo.evaluation.bootstrap import Estimate, jackknife
from dimo.worlds.oracle import coverage
from dimo.worlds.protocol import Scores

NEAR = 0.9  # share of tokens as in the nearest valid video, from which its labels say what a video shows


def coverage_detail(scores: Scores, near: bool = False) -> dict[str, float | None]:
    """Coverage of each factor that prompts leave open, over the valid videos of the right prompt.

    Args:
        near: over all videos of the right prompt that share NEAR of their tokens with a valid one. Errors that are rare
            per token add up: of 1,280 tokens, .1% wrong ones leave a quarter of the videos valid.

    Returns:
        For each factor its coverage pooled over prompts, and `<factor>_per_prompt`, the mean over prompts with enough
        such videos; None if there are too few.
    """
    return _Coverage(scores, near).detail()


def least_coverage(detail: dict[str, float | None]) -> float | None:
    """The minimum of a `coverage_detail`; None if one of its values is None or prompts leave nothing open."""
    figures = detail.values()
    defined = [figure for figure in figures if figure is not None]
    return min(defined, default=None) if len(defined) == len(figures) else None


def estimate_coverage(scores: Scores, near: bool = False) -> Estimate | None:
    """The `least_coverage` of the scores and its 95% interval over prompts; None if it is undefined.

    By the jackknife: in a resample of the bootstrap a prompt's videos come twice, and seem less varied than they are.
    """
    found = _Coverage(scores, near)

    def least(weights: torch.Tensor) -> torch.Tensor:
        drawn = [least_coverage(found.detail(row.nonzero().flatten().tolist())) for row in weights]
        return torch.tensor([math.nan if one is None else one for one in drawn], dtype=torch.float64)

    return jackknife(least, len(found.prompts), most=1.0)


class _Coverage:
    """The labels of the videos that count, prompt by prompt, so that prompts can be left out."""

    def __init__(self, scores: Scores, near: bool):
        good = (scores.accuracy >= NEAR if near else scores.valid) & scores.adherent
        self.prompts = scores.prompt.unique()
        of_prompt = [good & (scores.prompt == p) for p in self.prompts]
        self.labels = {name: [labels[rows] for rows in of_prompt] for name, (labels, _) in scores.free.items()}
        self.bins = {name: bins for name, (_, bins) in scores.free.items()}
        self.own = {name: [coverage(x, self.bins[name]) for x in labels] for name, labels in self.labels.items()}

    def detail(self, kept: list[int] | None = None) -> dict[str, float | None]:
        """`coverage_detail` of the prompts at these indices, or of all."""
        detail, kept = {}, list(range(len(self.prompts))) if kept is None else kept
        for name, labels in self.labels.items():
            detail[name] = coverage(torch.cat([labels[i] for i in kept]), self.bins[name])
            defined = [own for own in (self.own[name][i] for i in kept) if own is not None]
            # at least half of the prompts must be defined, or the mean would describe the easy ones only
            enough = len(defined) * 2 >= len(kept)
            detail[f"{name}_per_prompt"] = sum(defined) / len(defined) if defined and enough else None
        return detail
