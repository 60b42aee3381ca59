"""95% intervals of a metric over prompts, by the bootstrap's percentiles (Efron and Tibshirani, 1993, chapter 13).

The videos of a prompt are alike, so a prompt with all of its videos is what is drawn again, not a video.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from dimo.errors import DimoError, require_shape
from dimo.evaluation.intervals import t_quantile

RESAMPLES, SEED = 1000, 0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric's value and its 95% interval (low, high); None where fewer than two prompts leave it unknown."""

    value: float
    interval: tuple[float, float] | None = None


def weights(prompts: int, resamples: int = RESAMPLES) -> torch.Tensor:
    """How often each of P prompts is drawn in each resample, divided by P: (R, P) float64, rows sum to 1.

    The same in every call, so that two evaluations give the same intervals, and rows are resampled alike.
    """
    if prompts < 1 or resamples < 1:
        raise DimoError(f"prompts and resamples must be at least 1, got {prompts} and {resamples}")
    drawn = torch.randint(prompts, (resamples, prompts), generator=torch.Generator().manual_seed(SEED))
    counts = torch.zeros(resamples, prompts, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64)) / prompts


def estimate(
    statistic: Callable[[torch.Tensor], torch.Tensor], prompts: int, resamples: int = RESAMPLES
) -> Estimate | None:
    """A statistic of weighted prompts, and the percentiles 2.5 and 97.5 of its resamples.

    Args:
        statistic: weights (R, P) of the prompts, which sum to 1 -> (R,).
        prompts: P.

    Returns:
        None if the statistic is not finite on the prompts themselves.
    """
    found = _without_interval(statistic, prompts)
    if found is None or prompts < 2:
        return found
    again = statistic(weights(prompts, resamples)).double()
    again = again[again.isfinite()]
    low, high = torch.quantile(again, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(found.value, (low, high))


def _without_interval(statistic: Callable[[torch.Tensor], torch.Tensor], prompts: int) -> Estimate | None:
    value = statistic(torch.full((1, prompts), 1 / prompts, dtype=torch.float64))
    require_shape("statistic's values", value, (1,))
    return Estimate(value.item()) if bool(value.isfinite()) else None


def jackknife(
    statistic: Callable[[torch.Tensor], torch.Tensor], prompts: int, most: float = math.inf
) -> Estimate | None:
    """As `estimate`, with the interval of the delete-one-prompt jackknife and Student's t, cut off at 0 and `most`.

    For a statistic that changes where videos come twice, as they do in every resample of the bootstrap. No interval
    where it is undefined without one of the prompts.
    """
    found = _without_interval(statistic, prompts)
    if found is None or prompts < 2:
        return found
    without = statistic((1 - torch.eye(prompts, dtype=torch.float64)) / (prompts - 1)).double()
    if not bool(without.isfinite().all()):
        return found
    error = ((prompts - 1) / prompts * (without - without.mean()).square().sum()).sqrt().item()
    half = t_quantile(prompts - 1) * error
    return Estimate(found.value, (max(0.0, found.value - half), min(most, found.value + half)))


def mean(per_prompt: torch.Tensor, resamples: int = RESAMPLES) -> Estimate | None:
    """The mean of values (P,), one for each prompt."""
    require_shape("per_prompt", per_prompt, ("P",))
    values = per_prompt.double()
    return estimate(lambda w: w @ values, len(values), resamples)


def ratio(one: torch.Tensor, other: torch.Tensor) -> Estimate | None:
    """mean(one) / mean(other) of values (P,), paired by prompt; None if the latter is 0."""
    require_shape("one", one, ("P",))
    require_shape("other", other, tuple(one.shape))
    above, below = one.double(), other.double()
    return estimate(lambda w: (w @ above) / (w @ below), len(above))
