"""The metrics of a report: `SCORED` for videos scored by a world's oracle, `REFERENCE_FREE` for all others.

To add a metric, write a function of `Videos` in a file beside this one, and add a line to one or both of the dicts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from dimo.evaluation.reference_free import diversity
from dimo.evaluation.scored import coverage_detail, least_coverage
from dimo.ursa.probability_path import MetricPath, MixturePath
from dimo.views.collapse import distinct, spread
from dimo.worlds.protocol import Scores


@dataclasses.dataclass(frozen=True)
class Videos:
    """The videos of one row: V videos for each of P prompts, B = P V in total, those of a prompt adjacent.

    Attributes:
        codes: (B, T, H, W), on the CPU.
        prompts: the prompt of each of the B videos.
        copies: V.
        seconds: time to sample all videos, without decoding, after a warm-up pass.
        nll: (B,) `teacher_nll`, in nats per token; None if an oracle scores.
        entropy: (B,) mean `pass_entropy`, in nats per token; None for rows of several passes, and if an oracle scores.
        scores: the oracle's scores, if there is one.
        path: the teacher's probability path, whose codebook says how far apart two codes are.
    """

    codes: torch.Tensor
    prompts: list[str]
    copies: int
    seconds: float
    nll: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    scores: Scores | None = None
    path: MetricPath | MixturePath | None = None

    @functools.cached_property
    def coverage_detail(self) -> dict[str, float | None]:
        """`coverage_detail` of the scores, which two metrics report."""
        return coverage_detail(self.scored)

    @property
    def by_prompt(self) -> torch.Tensor:
        """The codes as (P, V, N)."""
        return self.codes.view(len(self.codes) // self.copies, self.copies, -1)

    @property
    def scored(self) -> Scores:
        """`scores`, where an oracle has scored."""
        assert self.scores is not None  # `measure` takes the metrics of SCORED only where they are there
        return self.scores


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of report.json; its name is its key in the dict.

    Attributes:
        better: "higher" or "lower"; None for a detail that is in report.json but not in tables.
        definition: one sentence with the unit, without a full stop.
        function: returns a number, or None if the metric is undefined. A detail may be any JSON value.
    """

    better: str | None
    definition: str
    function: Callable[[Videos], Any]


def _mean(values: torch.Tensor) -> float:
    return values.float().mean().item()


def _spread(videos: Videos) -> float | None:
    if videos.path is None or videos.copies < 2:
        return None
    path = videos.path
    return _mean(torch.cat([spread(one.to(path.device), path) for one in videos.by_prompt.split(1)]))


SECONDS = Metric(
    "lower", "seconds to sample one video, without decoding, after a warm-up pass",
    lambda v: v.seconds / len(v.codes),
)  # fmt: skip

SPREAD = Metric(
    "higher", "mean squared distance of two videos of a prompt in the codebook's space, per token; far below the "
    "teacher's where a student has collapsed", _spread,
)  # fmt: skip

DISTINCT = Metric(
    "higher", "share of distinct videos among those of a prompt",
    lambda v: distinct(v.by_prompt) if v.copies > 1 else None,
)  # fmt: skip

SCORED: dict[str, Metric] = {
    "validity": Metric(
        "higher", "share of videos that are valid for any prompt", lambda v: _mean(v.scored.valid)
    ),
    "adherence": Metric(
        "higher", "share of videos that are at least as near to a valid video of their own prompt as to any other",
        lambda v: _mean(v.scored.adherent),
    ),
    "token_accuracy": Metric(
        "higher", "share of tokens equal to those of the nearest valid video of any prompt",
        lambda v: _mean(v.scored.accuracy),
    ),
    "coverage": Metric(
        "higher", "entropy of each factor that prompts leave open, over valid videos of the right prompt, relative to "
        "its maximum; the minimum over factors, pooled and per prompt", lambda v: least_coverage(v.coverage_detail),
    ),
    "coverage_near": Metric(
        "higher", "the same, over videos of the right prompt that share 90% of their tokens with a valid one",
        lambda v: least_coverage(coverage_detail(v.scored, near=True)),
    ),
    "coverage_detail": Metric(
        None, "the values of which coverage is the minimum", lambda v: v.coverage_detail
    ),
    "videos": Metric(None, "number of videos", lambda v: len(v.codes)),
    "seconds_per_video": SECONDS,
    "spread": SPREAD,
    "distinct": DISTINCT,
}  # fmt: skip

REFERENCE_FREE: dict[str, Metric] = {
    "seconds_per_video": SECONDS,
    "spread": SPREAD,
    "distinct": DISTINCT,
    "codes_used": Metric("higher", "number of distinct codes in all videos", lambda v: v.codes.unique().numel()),
    "token_entropy": Metric(
        "lower", "entropy of the prediction of a single pass, in nats per token",
        lambda v: None if v.entropy is None else v.entropy.mean().item(),
    ),
    "teacher_nll": Metric(
        "lower", "negative log-likelihood under the teacher after re-noising, in nats per token",
        lambda v: None if v.nll is None else v.nll.mean().item(),
    ),
    "diversity": Metric(
        "higher", "share of tokens in which two videos of a prompt differ",
        lambda v: diversity(v.by_prompt),
    ),
}  # fmt: skip


def measure(videos: Videos) -> dict[str, Any]:
    """All metrics of the videos, {name: value}: `SCORED` if they have scores, else `REFERENCE_FREE`."""
    metrics = REFERENCE_FREE if videos.scores is None else SCORED
    return {name: metric.function(videos) for name, metric in metrics.items()}


def columns_of(rows: dict[str, dict]) -> list[str]:
    """Names of the metrics to show in a table of a report's rows."""
    known = SCORED | REFERENCE_FREE
    return [name for name, m in known.items() if m.better and any(name in row for row in rows.values())]


def legend(rows: dict[str, dict]) -> list[str]:
    """A sentence for each column of such a table."""
    known = SCORED | REFERENCE_FREE
    return [f"{name} ({known[name].better} is better): {known[name].definition}." for name in columns_of(rows)]
