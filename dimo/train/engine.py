"""Training engines: one process, DDP, FSDP2 or DeepSpeed ZeRO-2. The trainer does not need to know which one runs.

accelerate's launcher selects it: `accelerate launch --config_file dimo/config/presets/accelerate/fsdp2.yaml ...`.
Student and auxiliary share no autograd graph and are updated at different times, so each is a `Learner` with its own
optimizers, gradient norm and clipping. Master weights are float32 under every engine; bf16 is left to autocast,
and to bf16 copies of them (`dimo.train.masters`) where no engine shards them.
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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from dimo.config import Config, device_of
from dimo.errors import DimoError
from dimo.run.ranks import count_ranks, everywhere, launched_or_alone
from dimo.train.learner import BUCKET_ENTRIES, Learner
from dimo.train.sharded import full_tensors, reshard
from dimo.train.zero2 import Zero2Learner
from dimo.ursa.sequence import Split, splitting


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
        for part in (*model.model.layers, embeddings):
            if part not in shared:
                fully_shard(part, reshard_after_forward=True, **how)
        whole = {p for part in shared for p in part.parameters()}
        # the head is used after `hidden` has returned
        fully_shard(model, reshard_after_forward=False, ignored_params=whole, **how)
        register_fsdp_forward_method(model, "hidden")

    def learner(self, model: torch.nn.Module, make: Callable[[torch.nn.Module], list]) -> Learner:
        """A learner of the model, with the optimizers that `make` creates for it."""
        if self.kind == "deepspeed_zero2":
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
        return value if self.sharers == 1 else everywhere(value)[self.data_rank * self.sharers]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. As the following methods, collective."""
        return count_ranks([flag], self.device)[0] > 0

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """All-reduce: the mean over all ranks."""
        return self.accelerator.reduce(value, "mean")

    def full_state_dict(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The full state dict. A sharded one is gathered onto the CPU of rank 0 and empty on the other ranks."""
        reshard(model)
        return full_tensors(model.state_dict(), keep=self.rank == 0)


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
