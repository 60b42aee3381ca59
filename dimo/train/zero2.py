"""Training under DeepSpeed ZeRO-2: the learner of `dimo.train.learner` on top of a DeepSpeed engine."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from dimo.errors import require_finite
from dimo.train.learner import Learner
from dimo.train.masters import with_first_moments
from dimo.train.sharded import load_full_state


class Zero2Learner(Learner):
    """A `Learner` under DeepSpeed ZeRO-2: optimizer states and averaged gradients are sharded, weights are replicated.

    Each network has its own DeepSpeed engine. Forward passes call the network and not the engine, since there may be
    several before one backward pass. Written for DeepSpeed 0.19.
    """

    averages = False

    def __init__(self, model: torch.nn.Module, optimizers: list, max_grad_norm: float, sharers: int, settings: dict):
        import deepspeed  # optional dependency
        from deepspeed.utils import logger

        logger.setLevel(logging.WARNING)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizers[0], config=dict(settings))
        self.zero = self.engine.optimizer
        super().__init__(model, optimizers, max_grad_norm, sharers)

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        self.zero.clear_backward_seen_flag()
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.sharers, scale_wrt_gas=False)

    def gradient_norm(self) -> torch.Tensor:
        norm = torch.as_tensor(self.zero.scaled_global_norm(), device=self.engine.device)
        return torch.where(norm < 0, torch.nan, norm)  # DeepSpeed returns -1 for NaN or infinity

    def update(self, norm: torch.Tensor, name: str) -> None:
        require_finite(f"the norm of the {name}'s gradient", norm)
        self.engine.step()

    def discard(self) -> None:
        self.zero.zero_grad()
        for group in range(len(self.zero.bit16_groups)):
            self.zero.averaged_gradients[group] = None
            self.zero.all_grad_tensors[group] = None

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state, keep = {}, dist.get_rank() == 0
        steps = {i: self.optimizers[0].state[p].get("step") for i, p in enumerate(self._flat())}
        for group, parameters in enumerate(self.zero.bit16_groups):
            for p in parameters if steps[group] is not None else ():
                moments = {key: safe_get_full_optimizer_state(p, key) for key in ("exp_avg", "exp_avg_sq")}
                state[p] = {k: v.cpu() for k, v in {"step": steps[group], **moments}.items()} if keep else {}
        return {name: state[p] for name, p in self.model.named_parameters() if p in state and keep}

    def load_state(self, weights: dict[str, torch.Tensor], state: dict[str, dict[str, torch.Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        load_full_state(self.model, weights)
        self.zero.refresh_fp32_params()
        if not state:
            return
        state = with_first_moments(state)
        held, step = self.optimizers[0].state, next(iter(state.values()))["step"]
        for p in self._flat():
            if p not in held:
                held[p] = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            held[p]["step"] = step.to(p.device, copy=True)
        self.zero._lazy_init_hp_params_optimizer_state()  # maps parameters to their moments in the flat buffers
        for name, p in self.model.named_parameters():
            for key in ("exp_avg", "exp_avg_sq") if name in state else ():
                safe_set_full_optimizer_state(p, state[name][key].to(p.device), key)

    def _flat(self) -> list[torch.Tensor]:
        return [group["params"][0] for group in self.optimizers[0].param_groups]
