"""Checkpoint folders in URSA's own layout: read with no pickle executed, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dimo.errors import DimoError
from dimo.ursa.path import MetricPath, MixturePath
from dimo.ursa.transformer import UrsaConfig, UrsaTransformer

WEIGHTS = "diffusion_pytorch_model"


@dataclasses.dataclass
class Ursa:
    """What a checkpoint folder holds. `vae` decodes codes (B, T, H, W) to frames (B, F, height, width, 3) in [0, 1]."""

    transformer: UrsaTransformer
    path: MetricPath | MixturePath
    tokenizer: Any
    vae: Any
    shift: float
    folder: Path

    def tokenize(self, prompts: list[str], max_prompt_length: int, device=None) -> torch.Tensor:
        """txt_ids (B, max_prompt_length), left-padded and truncated as URSA's pipeline does."""
        ids = self.tokenizer(
            prompts, max_length=max_prompt_length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        return ids.to(device or self.path.device)


def load_ursa(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Ursa:
    """Load transformer, probability path, tokenizer and (where we have it) decoder from a checkpoint folder.

    Args:
        folder: holds `transformer/`, `scheduler/`, `tokenizer/` and `vae/`, as URSA-1.7B does.
        device, dtype: of the transformer; the path stays in float32.

    Raises:
        DimoError: something is missing or damaged, in a sentence that names it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DimoError(f"checkpoint folder {folder} does not exist")
    transformer = load_transformer(folder / "transformer", device, dtype)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    codebook = _load_pickle_safely(folder / "scheduler" / "scheduler_model.pth").get("path.emb")
    if codebook is None or codebook.dim() != 2:
        raise DimoError(f"{folder / 'scheduler' / 'scheduler_model.pth'} must hold a matrix under 'path.emb'")
    if codebook.shape[0] != transformer.config.codebook_size:
        raise DimoError(
            f"the scheduler's codebook in {folder} has {codebook.shape[0]} codes, "
            f"the transformer's config.json says {transformer.config.codebook_size}"
        )
    codebook = codebook.to(device).float()
    if scheduler.get("alpha") is None:
        path = MixturePath(codebook)
    else:
        path = MetricPath(codebook, scheduler["alpha"], scheduler["c"], scheduler.get("eps", 1e-5))
    shift = float(scheduler.get("shift", 1.0))
    return Ursa(transformer, path, _load_tokenizer(folder), _load_vae(folder, device), shift, folder)


def load_transformer(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> UrsaTransformer:
    """The transformer in a folder with config.json and weights: safetensors, sharded safetensors, or .bin."""
    folder = Path(folder)
    config = UrsaConfig.from_dict(read_json(folder / "config.json"))
    with torch.device("meta"):
        transformer = UrsaTransformer(config)
    load_weights(transformer, read_weights(folder), where=str(folder), assign=True)
    return transformer.to(device, dtype)


def load_weights(transformer: torch.nn.Module, state: dict, where: str, assign: bool = False) -> None:
    """load_state_dict(strict=True) whose refusal names the first keys or shapes that do not fit."""
    own = transformer.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    for problem, keys in (("lacks", missing), ("has unknown", extra), ("has the wrong shape for", sorted(wrong))):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise DimoError(f"the weights of {where} do not fit this model: it {problem} {keys[0]}{more}")
    transformer.load_state_dict(state, strict=True, assign=assign)


def read_weights(source: str | Path) -> dict[str, torch.Tensor]:
    """A state dict from a weights file (.safetensors, .bin, .pt) or from a folder that holds one, sharded or not."""
    source = Path(source)
    if source.is_dir():
        index = source / f"{WEIGHTS}.safetensors.index.json"
        if index.exists():
            shards = sorted(set(read_json(index)["weight_map"].values()))
            return {key: value for shard in shards for key, value in read_weights(source / shard).items()}
        found = [source / f"{WEIGHTS}{end}" for end in (".safetensors", ".bin")]
        source = next((f for f in found if f.exists()), found[0])
    if not source.exists():
        raise DimoError(f"weights file {source} does not exist")
    if source.suffix == ".safetensors":
        try:
            return load_file(source)
        except SafetensorError as error:
            raise DimoError(f"weights file {source} is damaged: {error}") from error
    return _load_pickle_safely(source)


def save_student(folder: str | Path, transformer: UrsaTransformer, state: dict | None = None) -> Path:
    """Write config.json and safetensors that `load_transformer` and upstream's `from_pretrained` read.

    The folder appears whole or not at all. `state` replaces the transformer's own weights (the EMA's, say).
    """
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    state = {k: v.detach().cpu().contiguous() for k, v in (state or transformer.state_dict()).items()}
    save_file(state, beside / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    config = {"_class_name": "URSATransformer3DModel", **transformer.config.to_dict()}
    (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(beside, folder)
    return folder


def read_json(file: Path) -> dict:
    if not file.exists():
        raise DimoError(f"{file} is missing")
    try:
        return json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DimoError(f"{file} is damaged: {error}") from error


def _load_pickle_safely(file: Path) -> dict:
    if not file.exists():
        raise DimoError(f"{file} is missing")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged or hostile file
        raise DimoError(f"{file} could not be read as plain tensors: {str(error).splitlines()[0]}") from error


def _load_tokenizer(folder: Path):
    from transformers import AutoTokenizer  # slow to import, and only needed here

    if not (folder / "tokenizer").is_dir():
        raise DimoError(f"{folder / 'tokenizer'} is missing")
    return AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left", local_files_only=True)


def _load_vae(folder: Path, device):
    """The built-in worlds' palette decoder; None for a real VAE, which only diffnext can run."""
    config = folder / "vae" / "config.json"
    if not config.exists() or read_json(config).get("_class_name") != "PaletteDecoder":
        return None
    from dimo.worlds.palette import PaletteDecoder

    return PaletteDecoder.load(folder / "vae").to(device)
