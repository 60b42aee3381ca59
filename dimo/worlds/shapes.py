"""The shapes world: a coloured shape moves one cell per latent frame in the prompted direction, on a torus.

The prompt fixes colour, shape and direction ("red square moving right"). It leaves open the start cell and two shades,
one of the object and one of the background, which are constant over the video. Tokens therefore depend on each other
across the whole video while the marginal of every token is broad, so sampling tokens independently, as one pass of the
teacher does, almost never gives a valid video. This is the gap that distillation has to close.

The nearest valid video is found exactly without enumerating all valid videos: for each mask of the object (shape x
direction x start cell), the best object code and the best background code are independent of each other, so it is
enough to count the codes inside and outside the mask.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import ClassVar

import torch
from torch.nn import functional as F

from dimo.errors import DimoError
from dimo.ursa.palette import PaletteDecoder
from dimo.worlds.protocol import Scores, require_whole_sizes, size_field

# Cells (y, x) of each shape relative to its anchor, and the step (y, x) of each direction.
SHAPES = {
    "square": ((0, 0), (0, 1), (1, 0), (1, 1)),
    "corner": ((0, 0), (1, 0), (1, 1)),
    "bar": ((0, 0), (0, 1), (0, 2)),
}
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
# Okabe and Ito's colour-blind-safe hues, RGB
COLOURS = {
    "orange": (0.90, 0.62, 0.00),
    "blue": (0.00, 0.45, 0.70),
    "green": (0.00, 0.62, 0.45),
    "pink": (0.80, 0.47, 0.65),
}
SHADE_SPREAD = 0.8  # extent of the codebook's shade axis; shades of one colour are nearer than other colours


@dataclasses.dataclass(frozen=True)
class ShapesWorld:
    """Coloured shapes that move over a background; the defaults are the sizes of the built-in world.

    Codes are ordered: the shades of the background, then those of each colour.
    """

    name: ClassVar[str] = "shapes"

    frames: int = size_field(3, "latent frames of a video")
    height: int = size_field(4, "cells")
    width: int = size_field(4, "cells")
    object_shades: int = size_field(2, "number of shades of each colour; a video shows one")
    background_shades: int = size_field(2, "number of shades of the background; a video shows one")

    def __post_init__(self):
        require_whole_sizes(self)
        if self.frames < 2 or self.height < 4 or self.width < 4:
            raise DimoError(
                "the shapes world needs at least 2 frames of 4x4 cells (a smaller torus makes shapes ambiguous), "
                f"got {self.frames}x{self.height}x{self.width}"
            )
        if self.object_shades < 1 or self.background_shades < 1:
            raise DimoError("object_shades and background_shades must be at least 1")

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def num_visual_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def codebook_size(self) -> int:
        return self.background_shades + len(COLOURS) * self.object_shades

    @property
    def num_positions(self) -> int:
        return self.height * self.width

    @functools.cached_property
    def prompts(self) -> list[str]:
        """All prompts, in the order of `attributes`."""
        triples = itertools.product(COLOURS, SHAPES, DIRECTIONS)
        return [f"{colour} {shape} moving {direction}" for colour, shape, direction in triples]

    def attributes(self, prompt: torch.Tensor) -> torch.Tensor:
        """Indices (B, 3) of colour, shape and direction of the prompts with indices (B,)."""
        motions, shapes = len(DIRECTIONS), len(SHAPES)
        return torch.stack([prompt // (motions * shapes), prompt // motions % shapes, prompt % motions], 1)

    @functools.cached_property
    def masks(self) -> torch.Tensor:
        """(shapes, directions, positions, N) bool: the tokens that the object covers."""
        masks = torch.zeros(len(SHAPES), len(DIRECTIONS), self.num_positions, *self.latents_shape, dtype=torch.bool)
        for (s, cells), (d, (dy, dx)) in itertools.product(enumerate(SHAPES.values()), enumerate(DIRECTIONS.values())):
            for (y0, x0), f, (y, x) in itertools.product(
                itertools.product(range(self.height), range(self.width)), range(self.frames), cells
            ):
                at = (y0 + y + f * dy) % self.height, (x0 + x + f * dx) % self.width
                masks[s, d, y0 * self.width + x0, f, at[0], at[1]] = True
        return masks.flatten(3)

    def render(self, attributes, position, object_shade, background_shade) -> torch.Tensor:
        """Codes (B, N) of valid videos, from attributes (B, 3) and start cells and shades, each (B,)."""
        mask = self.masks.to(attributes.device)[attributes[:, 1], attributes[:, 2], position]
        code = self.background_shades + attributes[:, 0] * self.object_shades + object_shade
        return torch.where(mask, code[:, None], background_shade[:, None])

    def draw(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a batch, uniform over prompts, start cells and shades: prompt indices (size,) and codes (size, N)."""

        def pick(n):
            return torch.randint(n, (size,), generator=generator, device=generator.device)

        prompt = pick(len(self.prompts))
        shades = pick(self.object_shades), pick(self.background_shades)
        return prompt, self.render(self.attributes(prompt), pick(self.num_positions), *shades)

    def score(self, codes: torch.Tensor, prompt: torch.Tensor) -> Scores:
        """Score codes (B, N) against the prompts with indices (B,); the free factors are positions and shades."""
        attributes = self.attributes(prompt)
        shapes, directions, positions, n = self.masks.shape
        onehot = F.one_hot(codes, self.codebook_size).float()
        masks = self.masks.to(codes.device).view(-1, n).float()
        inside = torch.einsum("bnk,mn->bmk", onehot, masks)
        background, b_shade = (onehot.sum(1)[:, None] - inside)[..., : self.background_shades].max(-1)
        colours = inside[..., self.background_shades :].unflatten(-1, (len(COLOURS), self.object_shades))
        objects, o_shade = colours.max(-1)
        matches = (objects + background[..., None]).view(-1, shapes, directions, positions, len(COLOURS))
        best, where = matches.flatten(1).max(-1)
        row = torch.arange(len(codes), device=codes.device)
        own = matches[row, attributes[:, 1], attributes[:, 2], :, attributes[:, 0]].max(-1).values
        place, colour = where // len(COLOURS), where % len(COLOURS)
        shade = o_shade[row, place, colour] * self.background_shades + b_shade[row, place]
        free = {
            "positions": (place % positions, positions),
            "shades": (shade, self.object_shades * self.background_shades),
        }
        nearest = colour * shapes * directions + place // positions
        return Scores(best / n, best == n, own == best, nearest, free)

    def codebook(self) -> torch.Tensor:
        """(K, 6) unit vectors: one axis for the background, one per colour, one for the shade.

        The squared distance is small between adjacent shades of a colour, larger between distant ones, and about 2 or
        more between colours. So the path reveals the colour first and the shade last.
        """

        def family(axis, shades):
            rows = torch.zeros(shades, len(COLOURS) + 2)
            rows[:, axis] = 1
            if shades > 1:
                rows[:, -1] = torch.linspace(-SHADE_SPREAD, SHADE_SPREAD, shades)
            return rows

        families = [family(0, self.background_shades)]
        families += [family(1 + c, self.object_shades) for c in range(len(COLOURS))]
        return torch.nn.functional.normalize(torch.cat(families), dim=-1)

    def decoder(self) -> PaletteDecoder:
        return PaletteDecoder(self.palette())

    def palette(self) -> torch.Tensor:
        """(K, 3) RGB in [0, 1]: grey backgrounds, colours from dark to light."""

        def ramp(rgb, shades, low, high):
            strength = torch.linspace(low, high, shades) if shades > 1 else torch.tensor([1.0])
            rgb = torch.tensor(rgb)
            # strength below 1 darkens, above 1 lightens
            dark, light = strength.clamp(max=1)[:, None], (strength - 1).clamp(min=0)[:, None]
            return rgb * dark * (1 - light) + light

        greys = torch.linspace(0.08, 0.42, self.background_shades)[:, None].expand(-1, 3)
        return torch.cat([greys] + [ramp(rgb, self.object_shades, 0.6, 1.55) for rgb in COLOURS.values()])
