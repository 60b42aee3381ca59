"""The configuration: the dataclasses of `dimo.train.keys`, read by OmegaConf; unknown keys and bad values are errors.

A preset by name or a YAML file, then `key=value` overrides; the same in the command line, in papermill parameters and
in notebooks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dimo.distill.losses import beta_of
from dimo.errors import DimoError, nearest
from dimo.train.keys import Config, Optim, config_keys, default_of, describe, to_flat
from dimo.ursa.checkpoint import BACKENDS, DTYPES
from dimo.ursa.inputs import latents_shape_for
from dimo.ursa.transformer import CHECKPOINTING
from dimo.worlds import built_in_worlds, is_world

__all__ = [
    "PRESETS",
    "Config",
    "Optim",
    "config_keys",
    "default_of",
    "default_prompt_length",
    "describe",
    "device_of",
    "load_config",
    "to_flat",
    "to_yaml",
    "validate",
]
PRESETS = Path(__file__).parent / "presets"
TRACKERS = ("tensorboard", "wandb", "trackio")


def load_config(config: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """A preset's name or a YAML file, then overrides such as `optim.lr=3e-4`.

    Without a preset the defaults are the built-in world's recipe; where the overrides name another checkpoint, they are
    preset `distill_dimo`'s: learning rates that suit a world of 175,000 parameters would destroy URSA.

    Raises:
        DimoError: unknown preset or key (the nearest is named), a value of the wrong type or out of range.
    """
    if isinstance(overrides, str):  # papermill's -p gives a string; its letters are no overrides
        raise DimoError(
            f"overrides must be a list, as papermill's -y 'overrides: [optim.lr=1e-4]' gives, got {overrides!r}"
        )
    config = config or _default_preset(overrides)
    layers = [_read(config)] if config else []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise DimoError(f"an override reads key=value, got {override!r}")
        _check_known(key)
        layers.append(OmegaConf.from_dotlist([override]) if value else OmegaConf.from_dotlist([f"{key}=''"]))
    merged = OmegaConf.structured(Config)
    try:
        for layer in layers:
            merged = OmegaConf.merge(merged, layer)
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise DimoError(f"{key}{str(error).splitlines()[0]}") from error
    validate(result)
    if result.distill.max_prompt_length == 0:
        result.distill.max_prompt_length = default_prompt_length(result.distill.teacher_ckpt)
    return result


def _default_preset(overrides: Sequence[str]) -> str | None:
    named = [o.partition("=")[2] for o in overrides if o.startswith("distill.teacher_ckpt=")]
    return "distill_dimo" if named and not _is_world(named[-1]) else None


def _is_world(teacher_ckpt: str | Path) -> bool:
    return str(teacher_ckpt) in built_in_worlds() or is_world(teacher_ckpt)


def default_prompt_length(teacher_ckpt: str | Path) -> int:
    """Text tokens of a prompt: URSA's 320, or the 4 words of a built-in world's prompts."""
    return 4 if _is_world(teacher_ckpt) else 320


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to the same."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def validate(config: Config) -> None:
    """Ranges and choices, each refusal a sentence that names the key."""
    flat = to_flat(config)
    choices = {
        "model.device": ("auto", "cpu", "cuda"),
        "model.backend": BACKENDS,
        "experiment.student_dtype": tuple(DTYPES),
        "distill.estimator": ("dimo", "reinforce"),
        "distill.aux_objective": ("denoise", "match_teacher"),
        "model.activation_checkpointing": CHECKPOINTING,
        "distill.aux_pass": ("own", "shared"),
        "distill.baseline": ("ema", "leave_one_out"),
        "distill.t_per": ("sample", "frame"),
        "optim.decay": ("linear", "cosine", "wsd", "constant"),
        "optim.optimizer": ("muon", "adamw"),
        "training.mixed_precision": ("no", "bf16"),
    }
    for key, allowed in choices.items():
        if flat[key] not in allowed:
            raise DimoError(f"{key} must be one of {', '.join(allowed)}, got {flat[key]!r}")
    shares = "empty_prompt_share label_smoothing p_corrupt corrupt_ratio baseline_decay guidance_trunc".split()
    optim_shares = ["optim.ema_decay", "optim.beta1", "optim.beta2", "optim.muon_momentum"]
    optim_shares += ["optim.min_lr_share", "optim.aux_min_lr_share"]
    for key in [f"distill.{s}" for s in [*shares, "motion_share"]] + optim_shares:
        if not 0 <= flat[key] <= 1:
            raise DimoError(f"{key} must lie in [0, 1], got {flat[key]}")
    at_least_one = ["experiment.log_every", "experiment.save_every", "experiment.sample_every", "experiment.keep_last"]
    at_least_one += ["distill.aux_steps", "distill.batch_size_per_gpu"]
    at_least_one += ["distill.shuffle_buffer", "distill.kd_every"]
    at_least_one += ["training.gradient_accumulation_steps", "training.max_bad_steps"]
    at_least_one += ["training.max_train_steps", "evaluation.videos_per_prompt", "evaluation.batch_size"]
    at_least_one += ["training.num_processes"]
    for tracker in flat["experiment.trackers"]:
        if tracker not in TRACKERS:
            raise DimoError(f"experiment.trackers may hold {', '.join(TRACKERS)}, got {tracker!r}")
    for key in ("experiment.seed", "evaluation.seed"):
        if not 0 <= flat[key] < 2**63:
            raise DimoError(f"{key} must lie in [0, 2**63), got {flat[key]}")
    if flat["distill.max_prompt_length"] < 0:
        raise DimoError(f"distill.max_prompt_length must not be negative, got {flat['distill.max_prompt_length']}")
    for key in at_least_one:
        if flat[key] is not None and flat[key] < 1:
            raise DimoError(f"{key} must be at least 1, got {flat[key]}")
    for key in (
        "optim.lr",
        "optim.aux_lr",
        "optim.muon_lr",
        "optim.max_grad_norm",
        "distill.temperature",
        "distill.t_power",
    ):
        if not flat[key] > 0:
            raise DimoError(f"{key} must be positive, got {flat[key]}")
    if not flat["distill.guidance_scale"] >= 1:
        raise DimoError(f"distill.guidance_scale must be at least 1 (1 is none), got {flat['distill.guidance_scale']}")
    if not flat["evaluation.teacher_steps"] or min(flat["evaluation.teacher_steps"]) < 1:
        raise DimoError(f"evaluation.teacher_steps must list numbers of passes, got {flat['evaluation.teacher_steps']}")
    for key in ("min_clarity", "min_aesthetic", "min_motion", "min_suitability"):
        if flat[f"distill.{key}"] is not None and not math.isfinite(flat[f"distill.{key}"]):
            raise DimoError(f"distill.{key} must be a number or null, got {flat[f'distill.{key}']}")
    d = config.distill
    asks_for_captions = d.motion_value() is not None or bool(d.score_minimums())
    if d.prompt_source == "world" and asks_for_captions:
        raise DimoError(
            "distill.min_* and distill.motion_prefix are for a file of captions, and distill.prompt_source is world"
        )
    beta_of(config.distill.divergence)
    latents_shape_for(config.distill.num_frames, config.distill.height, config.distill.width)


def device_of(config: Config) -> torch.device:
    if config.model.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise DimoError("model.device is cuda, but PyTorch sees no GPU; use model.device=auto or cpu")
    return torch.device(config.model.device)


def _read(config: str | Path):
    presets = {p.stem: p for p in PRESETS.glob("*.yaml")}
    file = presets.get(str(config), Path(config))
    if not file.is_file():
        raise DimoError(f"{config!s} is neither a preset nor a YAML file{nearest(str(config), presets)}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DimoError(f"{file} is not readable YAML: {error}") from error
    if not isinstance(content, dict):
        raise DimoError(f"{file} must hold groups of keys, got {type(content).__name__}")
    for group, keys in content.items():
        if not isinstance(keys, dict):
            raise DimoError(f"{group} in {file} must be a group of keys{nearest(str(group), _groups())}")
        for key in keys:
            _check_known(f"{group}.{key}")
    return OmegaConf.create(content)


def _groups() -> list[str]:
    return [f.name for f in dataclasses.fields(Config)]


def _check_known(key: str) -> None:
    known = config_keys()
    if key in known:
        return
    same = [k for k in known if k.split(".")[1] == key.split(".")[-1]]
    hint = f"; did you mean {same[0]!r}?" if same else nearest(key, known)
    raise DimoError(f"unknown key {key!r}{hint if 'did you mean' in hint else '; `dimo config` lists them all'}")
