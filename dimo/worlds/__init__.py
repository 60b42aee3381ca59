"""Worlds: synthetic videos with a known distribution, as a checkpoint folder in URSA's layout and an exact oracle."""

from __future__ import annotations

import os
from pathlib import Path

from dimo.errors import DimoError, nearest
from dimo.paths import user_path
from dimo.ursa.inputs import SPATIAL_STRIDE, TEMPORAL_STRIDE
from dimo.ursa.layout import default_size, require_checkpoint
from dimo.ursa.weights import read_json
from dimo.worlds.protocol import World
from dimo.worlds.registry import WORLDS

DATA = Path(__file__).parent / "data"
WORLD_FILE = "world.json"  # the world's name and sizes, in its teacher's folder
DEFAULT_WORLD = "shapes"
SHIPPED_STUDENT = DATA / DEFAULT_WORLD / "student"


def built_in_worlds() -> list[str]:
    """Names of the worlds that ship with a teacher; `distill.teacher_ckpt` accepts them in place of a folder."""
    return sorted(p.name for p in DATA.iterdir() if (p / "transformer").is_dir()) if DATA.is_dir() else []


def student_of(world: str) -> Path | None:
    """The student that ships with a world, in the folder `student` of its teacher's; None if none does."""
    folder = DATA / world / SHIPPED_STUDENT.name
    return folder if world in WORLDS and folder.is_dir() else None


def world_of(student: str | Path) -> str | None:
    """The world with which this student ships; None if it does not."""
    return next((world for world in built_in_worlds() if student_of(world) == Path(student)), None)


def checkpoint_folder(teacher_ckpt: str | Path) -> Path:
    """Resolve `distill.teacher_ckpt`, the name of a built-in world ("shapes") or a path, to a checkpoint folder.

    Raises:
        DimoError: the path does not exist or is not a checkpoint folder (the message names one nearby, if there is
            one), or the name is both a built-in world and a folder.
    """
    built_in, teacher_ckpt = built_in_worlds(), user_path(teacher_ckpt)
    if not str(teacher_ckpt).strip():
        raise DimoError(f"teacher_ckpt must not be empty, got {str(teacher_ckpt)!r}")  # Path("") is the current folder
    if str(teacher_ckpt) in built_in:
        _require_no_namesake(teacher_ckpt)
        return DATA / str(teacher_ckpt)
    if not os.path.lexists(teacher_ckpt):
        if str(teacher_ckpt) in WORLDS:
            raise DimoError(
                f"the world {teacher_ckpt} ships without a teacher: train one with `dimo world train {teacher_ckpt} "
                "-o FOLDER` and give FOLDER as teacher_ckpt"
            )
        hint, name = nearest(str(teacher_ckpt), built_in) if built_in else "", Path(teacher_ckpt).name
        if name in WORLDS and name not in built_in:
            hint = f"; `dimo world train {name} -o {teacher_ckpt}` makes one"
        raise DimoError(f"teacher_ckpt {teacher_ckpt} is neither a folder nor a built-in world{hint}")
    return require_checkpoint(teacher_ckpt)


def _require_no_namesake(world: str) -> None:
    """Raise if the current directory has a folder of the world's name that is not a run folder."""
    here, built_in = Path(world), DATA / world
    if here.is_dir() and not (here / "config.yaml").exists() and not here.samefile(built_in):
        raise DimoError(
            f"teacher_ckpt {world} is ambiguous, as there is a folder of this name: use ./{world} for the folder, "
            f"{built_in} for the built-in world"
        )


def is_world(folder: str | Path) -> bool:
    """Whether a checkpoint folder belongs to a world, so that an oracle can score its videos."""
    return (Path(folder) / WORLD_FILE).exists()


def load_world(folder: str | Path) -> World:
    """The world of a checkpoint folder, from its world.json; DEFAULT_WORLD if that has no name.

    Raises:
        DimoError: there is no world.json, it is damaged, or its world is not registered.
    """
    if not is_world(folder):
        raise DimoError(
            f"{folder} is not a world's checkpoint (it has no {WORLD_FILE}), so no oracle can score its videos"
        )
    file = Path(folder) / WORLD_FILE
    values = read_json(file)
    name = str(values.pop("world", DEFAULT_WORLD))
    if name not in WORLDS:
        raise DimoError(f"{file} names the world {name!r}, which is not registered{nearest(name, WORLDS)}")
    try:
        return WORLDS[name](**values)
    except TypeError as error:
        raise DimoError(f"{file} is damaged: {error}") from error


def video_size(folder: str | Path) -> tuple[int, int, int]:
    """Default (num_frames, height, width) of a checkpoint: a world's only size, else URSA's (`default_size`)."""
    if not is_world(folder):
        return default_size(folder)
    return size_of(load_world(folder).latents_shape)


def size_of(latents_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(num_frames, height, width) of a world's videos, whose decoders have URSA's strides."""
    t, h, w = latents_shape
    return TEMPORAL_STRIDE * (t - 1) + 1, SPATIAL_STRIDE * h, SPATIAL_STRIDE * w


def require_world(world: World, latents_shape: tuple[int, int, int], codebook_size: int) -> None:
    """Raise unless latents_shape (T, H, W) and codebook_size are those of the world."""
    if codebook_size != world.codebook_size:
        raise DimoError(
            f"the checkpoint's codebook has {codebook_size} codes, but the world in its {WORLD_FILE} has "
            f"{world.codebook_size}: one of the two belongs to another folder"
        )
    if tuple(latents_shape) != world.latents_shape:
        frames, height, width = size_of(world.latents_shape)
        raise DimoError(
            f"this world's latents_shape is {world.latents_shape}, but the configuration gives {tuple(latents_shape)}; "
            f"use num_frames={frames}, height={height}, width={width}"
        )
