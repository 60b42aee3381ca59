"""Work on logits a few tokens at a time: at 64,000 codes every temporary of full size is larger than the model."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

# float32 products are exact on purpose (path, losses): torch need not propose TF32, which rounds them to ten bits
warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")

# entries of a temporary: on a GPU 640 tokens of 64,000 codes, a divisor of URSA's 5,120 and 33,280 tokens, so that no
# smaller last piece needs a graph of its own (1,280 would be a tenth faster in the losses, for 0.8 GB more); on a CPU
# 16 MiB, which malloc reuses
ENTRIES = {"cuda": 640 * 64_000, "cpu": 2**22}
FEW_CODES = 2048  # up to here K x K tables and logits of all tokens are small
BLOCK = 256  # codes summed at once when drawing


def tokens_at_once(codes: int, device: torch.device) -> int:
    """How many tokens of `codes` entries a temporary may hold; halved while little memory is free, a round number."""
    entries = ENTRIES.get(device.type, ENTRIES["cuda"])
    if device.type == "cuda" and torch.cuda.is_available():
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        while entries > 128 * codes and 16 * entries > torch.cuda.mem_get_info(device)[0] + unused:
            entries //= 2  # few sizes, since each is a graph of its own
    tokens = max(1, entries // codes)
    return tokens if tokens < 128 else tokens // 128 * 128


def chunks(size: int, *tensors: torch.Tensor | None) -> Iterator[tuple[torch.Tensor | None, ...]]:
    """Pieces of `size` rows of each tensor; None stays None."""
    rows = next(len(x) for x in tensors if x is not None)
    for start in range(0, rows, size):
        yield tuple(None if x is None else x[start : start + size] for x in tensors)


_compiles = contextvars.ContextVar("compiles", default=True)


@contextlib.contextmanager
def without_compiling() -> Iterator[None]:
    """Inside, work on logits is not compiled: what passes a network a few hundred times never earns those seconds."""
    token = _compiles.set(False)
    try:
        yield
    finally:
        _compiles.reset(token)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def on_device(function: Callable, x: torch.Tensor) -> Callable:
    """The function compiled on a GPU, where passes over logits cost as much as products; as it is on a CPU.

    The last, smaller chunk is a second graph.
    """
    return _compiled(function) if x.is_cuda and _compiles.get() else function


def inverse_cdf(prob: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The index (...) at which the sum of prob (..., K) first exceeds u (...) of the whole, u float64 in [0, 1)."""
    cumulative = prob.cumsum(-1, dtype=torch.float64)
    at = u.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(-1).clamp(max=prob.shape[-1] - 1)


def pick(logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """One index per row from softmax(logits): the inverse of the distribution function at u.

    Sums of 256 codes in float32, then sums of those in float64, then within one block: the codes are read twice, and
    no sum of all of them is ever rounded in float32.

    Args:
        logits: (n, K) float32.
        u: (n,) float64 in [0, 1).

    Returns:
        (n,) in [0, K).
    """
    n, codes = logits.shape
    if codes <= BLOCK:
        return inverse_cdf(logits.softmax(-1), u)
    blocks = math.ceil(codes / BLOCK)
    top = logits.amax(-1, keepdim=True)
    if codes % BLOCK:
        logits = F.pad(logits, (0, blocks * BLOCK - codes), value=-math.inf)
    logits = logits.view(n, blocks, BLOCK)
    mass = (logits - top.unsqueeze(-1)).exp().sum(-1).double().cumsum(-1)
    at = u.unsqueeze(-1) * mass[:, -1:]
    block = (mass <= at).sum(-1, keepdim=True).clamp(max=blocks - 1)
    before = torch.where(block > 0, mass.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = logits.gather(1, block.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1)
    inside = (inside - top).exp().double().cumsum(-1)
    at = torch.minimum(at - before, inside[:, -1:] * (1 - 1e-15))  # the two sums of a block differ by rounding
    return (block * BLOCK + (inside <= at).sum(-1, keepdim=True)).squeeze(-1)
