"""Which folder is a checkpoint in URSA's own layout, and which sizes of video are its."""

from __future__ import annotations

import os
from pathlib import Path

from dimo.errors import DimoError
from dimo.ursa.config import UrsaConfig
from dimo.ursa.inputs import SPATIAL_STRIDE, TEMPORAL_STRIDE
from dimo.ursa.weights import absence, read_json

PARTS = ("transformer", "scheduler", "tokenizer", "vae")
INSIDE = ("*/", "*/*/", "*/snapshots/*/", "hub/*/snapshots/*/")  # the last two are the Hugging Face tools' cache
STRIDES = {"AutoencoderVQ": (1, 16)}  # of a VAE whose config.json does not say; else the video VAE's


def require_checkpoint(folder: str | Path) -> Path:
    """The folder, which holds at least one part of a checkpoint.

    Raises:
        DimoError: it holds none; where a folder above or below it does, that is named.
    """
    folder = Path(folder)
    if is_checkpoint(folder):
        return folder
    if not folder.exists():
        raise DimoError(f"checkpoint folder {folder} {absence(folder) or 'does not exist'}")
    parts = f"a checkpoint is a folder with {', '.join(f'{part}/' for part in PARTS)}"
    what = "has none of these" if folder.is_dir() else "is a file"
    raise DimoError(f"{parts}, and {folder} {what}{_meant(folder)}")


def is_checkpoint(folder: Path) -> bool:
    return any((folder / part).is_dir() for part in PARTS)


def _meant(given: Path) -> str:
    above = next((folder for folder in given.absolute().parents[:2] if is_checkpoint(folder)), None)
    if above:
        return f"; give the folder that it lies in, {above}"
    found = sorted({f.parent.parent for level in INSIDE for f in given.glob(f"{level}transformer/config.json")})
    if len(found) == 1:
        return f"; give the one inside it, {found[0]}"
    return f"; give one of those inside it, such as {found[0]}" if found else ""


def vae_config(folder: Path) -> dict | None:
    """What the VAE's config.json holds; None where the folder has no VAE at all."""
    where = folder / "vae"
    there = where.is_symlink() or where.is_file() or (where.is_dir() and any(where.iterdir()))
    if where.is_file():
        raise DimoError(f"{where} is a file, and a checkpoint's VAE is a folder")
    return read_json(where / "config.json") if there else None


def vae_strides(folder: Path) -> tuple[int, int]:
    """(time, space) strides of the folder's VAE; URSA's 4 and 8 where it does not say."""
    config = vae_config(folder) or {}
    time, space = STRIDES.get(str(config.get("_class_name")), (TEMPORAL_STRIDE, SPATIAL_STRIDE))
    strides = config.get("temporal_stride", time), config.get("spatial_stride", space)
    if not all(type(s) is int and s > 0 for s in strides):
        raise DimoError(
            f"temporal_stride and spatial_stride in {folder / 'vae' / 'config.json'} must be positive whole numbers, "
            f"got {strides}"
        )
    return strides


def makes_images(folder: str | Path) -> bool:
    """Whether the folder's VAE has no stride in time: then its model was trained on single images."""
    return vae_strides(Path(folder))[0] == 1


def default_size(folder: str | Path) -> tuple[int, int, int]:
    """(num_frames, height, width) where nobody says: URSA's smaller video, 17x256x256, or one image of 64x64 tokens.

    With the image models' stride of 16 that is 1024x1024.
    """
    time, space = vae_strides(Path(folder))
    return (1, 64 * space, 64 * space) if time == 1 else (4 * time + 1, 32 * space, 32 * space)


def read_config(folder: Path) -> UrsaConfig:
    """The sizes in a transformer folder's config.json."""
    values = read_json(folder / "config.json")
    try:
        return UrsaConfig.from_dict(values)
    except DimoError as error:
        raise DimoError(f"{folder / 'config.json'}: {error}") from error


def student_file(weights: str | Path) -> Path:
    """The file or folder of weights behind the same words.

    Raises:
        DimoError: a run that has not finished.
    """
    source = Path(weights)
    if (source / "checkpoints" / "final").is_dir():
        source = source / "checkpoints" / "final"
    elif (source / "status.json").exists():
        raise DimoError(f"{source} is a run that has no checkpoints/final: it has not finished")
    return source / "student.pt" if os.path.lexists(source / "student.pt") else source
