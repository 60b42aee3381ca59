"""Recognise checkpoint folders in URSA's layout, and derive video sizes from their VAE."""

from __future__ import annotations

import os
from pathlib import Path

from dimo.errors import DimoError, nearest
from dimo.ursa.config import UrsaConfig
from dimo.ursa.inputs import SPATIAL_STRIDE, TEMPORAL_STRIDE
from dimo.ursa.weights import absence, read_json, read_pickle

PARTS = ("transformer", "scheduler", "tokenizer", "vae")
INSIDE = ("*/", "*/*/", "*/snapshots/*/", "hub/*/snapshots/*/")  # the last two: the Hugging Face cache
UPSTREAM_VAES = {"AutoencoderVQCosmos3D": "autoencoder_vq_cosmos3d", "AutoencoderVQ": "autoencoder_vq"}
UPSTREAM_HEAD_DIM = 128  # the only head size that upstream supports
VIDEO_STRIDES, IMAGE_STRIDES = (TEMPORAL_STRIDE, SPATIAL_STRIDE), (1, 16)  # (time, space) of URSA's two VAEs
STRIDES = {"AutoencoderVQ": IMAGE_STRIDES}  # of VAE classes whose config.json lacks them; otherwise the video VAE's


def require_checkpoint(folder: str | Path) -> Path:
    """Return `folder` if it contains at least one part of a checkpoint.

    Raises:
        DimoError: it contains none; if a parent or subfolder does, the message names it.
    """
    folder = Path(folder)
    if is_checkpoint(folder):
        return folder
    if not folder.exists():
        raise DimoError(f"checkpoint folder {folder} {absence(folder) or 'does not exist'}")
    parts = f"a checkpoint is a folder with {', '.join(f'{part}/' for part in PARTS)}"
    what = "has none of these" if folder.is_dir() else "is a file"
    raise DimoError(f"{parts}, but {folder} {what}{_meant(folder)}")


def is_checkpoint(folder: Path) -> bool:
    return any((folder / part).is_dir() for part in PARTS)


def _meant(given: Path) -> str:
    above = next((folder for folder in given.absolute().parents[:2] if is_checkpoint(folder)), None)
    if above:
        return f"; give the folder above it, {above}"
    found = sorted({f.parent.parent for level in INSIDE for f in given.glob(f"{level}transformer/config.json")})
    if len(found) == 1:
        return f"; give the one inside it, {found[0]}"
    return f"; give one of those inside it, such as {found[0]}" if found else ""


def vae_config(folder: Path) -> dict | None:
    """Content of the VAE's config.json; None if the checkpoint has no VAE."""
    where = folder / "vae"
    there = where.is_symlink() or where.is_file() or (where.is_dir() and any(where.iterdir()))
    if where.is_file():
        raise DimoError(f"{where} is a file, but a checkpoint's VAE is a folder")
    return read_json(where / "config.json") if there else None


def vae_strides(folder: Path) -> tuple[int, int]:
    """(temporal, spatial) strides of the folder's VAE; 4 and 8, URSA's, if it does not specify them."""
    config = vae_config(folder) or {}
    time, space = STRIDES.get(str(config.get("_class_name")), VIDEO_STRIDES)
    strides = config.get("temporal_stride", time), config.get("spatial_stride", space)
    if not all(type(s) is int and s > 0 for s in strides):
        raise DimoError(
            f"temporal_stride and spatial_stride in {folder / 'vae' / 'config.json'} must be positive whole numbers, "
            f"got {strides}"
        )
    return strides


def makes_images(folder: str | Path) -> bool:
    """Whether this is an image model, that is, its VAE has temporal stride 1."""
    return vae_strides(Path(folder))[0] == 1


def default_size(folder: str | Path) -> tuple[int, int, int]:
    """Default (num_frames, height, width): 17x256x256 for URSA's video models, 1x1024x1024 for its image models."""
    time, space = vae_strides(Path(folder))
    return (1, 64 * space, 64 * space) if time == 1 else (4 * time + 1, 32 * space, 32 * space)


def read_config(folder: Path) -> UrsaConfig:
    """Read the config.json of a transformer folder."""
    values = read_json(folder / "config.json")
    try:
        return UrsaConfig.from_dict(values)
    except DimoError as error:
        raise DimoError(f"{folder / 'config.json'}: {error}") from error


def require_upstream_layout(folder: Path, what: str = "diffnext's pipeline") -> None:
    """Raise DimoError unless URSA's own pipeline can run this checkpoint folder, judging by its JSON files.

    Also loads `scheduler_model.pth` safely once, because upstream's scheduler would unpickle arbitrary code in it.

    Args:
        what: what needs that layout, for the message.
    """
    read_json(folder / "model_index.json")
    config = read_config(folder / "transformer")
    require_upstream_heads(what, config)
    if config.lm_head_size != config.codebook_size:
        raise DimoError(
            f"{what} needs a head over the codebook alone, but {folder / 'transformer'}/config.json has "
            f"lm_head_size = {config.lm_head_size} for {config.codebook_size} codes"
        )
    vae = read_json(folder / "vae" / "config.json").get("_class_name", "")
    if vae not in UPSTREAM_VAES:
        raise DimoError(f"{what} cannot run the VAE in {folder / 'vae'}, of class {vae!r}{nearest(vae, UPSTREAM_VAES)}")
    read_pickle(folder / "scheduler" / "scheduler_model.pth")


def require_upstream_heads(what: str, config: UrsaConfig, instead: str = "") -> None:
    """Raise DimoError unless the attention heads have upstream's only size."""
    if config.head_dim != UPSTREAM_HEAD_DIM:
        raise DimoError(
            f"{what} needs head_dim = {UPSTREAM_HEAD_DIM}, but this checkpoint's config.json has head_dim = "
            f"{config.head_dim}{instead}"
        )


def student_file(weights: str | Path) -> Path:
    """Resolve the `weights` argument of `load_student` to a file or folder of weights.

    Raises:
        DimoError: it is the folder of an unfinished run, or a checkpoint or a file in one, whose networks lack the last
            gain.
    """
    source = Path(weights)
    run = source.parent.parent if source.match("checkpoints/final") else source
    if (run / "checkpoints" / "final").is_dir():
        source = run / "checkpoints" / "final"
    elif (run / "status.json").exists():
        raise DimoError(f"{run} is a run without checkpoints/final: it has not finished")
    else:
        _refuse_checkpoint(source)
    return next((source / name for name in ("student.pt", "student") if os.path.lexists(source / name)), source)


def _refuse_checkpoint(source: Path) -> None:
    """Raise DimoError for a checkpoint, from which training goes on, or a file in it, naming the run's students."""
    is_file = source.is_file()
    folder = source.absolute().parent if is_file else source.absolute()
    if not ((folder / "ema.safetensors").exists() and (folder / "manifest.json").exists()):
        return
    what = "a network of a checkpoint, without model.final_logit_gain" if is_file else "a checkpoint"
    there = [folder.parent / "final", *sorted(folder.parent.glob("milestone-*"))[-1:]]
    students = " or ".join(str(place) for place in there if place.is_dir())
    students = students or "checkpoints/final, or a milestone, which a run keeps every experiment.keep_every steps"
    raise DimoError(f"{source} is {what}, from which training goes on; a student is {students}")
