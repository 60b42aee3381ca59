"""The configuration: keys, presets, and how they are read and validated."""

from dimo.config.load import PRESETS, default_prompt_length, device_of, load_config, to_yaml, validate
from dimo.config.schema import Config, Optim, config_keys, default_of, to_flat

__all__ = [
    "PRESETS",
    "Config",
    "Optim",
    "config_keys",
    "default_of",
    "default_prompt_length",
    "device_of",
    "load_config",
    "to_flat",
    "to_yaml",
    "validate",
]
