"""Mode coverage of videos that a world's oracle has scored."""

from __future__ import annotations

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
    good, detail = (scores.accuracy >= NEAR if near else scores.valid) & scores.adherent, {}
    for name, (labels, bins) in scores.free.items():
        detail[name] = coverage(labels[good], bins)
        per_prompt = [coverage(labels[good & (scores.prompt == p)], bins) for p in scores.prompt.unique()]
        defined = [c for c in per_prompt if c is not None]
        # at least half of the prompts must be defined, or the mean would describe the easy ones only
        enough = len(defined) * 2 >= len(per_prompt)
        detail[f"{name}_per_prompt"] = sum(defined) / len(defined) if defined and enough else None
    return detail


def least_coverage(detail: dict[str, float | None]) -> float | None:
    """The minimum of a `coverage_detail`; None if one of its values is None or prompts leave nothing open."""
    figures = detail.values()
    defined = [figure for figure in figures if figure is not None]
    return min(defined, default=None) if len(defined) == len(figures) else None
