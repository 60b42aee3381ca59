"""What the processes of a run agree on. Every function is collective: all ranks call it, in the same order."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from dimo.errors import DimoError


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


def everywhere(value: Any) -> list[Any]:
    """The value of every rank, in order of rank."""
    if _alone():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def count_ranks(flags: list[bool], device: torch.device) -> list[int]:
    """For each flag, on how many ranks it is up."""
    if _alone():
        return [int(flag) for flag in flags]
    counts = torch.tensor([int(flag) for flag in flags], device=device)
    dist.all_reduce(counts)
    return counts.tolist()


def raise_everywhere(error: Exception | None) -> None:
    """Raise on every rank if one of them has an error: a rank that waits for one that is gone would wait for ever."""
    errors = everywhere(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, text in enumerate(errors):
        if text is not None:
            raise DimoError(f"rank {rank}: {text}")
