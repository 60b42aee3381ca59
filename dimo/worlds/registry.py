"""All worlds. To add one, write a file beside this one and add a line here."""

from dimo.worlds.protocol import World
from dimo.worlds.shapes import ShapesWorld
from dimo.worlds.sprites import SpritesWorld
from dimo.worlds.tiles import TilesWorld

WORLDS: dict[str, type[World]] = {
    "shapes": ShapesWorld,
    "sprites": SpritesWorld,
    "tiles": TilesWorld,
}
