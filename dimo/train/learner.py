"""A network that is trained: its gradient over all processes, its norm, the update, and what of it is saved."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from dimo.errors import capturing, require_finite
from dimo.train.masters import MasterAdamW, learning_of, with_first_moments
from dimo.train.sharded import full_tensors, load_full_state, placed_like, reshard, to_local

BUCKET_ENTRIES = 2**26  # gradient entries per all-reduce: 256 MiB of float32
SENT_ALONE = 2**20  # gradients with at least so many entries are all-reduced during the backward pass, once ready


class Learner:
    """A trained network with its optimizers. Per update: `backward` calls, `gradient_norm`, then `update` or `discard`.

    This class serves a single process, DDP and FSDP2. Under DDP the gradients are all-reduced here, because a step may
    run several forward passes of a network before one backward pass, which torch's reducer does not allow. FSDP2
    averages them in its backward pass. Of GPUs that share samples (`sharers`) each has a summand of the gradient.
    """

    def __init__(
        self, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], max_grad_norm: float, sharers: int = 1
    ):
        self.model, self.optimizers, self.max_grad_norm, self.sharers = model, optimizers, max_grad_norm, sharers
        self.learning = learning_of(model)
        self.sharded = isinstance(model, FSDPModule)
        self.gradients: list[torch.Tensor] = []  # local shards; averaged over the ranks after `gradient_norm`
        self.last = True
        self.sending: dict[torch.Tensor, dist.Work] = {}
        if self.averages:
            for p in self.learning:
                if p.numel() >= SENT_ALONE:
                    p.register_post_accumulate_grad_hook(self._send)

    @property
    def averages(self) -> bool:
        """Whether gradients are averaged by this class and not by the engine."""
        return dist.is_initialized() and not self.sharded

    def _send(self, p: torch.nn.Parameter) -> None:
        if self.last:
            self.sending[p.grad] = dist.all_reduce(p.grad, reduction(), async_op=True)

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        """Accumulate the gradient of the loss; `last`: no further backward pass before the update."""
        self.last = last
        (loss * self.sharers).backward()

    def gradient_norm(self) -> torch.Tensor:
        """The norm of the gradient averaged over the ranks, equal on all of them: NaN on one rank is NaN on all."""
        self.gradients = [to_local(p.grad) for p in self.learning if p.grad is not None]
        if self.averages:
            average([gradient for gradient in self.gradients if gradient not in self.sending])
            for sent in self.sending.values():
                sent.wait()
            if self.sending and reduction() == dist.ReduceOp.SUM:
                torch._foreach_div_(list(self.sending), dist.get_world_size())
            self.sending = {}
        norms: list[torch.Tensor] = []
        for dtype in dict.fromkeys(gradient.dtype for gradient in self.gradients):  # one pass over each kind
            alike = [gradient for gradient in self.gradients if gradient.dtype == dtype]
            norms += torch._foreach_norm(alike, dtype=torch.promote_types(dtype, torch.float32))
        square = torch.stack(norms).square().sum()
        if self.sharded:
            dist.all_reduce(square)
        return square.sqrt()

    def update(self, norm: torch.Tensor, name: str) -> None:
        """Clip to max_grad_norm, step and zero the gradient; `norm` is what `gradient_norm` returned.

        Raises:
            NonFiniteError: the norm is not finite. No weight has changed then; `name` is that of the network.
        """
        clip, first = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0), self.optimizers[0]
        if isinstance(first, MasterAdamW):  # the only one; it clips as it goes, and not by a factor of NaN or 0
            read = reading(norm)
            first.step(scale=clip)  # queued while the GPU still makes the gradient
            require_finite(f"the norm of the {name}'s gradient", read())
        else:
            require_finite(f"the norm of the {name}'s gradient", norm)
            torch._foreach_mul_(self.gradients, clip)
            for optimizer in self.optimizers:
                optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Drop the gradient without a step."""
        self.gradients, self.sending = [], {}
        for p in self.learning:
            p.grad = None
        reshard(self.model)

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Full optimizer state, {parameter name: {"exp_avg": ..., ...}}, in the same form under every engine.

        Collective. If it is sharded, it is gathered onto rank 0, and the other ranks hold no tensors.
        """
        reshard(self.model)
        keep = dist.get_rank() == 0 if dist.is_initialized() else True
        held = {p: optimizer.state[p] for optimizer in self.optimizers for p in list(optimizer.state)}
        return {name: full_tensors(held[p], keep) for name, p in self.model.named_parameters() if p in held}

    def load_state(self, weights: dict[str, torch.Tensor], state: dict[str, dict[str, torch.Tensor]]) -> None:
        """Load the results of `Engine.full_state_dict` and `state`; every rank needs the full tensors."""
        load_full_state(self.model, weights)
        named = dict(self.model.named_parameters())
        for optimizer in self.optimizers:
            mine = {p for group in optimizer.param_groups for p in group["params"]}
            optimizer.state.clear()
            for name, values in with_first_moments(state).items():
                if named[name] in mine:
                    optimizer.state[named[name]] = {k: placed_like(named[name], v) for k, v in values.items()}


def reading(value: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Queue a copy of a tensor to the host; returns what waits for this copy, and not for what is queued after it."""
    if not value.is_cuda or capturing(value):
        return lambda: value
    held, ready = torch.empty_like(value, device="cpu", pin_memory=True), torch.cuda.Event()
    held.copy_(value, non_blocking=True)
    ready.record()

    def read() -> torch.Tensor:
        ready.synchronize()
        return held

    return read


def reduction() -> dist.ReduceOp:
    """The mean where the backend has it, which saves a pass over all gradients; else the sum, to be divided."""
    return dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM


def average(tensors: list[torch.Tensor]) -> None:
    """Replace every tensor by its mean over all ranks, in a few large all-reduces."""
    start = 0
    while start < len(tensors):
        end, entries = start, 0
        while end < len(tensors) and (end == start or entries + tensors[end].numel() <= BUCKET_ENTRIES):
            entries, end = entries + tensors[end].numel(), end + 1
        bucket = tensors[start:end]
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat, reduction())
        if reduction() == dist.ReduceOp.SUM:
            flat /= dist.get_world_size()
        pieces = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [piece.view_as(tensor) for piece, tensor in zip(pieces, bucket)])
        start = end
