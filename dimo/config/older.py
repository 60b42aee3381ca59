"""Backward compatibility: values under which runs begun with an older dimo continue unchanged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from dimo.config import PRESETS, Config, config_keys, default_of, to_flat
from dimo.config.load import read_groups, values_of
from dimo.errors import DimoError

# Behaviour before the key existed. Every new key needs an entry, unless it may change on resume (`FREE_KEYS`).
BEFORE = {
    "model.backend": "native",
    "model.train_embeddings": True,
    "model.aux_shared_layers": 0,
    "model.train_head": True,
    "model.logit_gain": 1.0,
    "model.final_logit_gain": 1.0,
    "distill.teacher": "network",
    "distill.min_clarity": None,
    "distill.min_aesthetic": None,
    "distill.min_motion": None,
    "distill.min_suitability": None,
    "distill.motion_prefix": "none",
    "distill.motion_share": 0.6,
    "distill.shuffle_buffer": 10_000,
    "distill.protocol": "none",
    "distill.negative_prompt": "",
    "distill.student_steps": 1,
    "distill.aux_pass": "own",
    "distill.aux_target": "sampled",
    "distill.kd_every": 1,
    "distill.t_power": 1.0,
    "distill.t_draws": 1,
    "distill.t_shift": "1",
    "distill.t_power_start": 0.0,
    "distill.t_power_fade": 0.9,
    "distill.p_corrupt_fade": 0.0,
    "evaluation.held_out": 0,
    "optim.optimizer": "adamw",
    "optim.muon_lr": 7.5e-3,
    "optim.muon_momentum": 0.9,
    "optim.min_lr_share": 0.0,
    "optim.ema_every": 1,
    "training.gradient_accumulation_steps": 1,
}
# {new key: the key that used to control both}
ONE_BEFORE = {"optim.muon_weight_decay": "optim.weight_decay", "optim.aux_min_lr_share": "optim.min_lr_share"}
# {removed key: values, as written, that match what dimo does now}
NO_MORE = {"distill.temperature": ("1", "1.0")}


def flat(groups: dict[str, dict]) -> dict[str, Any]:
    """{dotted key: value} of a configuration, without removed keys whose value matches what dimo does now."""
    return {key: value for key, value in values_of(groups).items() if value not in NO_MORE.get(key, ())}


def begun_with(old: dict[str, Any]) -> dict[str, Any]:
    """{key: value with the old behaviour} for every key missing in `old`, the {dotted key: value} of a config.yaml."""
    values = BEFORE | old
    values = {key: values[as_key] for key, as_key in ONE_BEFORE.items()} | values
    return {key: value for key, value in values.items() if key not in old}


def as_begun(config: Config) -> Config:
    """`config`, adjusted so that an older run in its output_dir continues with the behaviour it began with.

    Keys missing in the run's config.yaml get the old behaviour if they are at a default or preset value. A value the
    user chose is kept, and `RunFolder.open` then rejects it like any other change.
    """
    c = config.experiment
    file = Path(c.output_dir) / "config.yaml"
    if not c.resume or c.overwrite or not file.is_file():
        return config
    try:
        begun = begun_with(flat(read_groups(file)))
    except (DimoError, OSError):  # `RunFolder.open` reports it
        return config
    now, config = to_flat(config), copy.deepcopy(config)
    presets = [flat(read_groups(preset)) for preset in PRESETS.glob("*.yaml")] if begun else []
    for key, value in begun.items():
        group, name = key.split(".")
        nobodys = [default_of(config_keys()[key]), *(preset[key] for preset in presets if key in preset)]
        if now[key] in nobodys:
            setattr(getattr(config, group), name, value)
    return config
