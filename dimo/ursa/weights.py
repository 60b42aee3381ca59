"""Read checkpoint files: JSON, safetensors (sharded or not) and pickled tensors, without executing any code."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from dimo.errors import DimoError, are_finite, reason

WEIGHTS = "diffusion_pytorch_model"
LFS_POINTER = b"version https://git-lfs"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}  # safetensors' names
ZIP = b"PK\x03\x04"  # how what torch.save writes begins
UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2")  # suffixes of unfinished downloads
_VARIANT = re.compile(rf"{WEIGHTS}(?:\.safetensors\.index|\.bin\.index)?(\.\w+)\.(?:safetensors|bin|json)")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def weight_files(source: str | Path) -> list[Path]:
    """List the weight files of `source`.

    Args:
        source: a weights file, or a folder with weights in .safetensors or .bin, sharded or not. Without files of the
            plain name, a single variant such as `diffusion_pytorch_model.fp16.safetensors` is used.

    Returns:
        The file, or all shards.

    Raises:
        DimoError: no weights, a missing shard, or several variants.
    """
    source = Path(source)
    if not source.is_dir():
        if not source.exists():
            raise DimoError(f"weights file {source} {absence(source) or 'does not exist'}")
        return [source]
    variants = [""] + sorted({match[1] for match in map(_VARIANT.fullmatch, os.listdir(source)) if match})
    found = {variant: files for variant in variants if (files := _of_variant(source, variant))}
    if "" not in found and len(found) > 1:
        raise DimoError(
            f"{source} contains the weights in several variants, {' and '.join(v[1:] for v in found)}: keep only one"
        )
    if found:
        return next(iter(found.values()))
    file = source / f"{WEIGHTS}.safetensors"
    why = absence(file) or f"does not exist, nor .bin, nor an index of shards{_other_weights(source)}"
    raise DimoError(f"weights file {file} {why}")


def _of_variant(folder: Path, variant: str) -> list[Path]:
    for end in (".safetensors", ".bin"):
        index, file = folder / f"{WEIGHTS}{end}.index{variant}.json", folder / f"{WEIGHTS}{variant}{end}"
        for one in (index, file):
            if one.is_symlink() and not one.exists():  # the preferred file; do not fall back to another
                raise DimoError(f"weights file {one} {absence(one)}")
        if index.exists():
            return _shards(index)
        if file.exists():
            return [file]
    return []


def _other_weights(folder: Path) -> str:
    """A hint at other weight files in or below the folder."""
    others = sorted(f.name for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".pt"))
    if any(_SHARD.search(name) for name in others):
        return f"; the index of its shards, such as {others[0]}, is missing"
    deeper = [f.parent for end in ("safetensors", "bin") for f in folder.glob(f"*/{WEIGHTS}*.{end}")]
    deeper += [f for levels in ("*", "*/*") for f in folder.glob(f"{levels}/student.pt")]
    if deeper:
        return f"; did you mean {min(deeper)}?"
    return f"; give the path of one of its files: {', '.join(others)}" if others else ""


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DimoError(f"{index} is damaged: it has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    missing = [name for name in names if Path(name).name != name or not (index.parent / name).exists()]
    if missing:
        why = absence(index.parent / missing[0])
        raise DimoError(
            f"{len(missing)} of {len(names)} shards that {index} names are missing, the first is {missing[0]}"
            + (f": it {why}" if why else "; the copy of the folder is incomplete")
        )
    return [index.parent / name for name in names]


def read_weights(source: str | Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Read a full state dict from a weights file (.safetensors, .bin, .pt), or a folder with one or with its shards.

    Safetensors files are mapped, and with a GPU as `device` each tensor goes there by itself; others stay on the CPU.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:  # which safetensors takes for the first GPU
        device = torch.device("cuda", torch.cuda.current_device())
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(source):
        _join(state, _read_safetensors(file, device) if file.suffix == ".safetensors" else read_pickle(file), file)
    return state


def _join(known: dict, more: dict, file: Path) -> None:
    """Add the entries of another shard to `known`; raise DimoError for a key that both have."""
    twice = sorted(known.keys() & more.keys())
    if twice:
        raise DimoError(f"{file} contains {twice[0]}, which another shard also contains; download the shards again")
    known |= more


def weight_headers(source: str | Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """{key: (shape, dtype's name)} of what `read_weights` would read; of safetensors files, only the header is read."""
    headers: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in weight_files(source):
        if file.suffix != ".safetensors":
            values = read_pickle(file).items()
            _join(headers, {key: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for key, v in values}, file)
            continue
        try:
            with safe_open(file, "pt") as content:
                parts = {key: content.get_slice(key) for key in content.keys()}
                found = {key: (tuple(part.get_shape()), str(part.get_dtype())) for key, part in parts.items()}
                _join(headers, {key: (shape, DTYPES.get(name, name)) for key, (shape, name) in found.items()}, file)
        except SafetensorError as error:
            raise _damaged(file, error) from error
    return headers


def weight_shapes(source: str | Path) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the weights `read_weights` would read."""
    return {key: shape for key, (shape, _) in weight_headers(source).items()}


def _read_safetensors(file: Path, device: torch.device) -> dict[str, torch.Tensor]:
    try:
        # safetensors knows no "cpu:0", which is accelerate's name of the CPU of one of several processes
        return load_file(file, "cpu" if device.type == "cpu" else str(device))
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> DimoError:
    refuse_what_is_none(file)
    return DimoError(f"weights file {file} is damaged (an incomplete copy?): {error}")


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Read a pickled {name: tensor}; anything else in it is rejected, and code is never executed."""
    require_file(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged or malicious file
        refuse_what_is_none(file)
        why = reason(error)
        if why.startswith("Weights only load failed"):  # torch goes on to recommend weights_only=False
            why = "it was not written by torch.save, or contains more than tensors (code in it is not executed)"
        elif _is_cut_off(file):  # torch says only "Invalid argument"
            why = "it is cut off (an incomplete copy?)"
        elif not isinstance(error, RuntimeError | OSError):  # the unpickler stumbles over a text in many ways
            why = "it was not written by torch.save"
        raise DimoError(f"{file} could not be read as plain tensors: {why}") from error
    if not isinstance(content, dict):
        raise DimoError(f"{file} must hold a plain state dict, got {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise DimoError(f"{file} must map names to tensors only, but {key!r} is of type {type(value).__name__}")
    return content


def _is_cut_off(file: Path) -> bool:
    """Whether a file of torch.save, a zip archive, lacks its end, where a zip archive has its index."""
    with open(file, "rb") as opened:
        return opened.read(len(ZIP)) == ZIP and not zipfile.is_zipfile(file)


def require_file(file: Path) -> None:
    """Raise DimoError if `file` does not exist, with the reason if it can be determined."""
    if not file.exists():
        raise DimoError(f"{file} {absence(file) or 'is missing'}")


def absence(path: Path) -> str:
    """Why `path` does not exist, if that can be determined: a broken link or an unfinished download. Else empty."""
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            target = link.parent / os.readlink(link)
            return f"is a link to {target}, which does not exist (was a cache cleaned?); download it again"
    download = _unfinished(path.parent)
    return f"is missing, and {download} is an unfinished download; download it again" if download else ""


def _unfinished(folder: Path) -> Path | None:
    """An unfinished download, in `folder` or where the Hugging Face tools keep theirs; None if there is none."""
    places = [folder, folder / ".cache/huggingface/download", folder.parent / ".cache/huggingface/download"]
    places += [places[-1] / folder.name]
    places += [above.parent / "blobs" for above in folder.parents[:2] if above.name == "snapshots"]
    found = (file for place in places if place.is_dir() for file in place.iterdir() if file.suffix in UNFINISHED)
    return min(found, default=None)


def refuse_what_is_none(file: Path) -> None:
    """Raise DimoError if a file that could not be read is empty or a Git LFS pointer."""
    with open(file, "rb") as content:
        start = content.read(len(LFS_POINTER))
        if not start:
            raise DimoError(f"{file} is empty (0 bytes)")
        if start == LFS_POINTER:
            raise DimoError(f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` there")


def load_weights(
    transformer: torch.nn.Module, state: dict, where: str, assign: bool = False, model: str = "this model"
) -> None:
    """`load_state_dict(strict=True)` with readable errors.

    Args:
        state: full state dict.
        where, model: what the weights and the transformer are, for error messages.
        assign: as in `load_state_dict`: use the tensors of `state` instead of copying them.

    Raises:
        DimoError: keys or shapes do not match (the first is named), or values are not floating-point or not finite.
    """
    own = transformer.state_dict()
    problem = misfit(*({key: tuple(value.shape) for key, value in each.items()} for each in (own, state)))
    if problem:
        raise DimoError(f"the weights of {where} do not fit {model}: {problem}")
    for key, value in state.items():
        if own[key].is_floating_point():  # an autoencoder has integer buffers, too
            require_numbers(value, f"{key} in the weights of {where}")
    transformer.load_state_dict(state, strict=True, assign=assign)


def require_numbers(tensor: torch.Tensor, name: str) -> None:
    """Raise DimoError unless `tensor` is dense, floating-point and finite."""
    if tensor.layout != torch.strided:
        raise DimoError(f"{name} must be a dense tensor, got {tensor.layout}")
    if not tensor.is_floating_point():
        raise DimoError(f"{name} must hold floating-point numbers, got {tensor.dtype}")
    if not are_finite(tensor):
        raise DimoError(f"{name} must be finite, got NaN or infinity")


def scale_logits(state: dict[str, torch.Tensor], gain: float) -> dict[str, torch.Tensor]:
    """The state dict of a transformer whose logits are `gain` times as large: only the last norm's weight changes.

    Without that weight, as on ranks that hold no part of a sharded network, `state` is returned as it is.
    """
    norm = "model.norm.weight"
    return state | {norm: state[norm] * gain} if norm in state else state


def misfit(needed: dict[str, tuple], found: dict[str, tuple]) -> str:
    """Describe how {key: shape} `found` differs from `needed`; empty if they match."""
    wrong = sorted(k for k in needed.keys() & found.keys() if needed[k] != found[k])
    for problem, keys in (
        ("it lacks", sorted(needed.keys() - found.keys())),
        ("it has unknown", sorted(found.keys() - needed.keys())),
        ("it has the wrong shape for", wrong),
    ):
        if keys:
            shapes = f": {found[wrong[0]]} in place of {needed[wrong[0]]}" if keys is wrong else ""
            return f"{problem} {keys[0]}{shapes}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
    return ""


def read_json(file: Path) -> dict:
    """Read a JSON object; the file may start with a byte-order mark.

    Raises:
        DimoError: the file is missing or damaged, has a duplicate key, or is not an object.
    """
    require_file(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # includes huge numbers and excessive nesting
        refuse_what_is_none(file)
        raise DimoError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise DimoError(f"{file} must hold an object, got {type(content).__name__}")
    return content


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; raises ValueError for a duplicate key, of which json would keep the last value."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return content
