"""config.json of a transformer: what is read, and what is refused because it would be another model."""

import json

import pytest
from transformers import Qwen3Config

from dimo.errors import DimoError
from dimo.ursa import UrsaConfig
from dimo.ursa.layout import read_config

SIZES = {"vocab_size": 512, "lm_vocab_size": 272, "lm_head_size": 240, "bov_token_id": 3}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 31.0},
        {"rope_parameters": {"rope_theta": 31.0, "rope_type": "default"}},
        {"rope_parameters": {"full_attention": {"rope_theta": 31.0, "partial_rotary_factor": 1.0}}},
        {"rope_scaling": {"type": "default", "rope_theta": 31.0}, "rope_theta": None},
        {"rope_theta": 31, "rope_parameters": {"rope_theta": 31.0}, "rope_scaling": None},
    ],
)
def test_rope_theta_is_read_from_wherever_it_stands(rope):
    assert UrsaConfig.from_dict(SIZES | rope).rope_theta == 31.0
    assert UrsaConfig.from_dict(SIZES).rope_theta == 1e6


def test_what_transformers_writes_of_such_a_model_is_read():
    own = Qwen3Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, head_dim=16, vocab_size=512)  # fmt: skip
    written = json.loads(own.to_json_string(use_diff=False)) | SIZES
    config = UrsaConfig.from_dict(written)
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (64, 2, 16)
    theta = written.get("rope_parameters", written)["rope_theta"]
    assert config.rope_theta == theta != UrsaConfig.rope_theta


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e6}, "rope_parameters.rope_theta = 10000.0 contra"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, r"rope_parameters.rope_type = 'yarn' is not"),
        ({"rope_parameters": {"mrope_section": [24, 20, 20]}}, r"rope_parameters.mrope_section = \[24, 20, 20\]"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "rope_parameters.full_attention = {}"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor = 0.5"),
        ({"rope_parameters": [1e4]}, "rope_parameters must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type = 'linear' is not supported"),
        ({"rope_theta": float("nan")}, "rope_theta must be a number"),
        ({"rope_theta": float("inf")}, "rope_theta must be a number"),
        ({"rope_theta": 0.0}, "rope_theta must be a number of at least 0.01"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; dimo implements 'silu'"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05 is not supported; dimo implements 1e-06"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"use_sliding_window": True, "sliding_window": 512}, "use_sliding_window = True"),
        ({"sliding_window": 512}, "sliding_window = 512 is not supported; dimo implements None"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = 'sliding_attention'"),
        ({"_class_name": "NOVATransformer3DModel"}, "_class_name = 'NOVATransformer3DModel' is not"),
        (
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping = 30.0 is a field .* delete",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is a field that dimo does not know"),
        ({"num_hidden_layer": 2}, "num_hidden_layer = 2 is a field that dimo does not know"),
    ],
)
def test_a_field_that_would_not_be_honoured_is_refused_by_name(tmp_path, field, sentence):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | field))
    with pytest.raises(DimoError, match=sentence) as refusal:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(refusal.value)


def test_fields_that_say_what_is_computed_or_nothing_are_taken():
    said = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "attention_dropout": 0.0,
            "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096, "use_cache": True,
            "layer_types": ["full_attention"] * 28, "torch_dtype": "bfloat16", "_diffusers_version": "0.39.0",
            "attn_implementation": "sdpa", "quantization_config": None, "rope_scaling": None}  # fmt: skip
    assert UrsaConfig.from_dict(SIZES | said) == UrsaConfig.from_dict(SIZES)
