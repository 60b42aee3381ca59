"""Judged videos as frames: what is measured in pixels, and the time and memory that it takes to get there."""

from __future__ import annotations

import time
from typing import Any

import torch

from dimo.evaluation.differences import MEASURES, of_colours
from dimo.ursa import Ursa

NUMBERS = 2**26  # of the frames that are decoded at a time


def clock(device: torch.device) -> float:
    """Seconds, after what the GPU has been told to do is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class PeakMemory:
    """GPU memory that is needed beyond what was allocated before: `with PeakMemory(device) as peak: ...; peak.bytes`.

    0 on a CPU.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before


def weight_bytes(network: Any) -> int:
    """Bytes of the weights of a network, or of the one within diffnext's autoencoder; 0 if it has none."""
    module = getattr(network, "module", network)
    return sum(p.numel() * p.element_size() for p in module.parameters()) if hasattr(module, "parameters") else 0


def at_once(ursa: Ursa, grid: tuple[int, int, int]) -> int:
    """Number of videos to decode at a time."""
    (t, h, w), (temporal, spatial) = grid, ursa.strides
    return max(1, NUMBERS // (3 * (temporal * (t - 1) + 1) * spatial * h * spatial * w))


@torch.no_grad()
def in_pixels(ursa: Ursa, codes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Decode videos, and measure their frames.

    Args:
        ursa: with a VAE.
        codes: (B, T, H, W).

    Returns:
        pixel_motion, pixel_flicker and pixel_sharpness, as far as they are defined for as many frames, each (B,);
        "decode_seconds" (), the time to decode all, measuring excluded.
    """
    seconds, parts = 0.0, dict[str, list[torch.Tensor]]()
    for some in codes.split(at_once(ursa, (codes.shape[1], codes.shape[2], codes.shape[3]))):
        begin = clock(codes.device)
        frames = ursa.decode(some)
        seconds += clock(codes.device) - begin
        for name, function in MEASURES.items():
            found = function(frames, of_colours)
            if found is not None:
                parts.setdefault(f"pixel_{name}", []).append(found)
    return {name: torch.cat(found) for name, found in parts.items()} | {"decode_seconds": torch.tensor(seconds)}
