"""`dimo world train NAME`: every world has a parser of its own, whose flags are its sizes and the teacher's recipe."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from dimo.commands.examples import examples
from dimo.worlds.registry import WORLDS
from dimo.worlds.teacher import TeacherRecipe, make_teacher


def add_world(commands, kinds: dict[type, Callable]) -> None:
    """Add the command to the parser's `commands`; `kinds` read the numbers of its flags, by their type."""
    world = commands.add_parser("world", help="make a built-in world's teacher", description="Built-in worlds.")
    actions = world.add_subparsers(metavar="action", required=True)
    train = actions.add_parser(
        "train",
        help="train the world's teacher and write a checkpoint folder in URSA's layout",
        description="Train the teacher of a world by denoising its own videos.",
        epilog=examples(["world train"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = train.add_subparsers(metavar="NAME", required=True, title="worlds")
    for name, kind in WORLDS.items():
        sub = names.add_parser(name, help=kind.__doc__.splitlines()[0], description=kind.__doc__, allow_abbrev=False)
        sub.set_defaults(world=name)
        sub.add_argument("-o", "--out", required=True, help="the checkpoint folder to write")
        for field in (*dataclasses.fields(kind), *dataclasses.fields(TeacherRecipe)):
            text = f"{field.metadata['help']} (default: {field.default})"
            read = kinds.get(type(field.default), str)
            sub.add_argument(f"--{field.name}", type=read, default=field.default, help=text)


def world_train(args: argparse.Namespace) -> None:
    """Train the world's teacher, and print how good it is."""

    def chosen(kind):
        return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})

    print(make_teacher(chosen(WORLDS[args.world]), chosen(TeacherRecipe), Path(args.out)))
