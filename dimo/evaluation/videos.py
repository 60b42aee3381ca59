"""The videos of one row of a report, of which metrics are functions."""

from __future__ import annotations

import dataclasses
import functools

import torch

from dimo.evaluation.scored import coverage_detail
from dimo.ursa.probability_path import MetricPath, MixturePath
from dimo.worlds.protocol import Scores


@dataclasses.dataclass(frozen=True)
class Videos:
    """The videos of one row: V videos for each of P prompts, B = P V in total, those of a prompt adjacent.

    Attributes:
        codes: (B, T, H, W), on the CPU.
        prompts: the prompt of each of the B videos.
        copies: V.
        seconds: time to sample all videos, without decoding, after a warm-up pass.
        scores: the oracle's scores, if there is one.
        path: the teacher's probability path, whose codebook says how far apart two codes are.
        judged: of the first V' videos of every prompt, what `dimo.evaluation.judging.judge` returns, (P V', ...), and
            for rows of one pass "entropy" (P V',), the mean of `pass_entropy` in nats per token. Empty: none is judged.
        reference: the teacher's videos of the same P prompts with which these are compared.
    """

    codes: torch.Tensor
    prompts: list[str]
    copies: int
    seconds: float
    scores: Scores | None = None
    path: MetricPath | MixturePath | None = None
    judged: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    reference: Videos | None = None

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

    def judged_by_prompt(self, name: str) -> torch.Tensor:
        """What the judge said, (P, V', ...)."""
        return self.judged[name].unflatten(0, (len(self.codes) // self.copies, -1))
