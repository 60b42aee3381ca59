"""The hidden states after a network's first layers, kept by one pass so that another network need not make them again.

An auxiliary whose embeddings and first layers are the teacher's sees the teacher's x_t with the teacher's prompt, so
its pass can begin where the teacher's conditional pass has left these layers.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import torch


@dataclasses.dataclass(repr=False)
class Lower:
    """Hidden states (B, S, hidden_size) after the first `layers` layers; under sequence parallelism those held here."""

    layers: int
    states: torch.Tensor | None = None  # None: not kept yet

    def of(self, samples: slice) -> Lower:
        """Those of some of the samples."""
        assert self.states is not None
        return Lower(self.layers, self.states[samples])

    def first(self, samples: int) -> Lower:
        """Those of the first samples; of the others nothing stays in memory."""
        assert self.states is not None
        return Lower(self.layers, self.states if len(self.states) == samples else self.states[:samples].clone())

    def __repr__(self) -> str:
        return f"Lower({self.layers} layers, {None if self.states is None else tuple(self.states.shape)})"


_active: contextvars.ContextVar[Lower | None] = contextvars.ContextVar("lower", default=None)


def active_lower() -> Lower | None:
    """What passes in this context keep, or go on from."""
    return _active.get()


def keeping(layers: int) -> contextlib.AbstractContextManager[Lower | None]:
    """In this context a pass keeps its hidden states after the first `layers` layers, in what this yields; 0: none."""
    return going_on(Lower(layers) if layers else None)


@contextlib.contextmanager
def going_on(lower: Lower | None) -> Iterator[Lower | None]:
    """In this context a pass goes on from `lower`, which must be of the same ids and layers; None: from its ids."""
    token = _active.set(lower)
    try:
        yield lower
    finally:
        _active.reset(token)
