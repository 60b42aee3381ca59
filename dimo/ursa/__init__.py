"""The model family: URSA's transformer, its inputs, probability paths and sampler."""

from dimo.ursa.inputs import (
    UrsaInputs,
    build_ursa_inputs,
    extract_visual_logits,
    latents_shape_for,
    visual_logits,
)
from dimo.ursa.loading import Ursa, load_ursa, save_student
from dimo.ursa.probability_path import MetricPath, MixturePath, categorical
from dimo.ursa.sampler import draw_codes, guide, jump, sample, timesteps
from dimo.ursa.transformer import UrsaConfig, UrsaTransformer

__all__ = [
    "MetricPath",
    "MixturePath",
    "Ursa",
    "UrsaConfig",
    "UrsaInputs",
    "UrsaTransformer",
    "build_ursa_inputs",
    "categorical",
    "draw_codes",
    "extract_visual_logits",
    "guide",
    "jump",
    "latents_shape_for",
    "load_ursa",
    "sample",
    "save_student",
    "timesteps",
    "visual_logits",
]
