"""The training steps of a world's teacher: cross-entropy of the clean tokens, optimizers, and the moving average.

On a GPU the two halves of a step become CUDA graphs (`dimo.ursa.cuda_graph`), as it would be bound by its kernel
launches. Data are drawn, and learning rate and weight of the moving average set, before each replay, so a replay makes
the ordinary step. Between the halves, processes that train together average their gradients.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.nn import functional as F

from dimo.errors import DimoError, reason
from dimo.files import whole_file
from dimo.ursa import MetricPath, UrsaTransformer, predict, visual_logits
from dimo.ursa.chunks import FEW_CODES
from dimo.ursa.cuda_graph import ORDINARY, assign, make_capturable, record, towards
from dimo.ursa.muon import Muon, is_for_muon
from dimo.ursa.probability_path import T_MAX, shifted
from dimo.ursa.token_losses import denoising
from dimo.worlds.protocol import World

if TYPE_CHECKING:
    from dimo.worlds.teacher import TeacherRecipe

EMPTY_PROMPT_SHARE = 0.1
EMA_DECAY = 0.999
MAX_GRAD_NORM = 1.0
MUON_MOMENTUM = 0.95
WARMUP = 300  # steps, of a run of at least ten times as many


def rank() -> int:
    """Which of the processes that train together this one is; 0 is also one that trains alone."""
    return dist.get_rank() if dist.is_initialized() else 0


class DenoisingSteps:
    """A teacher in training: its network, the moving average of its weights, and its steps.

    Processes of one process group share the videos of a step, each with as many; their weights stay the same.

    Args:
        model: the network, on the generator's device, with the same weights in all processes.
        prompt_ids: (prompts, L) the ids of the world's prompts.
        pad: the id of which the empty prompt consists.
        generator: of this process's data.
        graph: whether the steps become a CUDA graph; then they run on a stream of their own.
    """

    def __init__(
        self,
        world: World,
        recipe: TeacherRecipe,
        model: UrsaTransformer,
        prompt_ids: torch.Tensor,
        pad: int,
        generator: torch.Generator,
        graph: bool,
    ):
        self.world, self.recipe, self.model, self.generator, self.graph = world, recipe, model, generator, graph
        device = generator.device
        self.path = MetricPath(world.codebook().to(device), recipe.alpha, recipe.c)
        self.prompt_ids, self.pad = prompt_ids.to(device), pad
        self.ema = copy.deepcopy(model).requires_grad_(False)
        self.optimizers = _optimizers(model, recipe, fused=graph or None)
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        if recipe.batch_size % self.processes:
            raise DimoError(f"batch_size {recipe.batch_size} cannot be shared evenly by {self.processes} processes")
        self.videos = recipe.batch_size // self.processes  # of this process
        self.gradient = _gradients_in_one(model)
        self.ema_weight: float | torch.Tensor = 1.0
        self.prompt, self.x_1 = torch.empty(0), torch.empty(0)  # prompt indices (B,) and clean tokens (B, N)
        self.loss = torch.zeros(())
        self.done = 0  # steps since this process began
        self.halves: list[Callable[[], None]] = [self._find_gradient, self._update]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if graph:
            make_capturable(list(self.optimizers.values()), device)
            self.ema_weight = torch.ones((), device=device)

    @property
    def parts(self) -> dict:
        """What a stopped training needs besides its generator."""
        return {"model": self.model, "ema": self.ema, **self.optimizers}

    def step(self, index: int) -> None:
        """Make training step `index`; on a GPU without waiting for it. `loss` is that of this process's videos."""
        recipe, warmup = self.recipe, min(WARMUP, self.recipe.steps // 10 + 1)
        decay = 0.5 * (1 + math.cos(math.pi * index / recipe.steps))
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                peak = recipe.muon_lr if name == "muon" else recipe.lr
                group["lr"] = assign(group["lr"], peak * min(1.0, (index + 1) / warmup) * decay)
        self.ema_weight = assign(self.ema_weight, max(1 - EMA_DECAY, 1 / (index + 1)))
        drawn = self.world.draw(self.videos, self.generator)
        if self.done == 0:
            self.prompt, self.x_1 = drawn
        self.prompt.copy_(drawn[0])
        self.x_1.copy_(drawn[1])
        if self.graph and self.done == ORDINARY:
            self.halves = [record(half, self.stream, self.generator) for half in self.halves]
        find_gradient, update = self.halves
        find_gradient()
        if self.processes > 1:
            dist.all_reduce(self.gradient)
        update()
        self.done += 1

    def _times(self) -> torch.Tensor:
        """t (B,) or, unless there is one per sample, (B, N)."""
        (frames, *rest), batch, g = self.world.latents_shape, self.videos, self.generator
        t_per, shift, spread = self.recipe.t_per, self.recipe.t_shift, self.recipe.t_spread
        size = (batch,) if t_per == "sample" else (batch, frames)
        if spread:
            t = torch.sigmoid(spread * torch.randn(size, generator=g, device=g.device) - math.log(shift)) * T_MAX
        else:
            t = shifted(torch.rand(size, generator=g, device=g.device) * T_MAX, shift)
        if t_per == "mixed":
            t = torch.where(torch.rand(batch, 1, generator=g, device=g.device) < 0.5, t[:, :1], t)
        return t if t_per == "sample" else t.repeat_interleave(math.prod(rest), 1)

    def _find_gradient(self) -> None:
        """Fill `gradient` with this process's summand of the mean over all videos."""
        t = self._times()
        drop = torch.rand(len(t), generator=self.generator, device=t.device) < EMPTY_PROMPT_SHARE
        txt_ids = self.prompt_ids[self.prompt].masked_fill(drop[:, None], self.pad)
        x_t = self.path.sample(self.x_1, t, self.generator)
        loss = denoising_loss(self.model, txt_ids, x_t, self.x_1, self.world.latents_shape)
        self.gradient.zero_()
        (loss / self.processes).backward()
        self.loss = loss.detach()

    @torch.no_grad()
    def _update(self) -> None:
        self.gradient.mul_((MAX_GRAD_NORM / (self.gradient.norm() + 1e-6)).clamp(max=1.0))
        for optimizer in self.optimizers.values():
            optimizer.step()
        towards(list(self.ema.parameters()), list(self.model.parameters()), self.ema_weight)


def _gradients_in_one(model: UrsaTransformer) -> torch.Tensor:
    """Zeros of which every parameter's gradient is a view, so that all are averaged, clipped and cleared at once."""
    parameters = list(model.parameters())
    gradient = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    for p, own in zip(parameters, gradient.split([p.numel() for p in parameters])):
        p.grad = own.view_as(p)
    return gradient


def _optimizers(model: UrsaTransformer, recipe: TeacherRecipe, fused: bool | None) -> dict[str, torch.optim.Optimizer]:
    """AdamW, and with a Muon rate Muon for the matrices inside the layers."""
    inside: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (inside if recipe.muon_lr and is_for_muon(name, parameter) else rest).append(parameter)
    made: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
    }
    return made | ({"muon": Muon(inside, recipe.muon_lr, MUON_MOMENTUM)} if inside else {})


def denoising_loss(
    model: UrsaTransformer,
    txt_ids: torch.Tensor,
    x_t: torch.Tensor,
    x_1: torch.Tensor,
    latents_shape: tuple[int, int, int],
) -> torch.Tensor:
    """Mean cross-entropy of the clean tokens; on a GPU and for large codebooks logits are not kept (`token_losses`).

    On a GPU the layers run in bf16, several times as fast at 1,280 tokens, and the losses in float32.
    """
    if model.config.codebook_size <= FEW_CODES and not x_t.is_cuda:
        return F.cross_entropy(visual_logits(model, txt_ids, x_t, latents_shape).flatten(0, 1), x_1.flatten())
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=x_t.is_cuda):
        prediction = predict(model, txt_ids, x_t, latents_shape)
    return denoising(prediction, x_1)


class TrainingState:
    """What training needs to go on where it stopped, in the file `kept`; None keeps nothing.

    The first of several processes writes it, with the states of all generators.
    """

    def __init__(self, kept: Path | None, steps: DenoisingSteps):
        self.kept, self.parts, self.generator = kept, steps.parts, steps.generator
        self.optimizers = steps.optimizers
        self.of = {"world": steps.world.name, **dataclasses.asdict(steps.world), **dataclasses.asdict(steps.recipe)}
        self.of["processes"] = steps.processes

    def load(self) -> int:
        """The number of steps done."""
        if self.kept is None or not self.kept.exists():
            return 0
        try:
            state = torch.load(self.kept, map_location="cpu", weights_only=True)
            if not (isinstance(state, dict) and {"of", "step", "generator", *self.parts} <= state.keys() | {"muon"}):
                raise DimoError("it is no state of training")
        except Exception as error:  # torch raises many types for a damaged file
            raise DimoError(f"{self.kept} is damaged: remove it to start afresh ({reason(error)})") from error
        if state["of"] != self.of:
            differ = ", ".join(name for name in self.of if state["of"].get(name) != self.of[name])
            raise DimoError(
                f"{self.kept} holds a teacher that is half trained, with other values of {differ}: give those again, "
                "or remove it to start afresh"
            )
        for name, optimizer in self.optimizers.items():  # whose rates a graph reads where they are
            state[name] = state[name] | {"param_groups": optimizer.state_dict()["param_groups"]}
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"][rank()])
        return state["step"]

    def save(self, step: int) -> None:
        if self.kept is None:
            return
        generators = [self.generator.get_state()]
        if dist.is_initialized():
            generators *= dist.get_world_size()
            dist.all_gather_object(generators, self.generator.get_state())
        if rank() > 0:
            return
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        with whole_file(self.kept) as beside:
            torch.save({"of": self.of, "step": step, "generator": generators, **parts}, beside)
