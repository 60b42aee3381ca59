"""Metrics of videos that need no oracle: what the teacher says of them, and how they differ from the teacher's own.

Each is an `Estimate` over prompts, or None if it is undefined. What is compared with the teacher has its floor in the
report: the teacher's row from other noise.
"""

from __future__ import annotations

import torch

from dimo.evaluation import bootstrap, features
from dimo.evaluation.bootstrap import Estimate
from dimo.evaluation.videos import Videos, per_prompt


def mean(videos: Videos, name: str) -> Estimate | None:
    """Mean over videos, and over times if there are several, of what was judged under this name."""
    return bootstrap.mean(per_prompt(videos.judged_by_prompt(name)))


def token_entropy(videos: Videos) -> Estimate | None:
    return mean(videos, "entropy") if "entropy" in videos.judged else None


def nll_by_t(videos: Videos) -> list[float]:
    return videos.judged["nll"].double().mean(0).tolist()


def nll_difference(videos: Videos, name: str = "nll") -> Estimate | None:
    """`mean` less that of the reference, paired by prompt."""
    if videos.reference is None:
        return None
    own, other = (per_prompt(one.judged_by_prompt(name)) for one in (videos, videos.reference))
    return bootstrap.mean(own - other)


def prompt_gain(videos: Videos) -> Estimate | None:
    with_prompt, without = (videos.judged_by_prompt(name) for name in ("recovered", "recovered_uncond"))
    return bootstrap.mean(per_prompt(with_prompt.double() - without.double()))


def retrieval(videos: Videos) -> Estimate | None:
    """Share of videos whose own prompt, the first of k, recovers most; m equal ones count 1/m. None if k is 1."""
    found = videos.judged_by_prompt("choice_recovered")  # (P, V', k)
    if found.shape[-1] < 2:
        return None
    best = found == found.amax(-1, keepdim=True)
    return bootstrap.mean(per_prompt(best[..., 0] / best.sum(-1)))


def retrieval_prompts(videos: Videos) -> int:
    """k, the prompts among which `retrieval` looks for a video's own: 1/k is chance."""
    return videos.judged["choice_recovered"].shape[-1]


def frechet_of(videos: Videos) -> Estimate | None:
    if videos.reference is None:
        return None
    return features.frechet(*(one.judged_by_prompt("features") for one in (videos, videos.reference)))


def frechet_dimension(videos: Videos) -> int | None:
    """The dimension in which `frechet_of` is measured."""
    return features.dimension(*videos.judged["features"].shape)


def feature_coverage(videos: Videos) -> Estimate | None:
    """`features.is_covered` of the reference; None where it has no more videos than neighbours are asked for."""
    if videos.reference is None or len(videos.reference.judged["features"]) <= features.NEIGHBOURS:
        return None
    covered = features.is_covered(videos.judged["features"], videos.reference.judged["features"])
    return bootstrap.mean(per_prompt(covered.view(len(videos.by_prompt), -1)))


def mean_spread(videos: Videos) -> Estimate | None:
    return None if videos.spread is None else bootstrap.mean(videos.spread)


def spread_ratio(videos: Videos) -> Estimate | None:
    return _ratio(videos.spread, None if videos.reference is None else videos.reference.spread)


def token_ratio(videos: Videos, name: str) -> Estimate | None:
    """Motion, flicker or sharpness of codes, relative to the reference's."""
    return _ratio(*(None if one is None else one.in_tokens.get(name) for one in (videos, videos.reference)))


def pixel_ratio(videos: Videos, name: str) -> Estimate | None:
    """pixel_motion, pixel_flicker or pixel_sharpness, relative to the reference's."""
    if videos.reference is None or name not in videos.judged or name not in videos.reference.judged:
        return None
    return _ratio(*(per_prompt(one.judged_by_prompt(name)) for one in (videos, videos.reference)))


def _ratio(own: torch.Tensor | None, other: torch.Tensor | None) -> Estimate | None:
    return None if own is None or other is None else bootstrap.ratio(own, other)
