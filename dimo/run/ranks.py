"""Process-group setup and collectives. From `everywhere` on, every function is collective: all ranks must call it."""

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
# any of these makes accelerate assume a multi-process launch
MISLEADING = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip


@contextlib.contextmanager
def launched_or_alone() -> Iterator[None]:
    """Context for initialising the process group (or a single process); reports when other processes keep it waiting.

    Raises:
        DimoError: an invalid launch environment (see `read_launch`), or the other processes could not be reached.
    """
    launch = read_launch()
    text = f"the other processes of the launch in the environment ({launch})"
    waits = threading.Timer(20, print, [f"dimo: waiting for {text}"], {"file": sys.stderr, "flush": True})
    waits.daemon = True
    if launch:
        waits.start()
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not launch or isinstance(error, DimoError):
            raise
        raise DimoError(
            f"{text} could not be reached: {reason(error)}; unset all five to train in one process"
        ) from error
    finally:
        waits.cancel()


def read_launch() -> str:
    """The launch variables in the environment as text; empty if this process was not started by a launcher.

    An incomplete set of variables, left over from another program or set by MPI, is removed from the environment with a
    message: accelerate would otherwise wait for processes that do not exist.

    Raises:
        DimoError: all five variables are set but inconsistent.
    """
    given = {name: os.environ.get(name, "") for name in LAUNCH}
    if not all(given.values()):
        left = [name for name in MISLEADING if os.environ.pop(name, None) is not None]
        missing = [name for name in LAUNCH if not given[name]]
        if left:
            print(
                f"dimo: ignored in the environment: {', '.join(left)}, which without {', '.join(missing)} is not a "
                "launch; to train in several processes, set training.num_processes",
                file=sys.stderr,
            )
        return ""
    shown = " ".join(f"{name}={value}" for name, value in given.items())
    try:
        rank, world, local, _, port = (int(value) if name != "MASTER_ADDR" else 0 for name, value in given.items())
    except ValueError:
        rank = local = world = port = -1
    if not (0 <= rank < world and 0 <= local and 0 < port < 2**16):
        raise DimoError(f"{shown} in the environment is not a valid launch; unset all five to train in one process")
    return shown


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


def everywhere(value: Any) -> list[Any]:
    """All-gather of Python objects: the value of every rank, in rank order."""
    if _alone():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def count_ranks(flags: list[bool], device: torch.device) -> list[int]:
    """All-reduce: for each flag, the number of ranks on which it is set."""
    if _alone():
        return [int(flag) for flag in flags]
    counts = torch.tensor([int(flag) for flag in flags], device=device)
    dist.all_reduce(counts)
    return counts.tolist()


def raise_everywhere(error: Exception | None) -> None:
    """Raise on all ranks if any rank has an error, so that no rank waits forever for one that has left."""
    errors = everywhere(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, text in enumerate(errors):
        if text is not None:
            raise DimoError(f"rank {rank}: {text}")
