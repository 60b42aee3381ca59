"""Load and validate the configuration, the dataclasses of `dimo.config.schema`. Unknown keys and bad values are errors.

A configuration is a preset or a YAML file plus `key=value` overrides, on the command line, in papermill parameters and
in notebooks alike. `dimo.config.values` defines how values are written; `${group.key}` inserts another key's value.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dimo.config.consistent import require_consistent
from dimo.config.schema import Config, config_keys, default_of, kind_of, to_flat
from dimo.config.served import require_captioned_video, with_protocol
from dimo.config.values import read_value, read_yaml, unquoted, write_yaml, yaml_text
from dimo.errors import DimoError, nearest, similar
from dimo.paths import user_path
from dimo.ursa.attention import KERNELS
from dimo.ursa.inputs import latents_shape_for
from dimo.ursa.layout import makes_images, vae_strides
from dimo.ursa.loading import BACKENDS, DTYPES
from dimo.ursa.probability_path import T_PER
from dimo.ursa.recompute import CHECKPOINTING
from dimo.ursa.sampler import require_passes
from dimo.worlds import DATA, built_in_worlds, is_world, load_world
from dimo.worlds.protocol import prompt_length

PRESETS = Path(__file__).parent / "presets"
GRIDS = Path(__file__).parent / "grids"  # of dimo.evaluation.grid
REFERENCE = re.compile(r"\$\{(\w+\.\w+)\}")
TRACKERS = ("tensorboard", "wandb", "trackio")
NAMES = ("experiment.name", "experiment.output_dir", "distill.teacher_ckpt", "distill.prompt_source", "training.engine")
RANGES = {  # {phrase: (test, keys)}; null values are not tested
    "lie in [0, 1]": (
        lambda value: 0 <= value <= 1,
        "distill.empty_prompt_share distill.p_corrupt distill.p_corrupt_fade distill.corrupt_ratio "
        "distill.t_power_fade distill.guidance_trunc distill.motion_share optim.min_lr_share optim.aux_min_lr_share",
    ),
    "lie in [0, 1)": (
        lambda value: 0 <= value < 1,
        "distill.label_smoothing distill.baseline_decay optim.beta1 optim.beta2 optim.muon_momentum optim.ema_decay",
    ),
    "not be negative": (
        lambda value: value >= 0,
        "distill.w_distill distill.w_kd distill.w_reinforce distill.lambda_ent distill.lambda_ent_high "
        "distill.entropy_floor distill.ent_anneal_from distill.ent_anneal_to distill.t_curriculum_steps "
        "distill.t_power_start distill.max_prompt_length experiment.keep_every optim.weight_decay "
        "optim.muon_weight_decay optim.warmup_steps evaluation.held_out evaluation.judged_videos "
        "model.aux_shared_layers",
    ),
    "be positive": (
        lambda value: value > 0,
        "distill.t_power optim.lr optim.aux_lr optim.muon_lr optim.max_grad_norm model.logit_gain "
        "model.final_logit_gain",
    ),
    "be at least 1": (
        lambda value: value >= 1,
        "distill.guidance_scale distill.aux_steps distill.t_draws distill.batch_size_per_gpu "
        "distill.shuffle_buffer distill.kd_every optim.ema_every "
        "experiment.log_every experiment.save_every experiment.sample_every experiment.keep_last "
        "training.gradient_accumulation_steps training.max_bad_steps training.max_train_steps training.num_processes "
        "training.sequence_parallel evaluation.videos_per_prompt evaluation.batch_size",
    ),
    "lie in [0, 2^63)": (lambda value: 0 <= value < 2**63, "experiment.seed evaluation.seed"),
}
FITS = {"none": 6_000, "swiglu": 10_500, "selective": 36_000}  # visual tokens per step, see `checkpointing_for`
OURS = {"model.backend": "native", "distill.teacher": "network"}  # what needs transformers of dimo's own
CAPTURABLE = {  # what training.cuda_graph needs; `dimo.train.graph` checks the rest
    "model.device": ("auto", "cuda"),
    "model.backend": ("native",),
    "training.num_processes": (1,),
    "training.gradient_accumulation_steps": (1,),
}


def shipped_grids() -> dict[str, Path]:
    """{name: file} of the grids that ship."""
    return {file.stem: file for file in sorted(GRIDS.glob("*.yaml"))}


def load_config(config: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration: a preset or YAML file, then overrides.

    Args:
        config: name of a preset or path of a YAML file. None means the defaults, which suit the built-in world; if the
            overrides name another teacher, None means preset `distill_dimo` (`distill_dimo_image` for an image model)
            with the `model.activation_checkpointing` that its token count needs (`checkpointing_for`), because the
            learning rates of a world with 175,000 parameters would destroy URSA.
        overrides: `key=value` strings such as `optim.lr=3e-4`.

    Raises:
        DimoError: unknown preset or key (the message suggests the closest), or a value of the wrong type or range.
    """
    if not isinstance(overrides, list | tuple):  # papermill's -p passes a string
        raise DimoError(
            f"overrides must be a list, as papermill's -y 'overrides: [optim.lr=1e-4]' gives, got {overrides!r}"
        )
    written = dict(_read_override(override) for override in overrides)
    by_size = not config and "model.activation_checkpointing" not in written
    config = config or _default_preset(written)
    written = with_protocol(_read(config) if config else {}, written)
    result = Config()
    for key, field in config_keys().items():
        value = _refer(key, written.get(key, default_of(field)), written)
        group, name = key.split(".")
        setattr(getattr(result, group), name, read_value(key, kind_of(field), value) if key in written else value)
    validate(result)
    if result.distill.max_prompt_length == 0:
        result.distill.max_prompt_length = default_prompt_length(result.distill.teacher_ckpt)
    if by_size and config:
        result.model.activation_checkpointing = checkpointing_for(result)
    return result


def _refer(key: str, written: Any, everything: dict[str, Any], on_the_way: tuple[str, ...] = ()) -> Any:
    """`written` with every `${group.key}` in it replaced by that key's value."""
    if isinstance(written, list):
        return [_refer(key, one, everything, on_the_way) for one in written]
    if not isinstance(written, str):
        return written
    on_the_way += (key,)

    def meant(match: re.Match) -> str:
        other = match[1]
        _check_known(other)
        if other in on_the_way:
            raise DimoError(f"{key}: {written!r} refers back to {other} itself")
        return str(_refer(other, everything.get(other, default_of(config_keys()[other])), everything, on_the_way))

    return REFERENCE.sub(meant, written)


def _default_preset(written: dict[str, Any]) -> str | None:
    teacher = written.get("distill.teacher_ckpt")
    if teacher is None or _is_world(user_path(teacher)):
        return None
    return "distill_dimo_image" if makes_images(user_path(teacher)) else "distill_dimo"


def checkpointing_for(config: Config) -> str:
    """The cheapest activation checkpointing with which a training step of URSA-1.7B fits into 80 GB.

    By visual tokens of a GPU, measured on H100 and H200 (docs/performance.md).
    """
    tokens = config.distill.batch_size_per_gpu * math.prod(_grid(config)) // config.training.sequence_parallel
    return next((how for how, most in FITS.items() if tokens <= most), "full")


def _is_world(teacher_ckpt: str | Path) -> bool:
    return str(teacher_ckpt) in built_in_worlds() or is_world(teacher_ckpt)


def default_prompt_length(teacher_ckpt: str | Path) -> int:
    """Text tokens of a prompt: URSA's 320, or as many as a world's longest prompt has words."""
    if not _is_world(teacher_ckpt):
        return 320
    folder = DATA / str(teacher_ckpt) if str(teacher_ckpt) in built_in_worlds() else teacher_ckpt
    return prompt_length(load_world(folder))


def to_yaml(config: Config) -> str:
    """The configuration as YAML; `load_config` reads back an equal one."""
    return write_yaml(dataclasses.asdict(config))


def validate(config: Config) -> None:
    """Check choices, ranges and combinations of keys.

    Raises:
        DimoError: names the key, its value and what is allowed.
    """
    flat = to_flat(config)
    choices = {
        "model.device": ("auto", "cpu", "cuda"),
        "model.backend": BACKENDS,
        "experiment.student_dtype": ("auto", *DTYPES),
        "distill.teacher": ("network", "exact"),
        "distill.aux_objective": ("denoise", "match_teacher"),
        "model.activation_checkpointing": CHECKPOINTING,
        "model.attention": KERNELS,
        "distill.aux_pass": ("own", "shared"),
        "distill.baseline": ("ema", "leave_one_out"),
        "distill.aux_target": ("sampled", "exact"),
        "distill.t_per": T_PER,
        "optim.decay": ("linear", "cosine", "wsd", "constant"),
        "optim.optimizer": ("muon", "adamw"),
        "training.mixed_precision": ("no", "bf16"),
    }
    for key, allowed in choices.items():
        if flat[key] not in allowed:
            raise DimoError(f"{key} must be one of {', '.join(allowed)}, got {flat[key]!r}")
    for tracker in flat["experiment.trackers"]:
        if tracker not in TRACKERS:
            raise DimoError(f"experiment.trackers: unknown tracker {tracker!r}{nearest(tracker, TRACKERS)}")
    for key in NAMES:
        if not flat[key].strip():
            raise DimoError(f"{key} must not be empty, got {flat[key]!r}")
    name = flat["experiment.name"]
    if not name.isprintable() or name[0] == "~" or {"", ".", ".."} & set(name.replace("\\", "/").split("/")):
        raise DimoError(
            f"experiment.name must name a folder inside runs/, got {name!r}; experiment.output_dir may be anywhere"
        )
    for phrase, (inside, keys) in RANGES.items():
        for key in keys.split():
            if flat[key] is not None and not inside(flat[key]):
                raise DimoError(f"{key} must {phrase}, got {flat[key]}")
    if not flat["evaluation.teacher_steps"]:
        raise DimoError("evaluation.teacher_steps must list numbers of sampling steps, got none")
    for passes in flat["evaluation.teacher_steps"]:
        require_passes("evaluation.teacher_steps", passes)
    require_passes("distill.student_steps", flat["distill.student_steps"])
    d = config.distill
    require_captioned_video(d, of_world=_is_world(d.teacher_ckpt))
    asks_for_captions = d.motion_value() is not None or bool(d.score_minimums())
    if d.prompt_source == "world" and asks_for_captions:
        raise DimoError(
            "distill.min_* and distill.motion_prefix need a file of captions, but distill.prompt_source is world"
        )
    require_consistent(config)
    d.beta()
    d.shift_value()
    _grid(config)
    t = config.training
    if t.num_processes % t.sequence_parallel:
        wanted = f"must divide training.num_processes={t.num_processes}"
        raise DimoError(f"training.sequence_parallel {wanted}, got {t.sequence_parallel}")
    for asking, least in (("training.sequence_parallel", 2), ("model.aux_shared_layers", 1)):
        for key, value in OURS.items() if flat[asking] >= least else ():
            if flat[key] != value:
                raise DimoError(f"{asking} needs {key}={value}, got {flat[key]}")
    for key, values in CAPTURABLE.items() if config.training.cuda_graph else ():
        if flat[key] not in values:
            raise DimoError(f"training.cuda_graph=true needs {key}={values[0]}, got {flat[key]}")


def _grid(config: Config) -> tuple[int, int, int]:
    """latents_shape (T, H, W) for the VAE of teacher_ckpt, or for URSA's video VAE if that folder does not exist."""
    d = config.distill
    return latents_shape_for(d.num_frames, d.height, d.width, *vae_strides(Path(d.teacher_ckpt)))


def device_of(config: Config) -> torch.device:
    """The device that `model.device` stands for.

    Raises:
        DimoError: it is cuda and there is no GPU.
    """
    if config.model.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise DimoError("model.device is cuda, but PyTorch finds no GPU; use model.device=auto or cpu")
    return torch.device(config.model.device)


def _read(config: str | Path) -> dict[str, Any]:
    """{dotted key: value as written} of a preset or YAML file."""
    presets = {p.stem: p for p in PRESETS.glob("*.yaml")}
    file = presets.get(str(config), Path(user_path(str(config))))
    if not file.is_file():
        raise DimoError(f"{config!s} is neither a preset nor an existing YAML file{nearest(str(config), presets)}")
    written = {f"{group}.{name}": value for group, keys in read_groups(file).items() for name, value in keys.items()}
    for key in written:
        _check_known(key)
    return written


def read_groups(file: Path) -> dict[str, dict[str, Any]]:
    """{group: {key: value as written}} of a YAML file.

    Raises:
        DimoError: not UTF-8, not YAML, not groups of keys, or a duplicate key.
    """
    return groups_in(yaml_text(file), file)


def groups_in(text: str, file: Path) -> dict[str, dict[str, Any]]:
    """Like `read_groups`, from a string; `file` is only named in error messages."""
    content = read_yaml(text, str(file))
    if not isinstance(content, dict):
        got = "nothing" if content is None else type(content).__name__
        raise DimoError(f"{file} must hold groups of keys, got {got}")
    for group, keys in content.items():
        if not isinstance(keys, dict):
            hint = "" if group in _groups() else nearest(group, _groups())
            if group in config_keys():
                hint = f"; in a file, write {group.replace('.', ': {')}: ...}}"
            raise DimoError(f"{group} in {file} must be a group of keys, got {keys or 'nothing'}{hint}")
    return content


def values_of(groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{dotted key: parsed value} of groups of keys; values of unknown keys are kept as written."""
    known = config_keys()
    written = {f"{group}.{name}": value for group, keys in groups.items() for name, value in keys.items()}
    return {k: read_value(k, kind_of(known[k]), value) if k in known else value for k, value in written.items()}


def _read_override(override: str) -> tuple[str, str]:
    if not isinstance(override, str):  # papermill's -y parses YAML: `a: b` becomes a dict
        raise DimoError(f"an override must be a string, got {override!r}; quote an override that contains ': '")
    key, equals, value = override.partition("=")
    if not equals:
        preset = f"; a preset is given by -c {override}" if (PRESETS / f"{override}.yaml").exists() else ""
        raise DimoError(f"an override must have the form key=value, got {override!r}{preset}")
    _check_known(key)
    return key, unquoted(value)


def _groups() -> list[str]:
    return [f.name for f in dataclasses.fields(Config)]


def _check_known(key: str) -> None:
    known = config_keys()
    if key in known:
        return
    same = [k for k in known if k.split(".")[1] == key.split(".")[-1]]
    hint = f"; did you mean {same[0]!r}?" if same else similar(key, known)
    raise DimoError(f"unknown key {key!r}{hint or '; `dimo config` lists them all'}")
