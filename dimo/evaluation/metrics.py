"""The metrics of a report: `SCORED` for videos scored by a world's oracle, `REFERENCE_FREE` for all others.

`JUDGED` (`dimo.evaluation.beside_teacher`) joins either where the teacher has judged videos. To add a metric, write a
function of `Videos` in a file beside this one, and add a line to one or more of the dicts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from dimo.evaluation import beside_teacher, bootstrap, features, trust
from dimo.evaluation.bootstrap import Estimate
from dimo.evaluation.comparison import AGAIN
from dimo.evaluation.reference_free import diversity
from dimo.evaluation.scored import coverage_detail, estimate_coverage
from dimo.evaluation.videos import Videos
from dimo.views.collapse import distinct


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of report.json; its name is its key in the dict.

    Attributes:
        better: "higher", "lower" or a value such as "nearer to 1"; None for a detail that is in report.json but not in
            tables.
        definition: one sentence with the unit, without a full stop.
        function: returns a number, an `Estimate`, or None if the metric is undefined. A detail may be any JSON value.
        needs: what must have been measured (`Videos.has`), for metrics of `JUDGED`.
    """

    better: str | None
    definition: str
    function: Callable[[Videos], Any]
    needs: str = "nll"


def _mean(videos: Videos, values: torch.Tensor) -> Estimate:
    """The mean of a value for each of the B videos."""
    per_prompt = bootstrap.mean(values.double().view(-1, videos.copies).mean(1))
    return Estimate(values.float().mean().item(), per_prompt.interval if per_prompt else None)


def _over_prompts(videos: Videos, figure: Callable[[torch.Tensor], float | None]) -> Estimate | None:
    """The mean over prompts of a figure of a prompt's codes (1, V, N); None where a prompt has a single video."""
    if videos.copies < 2:
        return None
    return bootstrap.mean(torch.tensor([figure(one) for one in videos.by_prompt.split(1)], dtype=torch.float64))


SECONDS = Metric(
    "lower", "seconds to sample one video, without decoding, after a warm-up pass",
    lambda v: v.seconds / len(v.codes),
)  # fmt: skip

SPREAD = Metric(
    "higher", "mean squared distance of two videos of a prompt in the codebook's space, per token; far below the "
    "teacher's where a student has collapsed; undefined of a single video", beside_teacher.mean_spread,
)  # fmt: skip

DISTINCT = Metric(
    "higher", "share of distinct videos among those of a prompt; undefined of a single one",
    lambda v: _over_prompts(v, distinct),
)  # fmt: skip

SCORED: dict[str, Metric] = {
    "validity": Metric(
        "higher", "share of videos that are valid for any prompt", lambda v: _mean(v, v.scored.valid)
    ),
    "adherence": Metric(
        "higher", "share of videos that are at least as near to a valid video of their own prompt as to any other",
        lambda v: _mean(v, v.scored.adherent),
    ),
    "token_accuracy": Metric(
        "higher", "share of tokens equal to those of the nearest valid video of any prompt",
        lambda v: _mean(v, v.scored.accuracy),
    ),
    "coverage": Metric(
        "higher", "entropy of each factor that prompts leave open, over valid videos of the right prompt, relative to "
        "its maximum; the minimum over factors, pooled and per prompt", lambda v: estimate_coverage(v.scored),
    ),
    "coverage_near": Metric(
        "higher", "the same, over videos of the right prompt that share 90% of their tokens with a valid one",
        lambda v: estimate_coverage(v.scored, near=True),
    ),
    "coverage_detail": Metric(
        None, "the values of which coverage is the minimum", lambda v: coverage_detail(v.scored)
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
    "diversity": Metric(
        "higher", "share of tokens in which two videos of a prompt differ; undefined of a single one",
        lambda v: _over_prompts(v, diversity),
    ),
}  # fmt: skip


JUDGED: dict[str, Metric] = {
    "token_entropy": Metric(
        "lower", "entropy of the prediction of a single pass, in nats per token", beside_teacher.token_entropy
    ),
    "teacher_nll": Metric(
        "lower", "denoising cross-entropy: negative log-likelihood under the teacher after re-noising, in nats per "
        "token",
        lambda v: beside_teacher.mean(v, "nll"),
    ),
    "nll_difference": Metric(
        "nearer to 0", "teacher_nll less that of the teacher's own videos; below 0 where videos are plainer than its",
        beside_teacher.nll_difference,
    ),
    "guided_nll": Metric(
        "lower", "as teacher_nll, under the guided teacher",
        lambda v: beside_teacher.mean(v, "nll_guided"), "nll_guided",
    ),
    "guided_nll_difference": Metric(
        "nearer to 0", "guided_nll less that of the teacher's own videos",
        lambda v: beside_teacher.nll_difference(v, "nll_guided"), "nll_guided",
    ),
    "nll_by_t": Metric(None, "teacher_nll at t = .1, .3, .5, .7 and .9", beside_teacher.nll_by_t),
    "recovered": Metric(
        "higher", "share of tokens that the teacher would draw again as they were, after re-noising; as high as can be "
        "of a single valid video, repeated", lambda v: beside_teacher.mean(v, "recovered"),
    ),
    "prompt_gain": Metric(
        "higher", "recovered less the share of tokens that the teacher would draw again without the prompt",
        beside_teacher.prompt_gain,
    ),
    "retrieval": Metric(
        "higher", "share of videos of which the teacher recovers more tokens under their own prompt than under 7 "
        "others (or all, if there are fewer)", beside_teacher.retrieval,
    ),
    "retrieval_prompts": Metric(
        None, "number of prompts k among which retrieval looks for a video's own; 1/k is chance",
        beside_teacher.retrieval_prompts,
    ),
    "frechet": Metric(
        "lower", "Fréchet distance from the teacher's videos in its hidden features; above 0 even for others of its "
        f"own, the more so the fewer there are; undefined below {features.FEWEST} videos, where chance alone makes it "
        "as large as a collapse would", beside_teacher.frechet_of,
    ),
    "frechet_dimension": Metric(None, "dimension of the features of frechet", beside_teacher.frechet_dimension),
    "feature_coverage": Metric(
        "higher", "share of the teacher's videos that have one of these within reach of their own 5th neighbour, in "
        f"its hidden features; undefined of {features.NEIGHBOURS} videos or fewer", beside_teacher.feature_coverage,
    ),
    "read": Metric(
        "higher", "share of videos in whose frames a reader that knows the world, but nothing of its tokens, sees "
        "their prompt", lambda v: beside_teacher.mean(v, "read"), "read",
    ),
    "spread_ratio": Metric("nearer to 1", "spread relative to the teacher's", beside_teacher.spread_ratio),
    "motion": Metric(
        "nearer to 1", "mean squared distance of a token from the one before it in time, in the codebook's space, "
        "relative to the teacher's", lambda v: beside_teacher.token_ratio(v, "motion"),
    ),
    "flicker": Metric(
        "nearer to 1", "mean squared distance of a token from the nearer of those before and after, relative to the "
        "teacher's", lambda v: beside_teacher.token_ratio(v, "flicker"),
    ),
    "sharpness": Metric(
        "nearer to 1", "mean squared distance of tokens that are neighbours in height or width, relative to the "
        "teacher's",
        lambda v: beside_teacher.token_ratio(v, "sharpness"),
    ),
    "pixel_motion": Metric(
        "nearer to 1", "mean squared difference of a pixel from the frame before, relative to the teacher's",
        lambda v: beside_teacher.pixel_ratio(v, "pixel_motion"), "decode_seconds",
    ),
    "pixel_flicker": Metric(
        "nearer to 1", "mean squared difference of a pixel from the nearer of the frames before and after, relative to "
        "the teacher's; undefined where frames are held",
        lambda v: beside_teacher.pixel_ratio(v, "pixel_flicker"), "decode_seconds",
    ),
    "pixel_sharpness": Metric(
        "nearer to 1", "mean squared difference of pixels that are neighbours in height or width, relative to the "
        "teacher's", lambda v: beside_teacher.pixel_ratio(v, "pixel_sharpness"), "decode_seconds",
    ),
    "seconds_to_frames": Metric(
        "lower", "seconds from the prompt's token ids to the frames of one video, after a first one",
        lambda v: v.seconds / len(v.codes) + (v.decode_seconds or 0) / v.judged_videos, "decode_seconds",
    ),
    "memory_gib": Metric(
        "lower", "GPU memory in GiB for a batch: the weights of transformer and VAE, and what sampling and decoding "
        "need at most", lambda v: v.peak_bytes / 2**30, "peak_bytes",
    ),
}  # fmt: skip


def measure(videos: Videos) -> dict[str, Any]:
    """All metrics of the videos, {name: value}: `SCORED` if they have scores, else `REFERENCE_FREE`, and `JUDGED`.

    The last entry, "intervals", holds the 95% intervals of those that have one, {name: [low, high]}.
    """
    metrics = REFERENCE_FREE if videos.scores is None else SCORED
    metrics = metrics | {name: metric for name, metric in JUDGED.items() if videos.has(metric.needs)}
    row: dict[str, Any] = {}
    intervals = {}
    for name, metric in metrics.items():
        value = metric.function(videos)
        row[name] = value.value if isinstance(value, Estimate) else value
        if isinstance(value, Estimate) and value.interval:
            intervals[name] = list(value.interval)
    return row | {"intervals": intervals}


def columns_of(rows: dict[str, dict]) -> list[str]:
    """Names of the metrics to show in a table of a report's rows."""
    known = SCORED | REFERENCE_FREE | JUDGED
    return [name for name, m in known.items() if m.better and any(name in row for row in rows.values())]


def world_title(rows: dict[str, dict]) -> str | None:
    """The `title_of` the world to which a report belongs; None where there is no oracle, or in reports before it."""
    return next((row["world"] for row in rows.values() if "world" in row), None)


def _by_chance(name: str, rows: dict[str, dict]) -> str:
    """The chance of retrieval, which is that of the report's own number of prompts; empty for all other metrics."""
    most = max((row.get("retrieval_prompts", 0) for row in rows.values()), default=0)
    return f"; 1/{most} by chance, among {most} prompts" if name == "retrieval" and most > 1 else ""


def legend(rows: dict[str, dict]) -> list[str]:
    """Sentences for each column of such a table, with how far it can be trusted, and what the brackets are."""
    known, columns, world = SCORED | REFERENCE_FREE | JUDGED, columns_of(rows), world_title(rows)
    said = [
        f"{name} ({known[name].better} is better): {known[name].definition}{_by_chance(name, rows)}. "
        f"{trust.sentence(name, world)}".rstrip()
        for name in columns
    ]
    if any(trust.measured(name, world) for name in columns):
        said.append(trust.rests_on(world))
    if any(row.get("intervals") for row in rows.values()):
        said.append("In brackets: the 95% interval over prompts.")
    again = next((name for name in rows if name.endswith(AGAIN)), None)
    if again:
        said.append(
            f"{again}: the teacher from other noise, which differs from {again.removesuffix(AGAIN)} by chance alone: "
            "no row can be expected to come nearer to the teacher."
        )
    return said
