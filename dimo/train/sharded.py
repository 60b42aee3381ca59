"""Tensors that FSDP2 may have sharded, and whole ones in their place."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """The local shard of a sharded tensor; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensors(values: dict[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """All-gather sharded tensors one by one onto the CPU of the ranks with `keep`; if none is sharded, no copy is made.

    The other ranks get {} from a dict with sharded tensors. Collective.
    """
    if not any(isinstance(value, DTensor) for value in values.values()):
        return values
    gathered = {}
    for name, value in values.items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            gathered[name] = value.cpu()
    return gathered


@torch.no_grad()
def load_full_state(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """`load_state_dict` of full tensors into a model that may be sharded."""
    reshard(model)
    own = model.state_dict()
    model.load_state_dict(
        {name: placed_like(own[name], value) if name in own else value for name, value in weights.items()}
    )


def placed_like(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The full tensor `value` on the device of `tensor`, sharded like it unless its shape differs (a step count)."""
    value = value.to(tensor.device)
    if not isinstance(tensor, DTensor) or value.shape != tensor.shape:
        return value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def reshard(model: torch.nn.Module) -> None:
    """Free the parameters that a forward pass under FSDP2 left gathered, so that the sharded ones are in place."""
    if isinstance(model, FSDPModule):
        model.reshard()
