"""Reads clips of the sprites world: which sprite, motion and texture is seen, where, and how sure that is.

It shares names, sizes and pictures with the renderer (`dimo.worlds.sprite_frames`) and nothing else: templates are
turned and zoomed by Pillow, and motions are followed by rules of its own. Of every second frame, at half resolution:

1. The median over time against every texture at every phase gives the background.
2. What differs from it in the first frame is compared with every sprite, at the five sizes with which clips start, on
   every cell of the grid, at a quarter of the resolution. The best few are kept.
3. Each of them is followed through the frames by every motion that can start so; the one that leaves least
   unexplained is what was read.
4. Confidence is the worst frame's share of the clip's departure from the plain texture that is explained.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np
import torch
from torch.nn import functional as F

from dimo.errors import require_shape
from dimo.ursa.weights import require_file
from dimo.worlds.sprite_frames import CANVAS, CELL, FRAMES, MOTIONS, PHASES, PICTURES, SIDE, STRENGTHS, TILE

READ = tuple(range(0, FRAMES, 2))  # the frames that are read
FOLLOWED = (0, 2, 4, 6, 8)  # of those, by which the motion is chosen
KEPT = 8  # sprites, sizes and places of the first frame that are followed
HALF = CANVAS // 2
BOX = 32  # half-resolution pixels of a template: room for a sprite that is turned or has grown
CELLS = (CANVAS - SIDE) // CELL + 1  # places along an axis
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
    phase: torch.Tensor
    confidence: torch.Tensor

    def choice(self) -> tuple[torch.Tensor, ...]:
        """All but the confidence, in the order of the renderer's arguments."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self)[:-1])


@torch.no_grad()
def read(frames: torch.Tensor, sprites: int, textures: int) -> Reading:
    """Read clips (B, 17, 128, 128, 3), RGB in [0, 1], of the first so many sprites and textures."""
    require_shape("frames", frames, ("B", FRAMES, CANVAS, CANVAS, 3))
    small = F.avg_pool2d(frames[:, READ].flatten(0, 1).permute(0, 3, 1, 2), 2).unflatten(0, (-1, len(READ)))
    device = str(frames.device)
    tiles = _tiles(device)[: textures * PHASES]
    middle = small.median(1).values[:, None]
    behind = (middle - tiles).abs().clamp(max=CLIPPED).mean((2, 3, 4)).argmin(1)
    plain = tiles[behind]  # (B, 3, HALF, HALF)
    templates, paths = _templates(sprites, device), _paths(device)
    sprite, pose, cell = _first_frame(small[:, 0], plain, templates)
    kept = torch.arange(len(frames), device=frames.device)
    path, which = _follow(small, plain, templates, paths, sprite, pose, cell)
    first, count = paths["first"][path], paths["count"][path]
    sprite, cell = sprite[kept, which], cell[kept, which].clamp(first, first + count - 1)  # for what is no clip at all
    way = paths["at"][path] + cell[:, None] * (CELL // 2)  # (B, frames, 2)
    seen = _explained(small, plain, templates[sprite[:, None], paths["pose"][path]], way)
    return Reading(
        sprite, path // len(STRENGTHS), path % len(STRENGTHS), cell[:, 0] - first[:, 0], cell[:, 1] - first[:, 1],
        behind // PHASES, behind % PHASES, seen.amin(1),
    )  # fmt: skip


def _first_frame(frame, plain, templates):
    """The KEPT best sprites, poses and cells of frame (B, 3, HALF, HALF): (B, KEPT), (B, KEPT), (B, KEPT, 2).

    With g the frame minus the texture b, and c and a a template's colour times alpha and its alpha, the unexplained
    |g - (c - a b)|^2 of a place is, but for |g|^2, four products of a map of the frame with one of the template.
    """
    frame, plain = F.avg_pool2d(frame, 2), F.avg_pool2d(plain, 2)
    difference, size, step = frame - plain, BOX // 2, CELL // 4
    maps = torch.cat(
        [difference, (difference * plain).sum(1, True), plain, plain.square().sum(1, True)], 1
    )  # (B, 8, 32, 32)
    margin = size // 2 - SIDE // 8
    places = F.unfold(F.pad(maps, [margin] * 4), size, stride=step).transpose(1, 2)  # (B, cells, 8 * size^2)
    starts = F.avg_pool2d(templates[:, : len(STARTS)].flatten(0, 1), 2)
    colour, alpha = starts[:, :3], starts[:, 3:]
    weights = torch.cat([-2 * colour, 2 * alpha, -2 * colour * alpha, alpha.square()], 1).flatten(1)
    left = places @ weights.T + colour.square().sum((1, 2, 3))  # (B, cells, sprites * poses)
    best = left.flatten(1).topk(KEPT, largest=False).indices
    cell, what = best // left.shape[2], best % left.shape[2]
    return what // len(STARTS), what % len(STARTS), torch.stack([cell // CELLS, cell % CELLS], -1)


def _follow(small, plain, templates, paths, sprite, pose, cell):
    """The path (B,) and the index (B,) among those kept that leave least unexplained."""
    moments = list(FOLLOWED)
    best = torch.full(sprite.shape[:1], torch.inf, device=sprite.device)
    path = torch.zeros_like(sprite[:, 0])
    which = torch.zeros_like(path)
    for k, p in itertools.product(range(sprite.shape[1]), range(len(paths["pose"]))):
        first, count = paths["first"][p], paths["count"][p]
        can = (pose[:, k] == paths["pose"][p, 0]) & ((cell[:, k] >= first) & (cell[:, k] < first + count)).all(1)
        rows = can.nonzero()[:, 0]
        if not len(rows):
            continue
        way = paths["at"][p][moments] + cell[rows, k, None] * (CELL // 2)
        template = templates[sprite[rows, k, None], paths["pose"][p][moments]]
        residue, empty = _residues(small[rows][:, moments], plain[rows], template, way)
        left = (residue - empty).sum(1)
        better = left < best[rows]
        rows, left = rows[better], left[better]
        best[rows], path[rows], which[rows] = left, p, k
    return path, which


def _residues(small, plain, template, way):
    """Squared differences (B, M) inside the boxes at `way` (B, M, 2): from the composite, and from the texture alone.

    small (B, M, 3, HALF, HALF), plain (B, 3, HALF, HALF), template (B, M, 4, BOX, BOX).
    """
    margin = BOX // 2
    inside = torch.arange(BOX, device=way.device)
    y, x = (way + margin - (BOX - SIDE // 2) // 2).unbind(-1)
    where = (y[..., None, None] + inside[:, None]) * (HALF + 2 * margin) + x[..., None, None] + inside
    where = where.flatten(2)[:, :, None].expand(-1, -1, 3, -1)
    valid = F.pad(torch.ones_like(plain[:1, :1]), [margin] * 4).flatten(2).expand(*where.shape[:2], -1)
    valid = valid.gather(2, where[:, :, 0])[:, :, None]
    behind = F.pad(plain, [margin] * 4).flatten(2)[:, None].expand(-1, where.shape[1], -1, -1).gather(3, where)
    difference = F.pad(small, [margin] * 4).flatten(3).gather(3, where) - behind
    colour, alpha = template[:, :, :3].flatten(3), template[:, :, 3:].flatten(3)
    left = (difference - colour + alpha * behind) * valid
    return left.square().sum((2, 3)), difference.square().sum((2, 3))


def _explained(small, plain, template, way):
    """(B, frames): 1 - |clip - composite|^2 / (|composite - texture|^2 + PALE), over whole frames."""
    inside, empty = _residues(small, plain, template, way)
    whole = (small - plain[:, None]).square().sum((2, 3, 4))
    drawn, _ = _residues(plain[:, None].expand_as(small), plain, template, way)
    return 1 - (whole - empty + inside) / (drawn + PALE)


@functools.cache
def _tiles(device: str) -> torch.Tensor:
    """(textures * phases, 3, HALF, HALF): every texture, shifted by 0 or 8 pixels up and to the left."""
    strip, tiles = _numbers(_open("textures.png").convert("RGB")), []
    for left, up, aside in itertools.product(range(0, strip.shape[2], TILE), (0, CELL), (0, CELL)):
        tile = strip[:, :, left : left + TILE].roll((-up, -aside), (1, 2))
        tiles.append(F.avg_pool2d(tile, 2).repeat(1, CANVAS // TILE, CANVAS // TILE))
    return torch.stack(tiles).to(device)


@functools.cache
def _templates(sprites: int, device: str) -> torch.Tensor:
    """(sprites, poses, 4, BOX, BOX): every sprite in every pose of `_poses`, RGB times alpha and alpha."""
    from PIL import Image

    atlas, drawn, side = _open("sprites.png").convert("RGBA"), [], 2 * BOX
    for i in range(sprites):
        left, top = i % 8 * SIDE, i // 8 * SIDE
        square = Image.new("RGBA", (side, side))
        square.paste(atlas.crop((left, top, left + SIDE, top + SIDE)), ((side - SIDE) // 2,) * 2)
        for size, degrees in _poses():
            c, s = math.cos(math.radians(degrees)) / size, math.sin(math.radians(degrees)) / size
            back = (c, s, BOX * (1 - c - s), -s, c, BOX * (1 + s - c))  # from where a pixel comes
            turned = square.transform((side, side), Image.Transform.AFFINE, back, Image.Resampling.BICUBIC)
            drawn.append(_numbers(turned.convert("RGBa")))
    return F.avg_pool2d(torch.stack(drawn), 2).unflatten(0, (sprites, -1)).to(device)


def _open(name: str):
    from PIL import Image  # slow, so only when needed

    require_file(PICTURES / name)
    return Image.open(PICTURES / name)


def _numbers(image) -> torch.Tensor:
    """(channels, height, width) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


STARTS = ((1.0, 0.0), (0.8, 0.0), (0.6, 0.0), (1.2, 0.0), (1.4, 0.0))  # poses of first frames: size, degrees clockwise


def _followed(motion: str, strength: int) -> list[tuple[int, int, float, float]]:
    """Where a sprite is in the frames READ: pixels down and right of its start, size, degrees clockwise."""
    end, seen = FRAMES - 1, []
    for frame in READ:
        down = right = 0
        size, degrees = 1.0, 0.0
        if motion.startswith("moving"):
            y, x = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}[motion.split()[1]]
            down, right = y * strength * frame, x * strength * frame
        elif motion == "bouncing":
            down = -8 * strength * {0: 0, 2: 12, 4: 16, 6: 12}[frame % 8] // 16
        elif motion.startswith("turning"):
            degrees = (1 if motion.endswith("right") else -1) * 45.0 * strength * frame / end
        else:
            much = strength / 10 * (2 * frame / end - 1)
            size = 1 + (much if motion.endswith("in") else -much)
        seen.append((down, right, round(size, 4), degrees))
    return seen


@functools.cache
def _poses() -> list[tuple[float, float]]:
    """All sizes and angles in which sprites are seen, those of STARTS first."""
    ways = [_followed(motion, strength) for motion in MOTIONS for strength in STRENGTHS]
    return list(dict.fromkeys([*STARTS, *((size, degrees) for way in ways for _, _, size, degrees in way)]))


@functools.cache
def _paths(device: str) -> dict[str, torch.Tensor]:
    """Tables of every motion at every strength, P in all.

    "pose" (P, frames) are indices in `_poses`, "at" (P, frames, 2) half-resolution pixels from the start. "first" and
    "count" (P, 2) are the cells where it may start: the sprite stays in the picture, and their number is the largest
    multiple of four, which leaves out the first ones.
    """
    pose, at, first, count = [], [], [], []
    for motion, strength in itertools.product(MOTIONS, STRENGTHS):
        way = _followed(motion, strength)
        pose.append([_poses().index((size, degrees)) for _, _, size, degrees in way])
        at.append([(down // 2, right // 2) for down, right, _, _ in way])
        for axis in (0, 1):
            far = [stop[axis] for stop in way]
            low, high = -min(far) // CELL, CELLS - 1 - max(far) // CELL
            if motion.startswith("zooming"):
                low, high = 2, CELLS - 3  # there is room for the largest
            spare = (high - low + 1) % 4
            first.append(low + spare)
            count.append(high - low + 1 - spare)
    table = {name: torch.tensor(value, device=device) for name, value in (("pose", pose), ("at", at))}
    ends = {
        name: torch.tensor(value, device=device).view(-1, 2) for name, value in (("first", first), ("count", count))
    }
    return table | ends
