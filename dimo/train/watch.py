"""Watch the student for collapse while it trains: what `dimo.views.collapse` measures, beside its teacher's samples.

It draws from generators of its own, so that a run learns the same whether it is watched or not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from dimo.config import Config
from dimo.errors import DimoError, reason, require_shape
from dimo.files import save_file, whole_file
from dimo.run.folder import TEACHER_SAMPLES, RunFolder
from dimo.run.ranks import everywhere, raise_everywhere
from dimo.train.passes import passes_of_step
from dimo.train.prompts import StreamedPrompts, WorldPrompts
from dimo.ursa import Ursa, sample
from dimo.ursa.chunks import chunks, without_compiling
from dimo.ursa.sampler import timesteps
from dimo.views.collapse import NOISES, beside_teacher, choose_tokens, student_over_noises
from dimo.worlds.exact import exact_teacher

if TYPE_CHECKING:
    from dimo.train.trainer import Trainer

SHARE = 0.03  # of a run's passes that watching it may take
# (prompts, the student's noises for each, the teacher's samples for each), of which the first that fits is taken
SIZES = ((4, NOISES, 16), (2, NOISES, 16), (2, 32, 16), (2, 16, 16), (2, 16, 8), (2, 8, 4))
TEACHER_STEPS = 25


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run is watched: every `every` steps, `prompts` x `noises` videos of the student, beside `samples` videos of
    the teacher per prompt, made once. `share` is the part of the run's passes that all of it takes.
    """

    prompts: int
    noises: int
    samples: int
    every: int
    share: float

    @property
    def sentence(self) -> str:
        return (
            f"watched for collapse every {self.every} steps: {self.prompts} prompts x {self.noises} noises, beside "
            f"{self.samples} samples of the teacher for each, {self.share:.1%} of the run's passes"
        )


def plan_for(config: Config, layers: int, prompts: int, processes: int, passes_per_sample: int) -> Plan | None:
    """The largest measurement that takes at most SHARE of the run's passes; None if the run is too short for any.

    The teacher's samples are divided over the processes, while every process measures the student, whose weights may be
    sharded. Where even the smallest measurement is too much at every stop of experiment.sample_every, the student is
    measured at every second or third of them, and so on.

    Args:
        layers: of the networks.
        prompts: number of prompts there are.
        passes_per_sample: of the teacher, guidance included.
    """
    last, stop = config.training.max_train_steps, config.experiment.sample_every
    whole, stops = passes_of_step(config, layers) * last, math.ceil(last / stop)
    budget, each = SHARE * whole, config.distill.student_steps
    for p, n, m in SIZES:
        p = min(p, prompts)
        of_teacher = math.ceil(p * m / processes) * passes_per_sample
        if of_teacher + stops * p * n * each <= budget:
            break
    measurements = min(stops, int((budget - of_teacher) // (p * n * each)))
    if measurements < 1:
        return None
    every = stop * math.ceil(stops / measurements)
    return Plan(p, n, m, every, (of_teacher + math.ceil(last / every) * p * n * each) / whole)


@dataclasses.dataclass
class Reference:
    """The teacher's own samples, with which students are compared.

    Attributes:
        codes: (P, m, N), from TEACHER_STEPS passes under the run's guidance.
        txt_ids: (P, L).
        prompts: the P prompts.
    """

    codes: torch.Tensor
    txt_ids: torch.Tensor
    prompts: list[str]

    def to(self, device: torch.device) -> Reference:
        """On another device, with codes as int64."""
        return Reference(self.codes.to(device).long(), self.txt_ids.to(device), self.prompts)


def read_reference(run: Path, num_visual_tokens: int) -> Reference | None:
    """The teacher's samples in a run folder; None if there are none.

    Raises:
        DimoError: the file is damaged, or its videos have another number of tokens.
    """
    file = run / TEACHER_SAMPLES
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as read:
            codes, txt_ids = (read.get_tensor(name) for name in ("codes", "txt_ids"))
            prompts = json.loads(read.metadata()["prompts"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DimoError(f"{file} is not readable: {reason(error)}") from error
    require_shape(f"codes in {file}", codes, (len(prompts), "m", num_visual_tokens))
    require_shape(f"txt_ids in {file}", txt_ids, (len(prompts), "L"))
    return Reference(codes, txt_ids, prompts)


class Watch:
    """Measures the EMA student of a run. Collective: the networks may be sharded.

    The teacher is sampled before the first measurement, not before the first step: at URSA's sizes it takes minutes.
    """

    def __init__(self, trainer: Trainer, run: RunFolder):
        d, ursa = trainer.settings, trainer.ursa
        guided = d.guidance_scale > 1
        times = timesteps(TEACHER_STEPS, ursa.shift)
        self.trainer, self.run = trainer, run
        self.tokens = choose_tokens(trainer.grid)[0].to(trainer.device)
        self.reference: Reference | None = None
        processes = trainer.accelerator.num_processes
        passes = TEACHER_STEPS + (sum(t < d.guidance_trunc for t in times) if guided else 0)
        layers = ursa.transformer.config.num_hidden_layers
        self.plan = plan_for(trainer.config, layers, len(trainer.prompts.examples), processes, passes)
        if self.plan is None:
            run.say(f"not watched for collapse: it would take more than {SHARE:.0%} of so short a run")
            return
        run.say(self.plan.sentence)

    def is_due(self, done: int) -> bool:
        """Whether to measure after step `done`."""
        last = self.trainer.config.training.max_train_steps
        return self.plan is not None and (done % self.plan.every == 0 or done == last)

    def measure(self) -> dict[str, float]:
        """The figures of `beside_teacher`, named collapse/..., and the seconds that they took."""
        assert self.plan is not None  # is_due
        self.reference = self.reference or self._reference(self.run, self.plan)
        t, start = self.trainer, time.perf_counter()
        with t.engine.autocast():
            student = student_over_noises(
                t.networks.ema, t.path, self.reference.txt_ids, t.grid, self.tokens, self.plan.noises,
                t.settings.batch_size_per_gpu, t.dense, t.student_times, t.draft_gain,
            )  # fmt: skip
        teacher = self.reference.codes[:, : self.plan.noises, self.tokens]  # may be an earlier, larger plan's
        figures = beside_teacher(student, teacher, t.path)
        figures = {f"collapse/{name}": value for name, value in figures.items()}
        return figures | {"time/collapse_s": time.perf_counter() - start}

    def _reference(self, run: RunFolder, plan: Plan) -> Reference:
        """That of the run folder, so that a resumed run compares with the same; made once, each rank its share."""
        trainer, found = self.trainer, None
        if run.writes:
            try:
                found = read_reference(run.path, trainer.num_visual_tokens)
            except DimoError as damaged:
                run.say(f"the teacher is sampled again: {damaged}", aloud=True)
        found = everywhere(found)[0]
        if found is None:
            start = time.perf_counter()
            with trainer.engine.autocast():  # the teacher is whole on every rank
                found = make_reference(
                    trainer.ursa, trainer.prompts, trainer.config, plan.prompts, plan.samples,
                    trainer.accelerator.process_index, trainer.accelerator.num_processes,
                )  # fmt: skip
            _write(run, found)
            run.say(f"sampled the teacher in {time.perf_counter() - start:.3g} s, for comparison")
        return found.to(trainer.device)


@torch.no_grad()
def make_reference(
    ursa: Ursa, prompts: WorldPrompts | StreamedPrompts, config: Config, shown: int = 2, samples: int = 8,
    rank: int = 0, processes: int = 1,
) -> Reference:  # fmt: skip
    """Sample the teacher for `shown` of the example prompts, `samples` times each. Collective: every rank does a part.

    What is drawn depends on the number of processes.
    """
    d, examples = config.distill, prompts.examples
    grid = ursa.latents_shape(d.num_frames, d.height, d.width)
    chosen = torch.linspace(0, len(examples) - 1, min(shown, len(examples))).long()
    txt_ids = prompts.example_ids[chosen.to(prompts.example_ids.device)]
    g = torch.Generator(txt_ids.device).manual_seed(rank)
    uncond_ids = ursa.tokenize([d.negative_prompt], d.max_prompt_length)
    teacher = exact_teacher(ursa.folder, ursa.path) if d.teacher == "exact" else ursa.transformer
    mine = txt_ids.repeat_interleave(samples, 0)[rank::processes]
    made = [torch.empty(0, math.prod(grid), dtype=torch.int32)]
    with without_compiling():
        for (ids,) in chunks(d.batch_size_per_gpu, mine):  # none, where there are more processes than samples
            codes = sample(
                teacher, ursa.path, ids, grid, TEACHER_STEPS, guidance_scale=d.guidance_scale, generator=g,
                guidance_trunc=d.guidance_trunc, uncond_ids=uncond_ids.expand_as(ids), shift=ursa.shift,
            )  # fmt: skip
            made.append(codes.int().cpu())
    every = torch.empty(len(chosen) * samples, math.prod(grid), dtype=torch.int32)
    for other, part in enumerate(everywhere(torch.cat(made))):
        every[other::processes] = part
    return Reference(every.view(len(chosen), samples, -1), txt_ids.cpu(), [examples[i] for i in chosen.tolist()])


def _write(run: RunFolder, reference: Reference) -> None:
    """Write the reference on rank 0; collective."""
    error = None
    if run.writes:
        tensors = {"codes": reference.codes, "txt_ids": reference.txt_ids}
        try:
            with whole_file(run.path / TEACHER_SAMPLES) as beside:
                save_file(tensors, beside, {"prompts": json.dumps(reference.prompts)})
        except (OSError, SafetensorError) as refused:
            error = DimoError(f"{run.path / TEACHER_SAMPLES} could not be written: {reason(refused)}")
    raise_everywhere(error)
