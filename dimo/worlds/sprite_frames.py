"""The pictures of the sprites world, and how its clips are drawn: one sprite over one texture, 17 frames of 128x128.

A sprite of 40x40 pixels starts on a grid of 8 pixels, the size of a token, and moves by whole pixels; it is drawn by
bilinear interpolation where it turns or zooms. The texture is a tile of 16x16 pixels, shifted by 0 or 8 pixels to the
left and up, and stands still.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import torch
from torch.nn import functional as F

from dimo.ursa.weights import require_file

PICTURES = Path(__file__).parent / "data" / "sprites"
SPRITES = {  # in the order of the atlas; the characters are those of Unicode
    "red car": "🚗", "blue car": "🚙", "taxi": "🚕", "bus": "🚌", "fire engine": "🚒", "ambulance": "🚑",
    "tractor": "🚜", "locomotive": "🚂", "airplane": "✈", "rocket": "🚀", "helicopter": "🚁", "sailboat": "⛵",
    "ship": "🚢", "dog": "🐶", "cat": "🐱", "rabbit": "🐰", "fox": "🦊", "panda": "🐼", "tiger": "🐯", "lion": "🦁",
    "cow": "🐮", "pig": "🐷", "frog": "🐸", "monkey": "🐵", "chicken": "🐔", "penguin": "🐧", "owl": "🦉",
    "butterfly": "🦋", "bee": "🐝", "ladybug": "🐞", "turtle": "🐢", "octopus": "🐙", "crab": "🦀", "fish": "🐠",
    "whale": "🐳", "elephant": "🐘", "snail": "🐌", "apple": "🍎", "banana": "🍌", "strawberry": "🍓",
    "pineapple": "🍍", "watermelon": "🍉", "cherry": "🍒", "grape": "🍇", "carrot": "🥕", "pizza": "🍕",
    "burger": "🍔", "cake": "🎂", "cactus": "🌵", "mushroom": "🍄", "house": "🏠", "balloon": "🎈", "gift": "🎁",
    "umbrella": "☂", "bell": "🔔", "guitar": "🎸", "teddy": "🧸", "ghost": "👻", "robot": "🤖", "pumpkin": "🎃",
    "crown": "👑", "gem": "💎", "flame": "🔥", "dinosaur": "🦕",
}  # fmt: skip
TEXTURES = ("sand", "grass", "water", "bricks", "snow", "wood", "night", "tiles")
SIDE, TILE, CANVAS, CELL = 40, 16, 128, 8  # pixels of a sprite, a texture, a frame and a token
FRAMES = 17
MOTIONS = (
    "moving left", "moving right", "moving up", "moving down", "bouncing", "turning left", "turning right",
    "zooming in", "zooming out",
)  # fmt: skip
STRENGTHS = (2, 4)  # "motion=2.0": pixels per frame, or as much of a turn, a jump or a zoom
PHASES = (TILE // CELL) ** 2
BOX = 64  # pixels: room for a sprite that is turned or has grown
MARGIN = (BOX - SIDE) // 2


@functools.cache
def sprite_pictures() -> torch.Tensor:
    """(sprites, 4, SIDE, SIDE) float32 in [0, 1]: RGB times alpha, and alpha."""
    atlas = _picture("sprites.png", 4)
    rows = atlas.unflatten(0, (-1, SIDE)).unflatten(2, (-1, SIDE))  # (rows, SIDE, columns, SIDE, 4)
    sprites = rows.permute(0, 2, 4, 1, 3).flatten(0, 1)[: len(SPRITES)]
    return torch.cat([sprites[:, :3] * sprites[:, 3:], sprites[:, 3:]], 1)


@functools.cache
def texture_pictures() -> torch.Tensor:
    """(textures, 3, TILE, TILE) float32 RGB in [0, 1]."""
    return _picture("textures.png", 3).unflatten(1, (-1, TILE)).permute(1, 3, 0, 2).contiguous()


def _picture(name: str, channels: int) -> torch.Tensor:
    import imageio.v3 as iio  # slow, so only when needed

    require_file(PICTURES / name)
    return torch.from_numpy(iio.imread(PICTURES / name)[..., :channels]).float() / 255


@functools.cache
def starts() -> torch.Tensor:
    """(motions, strengths, 2, 2) int64: first cell and number of cells, along y and x, where a sprite may start.

    The sprite stays in the picture. Numbers are multiples of 4, so that quarters of the range are equally likely.
    """
    table = torch.empty(len(MOTIONS), len(STRENGTHS), 2, 2, dtype=torch.long)
    for m, motion in enumerate(MOTIONS):
        for s, strength in enumerate(STRENGTHS):
            way = strength * (FRAMES - 1) // CELL
            whole, first, last = (0, 12), (0, 12 - way), (way, 12 - way)
            table[m, s] = torch.tensor(
                {
                    "moving left": (whole, last), "moving right": (whole, first), "moving up": (last, whole),
                    "moving down": (first, whole), "bouncing": ((4, 8), whole),
                }.get(motion, ((2, 8), (2, 8)) if "zooming" in motion else (whole, whole))
            )  # fmt: skip
    return table


@functools.cache
def poses() -> torch.Tensor:
    """(motions, strengths, FRAMES, 4) float32: shift down and right in pixels, scale, and angle in radians.

    At motion=m a sprite moves by m pixels per frame; bounces every 8 frames to a height of 8 m; turns by 45 m degrees
    in all, clockwise to the right; and zooms from 1 - m/10 to 1 + m/10 of its size, or back.
    """
    frame = torch.arange(FRAMES)
    zero, one = torch.zeros(FRAMES), torch.ones(FRAMES)
    table = torch.empty(len(MOTIONS), len(STRENGTHS), FRAMES, 4)
    for s, m in enumerate(STRENGTHS):
        jump = (8 * m * 4 * (frame % 8 / 8) * (1 - frame % 8 / 8)).round()
        turn, zoom = frame / (FRAMES - 1) * math.radians(45 * m), m / 10 * (frame / (FRAMES - 1) * 2 - 1)
        rows = {
            "moving left": (zero, -m * frame, one, zero),
            "moving right": (zero, m * frame, one, zero),
            "moving up": (-m * frame, zero, one, zero),
            "moving down": (m * frame, zero, one, zero),
            "bouncing": (-jump, zero, one, zero),
            "turning left": (zero, zero, one, -turn),
            "turning right": (zero, zero, one, turn),
            "zooming in": (zero, zero, 1 + zoom, zero),
            "zooming out": (zero, zero, 1 - zoom, zero),
        }
        for i, motion in enumerate(MOTIONS):
            table[i, s] = torch.stack([torch.as_tensor(column).float() for column in rows[motion]], 1)
    return table


def render(sprite, motion, strength, row, column, texture, phase) -> torch.Tensor:
    """Clips (B, FRAMES, CANVAS, CANVAS, 3), RGB in [0, 1], from indices (B,) each.

    Args:
        row, column: counted from the first cell where the sprite may start (`starts`).
        texture, phase: of TEXTURES and of PHASES.
    """
    device = sprite.device
    pose = poses().to(device)[motion, strength]  # (B, FRAMES, 4)
    first = starts().to(device)[motion, strength, :, 0]
    corner = CELL * (first + torch.stack([row, column], 1))  # (B, 2)
    cos, sin, zero = pose[..., 3].cos(), pose[..., 3].sin(), torch.zeros_like(pose[..., 3])
    theta = torch.stack([cos, sin, zero, -sin, cos, zero], -1) * (BOX / SIDE / pose[..., 2:3])
    grid = F.affine_grid(theta.view(-1, 2, 3), [len(sprite) * FRAMES, 4, BOX, BOX], align_corners=False)
    atlas = sprite_pictures().to(device)[sprite].repeat_interleave(FRAMES, 0)
    drawn = F.grid_sample(atlas, grid, align_corners=False).unflatten(0, (-1, FRAMES)).flatten(-2)
    wide = F.pad(background(texture, phase), [MARGIN] * 4)  # a turned sprite's box may stand out of the picture
    frames = wide[:, None].repeat(1, FRAMES, 1, 1, 1)
    y, x = (pose[..., :2].long() + corner[:, None] + MARGIN + (SIDE - BOX) // 2).unbind(-1)  # (B, FRAMES)
    inside = torch.arange(BOX, device=device)
    where = (y[..., None, None] + inside[:, None]) * wide.shape[-1] + x[..., None, None] + inside
    where = where.flatten(2)[:, :, None].expand(-1, -1, 3, -1)
    flat = frames.flatten(-2)
    flat.scatter_(-1, where, drawn[:, :, :3] + (1 - drawn[:, :, 3:]) * flat.gather(-1, where))
    return frames[..., MARGIN:-MARGIN, MARGIN:-MARGIN].permute(0, 1, 3, 4, 2)


def background(texture: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
    """(B, 3, CANVAS, CANVAS), RGB in [0, 1]: the texture shifted to the left and up, by `phase` % 2 and // 2 cells."""
    pixel = torch.arange(CANVAS, device=phase.device)
    y, x = ((pixel + CELL * shift[:, None]) % TILE for shift in (phase // 2, phase % 2))
    pictures = texture_pictures().to(phase.device).permute(0, 2, 3, 1)
    return pictures[texture[:, None, None], y[:, :, None], x[:, None]].permute(0, 3, 1, 2)
