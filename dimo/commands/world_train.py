"""`dimo world train NAME`: each world has its own subparser, with flags for its sizes and the teacher's recipe."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from dimo.commands.ending import next_commands
from dimo.commands.examples import examples
from dimo.errors import DimoError
from dimo.paths import quoted
from dimo.run.ranks import launched_or_alone, read_launch
from dimo.worlds.registry import WORLDS
from dimo.worlds.teacher import RECIPES, TeacherRecipe, make_teacher


def add_world(commands, kinds: dict[type, Callable]) -> None:
    """Add the command to the subparsers `commands`; `kinds` maps int and float to functions that parse them."""
    world = commands.add_parser("world", help="train the teacher of a world", description="Built-in worlds.")
    actions = world.add_subparsers(metavar="action", required=True)
    train = actions.add_parser(
        "train",
        help="train a world's teacher and write its checkpoint folder in URSA's layout",
        description="Train the teacher of a world by denoising the world's videos. On N GPUs of a machine:\n"
        "torchrun --nproc_per_node N -m dimo world train NAME -o OUT --device cuda",
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
            text = f"{field.metadata['help']} (default: {'none' if default == '' else default})"
            sub.add_argument(f"--{field.name}", type=kinds.get(type(default), str), default=default, help=text)


def world_train(args: argparse.Namespace) -> None:
    """Train the world's teacher and print its scores."""

    def chosen(kind):
        return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})

    with together(args.device):
        table = make_teacher(chosen(WORLDS[args.world]), chosen(TeacherRecipe), Path(args.out))
    if table:  # else another process has it
        print(table)
        print(f"written: {args.out}, a checkpoint folder in URSA's layout")
        print(next_commands({f"inspect {quoted(args.out)}": "its sizes, which a training on it needs"}))


@contextlib.contextmanager
def together(device: str) -> Iterator[None]:
    """In this context the processes that torchrun has started train together, each on a GPU of its own."""
    if not read_launch():
        yield
        return
    if device == "cuda":
        own, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= gpus:
            raise DimoError(f"there are {gpus} GPUs for more processes: start one per GPU")
        torch.cuda.set_device(own)
    with launched_or_alone():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
