"""The metrics of a report: `SCORED` where a world's oracle scores the videos, `REFERENCE_FREE` for all other videos.

A new metric is a function of `Videos`, in a file beside this one, and a line in one of the two, or in both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from dimo.evaluation.reference_free import diversity
from dimo.evaluation.scored import coverage_detail, least_coverage
from dimo.worlds.protocol import Scores


@dataclasses.dataclass(frozen=True)
class Videos:
    """What the sampler of one row made: of each of P prompts V videos, B = P V in all, those of a prompt together.

    Attributes:
        codes: (B, T, H, W), on the CPU.
        prompts: the prompt of each video (B).
        copies: V.
        seconds: of sampling all of them, without decoding, after one pass to warm up.
        nll: `teacher_nll` of each (B,), in nats per token; None where an oracle scores.
        entropy: what its one pass leaves open (B,), in nats per token; None of more passes, and where an oracle scores.
        scores: the oracle's; None where there is none.
    """

    codes: torch.Tensor
    prompts: list[str]
    copies: int
    seconds: float
    nll: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    scores: Scores | None = None


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure of report.json; its name is its key in the dict.

    Attributes:
        better: "higher" or "lower"; None for a detail, which report.json holds and no table shows.
        definition: one sentence without a full stop, with the unit.
        function: videos -> a number, or None where it is undefined. A detail may be anything that JSON can hold.
    """

    better: str | None
    definition: str
    function: Callable[[Videos], Any]


def _mean(values: torch.Tensor) -> float:
    return values.float().mean().item()


SECONDS = Metric(
    "lower", "seconds of sampling one video, without decoding, after one pass to warm up",
    lambda v: v.seconds / len(v.codes),
)  # fmt: skip

SCORED: dict[str, Metric] = {
    "validity": Metric(
        "higher", "share of videos that the world can make, of any prompt", lambda v: _mean(v.scores.valid)
    ),
    "adherence": Metric(
        "higher", "share of videos that are as near to a valid video of their own prompt as to any other's",
        lambda v: _mean(v.scores.adherent),
    ),
    "token_accuracy": Metric(
        "higher", "share of tokens equal to the nearest valid video's, of any prompt",
        lambda v: _mean(v.scores.accuracy),
    ),
    "coverage": Metric(
        "higher", "entropy of what a prompt leaves free, over valid videos, as a share of the most possible: the least "
        "over what is free, pooled and per prompt", lambda v: least_coverage(v.scores),
    ),
    "coverage_detail": Metric(None, "the figures of which coverage is the least", lambda v: coverage_detail(v.scores)),
    "videos": Metric(None, "number of videos", lambda v: len(v.codes)),
    "seconds_per_video": SECONDS,
}  # fmt: skip

REFERENCE_FREE: dict[str, Metric] = {
    "seconds_per_video": SECONDS,
    "codes_used": Metric("higher", "number of different codes in all videos", lambda v: v.codes.unique().numel()),
    "token_entropy": Metric(
        "lower", "entropy of what one pass predicts, in nats per token",
        lambda v: None if v.entropy is None else v.entropy.mean().item(),
    ),
    "teacher_nll": Metric(
        "lower", "negative log likelihood under the teacher after re-noising, in nats per token",
        lambda v: v.nll.mean().item(),
    ),
    "diversity": Metric(
        "higher", "share of tokens in which two videos of one prompt differ",
        lambda v: diversity(v.codes.view(len(v.codes) // v.copies, v.copies, -1)),
    ),
}  # fmt: skip


def measure(videos: Videos) -> dict[str, Any]:
    """Every metric of the videos, by name: of `SCORED` where they have scores, else of `REFERENCE_FREE`."""
    metrics = REFERENCE_FREE if videos.scores is None else SCORED
    return {name: metric.function(videos) for name, metric in metrics.items()}


def columns_of(rows: dict[str, dict]) -> list[str]:
    """The metrics that a table of a report's rows shows."""
    known = SCORED | REFERENCE_FREE
    return [name for name, m in known.items() if m.better and any(name in row for row in rows.values())]


def legend(rows: dict[str, dict]) -> list[str]:
    """What the columns of a report's rows mean, a sentence each."""
    known = SCORED | REFERENCE_FREE
    return [f"{name} ({known[name].better} is better): {known[name].definition}." for name in columns_of(rows)]
