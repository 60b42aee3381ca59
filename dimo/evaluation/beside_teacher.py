"""Metrics of videos that need no oracle: what the teacher says of them, and how they differ from the teacher's own.

Each is an `Estimate` over prompts, or None if it is undefined. What is compared with the teacher has its floor in the
report: the teacher's row from other noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dimo.evaluation import bootstrap, features, tokens
from dimo.evaluation.bootstrap import Estimate
from dimo.evaluation.videos import Videos
from dimo.views.collapse import spread

PerVideo = Callable[..., torch.Tensor | None]  # (codes, path) -> (B,)


def _per_prompt(values: torch.Tensor) -> torch.Tensor:
    """Means (P,) of values (P, V, ...) of each video, in float64."""
    return values.double().flatten(1).mean(1)


def token_entropy(videos: Videos) -> Estimate | None:
    return bootstrap.mean(_per_prompt(videos.judged_by_prompt("entropy"))) if "entropy" in videos.judged else None


def nll(videos: Videos, name: str = "nll") -> Estimate | None:
    """Mean over times of the judge's "nll" or "nll_guided", in nats per token."""
    return bootstrap.mean(_per_prompt(videos.judged_by_prompt(name)))


def nll_by_t(videos: Videos) -> list[float]:
    return videos.judged["nll"].double().mean(0).tolist()


def nll_difference(videos: Videos, name: str = "nll") -> Estimate | None:
    """`nll` less that of the reference, paired by prompt."""
    if videos.reference is None:
        return None
    own, other = (_per_prompt(one.judged_by_prompt(name)) for one in (videos, videos.reference))
    return bootstrap.mean(own - other)


def prompt_gain(videos: Videos) -> Estimate | None:
    with_prompt, without = (videos.judged_by_prompt(name) for name in ("nll", "nll_uncond"))
    return bootstrap.mean(_per_prompt(without.double() - with_prompt.double()))


def retrieval(videos: Videos) -> Estimate | None:
    """Share of videos whose own prompt, the first of k, has the least nll; m equal ones count 1/m. None if k is 1."""
    found = videos.judged_by_prompt("choice_nll")  # (P, V', k)
    if found.shape[-1] < 2:
        return None
    best = found == found.amin(-1, keepdim=True)
    return bootstrap.mean(_per_prompt(best[..., 0] / best.sum(-1)))


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
    return bootstrap.mean(_per_prompt(covered.view(len(videos.by_prompt), -1)))


def _spread(videos: Videos) -> torch.Tensor | None:
    """Spread of each prompt's videos, (P,); None of single ones."""
    if videos.path is None or videos.copies < 2:
        return None
    path = videos.path
    return _per_prompt(torch.cat([spread(one.to(path.device), path).cpu() for one in videos.by_prompt.split(1)]))


def mean_spread(videos: Videos) -> Estimate | None:
    own = _spread(videos)
    return None if own is None else bootstrap.mean(own)


def spread_ratio(videos: Videos) -> Estimate | None:
    return _ratio(_spread(videos), None if videos.reference is None else _spread(videos.reference))


def motion_ratio(videos: Videos) -> Estimate | None:
    return _token_ratio(videos, tokens.motion)


def flicker_ratio(videos: Videos) -> Estimate | None:
    return _token_ratio(videos, tokens.flicker)


def sharpness_ratio(videos: Videos) -> Estimate | None:
    return _token_ratio(videos, tokens.sharpness)


def _token_ratio(videos: Videos, function: PerVideo) -> Estimate | None:
    return _ratio(*(None if one is None else _of_tokens(one, function) for one in (videos, videos.reference)))


def _of_tokens(videos: Videos, function: PerVideo) -> torch.Tensor | None:
    """Means (P,) of a function of codes; a few videos at a time, since each code becomes a vector."""
    path = videos.path
    if path is None:
        return None
    parts = [
        function(one.to(path.device), path) for one in videos.codes.split(max(1, 2**20 // videos.codes[0].numel()))
    ]
    found = [part.cpu() for part in parts if part is not None]
    return _per_prompt(torch.cat(found).view(len(videos.by_prompt), -1)) if found else None


def _ratio(own: torch.Tensor | None, other: torch.Tensor | None) -> Estimate | None:
    return None if own is None or other is None else bootstrap.ratio(own, other)
