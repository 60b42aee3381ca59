"""One training step: the networks, the nine stages in order, and the state that a checkpoint holds."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator, DistributedType

from dimo.distill import stages
from dimo.distill.losses import beta_of, kl, token_entropy, total_variation
from dimo.distill.schedules import Baseline, EntropyController, XInit
from dimo.distill.stages import Step
from dimo.errors import DimoError
from dimo.train.config import Config, device_of
from dimo.train.loop import run_training
from dimo.train.optimizers import lr_factor, make_optimizers, set_lr_factor
from dimo.train.prompts import open_prompts
from dimo.train.runfolder import RunFolder
from dimo.ursa import Ursa, UrsaTransformer, load_ursa, visual_logits
from dimo.ursa.cpu import keep_memory
from dimo.worlds import checkpoint_folder, load_world, require_grid


@dataclasses.dataclass
class Networks:
    """Teacher (frozen), student, auxiliary, and the student's moving average (frozen)."""

    teacher: UrsaTransformer
    student: UrsaTransformer
    aux: UrsaTransformer
    ema: UrsaTransformer


class Trainer:
    """Everything a run needs, ready to step. `Trainer(config).train()` is the whole run; a notebook calls `step`."""

    def __init__(self, config: Config):
        self.config, d = config, config.distill
        self.accelerator = Accelerator(
            mixed_precision=config.training.mixed_precision, cpu=device_of(config).type == "cpu"
        )
        engine = self.accelerator.distributed_type
        if engine not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
            raise DimoError(
                f"dimo does not train under {engine.value} yet; start it with accelerate launch --multi_gpu"
            )
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            keep_memory()
        self.ursa: Ursa = load_ursa(checkpoint_folder(d.teacher_ckpt), self.device, backend=config.model.backend)
        self.path = self.ursa.path
        self.grid = self.ursa.latents_shape(d.num_frames, d.height, d.width)
        self.num_visual_tokens = math.prod(self.grid)
        if (self.ursa.folder / "world.json").exists():
            require_grid(load_world(self.ursa.folder), self.grid)
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.prompts = open_prompts(config, self.ursa, rank, world_size)
        self.empty_ids = self.ursa.tokenize([""], d.max_prompt_length)
        self.uncond_ids = self.ursa.tokenize([d.negative_prompt], d.max_prompt_length)

        teacher = self.ursa.transformer.requires_grad_(False).eval()
        student, aux = (copy.deepcopy(teacher).requires_grad_(True) for _ in range(2))
        o = config.optim
        student_optimizers = make_optimizers(student, o.lr, o.muon_lr, o)
        aux_optimizers = make_optimizers(aux, o.aux_lr, o.muon_lr * o.aux_lr / o.lr, o)
        self.student_optimizers = [self.accelerator.prepare(optimizer) for optimizer in student_optimizers]
        self.aux_optimizers = [self.accelerator.prepare(optimizer) for optimizer in aux_optimizers]
        self.networks = Networks(teacher, student, aux, copy.deepcopy(teacher))
        self.x_init = XInit(self.path.codebook_size, d.p_corrupt, d.corrupt_ratio)
        self.entropy_bonus = EntropyController(
            d.lambda_ent, d.lambda_ent_high, d.entropy_floor, d.ent_anneal_from, d.ent_anneal_to
        )
        self.baseline = Baseline(d.baseline_decay) if d.baseline == "ema" else None
        self.beta = beta_of(d.divergence)
        self.generator = torch.Generator(self.device)
        self.lambda_ent = d.lambda_ent

    def step(self, index: int) -> tuple[Step, dict[str, float]]:
        """One training step, the nine stages in order; returns all they produced and the metrics that cost nothing."""
        c, d, n, g, grid = self.config, self.config.distill, self.networks, self.generator, self.grid
        # derived from (seed, rank, step), so that a resumed run draws what the run would have drawn
        seed = (c.experiment.seed * 1_000_003 + index) * 4099 + self.accelerator.process_index
        g.manual_seed(seed % 2**63)
        factor = lr_factor(c.optim, index, c.training.max_train_steps)
        set_lr_factor(self.student_optimizers + self.aux_optimizers, factor)

        # 1 prompts; a guided teacher's student must know the empty prompt too
        step = Step(txt_ids=self.prompts.batch(d.batch_size_per_gpu, g))
        if d.guidance_scale != 1 and d.empty_prompt_share > 0:
            drop = torch.rand(d.batch_size_per_gpu, generator=g, device=self.device) < d.empty_prompt_share
            step.txt_ids = torch.where(drop[:, None], self.empty_ids, step.txt_ids)
        # 2 x_init
        stages.draw_x_init(step, self.x_init, self.num_visual_tokens, g)
        # 3 the student's one pass
        with self.accelerator.autocast():
            stages.student_pass(step, n.student, grid, d.temperature, g)
        self.x_init.remember(step.x_hat, step.txt_ids)
        # 4 x_t
        t = stages.draw_t(d.batch_size_per_gpu, grid, index, d.t_curriculum_steps, d.t_per, g, self.device)
        stages.renoise(step, self.path, t, g)
        # 5 teacher
        with self.accelerator.autocast():
            stages.teacher_pass(step, n.teacher, grid, d.guidance_scale, d.guidance_trunc, self.uncond_ids)
        # 6 auxiliary: its updates, then its answer at x_t
        with self.accelerator.autocast():
            aux_losses = stages.auxiliary_losses(
                step, n.aux, self.path, grid, d.aux_objective, d.aux_steps, d.label_smoothing,
                d.empty_prompt_share, self.empty_ids, g,
            )  # fmt: skip
            for aux_loss in aux_losses:
                aux_norm = self._update(n.aux, self.aux_optimizers, aux_loss)
            stages.auxiliary_pass(step, n.aux, grid)
            # 7 knowledge distillation, only where it counts
            if d.w_kd > 0:
                stages.distil_knowledge(step, n.student, grid)
        # 8 the distillation gradient
        stages.distillation_loss(step, d.estimator, self.beta, self.baseline, d.w_reinforce)
        # 9 the student's update
        if d.lambda_ent > 0:
            everywhere = self.accelerator.reduce(step.entropy.detach().mean(), "mean")
            self.lambda_ent = self.entropy_bonus(everywhere.item(), index)
        stages.total_loss(step, d.w_distill, d.w_kd, self.lambda_ent)
        student_norm = self._update(n.student, self.student_optimizers, step.loss)
        self._update_ema(index)
        return step, {"grad_norm/student": student_norm, "grad_norm/aux": aux_norm, "optim/lr": c.optim.lr * factor}

    def _update(self, model, optimizers: list, loss: torch.Tensor) -> torch.Tensor:
        self.accelerator.backward(loss)
        if self.accelerator.num_processes > 1:  # by hand: a stage may pass a network twice before its one backward
            for parameter in model.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        norm = self.accelerator.clip_grad_norm_(model.parameters(), self.config.optim.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise DimoError("a gradient is NaN or infinite; the step was not taken. Lower optim.lr or optim.aux_lr")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def _update_ema(self, index: int) -> None:
        decay = min(self.config.optim.ema_decay, (1 + index) / (10 + index))
        own = list(self.networks.student.parameters())
        torch._foreach_lerp_(list(self.networks.ema.parameters()), own, 1 - decay)

    @torch.no_grad()
    def metrics(self, step: Step) -> dict[str, float]:
        """The metrics of design: entropies and gaps at x_t, loss parts, reward. Costs one more pass of the student."""
        student_at_t = visual_logits(self.networks.student, step.txt_ids, step.x_t, self.grid)
        kd = kl(step.teacher_logits, student_at_t).mean()
        values = {
            "loss/total": step.loss,
            "loss/distill": step.distill,
            "loss/aux": torch.stack(step.aux_losses).mean(),
            "loss/kd": kd,
            "entropy/student": step.entropy.mean(),
            "entropy/aux": token_entropy(step.aux_logits).mean(),
            "entropy/teacher": token_entropy(step.teacher_logits).mean(),
            "reward/mean": step.reward.mean(),
            "reward/std": step.reward.std(unbiased=False),
            "reward/baseline": step.baseline if step.baseline is not None else step.reward.mean(),
            "gap/aux_teacher_tv": total_variation(step.teacher_logits, step.aux_logits).mean(),
            "gap/student_teacher_kl": kd,
            "t/mean": step.t.mean(),
            "x_init/corrupt_share": step.corrupted.float().mean(),
            "codes/used": torch.tensor(float(step.x_hat.unique().numel())),
        }
        values = {name: value.item() for name, value in values.items()}
        return values | {"lambda_ent": self.lambda_ent} | self.prompts.metrics()

    def state(self) -> tuple[dict, dict]:
        """(tensors by network, everything else) of a checkpoint."""
        n = self.networks
        networks = {"student": n.student, "aux": n.aux, "ema": n.ema}
        return {name: net.state_dict() for name, net in networks.items()}, {
            "student_optimizers": [optimizer.state_dict() for optimizer in self.student_optimizers],
            "aux_optimizers": [optimizer.state_dict() for optimizer in self.aux_optimizers],
            "prompts": self.prompts.state_dict(),
            "x_init": self.x_init.state_dict(),
            "entropy_bonus": self.entropy_bonus.state_dict(),
            "baseline": self.baseline.state_dict() if self.baseline else None,
        }

    def load_state(self, tensors: dict, state: dict) -> None:
        n = self.networks
        for name, net in (("student", n.student), ("aux", n.aux), ("ema", n.ema)):
            net.load_state_dict(tensors[name])
        for name in ("student_optimizers", "aux_optimizers"):
            for optimizer, saved in zip(getattr(self, name), state[name], strict=True):
                optimizer.load_state_dict(saved)
        self.prompts.load_state_dict(state["prompts"])
        memory = {k: None if v is None else v.to(self.device) for k, v in state["x_init"].items()}
        self.x_init.load_state_dict(memory)
        self.entropy_bonus.load_state_dict(state["entropy_bonus"])
        if self.baseline:
            self.baseline.load_state_dict(state["baseline"])

    def train(self, progress: bool = True) -> RunFolder:
        """Run to max_train_steps, resuming from the folder's newest checkpoint, and write checkpoints/final."""
        return run_training(self, progress)


def step_through(trainer: Trainer, steps: int) -> Iterator[tuple[int, Step, dict[str, float]]]:
    """For notebooks: train without a run folder, yielding every step."""
    for index in range(steps):
        step, extra = trainer.step(index)
        yield index, step, trainer.metrics(step) | {k: float(v) for k, v in extra.items()}
