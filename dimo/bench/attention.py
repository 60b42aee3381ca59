"""The part "attention" of `dimo bench`: one layer's attention with every kernel that is there, timed and checked."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dimo.bench.parts import Clock, matrix_product
from dimo.errors import reason
from dimo.train.trainer import Trainer
from dimo.ursa.attention import deactivate_fa4, fa4_problem, trial_errors

NAMES = {  # {name: kernel}
    "fa4": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
CHECKED = 1000  # positions at which outputs and gradients are compared with float32


def attention_alone(trainer: Trainer, batch: int, text: int, clock: Clock) -> Iterator[tuple[str, dict]]:
    """Time one layer's attention, forward and backward, for each kernel, with grouped and with repeated keys.

    FlashAttention 4 comes first, where it can be used, and is then left as the trainer has it.

    Yields:
        (name, result). Of a kernel that does not support this, or does not fit into memory, the result is {"why"}.
        Otherwise it has the times, "tflops" (a backward pass counts as two), and "errors": relative to float32, of
        output and gradients.
    """
    config, device = trainer.networks.student.config, trainer.device
    dtype = torch.bfloat16 if trainer.config.training.mixed_precision == "bf16" else torch.float32
    size = batch, text + 1 + trainer.num_visual_tokens
    product = matrix_product(clock)
    for name, kernel in NAMES.items():
        deactivate_fa4()
        why = fa4_problem(device, dtype, config) if name == "fa4" else ""
        for grouped in (True, False):
            row = f"{name}, {'grouped' if grouped else 'repeated'}"
            if why:
                yield row, {"why": why}
                break
            try:
                result = _timed(kernel, size, config, grouped, dtype, device, clock)
                errors = trial_errors(kernel, device, dtype, config, CHECKED)
            except RuntimeError as error:  # the kernel does not support this, or the memory does not suffice
                yield row, {"why": reason(error)}
                continue
            yield row, result | {"share_of_product": result["tflops"] / product, "errors": errors}
    if trainer.attention.name == "fa4":
        fa4_problem(device, dtype, config)


def _timed(kernel: SDPBackend, size: tuple[int, int], config, grouped: bool, dtype, device, clock: Clock) -> dict:
    heads, width = config.num_attention_heads, config.head_dim
    kv_heads = config.num_key_value_heads if grouped else heads

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(*size, heads, width, device=device, dtype=dtype).transpose(1, 2)

    q, k, v = (draw(n).requires_grad_() for n in (heads, kv_heads, kv_heads))
    grad = draw(heads)

    def both():
        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
        torch.autograd.grad(out, (q, k, v), grad)

    tflop = 3 * 4 * size[0] * heads * size[1] ** 2 * width / 1e12
    result = clock(both)
    return result | {"tflops": tflop / result["seconds"]}
