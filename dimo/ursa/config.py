"""The transformer's config.json: read its sizes, and reject every field that dimo does not implement."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dimo.errors import DimoError

CLASS = "URSATransformer3DModel"
NORM_EPS = 1e-6
# upper bounds, so that a damaged file does not allocate a huge model
MOST = {"rope_theta": 2**53, "num_hidden_layers": 1000}
MOST_OTHERS = 2**20
LEAST = {"rope_theta": 0.01, "bov_token_id": 0}  # of others 1; a theta below 1 turns faster than a radian per token
COMPUTED = {  # {field: the only values that our transformer implements}
    "hidden_act": ("silu", "swish"),
    "rms_norm_eps": (NORM_EPS,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "tie_word_embeddings": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1,),
    "_class_name": (CLASS,),
}
ROPE = ("rope_parameters", "rope_scaling")  # RoPE fields of transformers 5 and 4
NO_MATTER = {  # fields without influence on the output
    "architectures", "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "gradient_checkpointing", "id2label", "initializer_range", "is_encoder_decoder", "label2id",
    "max_position_embeddings", "max_window_layers", "model_type", "output_attentions", "output_hidden_states",
    "pad_token_id", "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class UrsaConfig:
    """The sizes in `transformer/config.json`; the defaults are URSA-1.7B's.

    Input ids are text in [0, lm_vocab_size) and visual codes in [lm_vocab_size, vocab_size). `lm_head_size` is the
    number of logits: the codebook size, or in some checkpoints text vocabulary plus codebook. `head_dim` is always 128
    upstream and absent from its config.json; the small models of the built-in worlds store their own.
    """

    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    num_hidden_layers: int = 28
    rope_theta: float = 1_000_000
    vocab_size: int = 215_669
    lm_vocab_size: int = 151_669
    lm_head_size: int = 64_000
    bov_token_id: int = 151_652
    head_dim: int = 128

    @classmethod
    def from_dict(cls, values: Mapping) -> UrsaConfig:
        """Build from the content of a config.json.

        Raises:
            DimoError: a size is out of range, or a field asks for something that this transformer does not implement.
        """
        values = dict(values) | _rope_theta(values)
        _refuse_another_model({key: value for key, value in values.items() if value is not None})
        config = cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values})
        for name, value in dataclasses.asdict(config).items():
            kinds = (int, float) if name == "rope_theta" else int
            least, most = LEAST.get(name, 1), MOST.get(name, MOST_OTHERS)
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
                raise DimoError(f"{name} must be a number of at least {least} and at most {most}, got {value!r}")
        if config.bov_token_id >= config.lm_vocab_size:
            raise DimoError(
                f"bov_token_id must lie in [0, lm_vocab_size = {config.lm_vocab_size}), got {config.bov_token_id}"
            )
        if config.lm_head_size not in (config.codebook_size, config.vocab_size) or config.codebook_size < 1:
            raise DimoError(
                f"lm_head_size must be the codebook's size, vocab_size - lm_vocab_size = {config.codebook_size}, or "
                f"vocab_size = {config.vocab_size}, got {config.lm_head_size}"
            )
        if config.num_attention_heads % config.num_key_value_heads:
            raise DimoError(
                f"num_attention_heads ({config.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({config.num_key_value_heads})"
            )
        if config.head_dim % 16:
            raise DimoError(f"head_dim must be a multiple of 16 (3-D RoPE), got {config.head_dim}")
        return config

    def to_dict(self) -> dict:
        """The content of a config.json that upstream can read; head_dim is omitted if it is upstream's 128."""
        values = {**dataclasses.asdict(self), "max_window_layers": self.num_hidden_layers}
        return values if self.head_dim != 128 else {k: v for k, v in values.items() if k != "head_dim"}

    @property
    def codebook_size(self) -> int:
        """K, the number of visual codes."""
        return self.vocab_size - self.lm_vocab_size


def _refuse_another_model(values: Mapping) -> None:
    """Raise DimoError for a field that is unknown or asks for something that our transformer does not implement."""
    if values.get("use_sliding_window") is False:  # then the window size is unused
        values = {key: value for key, value in values.items() if key != "sliding_window"}
    read = {field.name for field in dataclasses.fields(UrsaConfig)} | {"layer_types", *ROPE}
    for key, value in values.items():
        if key in COMPUTED:
            _require_computed(key, value, COMPUTED[key])
        elif key not in read | NO_MATTER and not key.startswith("_"):
            raise DimoError(
                f"{key} = {value!r} is a field that dimo does not know, so it might compute something other than this "
                "model; delete the field if it does not affect the output"
            )
    kinds = values.get("layer_types", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        _require_computed("layer_types", kind, ("full_attention",))


def _require_computed(key: str, value: Any, computed: tuple) -> None:
    if value not in computed:
        raise DimoError(f"{key} = {value!r} is not supported; dimo implements {computed[0]!r} only")


def _rope_theta(values: Mapping) -> dict:
    """{"rope_theta": ...} from whichever RoPE field has it, else {}; raise for an unsupported RoPE setting."""
    said = {"rope_theta": values.get("rope_theta")}
    for name in ROPE:
        rope = {} if values.get(name) is None else values[name]
        if isinstance(rope, Mapping) and rope.keys() == {"full_attention"}:  # given per layer type
            name, rope = f"{name}.full_attention", rope["full_attention"]
        if not isinstance(rope, Mapping):
            raise DimoError(f"{name} must be an object, got {rope!r}")
        for key, value in rope.items():
            if key == "rope_theta":
                said[f"{name}.rope_theta"] = value
            elif key in ("rope_type", "type"):
                _require_computed(f"{name}.{key}", value, ("default", None))
            elif key == "partial_rotary_factor":
                _require_computed(f"{name}.{key}", value, (1, None))
            elif value is not None:
                raise DimoError(f"{name}.{key} = {value!r} is not supported")
    said = {key: value for key, value in said.items() if value is not None}
    if not said:
        return {}
    (first, theta), *others = said.items()
    for key, value in others:
        if value != theta:
            raise DimoError(f"{key} = {value!r} contradicts {first} = {theta!r}")
    return {"rope_theta": theta}
