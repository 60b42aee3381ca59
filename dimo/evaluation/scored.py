"""Metrics of videos that a world's oracle has scored: how valid, how faithful and how varied they are."""

from __future__ import annotations

from dimo.worlds.oracle import coverage
from dimo.worlds.protocol import Scores


def coverage_detail(scores: Scores) -> dict[str, float | None]:
    """How evenly what a prompt leaves free is spread over the valid videos of the right prompt.

    Of every free label two figures: pooled, and `<label>_per_prompt`, the mean over prompts with enough valid videos.
    Each is None where too few videos are valid.
    """
    good, detail = scores.valid & scores.adherent, {}
    for name, (labels, bins) in scores.free.items():
        detail[name] = coverage(labels[good], bins)
        per_prompt = [coverage(labels[good & (scores.prompt == p)], bins) for p in scores.prompt.unique()]
        defined = [c for c in per_prompt if c is not None]
        # half of the prompts must count, or the figure would describe the easy ones only
        enough = len(defined) * 2 >= len(per_prompt)
        detail[f"{name}_per_prompt"] = sum(defined) / len(defined) if defined and enough else None
    return detail


def least_coverage(scores: Scores) -> float | None:
    """The smallest figure of `coverage_detail`; None where one of them is, or a prompt leaves nothing free."""
    figures = list(coverage_detail(scores).values())
    return None if not figures or None in figures else min(figures)
