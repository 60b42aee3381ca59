"""Mode coverage of videos that a world's oracle has scored."""

from __future__ import annotations

from dimo.worlds.oracle import coverage
from dimo.worlds.protocol import Scores


def coverage_detail(scores: Scores) -> dict[str, float | None]:
    """Coverage of each factor that prompts leave open, over the valid videos of the right prompt.

    Returns:
        For each factor its coverage pooled over prompts, and `<factor>_per_prompt`, the mean over prompts with enough
        valid videos; None if too few videos are valid.
    """
    good, detail = scores.valid & scores.adherent, {}
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
