"""The sprites world: an emoji on a card that moves, bounces, turns or zooms over a texture, of URSA's grid 5x16x16.

The prompt says which emoji, which motion and how strong, over what and when ("a red car moving left over sand at dusk,
motion=4.0"). Free are the place where the card starts and by how much the texture is shifted, all uniform. Every patch
of a clip is a code (`dimo.ursa.patch_vae`), so clips are drawn as codes.

With `strays`, that share of the clips is of another prompt than it comes with, as captions of videos may be wrong. So a
teacher, exact or trained, follows its prompt no more often than that, unless it is guided.

An emoji says nothing of the texture, and the texture nothing of the emoji, once it is known on which way the card is: a
card has no texture in it, its corners have no emoji. So sums over all clips, of which there are 12 million, are
taken for the emoji and for the texture separately (`SpritesWorld.sums`): the oracle compares with every clip, and the
exact teacher (`dimo.worlds.exact`) counts every one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch

from dimo.errors import DimoError, require_shape
from dimo.ursa.chunks import chunks
from dimo.ursa.patch_vae import PatchVae
from dimo.worlds.fsq import LEVELS, fsq_codebook
from dimo.worlds.protocol import Scores, require_whole_sizes, size_field
from dimo.worlds.sprite_frames import (
    BLOCK,
    CELLS,
    MOTIONS,
    PHASES,
    PICTURES,
    PLACES,
    POSES,
    SPRITES,
    STEPS,
    STRENGTHS,
    TEXTURES,
    TIMES,
    pieces,
    starts,
    ways,
)  # fmt: skip

FSQ = LEVELS[4_096]
KINDS = len(MOTIONS) * len(STRENGTHS)
QUARTERS = 4  # of the rows and columns where a card may start: the bins of coverage
MOST_STRAYS = 90
AT_ONCE = 8  # clips scored together
CPU = torch.device("cpu")

Look = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class SpritesWorld:
    """Emoji that move over textures, 17 frames of 128x128 pixels."""

    name: ClassVar[str] = "sprites"

    sprites: int = size_field(len(SPRITES), "how many of the emoji")
    textures: int = size_field(len(TEXTURES), "how many of the textures")
    strays: int = size_field(
        15, f"percent of the clips whose prompt is that of another, at most {MOST_STRAYS}: guidance removes them"
    )

    def __post_init__(self):
        require_whole_sizes(self)
        if not 1 <= self.sprites <= len(SPRITES) or not 1 <= self.textures <= len(TEXTURES):
            raise DimoError(
                f"the sprites world has 1 to {len(SPRITES)} sprites and 1 to {len(TEXTURES)} textures, got "
                f"sprites={self.sprites} and textures={self.textures}"
            )
        if not 0 <= self.strays <= MOST_STRAYS:
            raise DimoError(f"strays must lie in [0, {MOST_STRAYS}], in percent, got {self.strays}")

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        return STEPS, CELLS, CELLS

    @property
    def num_visual_tokens(self) -> int:
        return STEPS * CELLS * CELLS

    @property
    def codebook_size(self) -> int:
        return math.prod(FSQ)

    @property
    def backgrounds(self) -> int:
        return self.textures * len(TIMES)

    @functools.cached_property
    def prompts(self) -> list[str]:
        """All prompts, in the order of `attributes`; the time of day varies fastest."""
        every = itertools.product(list(SPRITES)[: self.sprites], MOTIONS, STRENGTHS, TEXTURES[: self.textures], TIMES)
        return [
            f"{'an' if sprite[0] in 'aeiou' else 'a'} {sprite} {motion} over {texture}{time}, motion={strength:.1f}"
            for sprite, motion, strength, texture, time in every
        ]

    def attributes(self, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Indices (B,) of prompts (B,): of the sprite, motion * strengths + strength, and texture * times + time."""
        behind = self.backgrounds
        return prompt // (KINDS * behind), prompt // behind % KINDS, prompt % behind

    @functools.cached_property
    def held_out(self) -> list[str]:
        """One prompt of every sprite, which `draw` never asks for; the other factors take turns."""
        i = torch.arange(self.sprites)
        index = (i * KINDS + i * 5 % KINDS) * self.backgrounds + (7 * i + i // 8) % self.backgrounds
        return [self.prompts[j] for j in index.tolist()]

    @functools.cached_property
    def used_codes(self) -> torch.Tensor:
        """(C,) the codes that clips of these sprites and textures use, ascending."""
        cards, corners, plain = _codes()
        behind = self.backgrounds
        return torch.cat([x.flatten() for x in (cards[: self.sprites], corners[:behind], plain[:behind])]).unique()[1:]

    def choose(self, size: int, generator: torch.Generator, prompt: torch.Tensor | None = None):
        """Prompt indices (size,), drawn unless given, and the (start's index, phase) of a clip of each, all uniform."""
        device = generator.device

        def pick(n):
            return (torch.rand(size, generator=generator, device=device, dtype=torch.float64) * n).long()

        if prompt is None:
            drawn = _drawn(self, device)
            prompt = drawn[pick(len(drawn))]
        counts = _ways(device).count[self.attributes(prompt)[1]]
        return prompt, pick(counts), pick(PHASES)

    def draw(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of the data on the generator's device: prompt indices (size,) and codes (size, N)."""
        prompt, device = self.choose(size, generator)[0], generator.device
        stray = torch.rand(size, generator=generator, device=device) < self.strays / 100
        other = torch.randint(len(self.prompts), (size,), generator=generator, device=device)
        return prompt, self.render(*self.choose(size, generator, torch.where(stray, other, prompt)))

    def render(self, prompt: torch.Tensor, start: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
        """Codes (B, N) of clips, from indices (B,) each; `start` counts rows by rows where the card may start."""
        device, size = prompt.device, len(prompt)
        cards, corners, plain = _codes(device)
        sprite, kind, behind = self.attributes(prompt)
        way = _ways(device)
        pose, place = way.pose[way.first[kind] + start], way.place[way.first[kind] + start]  # (B, STEPS)
        cell = torch.arange(CELLS, device=device)
        y, x = ((cell + shift[:, None]) % 2 for shift in (phase // 2, phase % 2))
        tile = behind[:, None, None] * 4 + y[:, :, None] * 2 + x[:, None]  # (B, CELLS, CELLS)
        codes = plain.flatten()[tile].flatten(1)[:, None].repeat(1, STEPS, 1)
        inside = torch.arange(BLOCK, device=device)
        at = (place // PLACES * CELLS + place % PLACES)[..., None, None] + inside[:, None] * CELLS + inside
        card = cards[sprite[:, None], pose].flatten(2)  # (B, STEPS, 16), -1 in the corners
        tile = tile.flatten(1)[:, None].expand(-1, STEPS, -1).gather(2, at.flatten(2))
        corner = corners.view(-1, 4)[tile, _which_corner(device)]
        return codes.scatter(2, at.flatten(2), torch.where(card < 0, corner, card)).view(size, -1)

    def factors(self, prompt: torch.Tensor, start: torch.Tensor, phase: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same clips as the arguments of `sprite_frames.render`."""
        sprite, kind, behind = self.attributes(prompt)
        columns = starts().flatten(0, 1)[:, 1, 1].to(prompt.device)[kind]
        return (
            sprite, kind // len(STRENGTHS), kind % len(STRENGTHS), start // columns, start % columns,
            behind // len(TIMES), behind % len(TIMES), phase,
        )  # fmt: skip

    def sums(self, look: Look, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the tokens of every clip of what `look` says of each.

        Args:
            look: called with positions in [0, N) and codes, tensors on `device` that broadcast to a shape S; returns
                (B, *S).

        Returns:
            (B, W, sprites) over the emoji's tokens and (B, W, backgrounds * PHASES) over all others, for each of the W
            ways of `_ways`. A clip's sum is that of one of each.
        """
        way, steps = _ways(device), torch.arange(STEPS, device=device)
        emoji, plain, corners = (look(*part) for part in _tokens(self, device))
        kind = emoji.dtype  # also of sums: torch adds up whole numbers as int64, which takes ten times as long
        seen = (
            emoji.sum(1, dtype=kind).unflatten(2, (-1, POSES)).unflatten(1, (STEPS, -1)).transpose(3, 4).flatten(1, 3)
        )
        cards = seen[:, (steps * PLACES**2 + way.place) * POSES + way.pose].sum(2, dtype=kind)
        plain, corners = (x.unflatten(1, (STEPS, CELLS, CELLS)) for x in (plain, corners))
        hidden = plain.unfold(2, BLOCK, 1).unfold(3, BLOCK, 1).sum((-1, -2), dtype=kind)
        seen = plain.sum((2, 3), keepdim=True, dtype=kind) - hidden  # (B, STEPS, PLACES, PLACES, backgrounds * PHASES)
        corners = corners.unflatten(-1, (-1, 4))
        for k, (y, x) in enumerate(itertools.product((0, BLOCK - 1), repeat=2)):
            seen = seen + corners[:, :, y : y + PLACES, x : x + PLACES, :, k]
        return cards, seen.flatten(1, 3)[:, steps * PLACES**2 + way.place].sum(2, dtype=kind)

    def log_evidence(self, values: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """log p(x_t | prompts), up to a constant: (B,). Strays count, with their own weight.

        Args:
            values: (B, N, C), log-likelihoods of x_t for every position and used code.
            prompts: (B, prompts) bool, one prompt or all: these are equally likely, as are the clips of a prompt.
        """
        require_shape("values", values, ("B", self.num_visual_tokens, len(self.used_codes)))
        slot = torch.empty(self.codebook_size, dtype=torch.long, device=values.device)
        slot[self.used_codes.to(values.device)] = torch.arange(values.shape[2], device=values.device)
        flat = values.flatten(1)

        def look(where: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
            index = where * values.shape[2] + slot[code]
            return flat.index_select(1, index.flatten()).unflatten(1, index.shape)

        emoji, behind = self.sums(look, values.device)
        way = _ways(values.device)
        per_way = -way.count[way.kind].log()  # each kind of motion is as likely, however many ways it has

        def evidence(sprite: torch.Tensor, kind: torch.Tensor, texture: torch.Tensor) -> torch.Tensor:
            texture = texture.repeat_interleave(PHASES, 1)
            each = emoji.masked_fill(~sprite[:, None], -torch.inf).logsumexp(-1)
            each = each + behind.masked_fill(~texture[:, None], -torch.inf).logsumexp(-1) + per_way
            number = sprite.sum(1) * kind.sum(1) * texture.sum(1)
            return each.masked_fill(~kind[:, way.kind], -torch.inf).logsumexp(-1) - number.log()

        asked = prompts.unflatten(1, (self.sprites, KINDS, self.backgrounds))
        own = asked.any(3).any(2), asked.any(3).any(1), asked.any(2).any(1)
        if not self.strays:
            return evidence(*own)
        share = self.strays / 100
        either = evidence(*own) + math.log(1 - share), evidence(*(torch.ones_like(x) for x in own)) + math.log(share)
        return torch.logaddexp(*either)

    def score(self, codes: torch.Tensor, prompt: torch.Tensor) -> Scores:
        """Codes (B, N) against the prompts of index (B,): the valid clip with most tokens in common."""
        parts = [self._nearest(*part) for part in chunks(AT_ONCE, codes, prompt)]
        best, own, sprite, at, behind = (torch.cat(part) for part in zip(*parts))
        way, n = _ways(codes.device), self.num_visual_tokens
        nearest = (sprite * KINDS + way.kind[at]) * self.backgrounds + behind // PHASES
        free = {"places": (way.quarter[at], QUARTERS**2), "phases": (behind % PHASES, PHASES)}
        return Scores(best / n, best == n, own == best, nearest, free)

    def _nearest(self, codes: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tokens in common with the nearest clip and the prompt's nearest; the nearest's sprite, way and background."""
        rows, way, small = torch.arange(len(codes), device=codes.device), _ways(codes.device), codes.short()
        emoji, behind = self.sums(lambda where, code: (small[:, where] == code.short()).short(), codes.device)
        (most, sprite), (rest, texture) = emoji.max(-1), behind.max(-1)
        best, at = (most + rest).max(-1)
        wanted, kind, asked = self.attributes(prompt)
        own = emoji[rows, :, wanted] + behind.unflatten(-1, (-1, PHASES))[rows, :, asked].amax(-1)
        own = own.masked_fill(way.kind != kind[:, None], -1).amax(-1)
        return best, own, sprite[rows, at], at, texture[rows, at]

    def codebook(self) -> torch.Tensor:
        """(K, D + 1) unit vectors: the FSQ vectors, halved, and what they lack to length 1.

        On the sphere itself, multiples of an FSQ vector would be one point. In float32 the last bit would depend on the
        machine, and a run knows its codebook by a digest.
        """
        vectors = fsq_codebook(FSQ).double() / math.sqrt(len(FSQ))
        return torch.cat([vectors, (1 - vectors.square().sum(1, keepdim=True)).clamp(min=0).sqrt()], 1).float()

    def decoder(self) -> PatchVae:
        return _vae()


@functools.cache
def _vae() -> PatchVae:
    return PatchVae.load(PICTURES / "vae")


# Tables are kept on their device: a copy in every step would make the host wait for the GPU


@functools.lru_cache(maxsize=8)
def _drawn(world: SpritesWorld, device: torch.device) -> torch.Tensor:
    """Indices of the prompts that are not held out."""
    held_out = set(world.held_out)
    return torch.tensor([i for i, prompt in enumerate(world.prompts) if prompt not in held_out], device=device)


@functools.cache
def _codes(device: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of the patches that `pieces` draws, int64: of cards (sprites, POSES, BLOCK^2), -1 in the corners; of
    corners (backgrounds, 4, 4), by cell of the tile behind and by corner; of tiles (backgrounds, 4).
    """
    if device != CPU:
        return tuple(x.to(device) for x in _codes())
    code = {patch.tobytes(): i for i, patch in enumerate(_vae().patches.numpy())}

    def look_up(patches: torch.Tensor) -> torch.Tensor:
        shape, flat = patches.shape[:-3], patches.reshape(-1, *patches.shape[-3:]).numpy()
        return torch.tensor([code.get(patch.tobytes(), -1) for patch in flat]).view(shape)

    cards, corners, plain = (look_up(part) for part in pieces())
    ends = torch.tensor([0, BLOCK - 1])
    cards[:, :, ends[:, None], ends] = -1
    return cards.flatten(2), corners.flatten(3).flatten(1, 2), plain.flatten(1)


class _Ways(NamedTuple):
    """All ways that cards go, W = 1,920: every motion and strength from every start."""

    kind: torch.Tensor  # (W,) motion * strengths + strength
    pose: torch.Tensor  # (W, STEPS)
    place: torch.Tensor  # (W, STEPS) of the card's first cell: row * PLACES + column
    quarter: torch.Tensor  # (W,) of the start: quarter of the rows * QUARTERS + quarter of the columns
    first: torch.Tensor  # (KINDS,) index of the first way of each kind
    count: torch.Tensor  # (KINDS,) number of ways of each kind


@functools.cache
def _ways(device: torch.device) -> _Ways:
    kinds, pose, place, quarter = [], [], [], []
    for kind, (way, bounds) in enumerate(zip(ways().flatten(0, 1), starts().flatten(0, 1).tolist())):
        (top, rows), (left, columns) = bounds
        for row, column in itertools.product(range(rows), range(columns)):
            kinds.append(kind)
            pose.append(way[:, 0])
            place.append((top + row + way[:, 1]) * PLACES + left + column + way[:, 2])
            quarter.append(row * QUARTERS // rows * QUARTERS + column * QUARTERS // columns)
    kind, count = torch.tensor(kinds), starts()[..., 1].prod(-1).flatten()
    made = kind, torch.stack(pose), torch.stack(place), torch.tensor(quarter), count.cumsum(0) - count, count
    return _Ways(*(x.to(device) for x in made))


@functools.lru_cache(maxsize=8)
def _tokens(world: SpritesWorld, device: torch.device) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """What `SpritesWorld.sums` looks at, (positions, codes) on the device, which broadcast to
    (12 tokens, STEPS * places, sprites * POSES) of emoji, (N, backgrounds * PHASES) of textures, and
    (N, backgrounds * PHASES * 4) of cards' corners.
    """
    cards, corners, plain = (part[:most] for part, most in zip(_codes(), (world.sprites, *[world.backgrounds] * 2)))
    inner = (cards[0, 0] >= 0).nonzero()[:, 0]
    step, y, x = (i[..., None] for i in torch.meshgrid(*map(torch.arange, (STEPS, PLACES, PLACES)), indexing="ij"))
    where = (step * CELLS + y + inner // BLOCK) * CELLS + x + inner % BLOCK
    emoji = where.flatten(0, 2).T[..., None], cards[..., inner].flatten(0, 1).T[:, None]
    cell, shift = torch.arange(CELLS), torch.arange(PHASES)
    rows, columns = (cell[:, None] + shift // 2) % 2, (cell[:, None] + shift % 2) % 2
    tile = (rows[:, None] * 2 + columns).flatten(0, 1)  # (CELLS^2, PHASES): the tile's cell at every cell
    shown = plain[:, tile].transpose(0, 1).flatten(1).repeat(STEPS, 1)
    around = corners[:, tile].transpose(0, 1).flatten(1).repeat(STEPS, 1)
    every = torch.arange(world.num_visual_tokens)[:, None]
    return tuple((a.to(device), b.to(device)) for a, b in (emoji, (every, shown), (every, around)))


def _which_corner(device: torch.device) -> torch.Tensor:
    """(BLOCK^2,) which corner a card's cell is; 0 for those that are none."""
    y, x = torch.arange(BLOCK, device=device)[:, None] // (BLOCK - 1), torch.arange(BLOCK, device=device) // (BLOCK - 1)
    return (2 * y + x).flatten()
