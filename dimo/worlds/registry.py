"""The worlds there are. A new one is a file beside this one, and its line here."""

from dimo.worlds.protocol import World
from dimo.worlds.shapes import ShapesWorld

WORLDS: dict[str, type[World]] = {
    "shapes": ShapesWorld,
}
