"""`dimo world train NAME`: each world has its own subparser, with flags for its sizes and the teacher's recipe."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from dimo.commands.ending import next_commands
from dimo.commands.examples import examples
from dimo.worlds.registry import WORLDS
from dimo.worlds.teacher import RECIPES, TeacherRecipe, make_teacher


def add_world(commands, kinds: dict[type, Callable]) -> None:
    """Add the command to the subparsers `commands`; `kinds` maps int and float to functions that parse them."""
    world = commands.add_parser("world", help="train the teacher of a world", description="Built-in worlds.")
    actions = world.add_subparsers(metavar="action", required=True)
    train = actions.add_parser(
        "train",
        help="train a world's teacher and write its checkpoint folder in URSA's layout",
        description="Train the teacher of a world by denoising the world's videos.",
        epilog=examples(["world train"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = train.add_subparsers(metavar="NAME", required=True, title="worlds")
    for name, kind in WORLDS.items():
        about = kind.__doc__ or name
        sub = names.add_parser(name, help=about.splitlines()[0], description=about, allow_abbrev=False)
        sub.set_defaults(world=name)
        sub.add_argument("-o", "--out", required=True, help="the checkpoint folder to write")
        recipe = dataclasses.asdict(RECIPES.get(name, TeacherRecipe()))
        for field in (*dataclasses.fields(kind), *dataclasses.fields(TeacherRecipe)):
            default = recipe.get(field.name, field.default)
            text = f"{field.metadata['help']} (default: {default})"
            sub.add_argument(f"--{field.name}", type=kinds.get(type(default), str), default=default, help=text)


def world_train(args: argparse.Namespace) -> None:
    """Train the world's teacher and print its scores."""

    def chosen(kind):
        return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})

    print(make_teacher(chosen(WORLDS[args.world]), chosen(TeacherRecipe), Path(args.out)))
    print(f"written: {args.out}, a checkpoint folder in URSA's layout")
    print(next_commands({f"inspect {args.out}": "its sizes, which a training on it needs"}))
