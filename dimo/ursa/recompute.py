"""Activation checkpointing: what a layer keeps for its backward pass, and what is computed again; compiled or not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

if TYPE_CHECKING:
    from dimo.ursa.transformer import Layer

CHECKPOINTING = {  # {model.activation_checkpointing: what a layer keeps}, each less than the one before
    "none": "everything",
    "swiglu": "everything but the product of gate and up",
    "pointwise": "its input and what attention and matrix products make: norms, RoPE and SwiGLU come again",
    "mlp": "the inputs of attention and of the MLP, and what attention and its products make",
    "selective": "its input and the output of attention",
    "full": "its input",
}

once = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def run_layer(layer: Layer, checkpointing: str, x: torch.Tensor, *how) -> torch.Tensor:
    """`layer.block` with a kind of `CHECKPOINTING`."""
    if checkpointing == "none":
        return layer.block(x, *how)
    if checkpointing == "swiglu":
        return layer.feed(layer.attend(x, *how), again=True)
    if checkpointing == "mlp":
        return once(layer.feed, once(layer.attend, x, *how, context_fn=_keep_products))
    if checkpointing == "full":
        return once(layer.block, x, *how)
    kept = _keep_products if checkpointing == "pointwise" else _keep_attention
    return once(layer.block, x, *how, context_fn=kept)


OPTIONS = {  # of the compiler: how much a kernel may read and compute before a result goes through memory
    # With its defaults, 4, 8 and 30, the gradients of q and k do, in float32, between RoPE and RMSNorm
    "realize_reads_threshold": 8,
    "realize_acc_reads_threshold": 16,
    "realize_opcount_threshold": 80,
}


@functools.cache
def compiled_run() -> Callable:
    """Compiled `run_layer`. The layer is an argument, so all layers of all networks of one dtype share a graph.

    Shapes are static: a run has a single video size and prompt length.
    """
    known = torch._inductor.list_options()
    return torch.compile(run_layer, dynamic=False, options={key: OPTIONS[key] for key in OPTIONS if key in known})


def _keep_attention():
    return create_selective_checkpoint_contexts(_attention)


def _keep_products():
    return create_selective_checkpoint_contexts(_attention_and_products)


def _attention(context, operator, *args, **kwargs) -> CheckpointPolicy:
    name = str(operator)  # what sequence parallelism has sent is not sent again
    kept = ("_scaled_dot_product" in name and "backward" not in name) or "alltoall" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _attention_and_products(context, operator, *args, **kwargs) -> CheckpointPolicy:
    if operator == torch.ops.aten.mm.default:
        return CheckpointPolicy.MUST_SAVE
    return _attention(context, operator, *args, **kwargs)
