"""What an evaluation compares: which network makes which videos, from which noise, in jobs that stand by themselves.

A job is one row's batch of videos. What comes of it depends on the seed, the row and the batch's index alone, so that
jobs run in any order and in any number of processes, and those that a killed evaluation has finished stay.
"""

from __future__ import annotations

import dataclasses
import math
import time

import torch

from dimo.errors import DimoError
from dimo.evaluation import reference_free
from dimo.ursa import Ursa, UrsaTransformer, sample
from dimo.ursa.chunks import without_compiling
from dimo.ursa.sampler import timesteps

NLL_NOISE = 2**61  # apart from the seeds of the samples' own noise


@dataclasses.dataclass(frozen=True)
class Row:
    """A sampler: the student or the teacher (`of_student`), at so many passes, sampled or arg-max, guided or not."""

    of_student: bool
    steps: int = 1
    argmax: bool = False
    guided: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """Batch `index` of a row, and what it costs: passes of a transformer, times videos."""

    row: str
    index: int
    cost: int

    @property
    def name(self) -> str:
        return f"{self.row}-{self.index:05d}"


class Comparison:
    """Every prompt `videos_per_prompt` times, under every row.

    Rows: student_1, student_1_argmax, untrained_1 (what the student started from), untrained_1_argmax, each one
    unguided pass, and teacher_<steps>, guided. Batch i starts from the same noise in every row.

    Args:
        prompts: what is sampled; the videos of one prompt are neighbours.
        grid: latents_shape (T, H, W) of every video.
        batch_size: videos a pass.
        held_out: how many of the prompts training has never seen, where that is known.
        judged: compute what reference-free metrics need besides codes: `reference_free.pass_entropy` of the rows of one
            pass, `teacher_nll` of all.

    Raises:
        DimoError: no prompt, or no video.
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
    ):
        if not prompts or videos_per_prompt < 1:
            raise DimoError(
                f"prompts and videos_per_prompt must not be empty, got {len(prompts)} and {videos_per_prompt}"
            )
        self.ursa, self.student, self.grid, self.seed, self.judged = ursa, student, grid, seed, judged
        self.held_out = held_out
        self.copies = videos_per_prompt
        self.prompts = [p for p in prompts for _ in range(videos_per_prompt)]
        self.txt_ids = ursa.tokenize(self.prompts, max_prompt_length).split(batch_size)
        uncond_ids = ursa.tokenize([negative_prompt], max_prompt_length)
        self.guidance = {"guidance_scale": guidance_scale, "guidance_trunc": guidance_trunc, "uncond_ids": uncond_ids}
        self.rows = {
            "student_1": Row(of_student=True),
            "student_1_argmax": Row(of_student=True, argmax=True),
            "untrained_1": Row(of_student=False),
            "untrained_1_argmax": Row(of_student=False, argmax=True),
        } | {f"teacher_{n}": Row(of_student=False, steps=n, guided=guidance_scale > 1) for n in teacher_steps}
        self._warm: set[tuple[bool, bool]] = set()  # (of_student, guided)

    def jobs(self) -> list[Job]:
        """All of them, the cheap rows first."""
        return [
            Job(name, i, len(ids) * (self._passes(row) + self._judging(row)))
            for name, row in self.rows.items()
            for i, ids in enumerate(self.txt_ids)
        ]

    def _passes(self, row: Row) -> int:
        """Of a video; a guided pass is two."""
        times = timesteps(row.steps, self.ursa.shift)
        return row.steps + (sum(t < self.guidance["guidance_trunc"] for t in times) if row.guided else 0)

    def _judging(self, row: Row) -> int:
        return (len(reference_free.TIMES) + (self._passes(row) if row.steps == 1 else 0)) if self.judged else 0

    @torch.no_grad()
    def run(self, job: Job) -> dict[str, torch.Tensor]:
        """codes (b, N), seconds () of sampling them, and where judged nll (b,) and, of one pass, entropy (b,)."""
        row, ids, i = self.rows[job.row], self.txt_ids[job.index], job.index
        network = self.student if row.of_student else self.ursa.transformer
        path, device = self.ursa.path, self.ursa.path.device
        options = {"shift": self.ursa.shift, "argmax": row.argmax}
        if row.guided:
            options |= self.guidance | {"uncond_ids": self.guidance["uncond_ids"].expand_as(ids)}
        # not one generator for all batches: rows draw different numbers on their way from one to the next
        g = torch.Generator(device).manual_seed((self.seed * 1_000_003 + i) % 2**63)
        x_init = torch.randint(path.codebook_size, (len(ids), math.prod(self.grid)), generator=g, device=device)
        with without_compiling():
            if (row.of_student, row.guided) not in self._warm:  # a network's first pass in a process is slower
                sample(network, path, ids, self.grid, 1, x_init=x_init, **options).cpu()
                self._warm.add((row.of_student, row.guided))
            start = time.perf_counter()
            codes = sample(network, path, ids, self.grid, row.steps, x_init=x_init, generator=g, **options).cpu()
            made = {"codes": codes, "seconds": torch.tensor(time.perf_counter() - start)}  # .cpu() waits for the GPU
            if self.judged:
                noise = torch.Generator(device).manual_seed((NLL_NOISE + self.seed * 1_000_003 + i) % 2**63)
                made["nll"] = reference_free.teacher_nll(self.ursa, codes.to(device), ids, self.grid, noise)
            if self.judged and row.steps == 1:
                at_0 = row.guided and self.guidance["guidance_trunc"] > 0  # where the one pass is
                scale = self.guidance["guidance_scale"] if at_0 else 1.0
                uncond_ids = self.guidance["uncond_ids"]
                entropy = reference_free.pass_entropy(network, ids, x_init, self.grid, scale, uncond_ids)
                made["entropy"] = entropy.mean(1)
        return {name: value.cpu() for name, value in made.items()}

    def gather(self, made: dict[Job, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        """What all jobs gave, by row: codes (B, N) and the rest as one tensor each."""
        rows: dict[str, list[dict[str, torch.Tensor]]] = {}
        for job in self.jobs():
            rows.setdefault(job.row, []).append(made[job])
        return {
            name: {key: torch.cat([torch.atleast_1d(part[key]) for part in parts]) for key in parts[0]}
            for name, parts in rows.items()
        }
