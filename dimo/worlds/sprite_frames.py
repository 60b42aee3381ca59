"""The pictures of the sprites world, and how its clips are drawn: a card with an emoji over a texture, 17 frames of
128x128 pixels.

Everything falls on a grid of 8 pixels, the size of a token, and stands still for the frames of one latent frame: so the
8x8 patches that can appear are few enough for each to be a code. The card is 32x32 pixels with rounded corners. A
corner shows the texture behind it, but no emoji; the rest of a card shows no texture. The emoji is seen at three sizes,
the largest turned four ways. The texture is a tile of 16x16 pixels, shifted by 0 or 8 pixels to the left and up.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from dimo.ursa.inputs import TEMPORAL_STRIDE
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
TIMES = ("", " at dawn", " at dusk")  # of day, which tint the texture; without one it is noon
MOTIONS = (
    "moving left", "moving right", "moving up", "moving down", "bouncing", "turning left", "turning right",
    "zooming in", "zooming out",
)  # fmt: skip
STRENGTHS = (2, 4)  # "motion=2.0": pixels per frame, or as much of a jump, a turn or a zoom
CELL, CELLS = 8, 16  # pixels of a token; tokens of a frame along each axis
CANVAS, CARD, TILE = 128, 32, 16  # pixels of a frame, a card and a texture's tile
BLOCK = CARD // CELL  # tokens of a card along each axis
STEPS = 5  # latent frames
PHASES = (TILE // CELL) ** 2
SIZES = (24, 16, 12)  # pixels of an emoji
POSES = 6  # the largest turned clockwise by 0, 90, 180 and 270 degrees, then the smaller ones
PLACES = CELLS - BLOCK + 1  # of a card along each axis


@functools.cache
def cards() -> torch.Tensor:
    """(sprites, POSES, CARD, CARD, 3) uint8: every emoji in every pose on its card, without the card's corners."""
    card, atlas = _picture("card.png"), _picture("sprites.png").unflatten(0, (-1, SIZES[0]))
    drawn, left = [], 0
    corner = torch.arange(CARD)
    corner = (corner < CELL) | (corner >= CARD - CELL)
    outside = corner[:, None] & corner  # where no emoji is drawn
    for size in SIZES:
        emoji = atlas.unflatten(2, (-1, sum(SIZES)))[:, :size, :, left : left + size].transpose(1, 2).flatten(0, 1)
        turns = range(4) if size == SIZES[0] else range(1)
        wide = torch.zeros(len(emoji), CARD, CARD, 4, dtype=torch.uint8)
        margin = (CARD - size) // 2
        for turn in turns:
            wide[:, margin : CARD - margin, margin : CARD - margin] = emoji.rot90(-turn, (1, 2))
            wide[:, outside] = 0
            drawn.append(over(wide[..., :3], wide[..., 3:], card[..., :3].expand(len(emoji), -1, -1, -1)))
        left += size
    return torch.stack(drawn, 1)[: len(SPRITES)]


@functools.cache
def card_alpha() -> torch.Tensor:
    """(CARD, CARD, 1) uint8: 255 but in the four corner cells."""
    return _picture("card.png")[..., 3:]


@functools.cache
def backgrounds() -> torch.Tensor:
    """(textures * times, TILE, TILE, 3) uint8, the time of day varying fastest."""
    tiles = _picture("textures.png")[..., :3].unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))
    return tiles.permute(2, 0, 1, 3, 4).flatten(0, 1)


def over(colour: torch.Tensor, alpha: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """Pictures, all uint8: `colour` with alpha (..., 1) over `behind`, in whole numbers, the same on every machine."""
    alpha = alpha.int()
    return ((alpha * colour + (255 - alpha) * behind + 127) // 255).to(torch.uint8)


def pieces() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All patches of clips, uint8: (sprites, POSES, BLOCK, BLOCK, 8, 8, 3) of cards, whose corners do not count;
    (backgrounds, 2, 2, 2, 2, 8, 8, 3) of cards' corners, by the cell of the tile behind them and which corner it is;
    and (backgrounds, 2, 2, 8, 8, 3) of tiles.
    """
    plain, card, alpha = cells(backgrounds()), cells(cards()), cells(card_alpha())
    ends = torch.tensor([0, BLOCK - 1])
    ends = ends[:, None], ends
    return card, over(card[0, 0][ends], alpha[ends], plain[:, :, :, None, None]), plain


def cells(pictures: torch.Tensor) -> torch.Tensor:
    """(..., 8 H, 8 W, C) -> (..., H, W, 8, 8, C)."""
    return pictures.unflatten(-3, (-1, CELL)).unflatten(-2, (-1, CELL)).transpose(-4, -3)


def _picture(name: str) -> torch.Tensor:
    """(height, width, 4 or 3) uint8."""
    import imageio.v3 as iio  # slow, so only when needed

    require_file(PICTURES / name)
    return torch.from_numpy(iio.imread(PICTURES / name).copy())


@functools.cache
def ways() -> torch.Tensor:
    """(motions, strengths, STEPS, 3) int64: the pose, and how many cells down and right of its start, of every motion.

    At motion=m a card moves by m pixels per frame, jumps to 8 m pixels, turns by m / 4 quarters per latent frame, or
    zooms between half (m = 4) or two thirds (m = 2) of its size and the whole.
    """
    table = torch.zeros(len(MOTIONS), len(STRENGTHS), STEPS, 3, dtype=torch.long)
    small, middle = POSES - 1, POSES - 2
    for s, m in enumerate(STRENGTHS):
        for f in range(STEPS):
            go, jump, turn = f * m * TEMPORAL_STRIDE // CELL, min(f, STEPS - 1 - f) * m // 2, f * m // 4 % 4
            grow = [small, small, middle, 0, 0] if m == 4 else [middle, middle, middle, 0, 0]
            table[:, s, f] = torch.tensor(
                [
                    (0, 0, -go), (0, 0, go), (0, -go, 0), (0, go, 0), (0, -jump, 0), (-turn % 4, 0, 0), (turn, 0, 0),
                    (grow[f], 0, 0), (grow[STEPS - 1 - f], 0, 0),
                ]
            )  # fmt: skip
    return table


@functools.cache
def starts() -> torch.Tensor:
    """(motions, strengths, 2, 2) int64: first cell and number of cells, along y and x, where a card may start.

    The card stays in the picture. Numbers are multiples of 4, so that quarters of the range are equally likely.
    """
    moved = ways()[..., 1:]
    first = (-moved).amax(2).clamp(min=0)
    count = PLACES - first - moved.amax(2).clamp(min=0)
    return torch.stack([first, count // 4 * 4], -1)


def render(sprite, motion, strength, row, column, texture, time, phase) -> torch.Tensor:
    """Clips (B, 17, CANVAS, CANVAS, 3), RGB in [0, 1], from indices (B,) each.

    Args:
        row, column: counted from the first cell where the card may start (`starts`).
        texture, time, phase: of TEXTURES, TIMES and PHASES.
    """
    device, size = sprite.device, len(sprite)
    way = ways().to(device)[motion, strength]  # (B, STEPS, 3)
    first = starts().to(device)[motion, strength, :, 0]
    corner = CELL * (first[:, None] + torch.stack([row, column], 1)[:, None] + way[..., 1:])
    pixel = torch.arange(CANVAS, device=device)
    y, x = ((pixel + CELL * shift[:, None]) % TILE for shift in (phase // 2, phase % 2))
    tile = backgrounds().to(device)[texture * len(TIMES) + time]
    plain = tile[torch.arange(size, device=device)[:, None, None], y[:, :, None], x[:, None]]  # (B, CANVAS, CANVAS, 3)
    frames = plain[:, None].repeat(1, STEPS, 1, 1, 1)
    inside = torch.arange(CARD, device=device)
    at = (
        torch.arange(size, device=device)[:, None, None, None], torch.arange(STEPS, device=device)[:, None, None],
        (corner[..., 0, None] + inside)[..., None], (corner[..., 1, None] + inside)[..., None, :],
    )  # fmt: skip
    drawn = cards().to(device)[sprite[:, None], way[..., 0]]
    frames[at] = over(drawn, card_alpha().to(device), frames[at])
    return torch.cat([frames[:, :1], frames[:, 1:].repeat_interleave(TEMPORAL_STRIDE, 1)], 1).float() / 255
