"""Device and dtype as --device and --dtype name them."""

from __future__ import annotations

import torch

from dimo.errors import DimoError
from dimo.ursa.loading import DTYPES


def pick_device(name: str) -> torch.device:
    """The device that auto, cpu or cuda names; auto is a GPU, if there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise DimoError(f"device must be one of auto, cpu, cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise DimoError("device is cuda, but PyTorch sees no GPU; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device, auto: str | None = None) -> str:
    """The name of a dtype in `DTYPES`.

    Args:
        name: one of them, or auto.
        auto: what auto stands for; None: bfloat16 on a GPU, else float32.
    """
    if name not in ("auto", *DTYPES):
        raise DimoError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}")
    if name != "auto":
        return name
    return auto or ("bfloat16" if device.type == "cuda" else "float32")
