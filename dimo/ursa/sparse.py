"""Predictions of an exact teacher, which considers few codes possible."""

from __future__ import annotations

import dataclasses

import torch

from dimo.errors import DimoError, may_read, require_ids, require_shape
from dimo.ursa.prediction import Prediction


@dataclasses.dataclass(repr=False, eq=False)
class Sparse(Prediction):
    """Prediction of an exact teacher: log-probabilities of S codes per token, and a floor for all others.

    Args:
        codes: (B, N, S) codes, distinct within each token.
        log_p: (B, N, S) their log-probabilities in nats.
        floor: log-probability of every other code in nats, finite so that the reverse KL is. `log_p` and `floor` need
            not be normalised.
        codebook_size: K.
    """

    codes: torch.Tensor
    log_p: torch.Tensor
    floor: float
    codebook_size: int

    def __post_init__(self):
        require_shape("codes", self.codes, ("B", "N", "S"))
        require_shape("log_p", self.log_p, tuple(self.codes.shape))
        require_ids("codes", self.codes, self.codebook_size)
        if not -float("inf") < self.floor < 0:
            raise DimoError(f"floor must be a finite log-probability below 0, got {self.floor}")

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes.shape[:2])

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def _rows(self, rows: slice) -> torch.Tensor:
        codes, log_p = (x.flatten(0, 1)[rows] for x in (self.codes, self.log_p))
        made = torch.full((len(codes), self.codebook_size), self.floor, device=self.device)
        return made.scatter_(-1, codes, log_p.float())

    def detach(self, copy: bool = False) -> Sparse:
        return self

    def guided(self, uncond: Sparse, scale: torch.Tensor | float) -> Sparse:
        """u + scale (c - u) on log-probabilities, normalised and floored; both must know the same codes."""
        require_shape("uncond's codes", uncond.codes, tuple(self.codes.shape))
        same = not may_read(self.codes) or torch.equal(self.codes, uncond.codes)
        if not same or self.floor != uncond.floor:
            raise DimoError("guidance needs two predictions with the same codes and the same floor")
        log_p = (uncond.log_p + scale * (self.log_p - uncond.log_p)).log_softmax(-1).clamp(min=self.floor)
        return dataclasses.replace(self, log_p=log_p)

    def of_tokens(self, tokens: slice | torch.Tensor) -> Sparse:
        """The prediction for some of the tokens."""
        return dataclasses.replace(self, codes=self.codes[:, tokens], log_p=self.log_p[:, tokens])

    def chunk(self, parts: int) -> list[Sparse]:
        """Split along the batch."""
        both = zip(self.codes.chunk(parts), self.log_p.chunk(parts))
        return [dataclasses.replace(self, codes=codes, log_p=log_p) for codes, log_p in both]
