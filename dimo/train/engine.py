"""Training engines: one process, DDP, FSDP2 or DeepSpeed ZeRO-2. The trainer does not need to know which one runs.

accelerate's launcher selects it: `accelerate launch --config_file dimo/config/presets/accelerate/fsdp2.yaml ...`.
Student and auxiliary share no autograd graph and are updated at different times, so each is a `Learner` with its own
optimizers, gradient norm and clipping. Master weights are float32 under every engine; bf16 is left to autocast.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from dimo.config import Config, device_of
from dimo.errors import DimoError
from dimo.run.ranks import count_ranks, everywhere, launched_or_alone
from dimo.train.masters import MasterAdamW, learning_of, with_first_moments
from dimo.train.optimizers import set_lr_factor
from dimo.train.sharded import full_tensors, load_full_state, placed_like, reshard, to_local
from dimo.ursa.sequence import Split, splitting

BUCKET_ENTRIES = 2**26  # gradient entries per all-reduce: 256 MiB of float32
SENT_ALONE = 2**20  # gradients with at least so many entries are all-reduced during the backward pass, once ready


class Engine:
    """Processes, device and precision of a run; creates the learners. `kind` is ddp, fsdp2 or deepspeed_zero2.

    Raises:
        DimoError: an unsupported engine, or an optimizer that the engine does not support.
    """

    def __init__(self, config: Config):
        asked = _asked_for()
        self.mixed_precision, self.max_grad_norm = config.training.mixed_precision, config.optim.max_grad_norm
        # accelerate fixes the precision once per process, and DeepSpeed has its own; `autocast` handles it instead
        with launched_or_alone():
            self.accelerator = Accelerator(mixed_precision="no", cpu=device_of(config).type == "cpu")
        self.kind = asked if dist.is_initialized() else "ddp"
        self.device = self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        # in bf16 AdamW keeps bf16 copies of its float32 weights, if none of them is sharded
        self.copies = config.training.mixed_precision == "bf16" and config.optim.optimizer == "adamw"
        self.copies &= self.kind == "ddp" and config.model.backend == "native"
        if self.kind != "ddp" and config.optim.optimizer == "muon":
            raise DimoError(
                f"optim.optimizer=muon needs full matrices, but {self.kind} shards them; use optim.optimizer=adamw or "
                "plain DDP"
            )
        if dist.is_initialized() and dist.get_backend() == "gloo":
            # A gloo thread releases the tensors of the last collective with a delay. If that happens while Python
            # shuts down, the process aborts, and the launcher reports the run as failed.
            atexit.register(time.sleep, 0.2)
        self.sharers = config.training.sequence_parallel if dist.is_initialized() else 1
        self.split = None
        if self.sharers > 1:
            self._require_divisible()
            shape = self.world_size // self.sharers, self.sharers
            mesh = dist.init_device_mesh(self.device.type, shape, mesh_dim_names=("samples", "tokens"))
            self.split = Split(mesh["tokens"])
        # of the samples: the GPUs that share one have the same draws
        self.data_rank, self.data_world_size = self.rank // self.sharers, self.world_size // self.sharers
        self._zero2 = {
            "train_micro_batch_size_per_gpu": config.distill.batch_size_per_gpu,
            "gradient_accumulation_steps": config.training.gradient_accumulation_steps,
            "gradient_clipping": config.optim.max_grad_norm,
            "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": BUCKET_ENTRIES},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }

    def copy_of(self, model: torch.nn.Module, learns: bool, shared: Sequence[torch.nn.Module] = ()) -> torch.nn.Module:
        """A float32 copy of the model, sharded under fsdp2; `learns` says whether it requires gradients.

        The modules `shared` of the model are not copied: the copy has them in common with it, whole and frozen.
        """
        copied = copy.deepcopy(model, {id(part): part for part in shared}).requires_grad_(learns)
        for part in shared:
            part.requires_grad_(False)
        if self.kind == "fsdp2":
            self._shard(copied, shared)
        return copied

    def _shard(self, model: torch.nn.Module, shared: Sequence[torch.nn.Module]) -> None:
        """Shard layer by layer. Under bf16 the weights are rounded before they are gathered, not after: half the bytes.

        Their gradients, which autocast computes in bf16 as well, are averaged in float32.
        """
        bf16 = torch.bfloat16 if self.mixed_precision == "bf16" else None
        policy = MixedPrecisionPolicy(bf16, torch.float32 if bf16 else None, cast_forward_inputs=False)
        how: dict = {"mesh": dist.init_device_mesh(self.device.type, (self.world_size,)), "mp_policy": policy}
        embeddings = model.model.embed_tokens
        for part in (*model.model.layers, *(() if embeddings in shared else (embeddings,))):
            fully_shard(part, reshard_after_forward=True, **how)
        whole = {p for part in shared for p in part.parameters()}
        # the head is used after `hidden` has returned
        fully_shard(model, reshard_after_forward=False, ignored_params=whole, **how)
        register_fsdp_forward_method(model, "hidden")

    def learner(self, model: torch.nn.Module, make: Callable[[torch.nn.Module], list]) -> Learner:
        """A learner of the model, with the optimizers that `make` creates for it."""
        if self.kind == "deepspeed_zero2":
            from dimo.train.zero2 import Zero2Learner  # which builds on this module

            return Zero2Learner(model, make(model), self.max_grad_norm, self.sharers, self._zero2)
        if self.copies:
            model.hold(torch.bfloat16)
        return Learner(model, make(model), self.max_grad_norm, self.sharers)

    def autocast(self) -> torch.autocast:
        """The autocast context of the forward passes, as set by training.mixed_precision.

        The cache of bf16 weights is off: it lives as long as the context, so an update inside it would have no effect.
        """
        bf16 = self.mixed_precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)

    @contextlib.contextmanager
    def dividing(self) -> Iterator[None]:
        """`autocast` in which GPUs that share samples divide their tokens; all of them must make the same passes."""
        with self.autocast(), splitting(self.split):
            yield

    def require_heads(self, heads: int) -> None:
        """Raise DimoError unless the GPUs that share samples can divide a network's key and value heads."""
        if heads % self.sharers:
            raise DimoError(f"training.sequence_parallel={self.sharers} must divide the {heads} key and value heads")

    def _require_divisible(self) -> None:
        if self.world_size % self.sharers:
            raise DimoError(
                f"training.sequence_parallel={self.sharers} must divide the number of processes, {self.world_size}"
            )

    def of_sharers(self, value: Any) -> Any:
        """The value of the first of the GPUs that share this one's samples. Collective."""
        return value if self.sharers == 1 else self.everywhere(value)[self.data_rank * self.sharers]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. This and the following methods are collective."""
        return count_ranks([flag], self.device)[0] > 0

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """All-reduce: the mean over all ranks."""
        return self.accelerator.reduce(value, "mean")

    def everywhere(self, value: Any) -> list:
        """All-gather: the value of every rank, in rank order."""
        return everywhere(value)

    def full_state_dict(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The full state dict. A sharded one is gathered onto the CPU of rank 0 and empty on the other ranks."""
        reshard(model)
        return full_tensors(model.state_dict(), keep=self.rank == 0)


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

    def set_lr_factor(self, factor: float) -> None:
        set_lr_factor(self.optimizers, factor)

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

    def update(self, norm: torch.Tensor) -> None:
        """Clip to max_grad_norm, step and zero the gradient; `norm` is what `gradient_norm` returned."""
        clip, first = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0), self.optimizers[0]
        if isinstance(first, MasterAdamW):  # the only one, and it clips as it goes
            first.step(scale=clip)
        else:
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


def _asked_for() -> str:
    """The engine that accelerate's launcher set in the environment.

    Raises:
        DimoError: a ZeRO stage other than 2, an FSDP version other than 2, or DeepSpeed cannot be imported.
    """
    on = {name for name in ("DEEPSPEED", "FSDP") if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"}
    if "DEEPSPEED" in on:
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage != "2":
            raise DimoError(f"under DeepSpeed zero_stage must be 2, got {stage}; use FSDP2 to shard weights as well")
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise DimoError(f"DeepSpeed cannot be used ({error}); pip install deepspeed, or use FSDP2") from error
        return "deepspeed_zero2"
    if "FSDP" in on:
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise DimoError(f"fsdp_version must be 2 in accelerate's configuration, got {version}")
        return "fsdp2"
    return "ddp"


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
