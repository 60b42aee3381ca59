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
from dimo.errors import DimoError, reason
from dimo.files import save_file, whole_file
from dimo.run.folder import TEACHER_SAMPLES, RunFolder
from dimo.run.ranks import everywhere, raise_everywhere
from dimo.ursa import sample
from dimo.ursa.chunks import without_compiling
from dimo.ursa.sampler import timesteps
from dimo.views.collapse import NOISES, beside_teacher, choose_tokens, student_over_noises

if TYPE_CHECKING:
    from dimo.train.trainer import Trainer

SHARE = 0.03  # of a run's passes that watching it may take
SIZES = ((4, 16), (2, 16), (2, 8), (2, 4))  # (prompts, teacher's samples of each), the largest that fits is taken
STUDENT_NOISES = (NOISES, 32, 16, 8)  # of each prompt
TEACHER_STEPS = 25


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run is watched: every `every` steps, `prompts` x `noises` passes of the student, beside `samples` videos of
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


def passes_of_step(config: Config) -> float:
    """Cost of a training step per process, in forward passes of one video.

    A backward pass counts as two and an update as one. Losses and moving average are left out, so that a share of these
    passes is a smaller share of the time.
    """
    d, parts = config.distill, config.training.gradient_accumulation_steps
    student = 4 + (parts > 1) + (3 / d.kd_every if d.w_kd > 0 else 0)
    teacher = d.t_draws * (2 if d.guidance_scale > 1 and d.guidance_trunc > 0 else 1)
    aux = 4 * d.aux_steps + (d.t_draws if d.aux_pass == "own" else 0)
    return parts * d.batch_size_per_gpu * (student + teacher + aux)


def plan_for(config: Config, prompts: int, processes: int, passes_per_sample: int) -> Plan | None:
    """The largest measurement that takes at most SHARE of the run's passes; None if the run is too short for any.

    Teacher samples take up to two thirds of it and are divided over the processes. The student is measured with what is
    left at the stops of experiment.sample_every, or, if they are too many for it, at every second or third of them.

    Args:
        prompts: number of prompts there are.
        passes_per_sample: of the teacher, guidance included.
    """
    last, stop = config.training.max_train_steps, config.experiment.sample_every
    whole = passes_of_step(config) * last
    for p, m in SIZES:
        p = min(p, prompts)
        of_teacher = math.ceil(p * m / processes) * passes_per_sample
        if of_teacher <= 2 / 3 * SHARE * whole:
            break
    left, stops = SHARE * whole - of_teacher, math.ceil(last / stop)
    sizes = [n for n in STUDENT_NOISES if n >= m]
    n = next((n for n in sizes if p * n * stops <= left), sizes[-1])
    if p * n > left:
        return None
    every = stop * math.ceil(stops / (left // (p * n)))
    share = (of_teacher + p * n * math.ceil(last / every)) / whole
    return Plan(p, n, m, every, share)


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


def read_reference(run: Path, device: torch.device | str = "cpu") -> Reference | None:
    """The teacher's samples in a run folder; None if there are none.

    Raises:
        DimoError: the file is damaged.
    """
    file = run / TEACHER_SAMPLES
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as read:
            codes, txt_ids = (read.get_tensor(name).to(device) for name in ("codes", "txt_ids"))
            prompts = json.loads(read.metadata()["prompts"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DimoError(f"{file} is not readable: {reason(error)}; delete it, and it is made again") from error
    return Reference(codes.long(), txt_ids, prompts)


class Watch:
    """Measures the EMA student of a run. All methods are collective: the networks may be sharded."""

    def __init__(self, trainer: Trainer, run: RunFolder):
        d, ursa = trainer.settings, trainer.ursa
        guided = d.guidance_scale > 1
        times = timesteps(TEACHER_STEPS, ursa.shift)
        self.trainer, self.tokens = trainer, choose_tokens(trainer.grid)[0].to(trainer.device)
        self.reference: Reference | None = None
        processes = trainer.accelerator.num_processes
        passes = TEACHER_STEPS + (sum(t < d.guidance_trunc for t in times) if guided else 0)
        self.plan = plan_for(trainer.config, len(trainer.prompts.examples), processes, passes)
        if self.plan is None:
            run.say(f"not watched for collapse: it would take more than {SHARE:.0%} of so short a run")
            return
        run.say(self.plan.sentence)
        self.reference = self._reference(run, self.plan)

    def is_due(self, done: int) -> bool:
        """Whether to measure after step `done`."""
        last = self.trainer.config.training.max_train_steps
        return self.plan is not None and (done % self.plan.every == 0 or done == last)

    def measure(self) -> dict[str, float]:
        """The figures of `beside_teacher`, named collapse/..., and the seconds that they took."""
        assert self.plan is not None and self.reference is not None  # is_due
        t, start = self.trainer, time.perf_counter()
        with t.engine.autocast():
            student = student_over_noises(
                t.networks.ema, t.path, self.reference.txt_ids, t.grid, self.tokens, self.plan.noises,
                t.settings.batch_size_per_gpu, t.dense,
            )  # fmt: skip
        teacher = self.reference.codes[:, : self.plan.noises, self.tokens]  # may be an earlier, larger plan's
        figures = beside_teacher(student, teacher, t.path)
        figures = {f"collapse/{name}": value for name, value in figures.items()}
        return figures | {"time/collapse_s": time.perf_counter() - start}

    def _reference(self, run: RunFolder, plan: Plan) -> Reference:
        """That of the run folder, so that a resumed run compares with the same; made once, each rank its share."""
        trainer, found, error = self.trainer, None, None
        if run.writes:
            try:
                found = read_reference(run.path)
            except DimoError as damaged:
                error = damaged
        raise_everywhere(error)
        found = everywhere(found)[0]
        if found is None:
            found = self._sample(plan)
            _write(run, found)
        device = trainer.device
        return Reference(found.codes.to(device), found.txt_ids.to(device), found.prompts)

    @torch.no_grad()
    def _sample(self, plan: Plan) -> Reference:
        t, d = self.trainer, self.trainer.settings
        rank, processes = t.accelerator.process_index, t.accelerator.num_processes
        prompts = torch.linspace(0, len(t.prompts.examples) - 1, plan.prompts).long().tolist()
        txt_ids = t.prompts.example_ids[prompts]
        g = torch.Generator(t.device).manual_seed(rank)
        mine = txt_ids.repeat_interleave(plan.samples, 0)[rank::processes]
        guidance = {"guidance_scale": d.guidance_scale, "guidance_trunc": d.guidance_trunc}
        made = [torch.empty(0, t.num_visual_tokens, dtype=torch.int32)]
        with t.engine.autocast(), without_compiling():  # the teacher is whole on every rank
            for ids in mine.split(d.batch_size_per_gpu):
                uncond_ids = t.uncond_ids.expand_as(ids)
                codes = sample(t.networks.teacher, t.path, ids, t.grid, TEACHER_STEPS, shift=t.ursa.shift, generator=g,
                               uncond_ids=uncond_ids, **guidance)  # fmt: skip
                made.append(codes.int().cpu())
        codes = torch.empty(len(txt_ids) * plan.samples, t.num_visual_tokens, dtype=torch.int32)
        for other, part in enumerate(everywhere(torch.cat(made))):
            codes[other::processes] = part
        shown = [t.prompts.examples[i] for i in prompts]
        return Reference(codes.view(plan.prompts, plan.samples, -1).long(), txt_ids.cpu(), shown)


def _write(run: RunFolder, reference: Reference) -> None:
    """Write the reference on rank 0; collective."""
    error = None
    if run.writes:
        tensors = {"codes": reference.codes.int(), "txt_ids": reference.txt_ids}
        try:
            with whole_file(run.path / TEACHER_SAMPLES) as beside:
                save_file(tensors, beside, {"prompts": json.dumps(reference.prompts)})
        except (OSError, SafetensorError) as refused:
            error = DimoError(f"{run.path / TEACHER_SAMPLES} could not be written: {reason(refused)}")
    raise_everywhere(error)
