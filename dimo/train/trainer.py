"""The trainer: networks and optimizers, the training step, metrics, and the state that a checkpoint holds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from dimo.config import Config
from dimo.config.older import as_begun
from dimo.distill import losses, stages
from dimo.distill.schedules import Baseline, EntropyController, XInit, fade, power_at, shift_for
from dimo.distill.stages import Step
from dimo.distill.step import nine_stages
from dimo.errors import DimoError, NonFiniteError, trusted_values
from dimo.paths import quoted
from dimo.run.cold_start import ColdStart
from dimo.run.folder import RunFolder
from dimo.train.engine import Engine
from dimo.train.graph import StepGraphs, require_capturable
from dimo.train.guards import Guard
from dimo.train.metrics import BY_T, MEASURED, QUARTERS, SHARE_OF_T, Averages, gaps_by_t, measured
from dimo.train.networks import lower_weights, make_networks
from dimo.train.optimizers import ema_decay_at, lr_factor, make_optimizers, set_lr_factor
from dimo.train.prompts import WorldPrompts, open_prompts
from dimo.train.sharded import load_full_state, reshard, to_local
from dimo.train.together import train_together
from dimo.ursa import Ursa, load_ursa, predict
from dimo.ursa.chunks import BLOCK
from dimo.ursa.cpu import keep_memory
from dimo.ursa.cuda_graph import assign, towards
from dimo.ursa.sampler import student_times
from dimo.ursa.weights import scale_logits
from dimo.views.clean_tokens import known_clean_tokens
from dimo.views.reading import check_slice
from dimo.worlds import checkpoint_folder, is_world, load_world, require_world


class Trainer:
    """Everything a run needs. `Trainer(config).train()` is the whole run; a notebook calls `step` or `walk`.

    Args:
        ursa: replaces the checkpoint that `distill.teacher_ckpt` names.
        prompts: replaces the source that `distill.prompt_source` names.

    Raises:
        DimoError: the configuration does not fit the checkpoint, the prompts or the engine.
    """

    def __init__(self, config: Config, ursa: Ursa | None = None, prompts: WorldPrompts | None = None):
        self.cold_start = ColdStart()
        self.config = config = as_begun(config)
        self.settings = d = config.distill
        o = config.optim
        stages.require_estimator(d.estimator)
        self.engine = Engine(config)
        self.accelerator, self.device = self.engine.accelerator, self.engine.device
        if self.device.type == "cpu":
            keep_memory()
        ursa = ursa or load_ursa(checkpoint_folder(d.teacher_ckpt), self.device, backend=config.model.backend)
        self.cold_start.mark("checkpoint")
        self.ursa, self.path = ursa, ursa.path
        self.grid = self.ursa.latents_shape(d.num_frames, d.height, d.width)
        self.num_visual_tokens = math.prod(self.grid)
        samples = d.batch_size_per_gpu * config.training.gradient_accumulation_steps * self.engine.data_world_size
        self.tokens_per_step = samples * self.num_visual_tokens
        if is_world(self.ursa.folder):
            require_world(load_world(self.ursa.folder), self.grid, self.path.codebook_size)
        self.prompts = prompts or open_prompts(config, self.ursa, self.engine.data_rank, self.engine.data_world_size)
        self.empty_ids = self.ursa.tokenize([""], d.max_prompt_length)
        self.uncond_ids = self.ursa.tokenize([d.negative_prompt], d.max_prompt_length)

        self.networks, self.attention = make_networks(config, ursa, self.engine)
        student, aux = self.networks.student, self.networks.aux
        self.student = self.engine.learner(student, lambda net: make_optimizers(net, o.lr, o.muon_lr, o))
        self.aux = self.engine.learner(aux, lambda net: make_optimizers(net, o.aux_lr, o.muon_lr * o.aux_lr / o.lr, o))
        self.x_init = XInit(self.path.codebook_size, d.p_corrupt, d.corrupt_ratio)
        self.student_times = student_times(self.path, d.student_steps, self.ursa.shift)
        self.draft_gain = config.model.final_logit_gain / config.model.logit_gain
        self.entropy_bonus = EntropyController(d.lambda_ent, d.lambda_ent_high, d.entropy_floor, self.device)
        self.shared_layers = config.model.aux_shared_layers
        self.baseline = Baseline(d.baseline_decay) if d.baseline == "ema" else None
        self.beta = d.beta()
        self.t_power: float | torch.Tensor = d.t_power
        self.t_shift = shift_for(d.shift_value(), self.num_visual_tokens, self.ursa.own_shift)
        self.generator = torch.Generator(self.device)
        self.lambda_ent: float | torch.Tensor = d.lambda_ent
        self.ema_weight = 0.0  # of the student in an update of its moving average
        # logits are stored only if a batch's take at most 128 MiB and are not rounded to bf16; where there are many
        # codes, a GPU recomputes them faster than it goes through stored ones: what reads them is compiled then
        large = d.t_draws * d.batch_size_per_gpu * self.num_visual_tokens * self.path.codebook_size > 2**25
        many = self.device.type == "cuda" and self.path.codebook_size > BLOCK
        whole = config.training.mixed_precision == "no" and self.engine.split is None
        self.dense = whole and not (large or many)
        self.guard = Guard(self.engine, config.training.max_bad_steps)
        self.averages = Averages()
        self.sheets = True  # of samples, where there is a VAE
        self.events: list[dict] = []  # {"step", "event", ...}; drained by the training loop
        self.drawn: torch.Tensor | None = None  # prompts that a CUDA graph reads, since it cannot draw captions
        self.graphs: StepGraphs | None = None
        if config.training.cuda_graph:
            require_capturable(self)
            self.graphs = StepGraphs(self)

    def step(self, index: int) -> tuple[Step, dict[str, float]]:
        """Run training step `index`, the nine stages in order.

        If any rank meets a value that is not finite, all ranks skip the rest of the step. With training.cuda_graph most
        steps are replays of a CUDA graph, which cannot skip anything (see `dimo.train.graph`).

        Returns:
            (results of the stages, of the last micro-batch under gradient accumulation; metrics grad_norm/student,
            grad_norm/aux, optim/lr and guard/skipped). Those of a replay are overwritten by the next one.

        Raises:
            DimoError: training.max_bad_steps steps in a row were skipped; the last batch is saved for replay.
        """
        with trusted_values():  # ids come from a tokenizer checked at loading, and from the step's own draws
            if self.graphs is not None:
                return self.graphs.step(index)
            *_, (_, step, values) = self.walk(index)
        return step, values

    def walk(self, index: int) -> Iterator[tuple[int, Step, dict[str, float]]]:
        """Run `step`, pausing after each stage, so that a notebook can inspect the results.

        Precision and compilation are those of training. Under gradient accumulation stages 1 to 8 are yielded for each
        micro-batch; stage 6 is yielded after the auxiliary's updates, stage 9 once, after the student's update.

        Yields:
            (stage number 1 to 9, results so far, metrics as in `step` for stage 9, else {}).
        """
        c = self.config
        values = self.prepare(index)
        steps = [Step(dense=self.dense) for _ in range(c.training.gradient_accumulation_steps)]
        norms = {"grad_norm/student": math.nan, "grad_norm/aux": math.nan}
        baseline = self.baseline.state_dict() if self.baseline else None
        try:
            for number, step in nine_stages(self, index, steps, norms):
                if number < 9:
                    yield number, step, {}
            self.update_ema()
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
            self.guard.stop_if_hopeless(c.experiment.output_dir, index, self.seed_of(index), steps)
        yield 9, steps[-1], norms | values | {"guard/skipped": self.guard.skipped}

    def prepare(self, index: int) -> dict[str, float]:
        """Seed the generator and set what a schedule changes from step to step; returns the metric optim/lr."""
        o, d, last = self.config.optim, self.config.distill, self.config.training.max_train_steps
        self.generator.manual_seed(self.seed_of(index))
        factor = lr_factor(o, index, last, o.min_lr_share)
        set_lr_factor(self.student.optimizers, factor)
        set_lr_factor(self.aux.optimizers, lr_factor(o, index, last, o.aux_min_lr_share))
        power = power_at(index, d.t_power, d.t_power_start, d.t_power_fade * last)
        self.t_power = assign(self.t_power, power)
        self.x_init.fade = assign(self.x_init.fade, fade(index, 0, d.p_corrupt_fade * last))
        self.entropy_bonus.fade = assign(self.entropy_bonus.fade, fade(index, d.ent_anneal_from, d.ent_anneal_to))
        self.ema_weight = 1 - ema_decay_at(o.ema_decay, index, o.ema_every)
        return {"optim/lr": o.lr * factor}

    def seed_of(self, index: int) -> int:
        """Generator seed from (seed, rank, step), so that a resumed run draws the same numbers."""
        return ((self.config.experiment.seed * 1_000_003 + index) * 4099 + self.engine.data_rank) % 2**63

    def draw_prompts(self) -> torch.Tensor:
        """Stage 1: txt_ids (B, L)."""
        if self.drawn is not None:
            return self.drawn
        return self.prompts.batch(self.settings.batch_size_per_gpu, self.generator)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The autocast context of the step's forward passes, in which GPUs that share samples divide the tokens."""
        return self.engine.dividing()

    def agreed(self) -> contextlib.AbstractContextManager:
        """Context around stages: a NonFiniteError on one rank is raised on all."""
        return self.guard.agreed()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks."""
        return self.engine.mean(value)

    def set_entropy_bonus(self, index: int, entropy: torch.Tensor) -> None:
        """Set lambda_ent from the mean token entropy over all ranks; a switch between its two values is an event."""
        entropy, bonus, before = self.engine.mean(entropy), self.entropy_bonus, self.lambda_ent
        was = bonus.raised.clone()
        weight = bonus(entropy)
        if isinstance(before, torch.Tensor):
            before.copy_(weight)  # `StepGraphs.look` notices a switch
            return
        self.lambda_ent, raised, switched, entropy = torch.stack(
            [weight, bonus.raised, was ^ bonus.raised, entropy]
        ).tolist()
        if switched:
            event = "entropy_bonus_raised" if raised else "entropy_bonus_lowered"
            change = {"was": before, "is": self.lambda_ent, "entropy": entropy}
            self.events.append({"step": index + 1, "event": event, **change})

    @torch.no_grad()
    def update_ema(self) -> None:
        """Update the student's moving average, if this step is one of those that do. In no CUDA graph."""
        if self.ema_weight == 0:
            return
        reshard(self.networks.ema)
        pairs = zip(self.networks.ema.parameters(), self.networks.student.parameters())
        ema, student = zip(*((to_local(e), to_local(s)) for e, s in pairs if s.requires_grad))
        towards(list(ema), list(student), self.ema_weight)

    def look(self) -> None:
        """Raise DimoError if a replayed CUDA graph met a value that is not finite (see `StepGraphs.look`)."""
        if self.graphs is not None:
            self.graphs.look()

    def stream(self) -> contextlib.AbstractContextManager:
        """The context in which the training loop runs this trainer: its own CUDA stream, if it has one."""
        own = self.graphs.stream if self.graphs is not None else None
        return contextlib.nullcontext() if own is None else torch.cuda.stream(own)

    @torch.no_grad()
    def metrics(self, step: Step) -> dict[str, float]:
        """Metrics averaged over the steps since the last call, their micro-batches and all ranks. Collective.

        codes/used, and gap/student_teacher_kl if stage 7 did not run (one more student pass), are computed for `step`,
        the latest one, only. NaN if no step, or for these two the latest step, was finite.
        """
        self.look()
        names = [*MEASURED, "reward/square", *(kind + q for kind in (BY_T, SHARE_OF_T) for q in QUARTERS)]
        means = dict.fromkeys(names, torch.tensor(math.nan, device=self.device))
        if not self.guard.in_a_row:
            means["gap/student_teacher_kl"] = self._student_teacher_kl(step)
            means["codes/used"] = torch.tensor(float(step.x_hat.unique().numel()), device=self.device)
            means |= measured(step)  # for a second call after the same step, when there is nothing left to average
        means |= self.averages.take()
        values = self.engine.mean(torch.stack([value.detach().float() for value in means.values()])).tolist()
        means = gaps_by_t(dict(zip(means, values)))
        means["reward/std"] = math.sqrt(max(means.pop("reward/square") - means["reward/mean"] ** 2, 0.0))
        means["loss/kd"] = means["gap/student_teacher_kl"]
        return means | {"lambda_ent": float(self.lambda_ent)} | self.prompts.metrics()

    def _student_teacher_kl(self, step: Step) -> torch.Tensor:
        if step.kd is not None:
            return step.kd
        with self.autocast():
            student = predict(self.networks.student, step.txt_ids_at_t, step.x_t, self.grid, step.dense)
        return losses.kl(step.teacher, student)

    def state(self) -> tuple[dict, dict]:
        """The state that all ranks share, unsharded under every engine. Collective.

        Returns:
            ({network: full state dict}, optimizers and everything else), without layers that are the teacher's. If the
            engine shards, only rank 0 holds them.
        """
        self.look()
        n, names = self.networks, ("student", "aux", "ema")
        tensors = {name: self.engine.full_state_dict(getattr(n, name)) for name in names}
        lower = lower_weights(n.aux, self.shared_layers)
        tensors["aux"] = {name: value for name, value in tensors["aux"].items() if name not in lower}
        return tensors, {
            "optimizers": {"student": self.student.state(), "aux": self.aux.state()},
            "prompts": self.prompts.state_dict(),  # one position for all ranks
            "entropy_bonus": self.entropy_bonus.state_dict(),
            "lambda_ent": float(self.lambda_ent),  # as the next step's event or row may name it
            "baseline": self.baseline.state_dict() if self.baseline else None,
            "guard": self.guard.state_dict(),
        }

    def final_weights(self) -> dict[str, torch.Tensor]:
        """The full state dict of the EMA, with final_logit_gain replacing logit_gain in its last norm. Collective.

        During training the student needs some entropy to explore. Afterwards its samples differ from the arg-max in
        single tokens, and each of these spoils a video, so a higher gain is used. If the engine shards the networks,
        the result is empty on all ranks but rank 0.
        """
        m = self.config.model
        return scale_logits(self.engine.full_state_dict(self.networks.ema), m.final_logit_gain / m.logit_gain)

    def rank_state(self) -> dict:
        """The state of this rank only: the memory of x_init and the running means of metrics."""
        return {"x_init": self.x_init.state_dict(), "averages": self.averages.state_dict()}

    def load_state(self, tensors: dict, state: dict, rank_state: dict) -> None:
        """Load a checkpoint, which may come from another engine or number of processes. Collective.

        Args:
            tensors, state: from `state`, complete on every rank.
            rank_state: from `rank_state`, of this rank or of the one that it takes over from.
        """
        if self.graphs is not None:
            self.graphs.forget()
        self.student.load_state(tensors["student"], state["optimizers"]["student"])
        lower = lower_weights(self.networks.aux, self.shared_layers)  # which an older checkpoint has
        self.aux.load_state(lower | tensors["aux"], state["optimizers"]["aux"])
        load_full_state(self.networks.ema, tensors["ema"])
        self.prompts.load_state_dict(state["prompts"])
        rank_state = self.engine.of_sharers(rank_state)
        memory = {k: None if v is None else v.to(self.device) for k, v in rank_state["x_init"].items()}
        self.x_init.load_state_dict(memory)
        self.averages.load_state_dict(rank_state["averages"], self.device)
        self.entropy_bonus.load_state_dict(state["entropy_bonus"])
        self.lambda_ent = assign(self.lambda_ent, state.get("lambda_ent", self.lambda_ent))  # older states have none
        if self.baseline:
            self.baseline.load_state_dict(state["baseline"])
        self.guard.load_state_dict(state["guard"])

    def require_aligned(self) -> tuple[str, bool]:
        """What is known of the logits slice that training reads through: (a sentence, whether it is known to be right).

        A world is checked by its own videos, another checkpoint by samples that `dimo check-alignment` has kept.

        Raises:
            DimoError: it is misread; its losses would fall all the same, and the student would learn something else.
        """
        d, runs = self.settings, Path(self.config.experiment.output_dir).parent
        clean = known_clean_tokens(self.ursa, self.grid, runs)
        if clean is None:
            command = f"dimo check-alignment {quoted(self.ursa.folder)} --num_frames {d.num_frames} "
            command += f"--height {d.height} --width {d.width} --runs {quoted(runs)}"
            return f"not checked: no clean tokens are kept in {runs}; `{command}` checks it", False
        with self.engine.autocast():
            alignment = check_slice(self.ursa, clean, d.max_prompt_length, self.dense)
        if alignment.found in ("right", None):
            return alignment.sentence, alignment.found == "right"
        raise DimoError(f"{alignment.sentence}; look at extract_visual_logits, as notebook 01 does")

    def train(self, progress: bool = True) -> RunFolder:
        """Train to max_train_steps, resuming from the newest checkpoint of the run folder; write checkpoints/final."""
        return train_together([self], progress)[0]


def step_through(trainer: Trainer, steps: int) -> Iterator[tuple[int, Step, dict[str, float]]]:
    """Train without a run folder, for notebooks; yields (index, results, metrics) of every step."""
    for index in range(steps):
        step, extra = trainer.step(index)
        yield index, step, trainer.metrics(step) | {k: float(v) for k, v in extra.items()}
