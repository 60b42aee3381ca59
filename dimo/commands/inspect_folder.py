"""`dimo inspect`: sizes, codebook, path, shapes and memory of a checkpoint folder, and what is missing in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from dimo.config import default_prompt_length
from dimo.errors import DimoError, reason
from dimo.ursa import MixturePath, UrsaConfig, UrsaTransformer, latents_shape_for
from dimo.ursa.layout import read_config, require_checkpoint, vae_config, vae_strides
from dimo.ursa.loading import import_upstream, load_path, load_tokenizer, require_codes_of
from dimo.ursa.weights import misfit, require_file, weight_files, weight_headers, weight_shapes
from dimo.worlds import video_size

GIB = 2**30


def inspect_folder(
    folder: str | Path,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    max_prompt_length: int | None = None,
) -> tuple[list[tuple[str, str]], list[str]]:
    """Inspect a checkpoint folder without loading weights; of safetensors files only the headers are read.

    Args:
        num_frames, height, width: video size, in frames and pixels; default: `dimo.worlds.video_size`.
        max_prompt_length: number of text tokens; default: a world's longest prompt, else 320.

    Returns:
        (rows of (name, description); a sentence for each part that is missing or damaged). A missing VAE is not
        reported, since training does not need it.

    Raises:
        DimoError: the folder is not a checkpoint, or a size is negative or not divisible by the strides.
    """
    folder = require_checkpoint(folder)
    if max_prompt_length is not None and max_prompt_length < 0:
        raise DimoError(f"max_prompt_length must not be negative, got {max_prompt_length}")
    rows: list[tuple[str, str]] = []
    missing: list[str] = []

    def part(function: Callable, *arguments):
        try:
            return function(*arguments)
        except (DimoError, OSError) as error:  # the latter: a file where a folder should be, or the other way round
            missing.append(reason(error))

    config = part(read_config, folder / "transformer")
    strides = part(vae_strides, folder)
    if config:
        rows += part(_transformer, folder / "transformer", config) or []
        rows += part(_path, folder, config) or []
        rows += part(_tokenizer, folder, config) or []
    else:  # without a readable config it can still report missing files
        if (folder / "transformer").is_dir():
            part(weight_files, folder / "transformer")
        for name in ("scheduler/scheduler_config.json", "scheduler/scheduler_model.pth", "tokenizer"):
            part(require_file, folder / name)
    rows += (part(_vae, folder, config) or []) if strides else []
    if config and strides:
        given = zip((num_frames, height, width), video_size(folder))
        num_frames, height, width = (default if size is None else size for size, default in given)
        text = max_prompt_length or default_prompt_length(folder)
        rows += _video(config, strides, num_frames, height, width, text)
    return rows, missing


def _transformer(folder: Path, config: UrsaConfig) -> list[tuple[str, str]]:
    with torch.device("meta"):
        needed = {key: tuple(value.shape) for key, value in UrsaTransformer(config).state_dict().items()}
    parameters = sum(math.prod(shape) for shape in needed.values())
    spans = "the codebook" if config.lm_head_size == config.codebook_size else "text and codebook"
    rows = [
        ("parameters", f"{parameters:,}; {_memory(parameters)}"),
        ("layers", f"{config.num_hidden_layers} of width {config.hidden_size}, MLP width {config.intermediate_size}; "
         f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of {config.head_dim}"),
        ("vocabulary", f"{config.lm_vocab_size:,} text ids (BOV {config.bov_token_id}), "
         f"then {config.codebook_size:,} codes"),
        ("head", f"{config.lm_head_size:,} columns: {spans}"),
    ]  # fmt: skip
    files = weight_files(folder)
    headers = weight_headers(folder)
    problem = misfit(needed, {key: shape for key, (shape, _) in headers.items()})
    if problem:
        raise DimoError(f"the weights of {folder} do not fit its config.json: {problem}")
    for key, (_, dtype) in headers.items():
        if not dtype.lower().startswith(("float", "bfloat", "f8")):
            raise DimoError(f"{key} in the weights of {folder} must hold floating-point numbers, got {dtype}")
    size = sum(file.stat().st_size for file in files)
    kinds = " and ".join(name for name, _ in Counter(dtype for _, dtype in headers.values()).most_common())
    return [*rows, ("weights", f"{', '.join(file.name for file in files)} ({_spelled(size)}, {kinds})")]


def _path(folder: Path, config: UrsaConfig) -> list[tuple[str, str]]:
    path, shift = load_path(folder, config.codebook_size)
    if isinstance(path, MixturePath):
        return [("path", f"mixture; shift {shift:g}")]
    shape = " x ".join(f"{n:,}" for n in path.codebook.shape)
    return [("path", f"metric; alpha {path.alpha:g}, c {path.c:g}, shift {shift:g}"), ("codebook", shape)]


def _tokenizer(folder: Path, config: UrsaConfig) -> list[tuple[str, str]]:
    tokenizer = load_tokenizer(folder, config)
    return [("tokenizer", f"{type(tokenizer).__name__}, {len(tokenizer):,} entries")]


def _vae(folder: Path, transformer: UrsaConfig | None) -> list[tuple[str, str]]:
    config = vae_config(folder)
    if config is None:
        return [("VAE", "none: not needed for training, but samples will be codes without frames")]
    if transformer is not None:
        require_codes_of(folder / "vae", config, transformer.codebook_size)
    name, (time, space) = config.get("_class_name"), vae_strides(folder)
    weight_shapes(folder / "vae")
    text = f"{name}, {time} frames and {space}x{space} pixels per token" + ("; an image model" if time == 1 else "")
    if "sample_frames" in config:
        text += f"; decodes {config['sample_frames']} frames at a time"
    if name not in ("PaletteDecoder", "PatchVae"):
        try:
            import_upstream()
        except DimoError as error:
            text += f"; cannot be run here, so samples will be codes only: {error}"
    return [("VAE", text)]


def _video(config, strides, num_frames: int, height: int, width: int, text: int) -> list[tuple[str, str]]:
    t, h, w = latents_shape_for(num_frames, height, width, *strides)
    n = t * h * w
    logits = n * config.codebook_size
    return [
        ("video", f"{num_frames}x{height}x{width} -> latents {t}x{h}x{w} = {n:,} visual tokens; "
         f"{n + text + 1:,} positions with {text} of text and BOV"),
        ("logits", f"for one video: {_memory(logits)}"),
    ]  # fmt: skip


def _memory(entries: int) -> str:
    return f"{_spelled(entries * 2)} at bf16, {_spelled(entries * 4)} at float32"


def _spelled(size: int) -> str:
    """Bytes in GiB, of small models and videos in MiB, where two places of a GiB say nothing."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def format_rows(rows: list[tuple[str, str]], missing: list[str]) -> str:
    """The result of `inspect_folder` as text."""
    lines = [f"{name:12}{text}" for name, text in rows]
    return "\n".join(lines + [f"{'missing':12}{sentence}" for sentence in missing or ["nothing"]])
