"""URSA: transformer, input construction, probability paths, sampler, checkpoint loading."""

from dimo.ursa.inputs import UrsaInputs, build_ursa_inputs, extract_visual_logits, latents_shape_for, visual_logits
from dimo.ursa.loading import Ursa, load_ursa, save_student
from dimo.ursa.prediction import Chunked, Dense, Prediction, predict
from dimo.ursa.probability_path import MetricPath, MixturePath, categorical
from dimo.ursa.sampler import jump, predict_guided, sample, timesteps
from dimo.ursa.sparse import Sparse
from dimo.ursa.transformer import UrsaConfig, UrsaTransformer

__all__ = [
    "Chunked",
    "Dense",
    "MetricPath",
    "MixturePath",
    "Prediction",
    "Sparse",
    "Ursa",
    "UrsaConfig",
    "UrsaInputs",
    "UrsaTransformer",
    "build_ursa_inputs",
    "categorical",
    "extract_visual_logits",
    "jump",
    "latents_shape_for",
    "load_ursa",
    "predict",
    "predict_guided",
    "sample",
    "save_student",
    "timesteps",
    "visual_logits",
]
