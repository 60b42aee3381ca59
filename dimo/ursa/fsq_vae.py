"""A small video tokenizer with URSA's strides: finite scalar quantization (FSQ, arXiv 2309.15505) between two networks.

A token stands for 4 frames of 8x8 pixels; the first frame of a video is encoded as if it stood still for four. Their
768 numbers are reduced to a few principal components, a transform fixed before training. The encoder sees those of its
own token. The decoder sees the token and its 26 neighbours in time and space, and so draws what no single token says.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dimo.errors import DimoError, require_ids, require_shape
from dimo.files import save_file
from dimo.ursa.inputs import SPATIAL_STRIDE, TEMPORAL_STRIDE
from dimo.ursa.weights import WEIGHTS, load_weights, read_json, read_weights

PIXELS = TEMPORAL_STRIDE * SPATIAL_STRIDE**2 * 3  # numbers in the frames of a token
NEIGHBOURS = 27


def fsq_vectors(codes: torch.Tensor, levels: tuple[int, ...]) -> torch.Tensor:
    """Vectors (..., D) float32 in [-1, 1] of codes (...) in [0, K), the first dimension varying fastest.

    A dimension of L levels takes the values (level - L // 2) / (L // 2): an even number of levels ends below 1.
    """
    basis = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], device=codes.device)
    sizes = torch.tensor(levels, device=codes.device)
    return (codes[..., None] // basis % sizes - sizes // 2) / (sizes // 2).float()


class FsqVae(nn.Module):
    """Frames (B, 4 (T-1) + 1, 8 H, 8 W, 3), RGB in [0, 1] <-> codes (B, T, H, W) in [0, K).

    Args:
        levels: levels of each FSQ dimension; K is their product.
        components: how many principal components a token has.
        hidden: size of the decoder's hidden layers.
    """

    mean: torch.Tensor  # (PIXELS,) of the tokens in the training data
    basis: torch.Tensor  # (components, PIXELS) orthonormal rows
    spread: torch.Tensor  # (components,) their standard deviations

    def __init__(self, levels: tuple[int, ...], components: int = 128, hidden: int = 256):
        super().__init__()
        sizes = (*levels, components, hidden)
        if not levels or any(type(n) is not int for n in sizes) or min(*levels, 99) < 2 or min(sizes) < 1:
            raise DimoError(
                "an FsqVae needs FSQ levels from 2 on, and positive whole numbers of components and hidden, got "
                f"levels={levels}, components={components} and hidden={hidden}"
            )
        self.levels, self.components, self.hidden = tuple(levels), components, hidden
        self.register_buffer("mean", torch.zeros(PIXELS))
        self.register_buffer("basis", torch.eye(components, PIXELS))
        self.register_buffer("spread", torch.ones(components))
        self.encoder = nn.Sequential(nn.Linear(components, hidden // 2), nn.GELU(), nn.Linear(hidden // 2, len(levels)))
        self.decoder = nn.Sequential(
            nn.Linear(NEIGHBOURS * (sum(levels) + 1), hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, components),
        )  # fmt: skip

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Codes (B, T, H, W) int64 of frames (B, F, height, width, 3).

        Raises:
            DimoError: F is not 4 (T-1) + 1, or height or width is not a multiple of 8.
        """
        require_shape("frames", frames, ("B", "F", "height", "width", 3))
        count, (height, width) = frames.shape[1], frames.shape[2:4]
        if count % TEMPORAL_STRIDE != 1 or height % SPATIAL_STRIDE or width % SPATIAL_STRIDE:
            raise DimoError(f"frames must be 4 (T-1) + 1 of 8 H x 8 W pixels, got {count} of {height}x{width}")
        sizes = torch.tensor(self.levels, device=frames.device)
        basis = torch.tensor([math.prod(self.levels[:i]) for i in range(len(self.levels))], device=frames.device)
        level = (self.quantise(self.encoder(self.analyse(frames))) * (sizes // 2)).round().long()
        return ((level + sizes // 2) * basis).sum(-1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Frames (B, 4 (T-1) + 1, 8 H, 8 W, 3) in [0, 1] of codes (B, T, H, W)."""
        require_shape("codes", codes, ("B", "T", "H", "W"))
        require_ids("codes", codes, self.codebook_size)
        drawn = self.decoder(neighbourhoods(self.features(fsq_vectors(codes, self.levels))))
        tokens = (drawn * self.spread) @ self.basis + self.mean
        return unpatched(tokens)[:, TEMPORAL_STRIDE - 1 :].clamp(0, 1)

    def analyse(self, frames: torch.Tensor) -> torch.Tensor:
        """Principal components (B, T, H, W, components) of frames (B, 4 (T-1) + 1, 8 H, 8 W, 3), of about unit size."""
        return (patches(still_start(frames)) - self.mean) @ self.basis.T / self.spread

    def quantise(self, z: torch.Tensor) -> torch.Tensor:
        """The nearest FSQ vectors of z (..., D), bounded by tanh; the gradient passes the rounding unchanged."""
        sizes = torch.tensor(self.levels, device=z.device)
        half, offset = (sizes - 1) * 1.001 / 2, (sizes % 2 == 0) / 2
        bounded = (z + (offset / half).atanh()).tanh() * half - offset
        return (bounded + (bounded.round() - bounded).detach()) / (sizes // 2)

    def features(self, vectors: torch.Tensor, inside: torch.Tensor | None = None) -> torch.Tensor:
        """What the decoder sees of FSQ vectors (B, T, H, W, D): (B, T + 2, H + 2, W + 2, E), in a border of zeros.

        Of a dimension of L levels it sees L - 1 waves, which tell levels apart as well as a one-hot vector would,
        and the level itself. A one at the end tells tokens from the border: E = sum of L + 1. A wave's gradient is the
        central difference of the levels beside, since its slope between levels means nothing where it is fast.

        Args:
            inside: (B, T, H, W, 1), 0 for tokens that count as border; default: none does.
        """
        waves = []
        for d, count in enumerate(self.levels):
            step = 2 * math.pi / count  # between levels
            angle = vectors[..., d] * (count // 2) * step
            for k in range(1, count // 2 + 1):
                passed = math.sin(k * step) / (k * step)
                turned = k * (angle.detach() + passed * (angle - angle.detach()))
                waves.append(turned.cos())
                if 2 * k < count:
                    waves.append(turned.sin())
        inside = torch.ones_like(vectors[..., :1]) if inside is None else inside
        seen = torch.cat([torch.stack(waves, -1) * inside, vectors * inside, inside], -1)
        return F.pad(seen, (0, 0, 1, 1, 1, 1, 1, 1))

    def save(self, folder: Path) -> None:
        """Write config.json and the weights, in float16."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: value.half().cpu().contiguous() for key, value in self.state_dict().items()}
        save_file(state, folder / f"{WEIGHTS}.safetensors")
        config = {"_class_name": "FsqVae", "temporal_stride": TEMPORAL_STRIDE, "spatial_stride": SPATIAL_STRIDE}
        config |= {"num_vq_embeddings": self.codebook_size, "levels": list(self.levels)}
        config |= {"components": self.components, "hidden": self.hidden}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> FsqVae:
        """Read what `save` wrote, in float32.

        Raises:
            DimoError: a file is missing or damaged, or the weights do not fit config.json.
        """
        config = read_json(folder / "config.json")
        levels: Any = config.get("levels")
        sizes: list[Any] = [config.get(name) for name in ("components", "hidden")]
        if not isinstance(levels, list):
            raise DimoError(f"{folder / 'config.json'} must list the FSQ levels, got levels={levels!r}")
        vae = cls(tuple(levels), *sizes)
        load_weights(vae, read_weights(folder), where=str(folder))
        return vae.float().eval().requires_grad_(False)


def still_start(frames: torch.Tensor) -> torch.Tensor:
    """Frames (B, 4 (T-1) + 1, ...) with the first one four times: (B, 4 T, ...)."""
    return torch.cat([frames[:, :1].expand(-1, TEMPORAL_STRIDE - 1, -1, -1, -1), frames], 1)


def patches(frames: torch.Tensor) -> torch.Tensor:
    """Frames (B, 4 T, 8 H, 8 W, 3) -> the numbers of every token, (B, T, H, W, PIXELS)."""
    s = SPATIAL_STRIDE
    cut = frames.unflatten(3, (-1, s)).unflatten(2, (-1, s)).unflatten(1, (-1, TEMPORAL_STRIDE))
    return cut.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


def unpatched(tokens: torch.Tensor) -> torch.Tensor:
    """The inverse of `patches`."""
    cut = tokens.unflatten(4, (TEMPORAL_STRIDE, SPATIAL_STRIDE, SPATIAL_STRIDE, 3))
    return cut.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def neighbourhoods(vectors: torch.Tensor) -> torch.Tensor:
    """Each token's and its 26 neighbours' vectors: (B, T + 2, H + 2, W + 2, D) -> (B, T, H, W, 27 D)."""
    return vectors.unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
