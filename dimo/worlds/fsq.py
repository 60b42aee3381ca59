"""Codebooks of finite scalar quantization (FSQ, arXiv 2309.15505), which URSA's video tokenizer uses."""

from __future__ import annotations

import math

import torch

# Level sets by the number of their codes K; the last is URSA's.
LEVELS = {
    16: (2, 2, 2, 2),
    256: (4, 4, 4, 4),
    1_000: (8, 5, 5, 5),
    4_096: (8, 8, 8, 8),
    8_000: (8, 8, 5, 5, 5),
    15_360: (8, 8, 8, 6, 5),
    64_000: (8, 8, 8, 5, 5, 5),
}


def fsq_codebook(levels: tuple[int, ...]) -> torch.Tensor:
    """(K, D) float32 vectors in [-1, 1], the first dimension varying fastest, as in URSA's scheduler folder.

    A dimension of L levels takes the values (level - L // 2) / (L // 2): an even number of levels ends below 1.
    """
    basis = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
    sizes = torch.tensor(levels)
    level = torch.arange(math.prod(levels))[:, None] // basis % sizes
    return (level - sizes // 2) / (sizes // 2).float()
