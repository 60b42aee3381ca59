"""What a world is: a source of videos about which everything is known, so that a sampler can be scored exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from dimo.errors import DimoError, nearest


@dataclasses.dataclass
class Scores:
    """What a world says of B videos. Tensors are (B,).

    Attributes:
        accuracy: share of tokens equal to the nearest valid video's, of any prompt.
        valid: whether the video is exactly a valid video, of any prompt.
        adherent: whether no valid video of another prompt is nearer than the nearest one of the own prompt.
        prompt: index in `World.prompts` of the nearest valid video's prompt.
        free: what a prompt leaves open, by name: (labels (B,) in [0, bins), bins). Labels are those of the nearest
            valid video, drawn uniformly in the data; coverage is measured on them. A bin stands for many videos where
            there are more of those than could be sampled.
    """

    accuracy: torch.Tensor
    valid: torch.Tensor
    adherent: torch.Tensor
    prompt: torch.Tensor
    free: dict[str, tuple[torch.Tensor, int]]


class Decoder(Protocol):
    """What makes frames of codes, kept in a checkpoint's vae/; `dimo.ursa.loading.load_vae` must know its class."""

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (B, T, H, W) -> frames (B, 4 (T-1) + 1, 8 H, 8 W, 3), RGB in [0, 1]."""

    def save(self, folder: Path) -> None:
        """Write config.json, with `_class_name`, and the weights."""


class World(Protocol):
    """Videos of N = T x H x W tokens over K codes, each the answer to a prompt.

    A world is a frozen dataclass. Its fields are its sizes: numbers with defaults, and a `help` in their metadata.
    world.json keeps them in a checkpoint folder, `dimo world train NAME` has a flag for each, and so none may be called
    as a field of `TeacherRecipe`. Nothing asks for all valid videos at once: a world may have more than fit in memory.

    Attributes:
        name: its key in `dimo.worlds.registry.WORLDS`.
    """

    name: ClassVar[str]

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """(T, H, W) of every video. With URSA's strides, frames are 4 (T-1) + 1 of 8 H x 8 W pixels."""

    @property
    def codebook_size(self) -> int:
        """K."""

    @property
    def prompts(self) -> list[str]:
        """Every prompt, all different: words with spaces between."""

    def codebook(self) -> torch.Tensor:
        """(K, D) float32 embeddings for the metric path: noise confuses codes that are near before those that are far.

        The path measures squared Euclidean distance, so unit vectors are at most 4 apart.
        """

    def draw(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of the data, on the generator's device: indices in `prompts` (size,) and codes (size, N), int64."""

    def score(self, codes: torch.Tensor, prompt: torch.Tensor) -> Scores:
        """Codes (B, N) in [0, K) that were asked for by the prompts of index (B,), on any device, exactly.

        `dimo.worlds.oracle.score` calls it, with checked codes and few videos at a time.
        """

    def decoder(self) -> Decoder | None:
        """What makes frames of its codes, such as a `PaletteDecoder`; None: there are codes, and no pictures."""


def prompt_index(world: World, prompts: list[str]) -> torch.Tensor:
    """(B,) indices in `world.prompts`.

    Raises:
        DimoError: a prompt that this world does not know.
    """
    known = {prompt: i for i, prompt in enumerate(world.prompts)}
    for prompt in prompts:
        if prompt not in known:
            hint = nearest(prompt, known)
            hint = hint if "did you mean" in hint else f"; prompts read like {world.prompts[0]!r}"
            raise DimoError(f"the {world.name} world does not know the prompt {prompt!r}{hint}")
    return torch.tensor([known[prompt] for prompt in prompts], dtype=torch.long)


def prompt_length(world: World) -> int:
    """Words of its longest prompt, each of which is one text token."""
    return max(len(prompt.split()) for prompt in world.prompts)
