"""The trainer: networks and optimizers, the training step, metrics, and the state that a checkpoint holds."""

from __future__ import annotations

import contextlib
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
from dimo.train.engine import Engine, load_full_state, reshard, to_local
from dimo.train.guards import Guard, alignment_of
from dimo.train.loop import run_training
from dimo.train.metrics import MEASURED, Averages, measured
from dimo.train.optimizers import lr_factor, make_optimizers, warm_ema_decay
from dimo.train.prompts import WorldPrompts, open_prompts
from dimo.ursa import Ursa, load_ursa, predict
from dimo.ursa.cpu import keep_memory
from dimo.worlds import checkpoint_folder, is_world, load_world, require_world
from dimo.worlds.exact import exact_teacher


class Trainer:
    """Everything a run needs. `Trainer(config).train()` is the whole run; a notebook calls `step` or `walk`.

    Args:
        ursa: replaces the checkpoint that `distill.teacher_ckpt` names.
        prompts: replaces the source that `distill.prompt_source` names.

    Raises:
        DimoError: the configuration does not fit the checkpoint, the prompts or the engine.
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
            teacher.bfloat16()  # frozen, so it needs no float32 master weights
        asked = exact_teacher(self.ursa.folder, self.path) if d.teacher == "exact" else teacher
        self.networks = Networks(asked, student, aux, ema)
        for network in (student, aux, ema):
            if not config.model.train_embeddings:
                network.model.embed_tokens = self.engine.frozen(network.model.embed_tokens, teacher.model.embed_tokens)
            if not config.model.train_head:
                network.lm_head = self.engine.frozen(network.lm_head, teacher.lm_head)
                network.model.norm.requires_grad_(False)  # small, so each network keeps its own, in its own precision
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
        self.beta, self.t_shift = d.beta(), d.shift(self.num_visual_tokens, self.ursa.own_shift)
        self.generator = torch.Generator(self.device)
        self.lambda_ent = d.lambda_ent
        # logits are stored only if a batch's take at most 128 MiB and are not rounded to bf16
        large = d.t_draws * d.batch_size_per_gpu * self.num_visual_tokens * self.path.codebook_size > 2**25
        self.dense = not large and config.training.mixed_precision == "no"
        self.guard = Guard(self.engine, config.training.max_bad_steps)
        self.averages = Averages()
        self.events: list[dict] = []  # {"step", "event", ...}; drained by the training loop

    def step(self, index: int) -> tuple[Step, dict[str, float]]:
        """Run training step `index`, the nine stages in order.

        If any rank meets a value that is not finite, all ranks skip the rest of the step.

        Returns:
            (results of the stages, of the last micro-batch under gradient accumulation; metrics grad_norm/student,
            grad_norm/aux, optim/lr and guard/skipped).

        Raises:
            DimoError: training.max_bad_steps steps in a row were skipped; the last batch is saved for replay.
        """
        with trusted_values():  # ids come from a tokenizer checked at loading, and from the step's own draws
            *_, (_, step, values) = self.walk(index)
        return step, values

    def walk(self, index: int) -> Iterator[tuple[int, Step, dict[str, float]]]:
        """Run `step`, pausing after each stage, so that a notebook can inspect the results.

        Precision and compilation are those of training. Under gradient accumulation stages 1 to 8 are yielded for each
        micro-batch; stage 6 is yielded after the auxiliary's updates, stage 9 once, after the student's update.

        Yields:
            (stage number 1 to 9, results so far, metrics as in `step` for stage 9, else {}).
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
            if self.baseline and baseline:
                self.baseline.load_state_dict(baseline)  # a NaN would stay in the moving average forever
            self.events.append({"step": index + 1, "event": "step_skipped", **self.guard.count(error)})
            self.guard.stop_if_hopeless(c.experiment.output_dir, index, seed, steps)
        yield 9, steps[-1], norms | {"optim/lr": c.optim.lr * factor, "guard/skipped": self.guard.skipped}

    def seed_of(self, index: int) -> int:
        """Generator seed from (seed, rank, step), so that a resumed run draws the same numbers."""
        return ((self.config.experiment.seed * 1_000_003 + index) * 4099 + self.engine.rank) % 2**63

    def draw_prompts(self) -> torch.Tensor:
        """Stage 1: txt_ids (B, L)."""
        return self.prompts.batch(self.settings.batch_size_per_gpu, self.generator)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The autocast context of the forward passes."""
        return self.engine.autocast()

    def agreed(self) -> contextlib.AbstractContextManager:
        """Context around stages: a NonFiniteError on one rank is raised on all."""
        return self.guard.agreed()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks."""
        return self.engine.mean(value)

    def set_entropy_bonus(self, index: int, entropy: torch.Tensor) -> None:
        """Set lambda_ent from the mean token entropy over all ranks; a switch between its two values is an event."""
        raised, before = self.entropy_bonus.raised, self.lambda_ent
        entropy = self.engine.mean(entropy).item()
        self.lambda_ent = self.entropy_bonus(entropy, index)
        if self.entropy_bonus.raised != raised:
            event = "entropy_bonus_lowered" if raised else "entropy_bonus_raised"
            change = {"was": before, "is": self.lambda_ent, "entropy": entropy}
            self.events.append({"step": index + 1, "event": event, **change})

    @torch.no_grad()
    def update_ema(self, index: int) -> None:
        """Update the student's moving average."""
        decay = warm_ema_decay(self.config.optim.ema_decay, index)
        reshard(self.networks.ema)
        pairs = zip(self.networks.ema.parameters(), self.networks.student.parameters())
        ema, student = zip(*((to_local(e), to_local(s)) for e, s in pairs if s.requires_grad))
        torch._foreach_lerp_(ema, student, 1 - decay)

    @torch.no_grad()
    def metrics(self, step: Step) -> dict[str, float]:
        """Metrics averaged over the steps since the last call, their micro-batches and all ranks. Collective.

        codes/used, and gap/student_teacher_kl if stage 7 did not run (one more student pass), are computed for `step`,
        the latest one, only. NaN if no step, or for these two the latest step, was finite.
        """
        means = dict.fromkeys([*MEASURED, "reward/square"], torch.tensor(math.nan, device=self.device))
        if not self.guard.in_a_row:
            means["gap/student_teacher_kl"] = self._student_teacher_kl(step)
            means["codes/used"] = torch.tensor(float(step.x_hat.unique().numel()), device=self.device)
            means |= measured(step)  # for a second call after the same step, when there is nothing left to average
        means |= self.averages.take()
        values = self.engine.mean(torch.stack([value.detach().float() for value in means.values()])).tolist()
        means = dict(zip(means, values))
        means["reward/std"] = math.sqrt(max(means.pop("reward/square") - means["reward/mean"] ** 2, 0.0))
        means["loss/kd"] = means["gap/student_teacher_kl"]
        return means | {"lambda_ent": self.lambda_ent} | self.prompts.metrics()

    def _student_teacher_kl(self, step: Step) -> torch.Tensor:
        if step.kd is not None:
            return step.kd
        with self.engine.autocast():
            student = predict(self.networks.student, step.txt_ids_at_t, step.x_t, self.grid, step.dense)
        return losses.kl(step.teacher, student)

    def state(self) -> tuple[dict, dict]:
        """The state that all ranks share, unsharded under every engine. Collective.

        Returns:
            ({network: full state dict}, optimizers and everything else). If the engine shards, only rank 0 holds them.
        """
        n = self.networks
        networks = {"student": n.student, "aux": n.aux, "ema": n.ema}
        return {name: self.engine.full_state_dict(net) for name, net in networks.items()}, {
            "optimizers": {"student": self.student.state(), "aux": self.aux.state()},
            "prompts": self.prompts.state_dict(),  # one position for all ranks
            "entropy_bonus": self.entropy_bonus.state_dict(),
            "baseline": self.baseline.state_dict() if self.baseline else None,
            "guard": self.guard.state_dict(),
        }

    def final_weights(self) -> dict[str, torch.Tensor]:
        """The full state dict of the EMA, with final_logit_gain replacing logit_gain in its last norm. Collective.

        During training the student needs some entropy to explore. Afterwards its samples differ from the arg-max in
        single tokens, and each of these spoils a video, so a higher gain is used. If the engine shards the networks,
        the result is empty on all ranks but rank 0.
        """
        m, weights, norm = self.config.model, self.engine.full_state_dict(self.networks.ema), "model.norm.weight"
        if norm in weights:
            weights[norm] = weights[norm] * (m.final_logit_gain / m.logit_gain)
        return weights

    def rank_state(self) -> dict:
        """The state of this rank only: the memory of x_init and the running means of metrics."""
        return {"x_init": self.x_init.state_dict(), "averages": self.averages.state_dict()}

    def load_state(self, tensors: dict, state: dict, rank_state: dict | None) -> None:
        """Load a checkpoint, which may come from another engine or number of processes. Collective.

        Args:
            tensors, state: from `state`, complete on every rank.
            rank_state: from `rank_state`; None for a rank that the checkpoint does not have, which then starts with an
                empty memory. This is recorded as an event.
        """
        self.student.load_state(tensors["student"], state["optimizers"]["student"])
        self.aux.load_state(tensors["aux"], state["optimizers"]["aux"])
        load_full_state(self.networks.ema, tensors["ema"])
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
        """Train to max_train_steps, resuming from the newest checkpoint of the run folder; write checkpoints/final."""
        return run_training(self, progress)


def step_through(trainer: Trainer, steps: int) -> Iterator[tuple[int, Step, dict[str, float]]]:
    """Train without a run folder, for notebooks; yields (index, results, metrics) of every step."""
    for index in range(steps):
        step, extra = trainer.step(index)
        yield index, step, trainer.metrics(step) | {k: float(v) for k, v in extra.items()}
