"""Work on logits a few tokens at a time: at 64,000 codes every temporary of full size is larger than the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

# float32 entries of a temporary: 512 MiB on a GPU; on a CPU 16 MiB, which malloc reuses instead of asking the system
ENTRIES = {"cuda": 2**27, "cpu": 2**22}


def tokens_at_once(codes: int, device: torch.device) -> int:
    """How many tokens of `codes` entries a temporary may hold."""
    return max(1, ENTRIES.get(device.type, ENTRIES["cuda"]) // codes)


def by_tokens(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """function(*tensors) without full-size temporaries, where it treats every token by itself.

    Args:
        function: takes tensors (n, ...) of n tokens, returns (n, ...).
        tensors: each (B, N, ...); the first holds the logits, (B, N, K).

    Returns:
        (B, N, ...). Gradients flow; each chunk is computed again in the backward pass instead of being remembered.
    """
    batch, tokens, codes = tensors[0].shape
    chunk = tokens_at_once(codes, tensors[0].device)
    if batch * tokens <= chunk:
        return function(*tensors)
    remember = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    samples = []
    for sample in zip(*(x.unbind(0) for x in tensors)):
        parts = zip(*(x.split(chunk) for x in sample))
        done = [checkpoint(function, *p, use_reentrant=False) if remember else function(*p) for p in parts]
        samples.append(torch.cat(done))
    return torch.stack(samples)
