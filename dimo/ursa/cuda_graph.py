"""Work that is repeated many times as a CUDA graph: captured once, then replayed without launching kernels one by one.

A replay reads and writes the tensors of the capture. What changes between replays is filled into such tensors before.
"""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Callable, Iterator

import torch

AHEAD = 2  # replays that may be queued, so that the time between steps is that of the GPU
ORDINARY = 3  # calls of a function before its capture: libraries set up their workspaces, and compilers compile


def record(function: Callable[[], None], stream, generator: torch.Generator) -> Callable[[], None]:
    """Capture the kernels of `function`, and of the generator that it draws from, as a CUDA graph.

    Returns:
        What replays it on the current stream; it waits until all but the last AHEAD replays have ended.
    """
    gc.collect()  # graphs of earlier trainers must not be destroyed during the capture
    graph, queued = torch.cuda.CUDAGraph(), deque[torch.cuda.Event]()
    graph.register_generator_state(generator)
    # relaxed, since chunks query free memory; an own stream, since concurrent graphs must not share a workspace
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        function()

    def replay() -> None:
        graph.replay()
        queued.append(torch.cuda.Event(blocking=True))
        queued[-1].record()
        if len(queued) > AHEAD:
            queued.popleft().synchronize()

    return replay


@contextlib.contextmanager
def on_stream(stream) -> Iterator[None]:
    """In this context `stream` is the current one; it and the outer one wait for each other. None does nothing."""
    outside = torch.cuda.current_stream(stream.device) if stream is not None else None
    if outside is None or outside == stream:
        yield
        return
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)


def assign(held: float | torch.Tensor, value: float | torch.Tensor) -> float | torch.Tensor:
    """`value`, to be held in place of `held`; a scalar tensor is filled instead, since a CUDA graph reads it there."""
    return held.fill_(value) if isinstance(held, torch.Tensor) else value


def towards(tensors: list[torch.Tensor], ends: list[torch.Tensor], weight: float | torch.Tensor) -> None:
    """Move tensors to `ends` by the share `weight`, in place: an update of a moving average."""
    if isinstance(weight, torch.Tensor):
        torch._foreach_add_(tensors, torch._foreach_mul(torch._foreach_sub(ends, tensors), weight))
    else:
        torch._foreach_lerp_(tensors, ends, weight)


def make_capturable(optimizers: list[torch.optim.Optimizer], device: torch.device) -> None:
    """Hold learning rates in scalar tensors, so that a CUDA graph can contain the update."""
    for optimizer in optimizers:
        optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are not captured
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
            group["capturable"] = True
