"""Process logits in chunks of tokens: at 64,000 codes every full-size temporary is larger than the model."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

# path and losses need full float32 products; silence the suggestion of TF32, which has a 10-bit mantissa
warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")

# entries per temporary: on a GPU up to 1,280 tokens of 64,000 codes, which divides URSA's 5,120 and 33,280 tokens, as
# do its halves, so that no smaller last chunk needs its own compiled graph; on a CPU 16 MiB, which malloc can reuse
ENTRIES = {"cuda": 1280 * 64_000, "cpu": 2**22}
NEEDED = 32  # bytes of free GPU memory for each of them: the losses take 2.3 GiB with 1,280 tokens
FEW_CODES = 2048  # up to this codebook size, K x K tables and full logits are small
BLOCK = 256  # codes per block in `pick`


_latest: dict[tuple[int, torch.device], int] = {}  # entries per temporary of these codes, as last chosen on that GPU


def tokens_at_once(codes: int, device: torch.device) -> int:
    """Chunk size in tokens for logits with `codes` entries per token; halved until it fits the free GPU memory.

    While a CUDA graph is captured it is that of the step before, for which everything is compiled.
    """
    entries = ENTRIES.get(device.type, ENTRIES["cuda"])
    if device.type == "cuda" and torch.cuda.is_available():
        entries = _fitting(entries, codes, device)
    tokens = max(1, entries // codes)
    return tokens if tokens < 128 else tokens // 128 * 128


def _fitting(entries: int, codes: int, device: torch.device) -> int:
    if not (torch.cuda.is_current_stream_capturing() and (codes, device) in _latest):
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        while entries > 128 * codes and NEEDED * entries > torch.cuda.mem_get_info(device)[0] + unused:
            entries //= 2  # powers of two, since each size compiles its own graph
        _latest[codes, device] = entries
    return _latest[codes, device]


def chunks(size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield tuples of `size` rows of each tensor."""
    for start in range(0, len(tensors[0]), size):
        yield tuple(x[start : start + size] for x in tensors)


_compiles = contextvars.ContextVar("compiles", default=True)


@contextlib.contextmanager
def without_compiling() -> Iterator[None]:
    """In this context `on_device` does not compile: a few hundred passes do not make up for the compile time."""
    token = _compiles.set(False)
    try:
        yield
    finally:
        _compiles.reset(token)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def on_device(function: Callable, x: torch.Tensor) -> Callable:
    """`function` compiled if `x` is on a GPU, where memory-bound passes over logits cost as much as matrix products.

    A smaller last chunk compiles a second graph.
    """
    return _compiled(function) if x.is_cuda and _compiles.get() else function


def inverse_cdf(prob: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """First index (...) at which the cumulative sum of prob (..., K) exceeds u times its total; u (...) in [0, 1)."""
    cumulative = prob.cumsum(-1, dtype=torch.float64)
    at = u.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(-1).clamp(max=prob.shape[-1] - 1)


def pick(logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Sample one index per row from softmax(logits) by inverting the CDF at u.

    Probabilities are summed in float32 over blocks of 256 codes, then in float64 over blocks to find the block, then
    within it. This reads the logits twice and never rounds a sum over all codes to float32.

    Args:
        logits: (n, K) float32.
        u: (n,) float64 uniform numbers in [0, 1).

    Returns:
        (n,) int64 in [0, K).
    """
    n, codes = logits.shape
    if codes <= BLOCK:
        return inverse_cdf(logits.softmax(-1), u)
    blocks = math.ceil(codes / BLOCK)
    top = logits.amax(-1, keepdim=True)
    if codes % BLOCK:
        logits = F.pad(logits, (0, blocks * BLOCK - codes), value=-math.inf)
    logits = logits.view(n, blocks, BLOCK)
    mass = (logits - top.unsqueeze(-1)).exp().sum(-1)

    def weights(block: torch.Tensor) -> torch.Tensor:
        inside = logits.gather(1, block.view(-1, 1, 1).expand(-1, 1, BLOCK)).squeeze(1)
        return (inside - top).exp()

    return pick_in_blocks(mass, weights, u)


def pick_in_blocks(
    mass: torch.Tensor, weights: Callable[[torch.Tensor], torch.Tensor], u: torch.Tensor
) -> torch.Tensor:
    """Sample one index per row from weights that are summed over blocks of 256, by inverting the CDF at u.

    Args:
        mass: (n, blocks) float32 sums.
        weights: the weights (n, 256) in one block (n,) of every row.
        u: (n,) float64 uniform numbers in [0, 1).
    """
    mass = mass.double().cumsum(-1)
    at = u.unsqueeze(-1) * mass[:, -1:]
    block = (mass <= at).sum(-1, keepdim=True).clamp(max=mass.shape[1] - 1)
    before = torch.where(block > 0, mass.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = weights(block.squeeze(-1)).double().cumsum(-1)
    at = torch.minimum(at - before, inside[:, -1:] * (1 - 1e-15))  # the two sums of a block differ by rounding
    return (block * BLOCK + (inside <= at).sum(-1, keepdim=True)).squeeze(-1)
