"""Reads clips of the sprites world: which sprite, motion and background is seen, where, and how sure that is.

It sees pixels and shares names, sizes and pictures with the renderer (`dimo.worlds.sprite_frames`) and nothing else:
cards are put together by Pillow, and motions are followed by rules of its own. At half resolution:

1. The median over time against every texture, time of day and phase gives the background.
2. In the first frame of every latent frame, every card is compared with every place on the grid.
3. The sprite that fits best over all of these is followed by every motion from every start; the one that leaves least
   unexplained is what was read.
4. Confidence is the worst frame's share of the clip's departure from the plain texture that is explained.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import torch
from torch.nn import functional as F

from dimo.errors import require_shape
from dimo.ursa.chunks import chunks
from dimo.ursa.weights import require_file
from dimo.worlds.sprite_frames import (
    CANVAS,
    CARD,
    CELL,
    MOTIONS,
    PHASES,
    PICTURES,
    SIZES,
    SPRITES,
    STRENGTHS,
    TILE,
    TIMES,
)
from dimo.worlds.sprites import SpritesWorld

FRAMES = 17
READ = (0, 1, 5, 9, 13)  # the frames that are matched; confidence judges all
HALF, BOX = CANVAS // 2, CARD // 2  # half-resolution pixels of a frame and of a card
ALONG = (CANVAS - CARD) // CELL + 1  # places of a card along an axis
CONFIDENT = 0.6  # `scripts/sprites.py failures` says how sure it is of real clips and of others
AT_ONCE = 16  # clips
PALE = 6.0  # energy below which a departure from the texture is not judged by its share alone
CLIPPED = 0.15  # a pixel farther than this from a texture is no worse for it


@dataclasses.dataclass
class Reading:
    """What was read of B clips: indices (B,) as `render` takes them, and `confidence` (B,), at most 1."""

    sprite: torch.Tensor
    motion: torch.Tensor
    strength: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    texture: torch.Tensor
    time: torch.Tensor
    phase: torch.Tensor
    confidence: torch.Tensor

    def choice(self) -> tuple[torch.Tensor, ...]:
        """All but the confidence, in the order of the renderer's arguments."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self)[:-1])


@torch.no_grad()
def read(frames: torch.Tensor) -> Reading:
    """Read clips (B, 17, 128, 128, 3), RGB in [0, 1]."""
    require_shape("frames", frames, ("B", FRAMES, CANVAS, CANVAS, 3))
    device, rows = str(frames.device), torch.arange(len(frames), device=frames.device)
    small = F.avg_pool2d(frames.flatten(0, 1).permute(0, 3, 1, 2), 2).unflatten(0, (-1, FRAMES))
    tiles = _tiles(device)
    far = [(middle - tiles).abs().clamp(max=CLIPPED).mean((1, 2, 3)) for middle in small.median(1).values]
    behind = torch.stack(far).argmin(1)
    residue = _residues(small[:, READ], device)  # (B, frames, places, sprites, poses)
    sprite = residue.amin((2, 4)).sum(1).argmin(1)
    way = _ways(device)
    followed = residue[rows, :, :, sprite][:, torch.arange(len(READ), device=frames.device), way.place, way.pose].sum(2)
    best = followed.argmin(1)
    confidence = _explained(small, tiles[behind], sprite, way.pose[best], way.place[best], device)
    start = way.start[best]
    return Reading(
        sprite, way.kind[best] // len(STRENGTHS), way.kind[best] % len(STRENGTHS), start[:, 0], start[:, 1],
        behind // (PHASES * len(TIMES)), behind // PHASES % len(TIMES), behind % PHASES, confidence,
    )  # fmt: skip


def agreement(world: SpritesWorld, codes: torch.Tensor, prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is read of clips, codes (B, N), as the prompts of index (B,) say: {factor: (B,) bool on the CPU}.

    Factors are sprite, motion, strength, texture and time; "sure" is whether the reader is. Clips are read on a GPU
    where there is one, a few at a time.
    """
    device, vae = "cuda" if torch.cuda.is_available() else "cpu", world.decoder()
    found: dict[str, list[torch.Tensor]] = {}
    for some, asked in chunks(AT_ONCE, codes.to(device), prompt.to(device)):
        seen = read(vae.to(device).decode(some.view(-1, *world.latents_shape)))
        sprite, kind, behind = world.attributes(asked)
        same = {
            "sprite": seen.sprite == sprite,
            "motion": seen.motion == kind // len(STRENGTHS),
            "strength": seen.strength == kind % len(STRENGTHS),
            "texture": seen.texture == behind // len(TIMES),
            "time": seen.time == behind % len(TIMES),
            "sure": seen.confidence >= CONFIDENT,
        }
        for name, right in same.items():
            found.setdefault(name, []).append(right.cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def reads_as(world: SpritesWorld, codes: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Whether clips, codes (B, N), are read as the prompts of index (B,), and with confidence: (B,) bool on the CPU."""
    return torch.stack(list(agreement(world, codes, prompt).values())).all(0)


def _residues(small: torch.Tensor, device: str) -> torch.Tensor:
    """|small - card|^2 without the corners: small (B, M, 3, HALF, HALF) -> (B, M, places, sprites, poses)."""
    cards, alpha = _cards(device)
    solid = (alpha == 1).float()
    places = F.unfold(small.flatten(0, 1), BOX, stride=CELL // 2).transpose(1, 2)  # (B * M, places, 3 BOX^2)
    solid, flat = solid.expand(3, -1, -1).flatten(), cards.flatten(2)
    known = flat.flatten(0, 1) * solid
    left = (places.square() @ solid)[..., None] - 2 * places @ known.T + known.square().sum(1)
    return left.view(*small.shape[:2], ALONG**2, *flat.shape[:2])


def _explained(small, plain, sprite, pose, place, device: str) -> torch.Tensor:
    """(B,) of the worst frame: 1 - |clip - composite|^2 / (|composite - texture|^2 + PALE)."""
    cards, alpha = _cards(device)
    composite = plain[:, None].repeat(1, pose.shape[1], 1, 1, 1)
    for b, f in itertools.product(range(len(sprite)), range(pose.shape[1])):
        y, x = CELL // 2 * (int(place[b, f]) // ALONG), CELL // 2 * (int(place[b, f]) % ALONG)
        under = composite[b, f, :, y : y + BOX, x : x + BOX]
        under.copy_(alpha * cards[sprite[b], pose[b, f]] + (1 - alpha) * under)
    composite = torch.cat([composite[:, :1], composite[:, 1:].repeat_interleave(4, 1)], 1)
    wrong = (small - composite).square().sum((2, 3, 4))
    return (1 - wrong / ((composite - plain[:, None]).square().sum((2, 3, 4)) + PALE)).amin(1)


@functools.cache
def _tiles(device: str) -> torch.Tensor:
    """(textures * times * phases, 3, HALF, HALF): every texture at every time, shifted by 0 or 8 pixels up and left."""
    sheet, tiles = _numbers(_open("textures.png").convert("RGB")), []
    for left, top in itertools.product(range(0, sheet.shape[2], TILE), range(0, sheet.shape[1], TILE)):
        for up, aside in itertools.product((0, CELL), (0, CELL)):
            tile = sheet[:, top : top + TILE, left : left + TILE].roll((-up, -aside), (1, 2))
            tiles.append(F.avg_pool2d(tile, 2).repeat(1, CANVAS // TILE, CANVAS // TILE))
    return torch.stack(tiles).to(device)


@functools.cache
def _cards(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(sprites, poses, 3, BOX, BOX) RGB of every card in every pose of POSES, and alpha (BOX, BOX) of them all."""
    from PIL import Image

    atlas, card, drawn = _open("sprites.png").convert("RGBA"), _open("card.png").convert("RGBA"), []
    for i in range(len(SPRITES)):
        for size, quarters in POSES:
            left = i % 8 * sum(SIZES) + sum(s for s in SIZES if s > size)
            emoji = atlas.crop((left, i // 8 * SIZES[0], left + size, i // 8 * SIZES[0] + size)).rotate(-90 * quarters)
            layer = Image.new("RGBA", card.size)
            layer.paste(emoji, ((CARD - size) // 2,) * 2)
            for x, y in itertools.product((0, CARD - CELL), repeat=2):
                layer.paste((0, 0, 0, 0), (x, y, x + CELL, y + CELL))
            drawn.append(_numbers(Image.alpha_composite(card, layer).convert("RGB")))
    alpha = F.avg_pool2d(_numbers(card)[3:], 2)[0]
    return F.avg_pool2d(torch.stack(drawn), 2).unflatten(0, (-1, len(POSES))).to(device), alpha.to(device)


def _open(name: str):
    from PIL import Image  # slow, so only when needed

    require_file(PICTURES / name)
    return Image.open(PICTURES / name)


def _numbers(image) -> torch.Tensor:
    """(channels, height, width) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


POSES = ((24, 0), (24, 1), (24, 2), (24, 3), (16, 0), (12, 0))  # pixels of the emoji, quarters turned clockwise


def _followed(motion: str, strength: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where a card is in the frames READ: cells down and right of its start, and its pose."""
    seen, last = [], len(READ) - 1
    for i in range(len(READ)):
        down = right = quarters = 0
        size = 24
        if motion.startswith("moving"):
            y, x = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[motion.split()[1]]
            down, right = y * i * strength // 2, x * i * strength // 2
        elif motion == "bouncing":
            down = -strength // 2 * (i if i <= 2 else last - i)
        elif motion.startswith("turning"):
            quarters = (1 if motion.endswith("right") else -1) * (i if strength == 4 else i // 2) % 4
        else:
            sizes = {4: (12, 12, 16, 24, 24), 2: (16, 16, 16, 24, 24)}[strength]
            size = sizes[i if motion.endswith("in") else last - i]
        seen.append(((down, right), (size, quarters)))
    return seen


@dataclasses.dataclass
class _Ways:
    """Every motion at every strength from every start, W in all."""

    kind: torch.Tensor  # (W,) motion * strengths + strength
    start: torch.Tensor  # (W, 2) row and column, counted from the first where it may start
    pose: torch.Tensor  # (W, frames) of POSES
    place: torch.Tensor  # (W, frames) row * ALONG + column


@functools.cache
def _ways(device: str) -> _Ways:
    """A card stays in the picture, and starts at a multiple of four rows and columns: of those there are, the first."""
    rows = []
    for kind, (motion, strength) in enumerate(itertools.product(MOTIONS, STRENGTHS)):
        way = _followed(motion, strength)
        inside = [
            [at for at in range(ALONG) if all(0 <= at + cells[axis] < ALONG for cells, _ in way)] for axis in (0, 1)
        ]
        down, right = (kept[: len(kept) // 4 * 4] for kept in inside)
        for y, x in itertools.product(down, right):
            place = [(y + cells[0]) * ALONG + x + cells[1] for cells, _ in way]
            rows.append((kind, (y - down[0], x - right[0]), [POSES.index(pose) for _, pose in way], place))
    return _Ways(*(torch.tensor(column, device=device) for column in zip(*rows)))
