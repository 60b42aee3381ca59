"""What an evaluation compares: the networks, prompts and noise, divided into independent jobs.

A job is one batch of videos of one row. Its result depends only on the seed, the row and the index of the batch, so
jobs can run in any order and in any number of processes, and a killed evaluation keeps the finished ones.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch

from dimo.errors import DimoError
from dimo.evaluation import reference_free
from dimo.ursa import Ursa, UrsaTransformer, sample
from dimo.ursa.chunks import without_compiling
from dimo.ursa.sampler import student_times, timesteps

NLL_NOISE = 2**61  # offset that keeps the seeds of teacher_nll apart from those of sampling


@dataclasses.dataclass(frozen=True)
class Row:
    """A sampler: student, teacher or the untrained student, number of steps, sampled or arg-max, guided or not."""

    network: str  # student, untrained or teacher
    steps: int = 1
    argmax: bool = False
    guided: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """Batch `index` of a row, and its cost in transformer passes times videos."""

    row: str
    index: int
    cost: int

    @property
    def name(self) -> str:
        return f"{self.row}-{self.index:05d}"


class Comparison:
    """Samples every prompt `videos_per_prompt` times with every row (sampler).

    Rows: student_1, student_1_argmax, untrained_1 (the teacher in one pass, from which the student started) and
    untrained_1_argmax, all unguided; for a student of S > 1 passes the same four with <S> in place of 1 as well; and
    teacher_<steps>, guided if guidance_scale > 1. Batch i starts from the same noise in every row.

    Args:
        prompts: prompts to sample; the videos of a prompt are adjacent.
        grid: latents_shape (T, H, W).
        teacher_steps: numbers of sampling steps of the teacher.
        batch_size: videos per batch.
        guidance_trunc: guidance is off where t >= this.
        judged: compute the inputs of reference-free metrics as well: `reference_free.teacher_nll`, and for rows of one
            pass `reference_free.pass_entropy`.
        held_out: number of prompts that training has never seen, if known.
        teacher: the teacher of the rows teacher_<steps>; None: the transformer of `ursa`.
        student_steps: S, the number of passes that the student was trained for.

    Raises:
        DimoError: no prompts, or videos_per_prompt below 1.
    """

    def __init__(
        self,
        ursa: Ursa,
        student: UrsaTransformer,
        prompts: list[str],
        grid: tuple[int, int, int],
        *,
        videos_per_prompt: int,
        teacher_steps: tuple[int, ...],
        batch_size: int,
        seed: int,
        max_prompt_length: int,
        guidance_scale: float = 1.0,
        guidance_trunc: float = 0.9,
        negative_prompt: str = "",
        judged: bool = False,
        held_out: int | None = None,
        teacher: Any = None,
        student_steps: int = 1,
    ):
        if not prompts or videos_per_prompt < 1:
            raise DimoError(
                f"at least one prompt and one video per prompt are needed, got {len(prompts)} prompts and "
                f"videos_per_prompt={videos_per_prompt}"
            )
        self.ursa, self.grid, self.seed, self.judged = ursa, grid, seed, judged
        untrained = ursa.transformer
        self.networks = {
            "student": student,
            "untrained": untrained,
            "teacher": untrained if teacher is None else teacher,
        }
        self.held_out = held_out
        self.copies = videos_per_prompt
        self.prompts = [p for p in prompts for _ in range(videos_per_prompt)]
        self.txt_ids = ursa.tokenize(self.prompts, max_prompt_length).split(batch_size)
        uncond_ids = ursa.tokenize([negative_prompt], max_prompt_length)
        self.guidance = {"guidance_scale": guidance_scale, "guidance_trunc": guidance_trunc, "uncond_ids": uncond_ids}
        passes = [(n, argmax) for n in sorted({1, student_steps}) for argmax in (False, True)]
        self.rows = {
            f"{network}_{n}{'_argmax' if argmax else ''}": Row(network, n, argmax)
            for network in ("student", "untrained")
            for n, argmax in passes
        } | {f"teacher_{n}": Row("teacher", steps=n, guided=guidance_scale > 1) for n in teacher_steps}
        self._warm: set[tuple[str, bool]] = set()  # (network, guided)

    def jobs(self) -> list[Job]:
        """All jobs, row by row, cheap rows first."""
        return [
            Job(name, i, len(ids) * (self._passes(row) + self._judging(row)))
            for name, row in self.rows.items()
            for i, ids in enumerate(self.txt_ids)
        ]

    def _passes(self, row: Row) -> int:
        """Transformer passes per video for sampling; a guided step takes two."""
        times = self._times(row)
        return row.steps + (sum(t < self.guidance["guidance_trunc"] for t in times) if row.guided else 0)

    def _times(self, row: Row) -> list[float]:
        """A teacher's steps are the pipeline's, a student's are its passes."""
        if row.network == "teacher":
            return timesteps(row.steps, self.ursa.shift)
        return student_times(self.ursa.path, row.steps, self.ursa.shift)

    def _judging(self, row: Row) -> int:
        return (len(reference_free.TIMES) + (self._passes(row) if row.steps == 1 else 0)) if self.judged else 0

    @torch.no_grad()
    def run(self, job: Job) -> dict[str, torch.Tensor]:
        """Run a job of b videos.

        Returns:
            "codes" (b, N) and "seconds" (), the time to sample them; if judged also "nll" (b,) and, for rows of one
            pass, "entropy" (b,), both in nats per token. All on the CPU.
        """
        row, ids, i = self.rows[job.row], self.txt_ids[job.index], job.index
        network = self.networks[row.network]
        path, device, times = self.ursa.path, self.ursa.path.device, self._times(row)
        options = {"argmax": row.argmax}
        if row.guided:
            options |= self.guidance | {"uncond_ids": self.guidance["uncond_ids"].expand_as(ids)}
        # one generator per batch: rows consume different amounts of random numbers
        g = torch.Generator(device).manual_seed((self.seed * 1_000_003 + i) % 2**63)
        x_init = torch.randint(path.codebook_size, (len(ids), math.prod(self.grid)), generator=g, device=device)
        with without_compiling():
            if (row.network, row.guided) not in self._warm:  # the first pass of a network in a process is slower
                sample(network, path, ids, self.grid, 1, x_init=x_init, **options).cpu()
                self._warm.add((row.network, row.guided))
            start = time.perf_counter()
            codes = sample(network, path, ids, self.grid, times, x_init=x_init, generator=g, **options).cpu()
            made = {"codes": codes, "seconds": torch.tensor(time.perf_counter() - start)}  # .cpu() waits for the GPU
            if self.judged:
                noise = torch.Generator(device).manual_seed((NLL_NOISE + self.seed * 1_000_003 + i) % 2**63)
                made["nll"] = reference_free.teacher_nll(self.ursa, codes.to(device), ids, self.grid, noise)
            if self.judged and row.steps == 1:
                at_0 = row.guided and self.guidance["guidance_trunc"] > 0  # the only pass is at t = 0
                scale = self.guidance["guidance_scale"] if at_0 else 1.0
                uncond_ids = self.guidance["uncond_ids"]
                entropy = reference_free.pass_entropy(network, ids, x_init, self.grid, scale, uncond_ids)
                made["entropy"] = entropy.mean(1)
        return {name: value.cpu() for name, value in made.items()}

    def gather(self, made: dict[Job, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        """Concatenate the results of all jobs, {row: {"codes": (B, N), ...}}."""
        rows: dict[str, list[dict[str, torch.Tensor]]] = {}
        for job in self.jobs():
            rows.setdefault(job.row, []).append(made[job])
        return {
            name: {key: torch.cat([torch.atleast_1d(part[key]) for part in parts]) for key in parts[0]}
            for name, parts in rows.items()
        }
