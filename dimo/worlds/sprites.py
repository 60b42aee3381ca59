"""The sprites world: an emoji that moves, bounces, turns or zooms over a texture, of URSA's grid 5x16x16.

The prompt says which emoji, which motion and how strong, and over what ("a red car moving left over sand, motion=4.0").
Free are the place where the sprite starts and by how much the texture is shifted, all uniform. Tokens come from a
tokenizer that was trained on such clips (`dimo.ursa.fsq_vae`): data are drawn as frames and encoded.

Many tokens of a clip may be wrong by a level without being seen, so it is not compared token by token. The oracle
decodes, and an independent reader (`dimo.worlds.sprite_reader`) says what it sees and how sure it is.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import ClassVar

import torch

from dimo.errors import DimoError
from dimo.ursa.fsq_vae import FsqVae
from dimo.worlds.fsq import fsq_codebook
from dimo.worlds.protocol import Scores, require_whole_sizes, size_field
from dimo.worlds.sprite_frames import MOTIONS, PHASES, PICTURES, SPRITES, STRENGTHS, TEXTURES, render, starts
from dimo.worlds.sprite_reader import read

CONFIDENT = 0.6  # `scripts/sprites.py gate` says how sure the reader is of real clips
QUARTERS = 4  # of the rows and columns where a sprite may start: the bins of coverage
AT_ONCE = {"cpu": 8, "cuda": 128}  # clips drawn together


@dataclasses.dataclass(frozen=True)
class SpritesWorld:
    """Emoji that move over textures, 17 frames of 128x128 pixels."""

    name: ClassVar[str] = "sprites"

    sprites: int = size_field(len(SPRITES), "how many of the emoji")
    textures: int = size_field(len(TEXTURES), "how many of the textures")

    def __post_init__(self):
        require_whole_sizes(self)
        if not 1 <= self.sprites <= len(SPRITES) or not 1 <= self.textures <= len(TEXTURES):
            raise DimoError(
                f"the sprites world has 1 to {len(SPRITES)} sprites and 1 to {len(TEXTURES)} textures, got "
                f"sprites={self.sprites} and textures={self.textures}"
            )

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        return 5, 16, 16

    @property
    def codebook_size(self) -> int:
        return self.decoder().codebook_size

    @functools.cached_property
    def prompts(self) -> list[str]:
        """All prompts, in the order of `attributes`; the texture varies fastest."""
        every = itertools.product(list(SPRITES)[: self.sprites], MOTIONS, STRENGTHS, TEXTURES[: self.textures])
        return [
            f"{'an' if sprite[0] in 'aeiou' else 'a'} {sprite} {motion} over {texture}, motion={strength:.1f}"
            for sprite, motion, strength, texture in every
        ]

    def attributes(self, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Indices (B,) of sprite, motion, strength and texture of the prompts with indices (B,)."""
        strengths = len(STRENGTHS) * self.textures
        return (
            prompt // (len(MOTIONS) * strengths), prompt // strengths % len(MOTIONS),
            prompt // self.textures % len(STRENGTHS), prompt % self.textures,
        )  # fmt: skip

    def prompt_of(self, sprite, motion, strength, texture) -> torch.Tensor:
        """The inverse of `attributes`."""
        return ((sprite * len(MOTIONS) + motion) * len(STRENGTHS) + strength) * self.textures + texture

    @functools.cached_property
    def held_out(self) -> list[str]:
        """One prompt of every sprite, which `draw` never gives; motions, strengths and textures take turns."""
        i = torch.arange(self.sprites)
        index = self.prompt_of(i, i * 5 % len(MOTIONS), i // 9 % len(STRENGTHS), (3 * i + i // 8) % self.textures)
        return [self.prompts[j] for j in index.tolist()]

    @functools.cached_property
    def _drawn(self) -> torch.Tensor:
        """Indices of the prompts that are not held out."""
        held_out = set(self.held_out)
        return torch.tensor([i for i, prompt in enumerate(self.prompts) if prompt not in held_out])

    def choose(self, size: int, generator: torch.Generator, prompt: torch.Tensor | None = None):
        """Prompt indices (size,), drawn unless given, and what `render` needs for a clip of each, all uniform."""
        device = generator.device

        def pick(n):
            return (torch.rand(size, generator=generator, device=device, dtype=torch.float64) * n).long()

        if prompt is None:
            prompt = self._drawn.to(device)[pick(len(self._drawn))]
        sprite, motion, strength, texture = self.attributes(prompt)
        rows, columns = starts().to(device)[motion, strength, :, 1].unbind(-1)
        return prompt, (sprite, motion, strength, pick(rows), pick(columns), texture, pick(PHASES))

    def draw(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of the data on the generator's device: prompt indices (size,) and codes (size, N)."""
        prompt, choice = self.choose(size, generator)
        return prompt, self.encode(choice)

    def encode(self, choice: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Codes (B, N) of the clips that `render` draws of the choice."""
        vae = _vae(str(choice[0].device))
        parts = zip(*(part.split(AT_ONCE[choice[0].device.type]) for part in choice))
        return torch.cat([vae.encode(render(*part)).flatten(1) for part in parts])

    def score(self, codes: torch.Tensor, prompt: torch.Tensor) -> Scores:
        """Codes (B, N) against the prompts of index (B,), by what the reader sees in their frames.

        A clip is valid if the reader is sure of at least CONFIDENT, and adherent if it reads its own prompt. `accuracy`
        is the share of tokens that it has in common with the clip that was read, encoded. Pictures are read on a GPU
        where there is one.
        """
        if torch.cuda.is_available():
            codes, prompt = codes.to("cuda"), prompt.to("cuda")
        frames = _vae(str(codes.device)).decode(codes.view(-1, *self.latents_shape))
        seen = read(frames, self.sprites, self.textures)
        same = (self.encode(seen.choice()) == codes).float().mean(1)
        counts = starts().to(codes.device)[seen.motion, seen.strength, :, 1]
        nearest = self.prompt_of(seen.sprite, seen.motion, seen.strength, seen.texture)
        free = {
            "rows": (seen.row * QUARTERS // counts[:, 0], QUARTERS),
            "columns": (seen.column * QUARTERS // counts[:, 1], QUARTERS),
            "phases": (seen.phase, PHASES),
        }
        return Scores(same, seen.confidence >= CONFIDENT, nearest == prompt, nearest, free)

    def codebook(self) -> torch.Tensor:
        """(K, D + 1) unit vectors: the FSQ vectors, halved, and what they lack to length 1.

        On the sphere itself, multiples of an FSQ vector would be one point, and the path could not tell them apart.
        """
        vectors = fsq_codebook(self.decoder().levels)
        vectors = vectors / math.sqrt(vectors.shape[1])
        return torch.cat([vectors, (1 - vectors.square().sum(1, keepdim=True)).clamp(min=0).sqrt()], 1)

    def decoder(self) -> FsqVae:
        return _vae("cpu")


@functools.cache
def _vae(device: str) -> FsqVae:
    return FsqVae.load(PICTURES / "vae").to(device)
