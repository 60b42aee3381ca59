"""All worlds. To add one, write a file beside this one and add a line here."""

from collections.abc import Callable

import torch

from dimo.worlds.protocol import World
from dimo.worlds.shapes import ShapesWorld
from dimo.worlds.sprite_reader import reads_as
from dimo.worlds.sprites import SpritesWorld
from dimo.worlds.tiles import TilesWorld

WORLDS: dict[str, type[World]] = {
    "shapes": ShapesWorld,
    "sprites": SpritesWorld,
    "tiles": TilesWorld,
}

# of worlds whose pictures can be read: whether videos, codes (B, N), are seen as the prompts of index (B,), (B,) bool
READERS: dict[str, Callable[..., torch.Tensor]] = {"sprites": reads_as}
