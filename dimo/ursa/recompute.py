"""Activation checkpointing: what a layer keeps for its backward pass, and what is computed again; compiled or not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from dimo.ursa.transformer import Layer

CHECKPOINTING = {  # {model.activation_checkpointing: what a layer keeps}, each less than the one before
    "none": "everything",
    "swiglu": "everything but the product of gate and up",
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
    kept = {"context_fn": _keep_attention} if checkpointing == "selective" else {}
    return once(layer.block, x, *how, **kept)


@functools.cache
def compiled_run() -> Callable:
    """Compiled `run_layer`. The layer is an argument, so all layers of all networks of one dtype share a graph.

    Shapes are static: a run has a single video size and prompt length.
    """
    return torch.compile(run_layer, dynamic=False)


def _keep_attention():
    return create_selective_checkpoint_contexts(_attention)


def _attention(context, operator, *args, **kwargs) -> CheckpointPolicy:
    name = str(operator)  # what sequence parallelism has sent is not sent again
    kept = ("_scaled_dot_product" in name and "backward" not in name) or "alltoall" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
