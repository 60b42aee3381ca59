"""The tiles world: textured videos from 48 tokens to URSA's size, over FSQ codebooks up to URSA's.

The grid is cut into 4x4 blocks. An object of 2x2 blocks moves by one block per latent frame, on a torus, and object and
background each show a texture. The prompt fixes subject, texture and direction ("harbour stripes moving right"). Free
are four choices, which noise hides one after the other:

- the palette: which hue the object has and which the background. Hues are far apart in the codebook and every token
  tells of them, so this is known nearest to the noise;
- the place where the object starts, of 16;
- a phase of the object's texture and one of the background's. A texture is a lattice of a few shades, codes that differ
  in one FSQ level, so the phases are known last, and the object's, of a quarter of the tokens, last of all.

With `strays`, that share of the videos comes with any prompt and is valid for none: the object has a hue of the other
subject. So a teacher, exact or trained, makes strays at that rate, unless it is guided: they are as likely under the
empty prompt as under any other, and guidance divides them away.

A prompt has M = palettes x 16 x shades^2 videos. A sum over the tokens of a video, of whatever depends on position and
code, is taken for all of them at once (`TilesWorld.totals`): over blocks first, once per hue and phase, then over the
blocks of each object. Matches with given codes make it the oracle, log-likelihoods the exact teacher
(`dimo.worlds.exact`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import ClassVar

import torch
from torch.nn import functional as F

from dimo.errors import DimoError, require_shape
from dimo.ursa.palette import PaletteDecoder
from dimo.worlds.fsq import LEVELS, fsq_codebook
from dimo.worlds.protocol import Scores, require_whole_sizes, size_field

SUBJECTS = ("meadow", "harbour")  # each has palettes of its own
TEXTURES = {"stripes": (0, 1), "checks": (1, 1)}  # shades to go on per row and per column
DIRECTIONS = {"right": (0, 1), "down": (1, 0)}  # blocks per latent frame (y, x)
BLOCKS = 4  # along each axis
PLACES = BLOCKS**2
SIZES = {  # latents_shape by the number of tokens
    48: (3, 4, 4),
    208: (13, 4, 4),
    320: (5, 8, 8),
    1_280: (5, 16, 16),
    5_120: (5, 32, 32),
    33_280: (13, 40, 64),
}
MOST_STRAYS = 90
MOST_VIDEOS = 4096  # per prompt: the exact posterior has a number for each, per sample


@dataclasses.dataclass(frozen=True)
class TilesWorld:
    """Textured objects that move over a textured background, of any size."""

    name: ClassVar[str] = "tiles"

    frames: int = size_field(3, "latent frames of a video")
    height: int = size_field(4, "tokens, a multiple of 4")
    width: int = size_field(4, "tokens, a multiple of 4")
    codes: int = size_field(256, f"codes of the codebook: {', '.join(map(str, LEVELS))}")
    palettes: int = size_field(2, "palettes of every subject, one per video")
    shades: int = size_field(2, "shades of a texture, and so its phases")
    strays: int = size_field(
        0, f"percent of the videos that fit no prompt, at most {MOST_STRAYS}: guidance removes them"
    )

    def __post_init__(self):
        require_whole_sizes(self)
        if self.frames < 2 or min(self.height, self.width) < BLOCKS or self.height % BLOCKS or self.width % BLOCKS:
            raise DimoError(
                "the tiles world needs at least 2 frames, and a height and a width that are multiples of 4, got "
                f"{self.frames}x{self.height}x{self.width}"
            )
        if self.codes not in LEVELS:
            raise DimoError(f"codes must be one of {', '.join(map(str, LEVELS))}, got {self.codes}")
        if self.palettes < 2 or not 2 <= self.shades <= LEVELS[self.codes][0]:
            raise DimoError(
                f"{self.codes} codes allow 2 to {LEVELS[self.codes][0]} shades, and there must be 2 palettes or more; "
                f"got shades={self.shades} and palettes={self.palettes}"
            )
        if not 0 <= self.strays <= MOST_STRAYS:
            raise DimoError(f"strays must lie in [0, {MOST_STRAYS}], in percent, got {self.strays}")
        if self.videos_per_prompt > MOST_VIDEOS:
            raise DimoError(
                f"palettes={self.palettes} and shades={self.shades} make {self.videos_per_prompt} videos per prompt "
                f"(palettes x {PLACES} x shades^2), more than the {MOST_VIDEOS} that an exact posterior may list"
            )
        _ = self.used_codes  # raises where there are too few hues

    @classmethod
    def of_size(cls, num_visual_tokens: int, **sizes: int) -> TilesWorld:
        """The world of 48, 208, 320, 1,280, 5,120 or 33,280 tokens; `sizes` are its other fields."""
        if num_visual_tokens not in SIZES:
            known = ", ".join(map(str, SIZES))
            raise DimoError(f"num_visual_tokens must be one of {known}, got {num_visual_tokens}; else give the shape")
        frames, height, width = SIZES[num_visual_tokens]
        return cls(frames, height, width, **sizes)

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def num_visual_tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def codebook_size(self) -> int:
        return self.codes

    @property
    def videos_per_prompt(self) -> int:
        return self.palettes * PLACES * self.shades**2

    @functools.cached_property
    def prompts(self) -> list[str]:
        """Every prompt, the direction varying fastest."""
        triples = itertools.product(SUBJECTS, TEXTURES, DIRECTIONS)
        return [f"{subject} {texture} moving {direction}" for subject, texture, direction in triples]

    def codebook(self) -> torch.Tensor:
        """(K, D) FSQ vectors in [-1, 1]; `MetricPath` puts them on the unit sphere."""
        return fsq_codebook(LEVELS[self.codes])

    @functools.cached_property
    def used_codes(self) -> torch.Tensor:
        """(C,) the codes that videos use, all different on the unit sphere: a row of shades for each hue.

        Hues go subject by subject, palette by palette, the background's before the object's. A hue is what all FSQ
        levels but the first say, its shades are neighbouring values of the first.
        """
        first = (LEVELS[self.codes][0] - self.shades) // 2
        rows = torch.arange(self.codes).view(-1, LEVELS[self.codes][0])[:, first : first + self.shades]
        sphere = F.normalize(self.codebook().double(), dim=-1)
        points = sphere[rows]  # (hues there are, shades, D)
        rows = rows[(points.diff(dim=1).square().sum(-1) > 1e-9).all(1)]  # else its shades are one point
        hues, found = len(SUBJECTS) * self.palettes * 2, _far_apart(sphere[rows[:, self.shades // 2]])
        used = rows[list(itertools.islice(found, hues))].flatten()
        if len(used) < hues * self.shades or torch.pdist(sphere[used]).min() < 1e-4:
            raise DimoError(f"{self.codes} codes have fewer hues than the {hues} of {self.palettes} palettes a subject")
        return used

    @functools.cached_property
    def masks(self) -> torch.Tensor:
        """(directions, places, T, 4, 4) bool: the blocks where the object is."""
        masks = torch.zeros(len(DIRECTIONS), PLACES, self.frames, BLOCKS, BLOCKS, dtype=torch.bool)
        for d, (dy, dx) in enumerate(DIRECTIONS.values()):
            for place, f, y, x in itertools.product(range(PLACES), range(self.frames), range(2), range(2)):
                at = (place // BLOCKS + y + f * dy) % BLOCKS, (place % BLOCKS + x + f * dx) % BLOCKS
                masks[d, place, f, at[0], at[1]] = True
        return masks

    @functools.cached_property
    def lattices(self) -> torch.Tensor:
        """(textures, N) int64: the shade of every position at phase 0, in [0, shades)."""
        y, x = torch.arange(self.height)[:, None], torch.arange(self.width)
        return torch.stack(
            [((dy * y + dx * x) % self.shades).flatten().repeat(self.frames) for dy, dx in TEXTURES.values()]
        )

    def render(self, prompt, palette, place, object_phase, background_phase, stray=None) -> torch.Tensor:
        """Valid videos: indices, each (B,) -> codes (B, N); where `stray` (B,), with the other subject's object."""
        device, directions, textures = prompt.device, len(DIRECTIONS), len(TEXTURES)
        inside = self.masks.to(device)[prompt % directions, place]
        inside = inside.repeat_interleave(self.height // BLOCKS, 2).repeat_interleave(self.width // BLOCKS, 3)
        inside = inside.flatten(1)
        phase = torch.where(inside, object_phase[:, None], background_phase[:, None])
        shade = (self.lattices.to(device)[prompt // directions % textures] + phase) % self.shades
        subject = (prompt // (directions * textures))[:, None]
        if stray is not None:
            subject = (subject + (inside & stray[:, None])) % len(SUBJECTS)
        hue = 2 * (subject * self.palettes + palette[:, None]) + inside
        return self.used_codes.to(device)[hue * self.shades + shade]

    def draw(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of the data, all uniform, on the generator's device: prompt indices (B,) and codes (B, N)."""
        sizes = len(self.prompts), self.palettes, PLACES, self.shades, self.shades
        picks = [torch.randint(n, (size,), generator=generator, device=generator.device) for n in sizes]
        if not self.strays:
            return picks[0], self.render(*picks)
        stray = torch.rand(size, generator=generator, device=generator.device) < self.strays / 100
        other = torch.randint(len(self.prompts), (size,), generator=generator, device=generator.device)
        shown = torch.where(stray, other, picks[0])
        return picks[0], self.render(shown, picks[1], picks[2], picks[3], picks[4], stray)

    def totals(self, values: torch.Tensor, strays: bool = False) -> torch.Tensor:
        """The sum over the tokens of every valid video of what `values` says of its code there.

        Args:
            values: (B, N, C), of every position and used code.
            strays: of the same videos with the other subject's object.

        Returns:
            (B, prompts, M), in values' dtype; videos go palette by palette, place by place, the object's phase by the
            object's phase, the background's phase varying fastest.
        """
        (t, h, w), s, n = self.latents_shape, self.shades, self.num_visual_tokens
        require_shape("values", values, ("B", n, len(self.used_codes)))
        textures, directions, batch = len(TEXTURES), len(DIRECTIONS), len(values)
        shade, masks = _tables(self, values.device, values.dtype)
        values = values.unflatten(-1, (-1, s))  # (B, N, hues, shades)
        shade = shade[None, :, None].expand(batch, n, values.shape[2], -1)
        tokens = values.gather(-1, shade).view(batch, t, BLOCKS, h // BLOCKS, BLOCKS, w // BLOCKS, -1)
        blocks = tokens.sum((3, 5)).flatten(1, 3)  # (B, T * 16, hues * textures * phases)
        inside, outside = masks @ blocks, (1 - masks) @ blocks  # no difference of the two, which would cancel digits
        roles = (batch, directions, PLACES, len(SUBJECTS), self.palettes, 2, textures, s)
        background, objects = outside.view(roles)[:, :, :, :, :, 0], inside.view(roles)[:, :, :, :, :, 1]
        objects = objects.roll(1, 3) if strays else objects
        both = objects[..., :, None] + background[..., None, :]  # (B, directions, places, subjects, palettes, ...)
        return both.permute(0, 3, 5, 1, 4, 2, 6, 7).reshape(batch, len(self.prompts), self.videos_per_prompt)

    def log_evidence(self, values: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """log p(x_t | prompts), up to a constant: (B,). Strays count, with their own weight.

        Args:
            values: (B, N, C), log-likelihoods of x_t for every position and used code.
            prompts: (B, prompts) bool, those whose videos count.
        """
        videos = self.totals(values).masked_fill(~prompts[:, :, None], -torch.inf).flatten(1)
        if not self.strays:
            return videos.logsumexp(-1)
        share, strays = self.strays / 100, self.totals(values, strays=True).flatten(1)
        videos = videos + math.log(1 - share) - prompts.sum(1, keepdim=True).log()
        return torch.cat([videos, strays + math.log(share / prompts.shape[1])], 1).logsumexp(-1)

    def score(self, codes: torch.Tensor, prompt: torch.Tensor) -> Scores:
        """Codes (B, N) against the prompts of index (B,): the valid video with most tokens in common."""
        used = self.used_codes.to(codes.device)
        matches = self.totals((codes[..., None] == used).float())  # whole numbers, exact
        best, where = matches.flatten(1).max(-1)
        own = matches[torch.arange(len(codes), device=codes.device), prompt].amax(-1)
        m, s, n = self.videos_per_prompt, self.shades, self.num_visual_tokens
        free = {
            "palettes": (where % m // (PLACES * s * s), self.palettes),
            "places": (where // (s * s) % PLACES, PLACES),
            "object_phases": (where // s % s, s),
            "background_phases": (where % s, s),
        }
        return Scores(best / n, best == n, own == best, where // m, free)

    def decoder(self) -> PaletteDecoder:
        """Three of the levels behind a hue are red, green and blue; the first level, the shade, darkens them."""
        vectors = self.codebook()
        light = 0.7 + 0.3 * vectors[:, :1]
        return PaletteDecoder(light * (vectors[:, 1:4] + 1) / 2)


@functools.lru_cache(maxsize=16)
def _tables(world: TilesWorld, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `totals`, kept on the device: shades (N, textures * phases) and masks (directions * places, T * 16)."""
    shade = (world.lattices.T[..., None] + torch.arange(world.shades)) % world.shades
    return shade.flatten(1).to(device), world.masks.view(len(DIRECTIONS) * PLACES, -1).to(device, dtype)


def _far_apart(points: torch.Tensor):
    """Indices of points (n, D), the first, then always the one farthest from all before; each different point once.

    Distances are rounded, so that ties go to the first on every machine.
    """
    index, distance = 0, torch.full((len(points),), math.inf, dtype=points.dtype)
    while distance.max() > 0:
        yield index
        distance = torch.minimum(distance, (points - points[index]).square().sum(-1).round(decimals=6))
        index = int((distance == distance.max()).nonzero()[0])
