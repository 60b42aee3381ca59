"""Generators with known ground truth: a checkpoint folder in URSA's layout plus an exact oracle."""

from __future__ import annotations

import os
from pathlib import Path

from dimo.errors import DimoError, nearest
from dimo.paths import user_path
from dimo.ursa.layout import default_size, require_checkpoint
from dimo.ursa.weights import read_json
from dimo.worlds.protocol import World
from dimo.worlds.registry import WORLDS

DATA = Path(__file__).parent / "data"
WORLD_FILE = "world.json"  # which world it is and its sizes, beside its teacher
DEFAULT_WORLD = "shapes"
SHIPPED_STUDENT = DATA / DEFAULT_WORLD / "student"


def built_in_worlds() -> list[str]:
    """Names that `distill.teacher_ckpt` takes besides folders: of the worlds that ship with a teacher."""
    return sorted(p.name for p in DATA.iterdir() if p.is_dir()) if DATA.is_dir() else []


def checkpoint_folder(teacher_ckpt: str | Path) -> Path:
    """The folder behind `distill.teacher_ckpt`: a built-in world's name ("shapes"), or a path.

    Raises:
        DimoError: nothing is there, or no checkpoint, where a folder that is one, above or below, is named; or both a
            world and a folder are called so.
    """
    built_in, teacher_ckpt = built_in_worlds(), user_path(teacher_ckpt)
    if not str(teacher_ckpt).strip():
        raise DimoError(f"teacher_ckpt must not be empty, got {str(teacher_ckpt)!r}")  # Path("") is the folder here
    if str(teacher_ckpt) in built_in:
        _require_no_namesake(teacher_ckpt)
        return DATA / str(teacher_ckpt)
    if not os.path.lexists(teacher_ckpt):
        if str(teacher_ckpt) in WORLDS:
            raise DimoError(
                f"the world {teacher_ckpt} ships without a teacher: make one with `dimo world train {teacher_ckpt} "
                "-o FOLDER`, and give FOLDER as teacher_ckpt"
            )
        hint = nearest(str(teacher_ckpt), built_in) if built_in else ""
        raise DimoError(f"teacher_ckpt {teacher_ckpt} is neither a folder nor a built-in world{hint}")
    return require_checkpoint(teacher_ckpt)


def _require_no_namesake(world: str) -> None:
    """Raise where a folder here is called as the world. A run folder may be: runs/shapes is a usual one."""
    here, built_in = Path(world), DATA / world
    if here.is_dir() and not (here / "config.yaml").exists() and not here.samefile(built_in):
        raise DimoError(
            f"teacher_ckpt {world} is a built-in world, and there is a folder {world} here: say ./{world} for the "
            f"folder, {built_in} for the built-in world"
        )


def is_world(folder: str | Path) -> bool:
    """Whether a checkpoint folder belongs to a world, whose oracle can score its videos."""
    return (Path(folder) / WORLD_FILE).exists()


def load_world(folder: str | Path) -> World:
    """The world that a checkpoint folder belongs to, from its world.json; without a name there it is DEFAULT_WORLD.

    Raises:
        DimoError: there is no world.json, it is damaged, or it names a world that is not registered.
    """
    if not is_world(folder):
        raise DimoError(f"{folder} is no built-in world (it has no {WORLD_FILE}), so nothing here can score its videos")
    file = Path(folder) / WORLD_FILE
    values = read_json(file)
    name = str(values.pop("world", DEFAULT_WORLD))
    if name not in WORLDS:
        raise DimoError(f"{file} is of a world {name!r}, which is not registered{nearest(name, WORLDS)}")
    try:
        return WORLDS[name](**values)
    except TypeError as error:
        raise DimoError(f"{file} is damaged: {error}") from error


def video_size(folder: str | Path) -> tuple[int, int, int]:
    """(num_frames, height, width) where nobody says: a world's only size, else 17x256x256 or one image."""
    if not is_world(folder):
        return default_size(folder)
    t, h, w = load_world(folder).latents_shape
    return 4 * t - 3, 8 * h, 8 * w


def require_world(world: World, latents_shape: tuple[int, int, int], codebook_size: int) -> None:
    """Raise unless a checkpoint's videos, of `latents_shape` over `codebook_size` codes, are this world's."""
    if codebook_size != world.codebook_size:
        raise DimoError(
            f"the checkpoint's codebook has {codebook_size} codes, the world of its {WORLD_FILE} {world.codebook_size}"
            ": one of the two is not from this folder"
        )
    if tuple(latents_shape) != world.latents_shape:
        t, h, w = world.latents_shape
        raise DimoError(
            f"this world's latents_shape is {world.latents_shape}, the configuration asks for {tuple(latents_shape)}; "
            f"use distill.num_frames={4 * t - 3} distill.height={8 * h} distill.width={8 * w}"
        )
