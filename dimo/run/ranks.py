"""How the processes of a run meet, and what they agree on: from `everywhere` on each function is collective, all ranks
call it, in the same order."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from dimo.errors import DimoError, reason

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun and accelerate set all five
# what accelerate takes for a launch of several processes by itself
MISLEADING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
MISLEADING += ("MV2_COMM_WORLD_SIZE",)


@contextlib.contextmanager
def launched_or_alone() -> Iterator[None]:
    """Around what reads the environment and makes the processes of a launch meet.

    Raises:
        DimoError: as `read_launch`, or they did not meet.
    """
    launch = read_launch()
    text = f"the other processes that the environment speaks of ({launch})"
    waits = threading.Timer(20, print, [f"dimo: waiting for {text}"], {"file": sys.stderr, "flush": True})
    waits.daemon = True
    if launch:
        waits.start()
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not launch or isinstance(error, DimoError):
            raise
        raise DimoError(f"{text} were not met: {reason(error)}; unset all five to train in one process") from error
    finally:
        waits.cancel()


def read_launch() -> str:
    """What a launcher has announced in the environment, as text; empty without one.

    What a shell still has from another program, one of five variables or an MPI's own, is taken out of the environment
    and said to be: accelerate would wait for processes that nobody has started.

    Raises:
        DimoError: all five are there, and do not fit together.
    """
    given = {name: os.environ.get(name, "") for name in LAUNCH}
    if not all(given.values()):
        left = [name for name in MISLEADING if os.environ.pop(name, None) is not None]
        missing = [name for name in LAUNCH if not given[name]]
        if left:
            print(
                f"dimo: ignored in the environment: {', '.join(left)}, which without {', '.join(missing)} is no "
                "launch; several processes are started by training.num_processes",
                file=sys.stderr,
            )
        return ""
    shown = " ".join(f"{name}={value}" for name, value in given.items())
    try:
        rank, world, local, _, port = (int(value) if name != "MASTER_ADDR" else 0 for name, value in given.items())
    except ValueError:
        rank = local = world = port = -1
    if not (0 <= rank < world and 0 <= local and 0 < port < 2**16):
        raise DimoError(f"{shown} in the environment is no launcher's; unset all five to train in one process")
    return shown


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
