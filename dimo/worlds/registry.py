"""The worlds there are. A new one is a file beside this one, and its line here."""

from dimo.worlds.shapes import ShapesWorld
from dimo.worlds.world import World

WORLDS: dict[str, type[World]] = {
    "shapes": ShapesWorld,
}
