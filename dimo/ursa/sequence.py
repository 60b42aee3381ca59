"""Sequence parallelism: the tokens of a sample divided among the GPUs of a group, after DeepSpeed-Ulysses.

A GPU holds a contiguous part of the sequence through all layers. Only attention needs all tokens: there the heads are
divided instead, by an all-to-all before and one after it (arXiv 2309.14509, section 3.2). Both are redistributions of
PyTorch's DTensor, which also pads where the length is no multiple of the group and sends gradients back.

What is small, such as codes or log-probabilities, one number per token, is whole on every GPU of a group and equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dimo.errors import DimoError

HEADS, TOKENS = 1, 2  # dimensions of queries, keys and values: (B, heads, S, head_dim)


class Part:
    """Which of the N visual tokens a prediction holds; this one: all of them. Its methods take one value per token."""

    count: int | None = None  # N, where it is not the number of those held

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """The part of (B, N, ...) that is held here: (B, n, ...). (B, 1, ...) stays, one value for all tokens."""
        return values

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        """The values (B, N, ...) of all tokens, from those held here, (B, n, ...). Collective, without gradients."""
        return values

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over the GPUs of the group. Collective, without gradients."""
        return value


@dataclasses.dataclass(frozen=True)
class Share(Part):
    """Visual tokens `start` to `end`, without `end`, of `count`; the others of the group hold the rest."""

    mesh: DeviceMesh
    start: int
    end: int
    count: int

    def own(self, values: torch.Tensor) -> torch.Tensor:
        return values if values.shape[1] == 1 else values[:, self.start : self.end]

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        made = values.new_zeros(len(values), self.count, *values.shape[2:])
        made[:, self.start : self.end] = values
        return self.total(made)  # exact: all but one of the summands are zero

    def total(self, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        dist.all_reduce(value, group=self.mesh.get_group())
        return value


@dataclasses.dataclass(frozen=True)
class Split:
    """A group of GPUs (a mesh of one dimension) that divides sequences among its members."""

    mesh: DeviceMesh

    def bounds(self, length: int) -> tuple[int, int]:
        """First position held here and the one after the last; parts are those of `torch.chunk`."""
        size = -(-length // self.mesh.size())
        start, end = (min(size * (self.mesh.get_local_rank() + i), length) for i in (0, 1))
        return start, end

    def own(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """The part of `values` along `dim` that is held here."""
        start, end = self.bounds(values.shape[dim])
        return values.narrow(dim, start, end - start)

    def share(self, first: int, count: int, length: int) -> tuple[slice, Share]:
        """The visual tokens predicted here: (positions in the part held here, which tokens they predict).

        Args:
            first: position of the sequence that predicts the first of the `count` visual tokens.
            length: length S of the sequence.

        Raises:
            DimoError: some GPU of the group would hold no visual token.
        """
        size = -(-length // self.mesh.size())
        if size <= first or length - size * (self.mesh.size() - 1) <= length - first - count:
            raise DimoError(
                f"training.sequence_parallel={self.mesh.size()} leaves a GPU without visual tokens: a sequence of "
                f"{length} has {count}"
            )
        start, end = self.bounds(length)
        own = max(start, first), min(end, first + count)
        return slice(own[0] - start, own[1] - start), Share(self.mesh, own[0] - first, own[1] - first, count)

    def to_heads(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """All heads of the tokens held here, (B, heads, s, D), to some heads of all tokens, (B, heads / GPUs, S, D)."""
        return self._redistribute(x, TOKENS, HEADS, (x.shape[0], x.shape[1], length, x.shape[3]))

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The way back: (B, heads / GPUs, S, D) to (B, heads, s, D)."""
        return self._redistribute(x, HEADS, TOKENS, (x.shape[0], x.shape[1] * self.mesh.size(), *x.shape[2:]))

    def _redistribute(self, x: torch.Tensor, cut: int, to: int, shape: tuple[int, ...]) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, Shard  # its import takes a third as long as PyTorch's

        stride = (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
        whole = DTensor.from_local(x.contiguous(), self.mesh, [Shard(cut)], shape=torch.Size(shape), stride=stride)
        return whole.redistribute(placements=[Shard(to)]).to_local()


ALL = Part()
_active: Split | None = None


@contextlib.contextmanager
def splitting(split: Split | None) -> Iterator[None]:
    """Context in which forward passes divide their tokens by `split`; None: no division.

    All GPUs of the group must make the same passes. A backward pass may run after the context has ended.
    """
    global _active
    before, _active = _active, split
    try:
        yield
    finally:
        _active = before


def active_split() -> Split | None:
    """The division that `splitting` has set."""
    return _active
