"""The videos of one row of a report, of which metrics are functions."""

from __future__ import annotations

import dataclasses
import functools

import torch

from dimo.evaluation.differences import MEASURES, of_codes
from dimo.ursa.probability_path import MetricPath, MixturePath
from dimo.views.collapse import spread
from dimo.worlds.protocol import Scores

CLOCKS = ("first_pass_seconds", "seconds", "judge_seconds", "first_decode_seconds", "decode_seconds")
NUMBERS = (*CLOCKS, "peak_bytes")  # what a job says of itself, not of each of its videos


@dataclasses.dataclass(eq=False)
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
            for rows of one pass "entropy" (P V',), the mean of `pass_entropy` in nats per token; with a VAE also what
            `dimo.evaluation.decoding.in_pixels` measures, and "read", whether a world's reader sees the prompt, all
            (P V',). If none is judged: "read" alone, of the first video of every prompt, where there is a reader.
        reference: the teacher's videos of the same P prompts with which these are compared.
        decode_seconds: time to decode the P V' judged videos, if there is a VAE.
        peak_bytes: GPU memory for sampling and decoding, the most of all jobs; 0: not measured.
    """

    codes: torch.Tensor
    prompts: list[str]
    copies: int
    seconds: float
    scores: Scores | None = None
    path: MetricPath | MixturePath | None = None
    judged: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    reference: Videos | None = None
    decode_seconds: float | None = None
    peak_bytes: int = 0

    @functools.cached_property
    def spread(self) -> torch.Tensor | None:
        """Spread of each prompt's videos, (P,) float64; None of single ones. Kept, as the teacher's serves all rows."""
        if self.path is None or self.copies < 2:
            return None
        path = self.path
        return per_prompt(torch.cat([spread(one.to(path.device), path).cpu() for one in self.by_prompt.split(1)]))

    @functools.cached_property
    def in_tokens(self) -> dict[str, torch.Tensor]:
        """Motion, flicker and sharpness of each prompt's codes, (P,) float64, where they are defined. Kept as well."""
        path, parts = self.path, dict[str, list[torch.Tensor]]()
        if path is None:
            return {}
        # a few videos at a time, since each code becomes a vector
        for some in self.codes.split(max(1, 2**20 // self.codes[0].numel())):
            for name, function in MEASURES.items():
                found = function(some.to(path.device), of_codes(path))
                if found is not None:
                    parts.setdefault(name, []).append(found.cpu())
        return {name: per_prompt(torch.cat(found).view(len(self.by_prompt), -1)) for name, found in parts.items()}

    @property
    def by_prompt(self) -> torch.Tensor:
        """The codes as (P, V, N)."""
        return self.codes.view(len(self.codes) // self.copies, self.copies, -1)

    @property
    def scored(self) -> Scores:
        """`scores`, where an oracle has scored."""
        assert self.scores is not None  # `measure` takes the metrics of SCORED only where they are there
        return self.scores

    def has(self, name: str) -> bool:
        """Whether something was measured: an entry of `judged`, or a number such as `peak_bytes`."""
        return name in self.judged or bool(getattr(self, name, None))

    @property
    def judged_videos(self) -> int:
        """P V'."""
        return len(next(iter(self.judged.values())))

    def judged_by_prompt(self, name: str) -> torch.Tensor:
        """What the judge said, (P, V', ...)."""
        return self.judged[name].unflatten(0, (len(self.codes) // self.copies, -1))


def per_prompt(values: torch.Tensor) -> torch.Tensor:
    """Means (P,) of values (P, ...), in float64."""
    return values.double().flatten(1).mean(1)
