"""Networks of URSA's sizes with random weights, and FLOP counts of passes and steps."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from dimo.config import Config
from dimo.errors import DimoError, similar
from dimo.train.passes import LEARNING, passes_of, passes_shared
from dimo.train.prompts import WorldPrompts
from dimo.ursa import MetricPath, Ursa, UrsaConfig, UrsaTransformer
from dimo.ursa.layout import IMAGE_STRIDES, VIDEO_STRIDES

SIZES = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7B": {},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 155_765,
             "lm_head_size": 4096},
}  # fmt: skip


class RandomIds:
    """Stands in for a tokenizer: random ids, seeded by the length of the prompt."""

    def __init__(self, lm_vocab_size: int):
        self.lm_vocab_size = lm_vocab_size

    def __call__(self, prompts: list[str], max_length: int, **_):
        rows = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
        ids = [torch.randint(self.lm_vocab_size, (max_length,), generator=row) for row in rows]
        return dataclasses.make_dataclass("Encoding", ["input_ids"])(torch.stack(ids))


def require_size(size: str) -> None:
    """Raise DimoError for an unknown size."""
    if size not in SIZES:
        raise DimoError(f"size must be one of {', '.join(SIZES)}, got {size!r}{similar(size, SIZES)}")


def require_size_alone(size: str, overrides: Sequence[str]) -> None:
    """Raise DimoError for an unknown size, or overrides that name a teacher as well."""
    require_size(size)
    if any(word.startswith("distill.teacher_ckpt=") for word in overrides):
        raise DimoError(f"--size {size} stands for a teacher without weights, so --teacher_ckpt must be left out")


def strides_for(num_frames: int) -> tuple[int, int]:
    """(time, space): those of URSA's image models for a single frame, else those of its video models."""
    return IMAGE_STRIDES if num_frames == 1 else VIDEO_STRIDES


def random_ursa(size: str, device: torch.device, strides: tuple[int, int] = VIDEO_STRIDES) -> Ursa:
    """A model of one of URSA's sizes with random weights, without files.

    Raises:
        DimoError: unknown size.
    """
    require_size(size)
    config = UrsaConfig.from_dict(SIZES[size])
    with device:
        torch.manual_seed(0)
        transformer = UrsaTransformer(config)
        path = MetricPath(torch.randn(config.codebook_size, 32), alpha=0.9, c=3.0)
    tokenizer, folder = RandomIds(config.lm_vocab_size), Path(tempfile.gettempdir())
    return Ursa(transformer, path, tokenizer, None, 1.0, folder, "random", strides)


def random_prompts(ursa: Ursa, max_prompt_length: int) -> WorldPrompts:
    """64 prompts for `random_ursa`, of different lengths, which its tokenizer maps to different ids."""
    texts = ["a red ball rolls over green grass" + "." * i for i in range(64)]
    return WorldPrompts(texts, ursa, max_prompt_length)


def model_flops(config: UrsaConfig, sequence: int, tokens: int) -> float:
    """FLOPs of one forward pass for one sample: layers, attention, and the head on the visual tokens.

    Args:
        sequence: length of the sequence, text and BOV included.
        tokens: number of visual tokens.
    """
    return config.num_hidden_layers * layer_flops(config, sequence) + head_flops(config, tokens)


def layer_flops(config: UrsaConfig, sequence: int) -> float:
    """FLOPs of one layer's forward pass for one sample."""
    attention_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    weights = config.hidden_size * (2 * attention_width + 2 * kv_width + 3 * config.intermediate_size)
    return 2 * weights * sequence + 4 * sequence**2 * attention_width


def head_flops(config: UrsaConfig, tokens: int) -> float:
    """FLOPs of the head's matrix product for one sample, equal to those of either gradient of it."""
    return 2 * config.hidden_size * config.lm_head_size * tokens


def step_flops(config: Config, network: UrsaConfig, batch: int, sequence: int, tokens: int) -> float:
    """FLOPs of all passes of a training step for its batches of one GPU, as far as they are made.

    A frozen head has no weight gradient. Layers that the auxiliary shares with the teacher have no backward pass, and
    at x_t no forward pass of the auxiliary's.
    """
    passes = passes_of(config)
    flops = sum(passes.values()) * model_flops(network, sequence, tokens)
    if not config.model.train_head:
        flops -= sum(passes[name] // 3 for name in LEARNING) * head_flops(network, tokens)
    flops -= passes_shared(config) * config.model.aux_shared_layers * layer_flops(network, sequence)
    return config.training.gradient_accumulation_steps * batch * flops
