"""Training in bf16: the layers' matrices are bf16 copies of float32 master weights, and one pass over all updates both.

A step of AdamW on 1.4 billion weights is memory traffic. Each trained network saves: in every pass the cast of its
weights and of their gradients; in the update the pass for clipping and, with beta1 = 0, reading and writing a first
moment that is the gradient itself; and half of the memory that gradients take.
"""

from __future__ import annotations

import torch

from dimo.ursa.chunks import on_device
from dimo.ursa.transformer import Products


class MasterAdamW(torch.optim.AdamW):
    """AdamW of float32 weights, some of which learn through copies (`dimo.ursa.transformer.Products`), in one pass.

    The steps are those of `torch.optim.AdamW` with the gradients of the copies. What it saves is memory traffic: in one
    compiled function for each parameter group it also clips, and writes the copies anew. With beta1 = 0 the first
    moment is the gradient itself, so there is none.
    """

    def __init__(self, params, copies: dict[torch.Tensor, tuple[torch.Tensor, slice]], **settings):
        super().__init__(params, **settings)
        # {weight: (its copy, what holds it and gets the gradient, rows)}
        self.copies = {p: (held.detach()[rows], held, rows) for p, (held, rows) in copies.items()}

    @torch.no_grad()
    def step(self, closure=None, scale: torch.Tensor | None = None) -> None:
        """One step with all gradients times `scale`, a scalar tensor; none if that is NaN or 0.

        So the host may queue a step before it knows whether the gradients are finite.
        """
        beta1, beta2 = self.defaults["betas"]
        numbers: tuple[torch.Tensor, ...] = ()
        for group in self.param_groups:  # one after another, so that the GPU has the first while the next is prepared
            rows = [(p, *self._copy_and_gradient(p), self._state(p)) for p in group["params"]]
            rows = [row for row in rows if row[2] is not None]
            if not rows:
                continue
            params, copies, grads, states = zip(*rows)
            moments = [[state.get(key) for state in states] for key in ("exp_avg", "exp_avg_sq")]
            counts = [state["step"] for state in states]
            scale = torch.ones_like(counts[0]) if scale is None else scale
            torch._foreach_add_(counts, (scale > 0).float())
            if not numbers:
                numbers = scale, 1 - beta1 ** counts[0], 1 - beta2 ** counts[0]
            lr = group["lr"] if torch.is_tensor(group["lr"]) else torch.full_like(counts[0], group["lr"])
            settings = beta1, beta2, group["eps"], group["weight_decay"]
            on_device(_adamw, params[0])(params, copies, grads, *moments, lr, *numbers, *settings)

    def _copy_and_gradient(self, p: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if p not in self.copies:
            return None, p.grad
        copy, held, rows = self.copies[p]
        return copy, None if held.grad is None else held.grad[rows]

    def _state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg_sq"] = torch.zeros_like(p)
        if self.defaults["betas"][0] == 0:
            state.pop("exp_avg", None)  # a checkpoint of another optimizer has it
        elif "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(p)
        return state


def _adamw(params, copies, grads, first, second, lr, scale, bias1, bias2, beta1, beta2, eps, weight_decay) -> None:
    go = scale > 0
    for p, copy, grad, m, v in zip(params, copies, grads, first, second):
        grad = grad.float() * scale
        v.copy_(torch.where(go, beta2 * v + (1 - beta2) * grad.square(), v))
        if m is not None:
            m.copy_(torch.where(go, beta1 * m + (1 - beta1) * grad, m))
            grad = m / bias1
        p.copy_(torch.where(go, p * (1 - lr * weight_decay) - lr * grad / ((v / bias2).sqrt() + eps), p))
        if copy is not None:
            copy.copy_(p)


def copies_of(model: torch.nn.Module) -> dict[torch.Tensor, tuple[torch.Tensor, slice]]:
    """{weight that learns through a copy: (matrix that holds the copy, rows)}."""
    found = (row for part in model.modules() if isinstance(part, Products) for row in part.copies())
    return {p: (held, rows) for p, held, rows in found if held.requires_grad}


def learning_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors that get gradients: parameters, or in place of some what holds their copies."""
    copies, found = copies_of(model), dict[torch.Tensor, None]()
    for p in model.parameters():
        if p.requires_grad:
            found[copies[p][0] if p in copies else p] = None
    return list(found)


def with_first_moments(state: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """AdamW's state by parameter, with the first moments that `MasterAdamW` does without if beta1 is 0."""
    return {
        name: {"exp_avg": torch.zeros_like(held["exp_avg_sq"]), **held} if "exp_avg_sq" in held else held
        for name, held in state.items()
    }
