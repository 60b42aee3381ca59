"""One training step: the networks, the nine stages in order, and the state that a checkpoint holds."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch

from dimo.config import Config
from dimo.config.older import as_begun
from dimo.distill import losses, stages
from dimo.distill.schedules import Baseline, EntropyController, XInit, fade
from dimo.distill.stages import Step
from dimo.distill.step import Networks, nine_stages
from dimo.errors import DimoError, NonFiniteError, trusted_values
from dimo.run.folder import RunFolder
from dimo.train.engine import Engine, load_whole, local, reshard
from dimo.train.guards import Guard, alignment_of
from dimo.train.loop import run_training
from dimo.train.metrics import MEASURED, Averages, measured
from dimo.train.optimizers import lr_factor, make_optimizers, warm_ema_decay
from dimo.train.prompts import WorldPrompts, open_prompts
from dimo.ursa import Ursa, load_ursa
from dimo.ursa.cpu import keep_memory
from dimo.worlds import checkpoint_folder, is_world, load_world, require_world


class Trainer:
    """Everything a run needs, ready to step. `Trainer(config).train()` is the whole run; a notebook calls `step`.

    `ursa` and `prompts` stand for the checkpoint folder and the prompt source that the configuration names.
    """

    def __init__(self, config: Config, ursa: Ursa | None = None, prompts: WorldPrompts | None = None):
        self.config = config = as_begun(config)
        self.settings = d = config.distill
        o = config.optim
        stages.require_estimator(d.estimator)
        self.engine = Engine(config)
        self.accelerator, self.device = self.engine.accelerator, self.engine.device
        if self.device.type == "cpu":
            keep_memory()
        if ursa is None:
            ursa = load_ursa(checkpoint_folder(d.teacher_ckpt), self.device, backend=config.model.backend)
        self.ursa = ursa
        self.path = self.ursa.path
        self.grid = self.ursa.latents_shape(d.num_frames, d.height, d.width)
        self.num_visual_tokens = math.prod(self.grid)
        samples = d.batch_size_per_gpu * config.training.gradient_accumulation_steps * self.engine.world_size
        self.tokens_per_step = samples * self.num_visual_tokens
        if is_world(self.ursa.folder):
            require_world(load_world(self.ursa.folder), self.grid, self.path.codebook_size)
        self.prompts = prompts or open_prompts(config, self.ursa, self.engine.rank, self.engine.world_size)
        self.empty_ids = self.ursa.tokenize([""], d.max_prompt_length)
        self.uncond_ids = self.ursa.tokenize([d.negative_prompt], d.max_prompt_length)

        teacher = self.ursa.transformer.requires_grad_(False).eval()
        student, aux, ema = (self.engine.copy_of(teacher, learns) for learns in (True, True, False))
        if config.training.mixed_precision == "bf16":
            teacher.bfloat16()  # it never learns, so it needs no more
        self.networks = Networks(teacher, student, aux, ema)
        for network in (student, aux, ema):
            if not config.model.train_embeddings:
                network.model.embed_tokens = self.engine.frozen(network.model.embed_tokens, teacher.model.embed_tokens)
            if not config.model.train_head:
                network.lm_head = self.engine.frozen(network.lm_head, teacher.lm_head)
                network.model.norm.requires_grad_(False)  # small: each has its own, in its own precision
        for network in (student, ema):
            network.model.norm.weight.data.mul_(config.model.logit_gain)
        for network in (teacher, student, aux, ema) if config.model.backend == "native" else ():
            network.run_with(config.model.compile and self.device.type == "cuda", config.model.activation_checkpointing)
        self.student = self.engine.learner(student, lambda net: make_optimizers(net, o.lr, o.muon_lr, o))
        self.aux = self.engine.learner(aux, lambda net: make_optimizers(net, o.aux_lr, o.muon_lr * o.aux_lr / o.lr, o))
        self.x_init = XInit(self.path.codebook_size, d.p_corrupt, d.corrupt_ratio)
        self.entropy_bonus = EntropyController(
            d.lambda_ent, d.lambda_ent_high, d.entropy_floor, d.ent_anneal_from, d.ent_anneal_to
        )
        self.baseline = Baseline(d.baseline_decay) if d.baseline == "ema" else None
        self.beta = d.beta()
        self.generator = torch.Generator(self.device)
        self.lambda_ent = d.lambda_ent
        # logits are not kept where a batch's would be larger than 128 MiB, or bf16 would round them
        large = d.t_draws * d.batch_size_per_gpu * self.num_visual_tokens * self.path.codebook_size > 2**25
        self.dense = not large and config.training.mixed_precision == "no"
        self.guard = Guard(self.engine, config.training.max_bad_steps)
        self.averages = Averages()
        self.events: list[dict] = []  # {"step", "event", ...}: whoever runs the steps takes them away

    def step(self, index: int) -> tuple[Step, dict[str, float]]:
        """One training step, the nine stages in order; returns all they produced and the metrics that cost nothing.

        With training.gradient_accumulation_steps the step has several parts, and what is returned is the last one's.
        A step that meets a value that is not finite, in any process, changes nothing from there on, in all of them.

        Raises:
            DimoError: training.max_bad_steps steps in a row were of that kind; their last batch is saved for replay.
        """
        with trusted_values():  # a tokenizer's ids, which were checked when it was loaded, and what the step draws
            *_, (_, step, values) = self.walk(index)
        return step, values

    def walk(self, index: int) -> Iterator[tuple[int, Step, dict[str, float]]]:
        """`step`, stopping after each stage: yields the stage's number, the step so far, and at the end its metrics.

        For a notebook that looks at what each stage made, in the precision and with the compiled networks that training
        has. Of several parts each comes by itself; stage 6 stops after its updates, stage 9 after the student's.
        """
        c, g = self.config, self.generator
        seed = self.seed_of(index)
        g.manual_seed(seed)
        last = c.training.max_train_steps
        factor = lr_factor(c.optim, index, last, c.optim.min_lr_share)
        self.student.set_lr_factor(factor)
        self.aux.set_lr_factor(lr_factor(c.optim, index, last, c.optim.aux_min_lr_share))
        self.x_init.fade = fade(index, 0, c.distill.p_corrupt_fade * last)
        steps = [Step(dense=self.dense) for _ in range(c.training.gradient_accumulation_steps)]
        norms = {"grad_norm/student": math.nan, "grad_norm/aux": math.nan}
        baseline = self.baseline.state_dict() if self.baseline else None
        try:
            for number, step in nine_stages(self, index, steps, norms):
                if number < 9:
                    yield number, step, {}
            self.guard.count(None)
            for step in steps:
                self.averages.add(measured(step))
        except NonFiniteError as error:
            norms = dict.fromkeys(norms, math.nan)
            self.student.discard()
            self.aux.discard()
            if self.baseline:
                self.baseline.load_state_dict(baseline)  # a moving average never forgets a NaN
            self.events.append({"step": index + 1, "event": "step_skipped", **self.guard.count(error)})
            self.guard.stop_if_hopeless(c.experiment.output_dir, index, seed, steps)
        yield 9, steps[-1], norms | {"optim/lr": c.optim.lr * factor, "guard/skipped": self.guard.skipped}

    def seed_of(self, index: int) -> int:
        """Of (seed, rank, step), so that a resumed run draws what the run would have drawn."""
        return ((self.config.experiment.seed * 1_000_003 + index) * 4099 + self.engine.rank) % 2**63

    def draw_prompts(self) -> torch.Tensor:
        """Stage 1's txt_ids (B, L)."""
        return self.prompts.batch(self.settings.batch_size_per_gpu, self.generator)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision of the passes."""
        return self.engine.autocast()

    def agreed(self) -> contextlib.AbstractContextManager:
        """Around stages: a NonFiniteError in one process is raised in all."""
        return self.guard.agreed()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Over all processes."""
        return self.engine.mean(value)

    def set_entropy_bonus(self, index: int, entropy: torch.Tensor) -> None:
        """lambda_ent from the entropy over all processes; its rise and its fall are events."""
        raised, before = self.entropy_bonus.raised, self.lambda_ent
        entropy = self.engine.mean(entropy).item()
        self.lambda_ent = self.entropy_bonus(entropy, index)
        if self.entropy_bonus.raised != raised:
            event = "entropy_bonus_lowered" if raised else "entropy_bonus_raised"
            change = {"was": before, "is": self.lambda_ent, "entropy": entropy}
            self.events.append({"step": index + 1, "event": event, **change})

    @torch.no_grad()
    def update_ema(self, index: int) -> None:
        """Move the average towards the student."""
        decay = warm_ema_decay(self.config.optim.ema_decay, index)
        reshard(self.networks.ema)
        pairs = zip(self.networks.ema.parameters(), self.networks.student.parameters())
        ema, student = zip(*((local(e), local(s)) for e, s in pairs if s.requires_grad))
        torch._foreach_lerp_(ema, student, 1 - decay)

    @torch.no_grad()
    def metrics(self, step: Step) -> dict[str, float]:
        """Means over the steps since the last call, their parts and all processes; collective.

        What a step does not compute anyway is of `step`, the latest, alone: KL(p_T || p_St) without stage 7 (one more
        pass of the student), and codes/used. Where no step was finite, or for these the latest was not, they are NaN.
        """
        means = dict.fromkeys([*MEASURED, "reward/square"], torch.tensor(math.nan, device=self.device))
        if not self.guard.in_a_row:
            means["gap/student_teacher_kl"] = self._student_teacher_kl(step)
            means["codes/used"] = torch.tensor(float(step.x_hat.unique().numel()), device=self.device)
            means |= measured(step)  # for who asks a second time of one step, when there is nothing left to average
        means |= self.averages.take()
        values = self.engine.mean(torch.stack([value.detach().float() for value in means.values()])).tolist()
        means = dict(zip(means, values))
        means["reward/std"] = math.sqrt(max(means.pop("reward/square") - means["reward/mean"] ** 2, 0.0))
        means["loss/kd"] = means["gap/student_teacher_kl"]
        return means | {"lambda_ent": self.lambda_ent} | self.prompts.metrics()

    def _student_teacher_kl(self, step: Step) -> torch.Tensor:
        if step.kd is not None:
            return step.kd
        at_t = dataclasses.replace(step)
        with self.engine.autocast():
            stages.distil_knowledge(at_t, self.networks.student, self.grid)
        return losses.kl(at_t.teacher, at_t.student_at_t)

    def state(self) -> tuple[dict, dict]:
        """(tensors by network, all else that the processes share) of a checkpoint; whole, whatever the engine.

        Collective. Where the engine cuts networks, the content is rank 0's.
        """
        n = self.networks
        networks = {"student": n.student, "aux": n.aux, "ema": n.ema}
        return {name: self.engine.whole_state(net) for name, net in networks.items()}, {
            "optimizers": {"student": self.student.state(), "aux": self.aux.state()},
            "prompts": self.prompts.state_dict(),  # one position for all
            "entropy_bonus": self.entropy_bonus.state_dict(),
            "baseline": self.baseline.state_dict() if self.baseline else None,
            "guard": self.guard.state_dict(),
        }

    def final_weights(self) -> dict[str, torch.Tensor]:
        """The EMA's, whole, with final_logit_gain in its last norm in the place of logit_gain. Collective.

        On the ranks that hold none, where the engine cuts networks, it is empty. In training the student's draws must
        stay open to be led; at the end they differ from the arg-max by single tokens, each of which spoils a video.
        """
        m, weights, norm = self.config.model, self.engine.whole_state(self.networks.ema), "model.norm.weight"
        if norm in weights:
            weights[norm] = weights[norm] * (m.final_logit_gain / m.logit_gain)
        return weights

    def rank_state(self) -> dict:
        """What is this process's own: the memory that x_init is drawn from, and sums of metrics."""
        return {"x_init": self.x_init.state_dict(), "averages": self.averages.state_dict()}

    def load_state(self, tensors: dict, state: dict, rank_state: dict | None) -> None:
        """Continue from `state()` and this rank's `rank_state()`, or None for a rank that the checkpoint has not.

        Collective. The number of processes and the engine may be others than the checkpoint's; a rank without a state
        starts with an empty memory, which is an event.
        """
        self.student.load_state(tensors["student"], state["optimizers"]["student"])
        self.aux.load_state(tensors["aux"], state["optimizers"]["aux"])
        load_whole(self.networks.ema, tensors["ema"])
        self.prompts.load_state_dict(state["prompts"])
        if rank_state is not None:
            memory = {k: None if v is None else v.to(self.device) for k, v in rank_state["x_init"].items()}
            self.x_init.load_state_dict(memory)
            self.averages.load_state_dict(rank_state["averages"], self.device)
        new = [rank for rank, is_new in enumerate(self.engine.everywhere(rank_state is None)) if is_new]
        if new:
            self.events.append({"step": state.get("step", 0), "event": "ranks_without_state", "ranks": new})
        self.entropy_bonus.load_state_dict(state["entropy_bonus"])
        if self.baseline:
            self.baseline.load_state_dict(state["baseline"])
        self.guard.load_state_dict(state["guard"])

    def require_aligned(self) -> str:
        """What is known of the logits slice that training reads through, in a sentence.

        Raises:
            DimoError: it is misread; its losses would fall all the same, and the student would learn something else.
        """
        with self.autocast():
            alignment = alignment_of(self.ursa, self.settings.max_prompt_length, self.dense)
        if alignment is None:
            return "the logits slice is not checked: without a built-in world no clean videos are known"
        if alignment.found in ("right", None):
            return alignment.sentence
        raise DimoError(f"{alignment.sentence}; look at extract_visual_logits, as notebook 01 does")

    def train(self, progress: bool = True) -> RunFolder:
        """Run to max_train_steps, resuming from the folder's newest checkpoint, and write checkpoints/final."""
        return run_training(self, progress)


def step_through(trainer: Trainer, steps: int) -> Iterator[tuple[int, Step, dict[str, float]]]:
    """For notebooks: train without a run folder, yielding every step."""
    for index in range(steps):
        step, extra = trainer.step(index)
        yield index, step, trainer.metrics(step) | {k: float(v) for k, v in extra.items()}
