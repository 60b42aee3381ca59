"""What an evaluation compares: the networks, prompts and noise, divided into independent jobs.

A job is one batch of videos of one row. Its result depends only on the seed, the row and the index of the batch, so
jobs can run in any order and in any number of processes, and a killed evaluation keeps the finished ones.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from dimo.errors import DimoError
from dimo.evaluation import judging, reference_free
from dimo.evaluation.decoding import PeakMemory, at_once, clock, in_pixels, weight_bytes
from dimo.ursa import Ursa, UrsaTransformer, sample
from dimo.ursa.chunks import without_compiling
from dimo.ursa.sampler import student_times, timesteps

# Offsets that keep the seeds of the judge's noise, and of the teacher's other videos, apart from those of sampling.
# They differ in the low 32 bits, which are all that a generator on a CPU looks at.
JUDGE_NOISE, OTHER_NOISE = 0x9E3779B9, 0x5851F42D
AGAIN = "_again"  # ends the name of the row of the teacher's other videos


@dataclasses.dataclass(frozen=True)
class Row:
    """A sampler: student, teacher or the untrained student, number of steps, sampled or arg-max, guided or not.

    `again`: from other noise than all other rows, and only the videos that are judged.
    """

    network: str  # student, untrained or teacher
    steps: int = 1
    argmax: bool = False
    guided: bool = False
    again: bool = False


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

    Without a student, only the teacher's rows.

    If videos are judged, the row teacher_<most steps>_again is the teacher from other noise: what tells it from the
    teacher is chance, and so the floor of every comparison with the teacher.

    Args:
        prompts: prompts to sample; the videos of a prompt are adjacent.
        grid: latents_shape (T, H, W).
        teacher_steps: numbers of sampling steps of the teacher.
        batch_size: videos per batch.
        guidance_trunc: guidance is off where t >= this.
        judged: number of videos of each row, spread over the prompts, for which the inputs of reference-free metrics
            are computed as well: `judging.judge`, and for rows of one pass `reference_free.pass_entropy`. At least one
            of every prompt; 0: none.
        held_out: number of prompts that training has never seen, if known.
        teacher: the teacher of the rows teacher_<steps>; None: the transformer of `ursa`.
        student_steps: S, the number of passes that the student was trained for.

    Raises:
        DimoError: no prompts, or videos_per_prompt below 1.
    """

    def __init__(
        self,
        ursa: Ursa,
        student: UrsaTransformer | None,
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
        judged: int = 0,
        held_out: int | None = None,
        teacher: Any = None,
        student_steps: int = 1,
    ):
        if not prompts or videos_per_prompt < 1:
            raise DimoError(
                f"at least one prompt and one video per prompt are needed, got {len(prompts)} prompts and "
                f"videos_per_prompt={videos_per_prompt}"
            )
        self.ursa, self.grid, self.seed = ursa, grid, seed
        untrained = ursa.transformer
        self.networks: dict[str, Any] = {} if student is None else {"student": student, "untrained": untrained}
        self.networks["teacher"] = untrained if teacher is None else teacher
        self.held_out = held_out
        self.copies = videos_per_prompt
        self.judged_copies = min(videos_per_prompt, max(1, judged // len(prompts))) if judged else 0
        self.prompts = [p for p in prompts for _ in range(videos_per_prompt)]
        self.txt_ids = ursa.tokenize(self.prompts, max_prompt_length).split(batch_size)
        self.videos = torch.arange(len(self.prompts)).split(batch_size)  # indices of each batch
        self.choice_ids = ursa.tokenize(prompts, max_prompt_length)[judging.choices(len(prompts))]  # (P, k, L)
        uncond_ids = ursa.tokenize([negative_prompt], max_prompt_length)
        self.guidance = {"guidance_scale": guidance_scale, "guidance_trunc": guidance_trunc, "uncond_ids": uncond_ids}
        passes = [(n, argmax) for n in sorted({1, student_steps}) for argmax in (False, True)]
        self.rows = {
            f"{network}_{n}{'_argmax' if argmax else ''}": Row(network, n, argmax)
            for network in self.networks
            if network != "teacher"
            for n, argmax in passes
        } | {f"teacher_{n}": Row("teacher", steps=n, guided=guidance_scale > 1) for n in teacher_steps}
        if judged and teacher_steps:
            most = f"teacher_{max(teacher_steps)}"
            self.rows[most + AGAIN] = dataclasses.replace(self.rows[most], again=True)
        self._warm: set[tuple[str, bool]] = set()  # (network, guided), and ("decoder", False)

    def jobs(self) -> list[Job]:
        """All jobs, row by row, cheap rows first."""
        return [
            Job(name, i, self._made(row, i) * self._passes(row) + int(self._is_judged(i).sum()) * self._judging(row))
            for name, row in self.rows.items()
            for i in range(len(self.txt_ids))
            if self._made(row, i)
        ]

    def count(self) -> int:
        """Number of videos that all rows make."""
        return sum(self._made(row, i) for row in self.rows.values() for i in range(len(self.txt_ids)))

    def _is_judged(self, batch: int) -> torch.Tensor:
        """Which videos of a batch are judged, (b,) bool: the first `judged_copies` of a prompt."""
        return self.videos[batch] % self.copies < self.judged_copies

    def _made(self, row: Row, batch: int) -> int:
        """Number of videos of a batch that a row makes."""
        return int(self._is_judged(batch).sum()) if row.again else len(self.videos[batch])

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
        """Transformer passes per judged video."""
        return judging.passes(len(self.choice_ids)) + (self._passes(row) if self._has_entropy(row) else 0)

    def _has_entropy(self, row: Row) -> bool:
        """Whether `pass_entropy` is computed: of single passes of a transformer, not of an exact teacher."""
        return row.steps == 1 and not hasattr(self.networks[row.network], "predict")

    @torch.no_grad()
    def run(self, job: Job) -> dict[str, torch.Tensor]:
        """Run a job of b videos, of which j are judged.

        Returns:
            "codes" (b, N), and if j > 0 also what `judging.judge` returns, (j, ...), for rows of one pass "entropy"
            (j,), in nats per token, and where there is a VAE what `decoding.in_pixels` measures, (j,). Numbers (): the
            time that parts took, which names in _seconds tell, of which "seconds" is that of sampling after a first
            pass; on a GPU "peak_bytes", the memory for sampling and decoding. All on the CPU.
        """
        row, i = self.rows[job.row], job.index
        judged = self._is_judged(i)
        made_of = judged if row.again else torch.ones_like(judged)
        ids, index = self.txt_ids[i][made_of], self.videos[i][made_of]
        network = self.networks[row.network]
        path, device, times = self.ursa.path, self.ursa.path.device, self._times(row)
        options = {"argmax": row.argmax}
        if row.guided:
            options |= self.guidance | {"uncond_ids": self.guidance["uncond_ids"].expand_as(ids)}
        # one generator per batch: rows consume different amounts of random numbers
        g = self._noise(i, OTHER_NOISE if row.again else 0)
        x_init = torch.randint(path.codebook_size, (len(ids), math.prod(self.grid)), generator=g, device=device)
        with without_compiling():
            begin = clock(device)
            if (row.network, row.guided) not in self._warm:  # the first pass of a network in a process is slower
                sample(network, path, ids, self.grid, 1, x_init=x_init, **options)
                self._warm.add((row.network, row.guided))
            warm = clock(device)
            with PeakMemory(device) as peak:
                codes = sample(network, path, ids, self.grid, times, x_init=x_init, generator=g, **options)
                sampled = clock(device)
            made = {"codes": codes, "first_pass_seconds": warm - begin, "seconds": sampled - warm}
            if judged.any():
                mine = judged[made_of].to(device)
                made |= self._judge(row, i, index[mine.cpu()], codes[mine], x_init[mine])
                made["judge_seconds"] = clock(device) - sampled
                made |= self._decode(codes[mine])
            if device.type == "cuda":
                working = max(peak.bytes, made.pop("decode_bytes", 0))
                made["peak_bytes"] = weight_bytes(network) + weight_bytes(self.ursa.vae) + working
        return {name: torch.as_tensor(value).cpu() for name, value in made.items()}

    def _decode(self, codes: torch.Tensor) -> dict[str, Any]:
        """`in_pixels` of codes (j, N) where there is a VAE, "decode_bytes" and "first_decode_seconds"."""
        ursa, videos = self.ursa, codes.view(-1, *self.grid)
        if ursa.vae is None:
            return {}
        begin = clock(codes.device)
        if ("decoder", False) not in self._warm:
            ursa.decode(videos[: at_once(ursa, self.grid)])
            self._warm.add(("decoder", False))
        warm = clock(codes.device)
        with PeakMemory(codes.device) as peak:
            made = in_pixels(ursa, videos)
        return made | {"first_decode_seconds": warm - begin, "decode_bytes": peak.bytes}

    def _noise(self, batch: int, offset: int) -> torch.Generator:
        return torch.Generator(self.ursa.path.device).manual_seed((offset + self.seed * 1_000_003 + batch) % 2**63)

    def _judge(self, row: Row, batch: int, index: torch.Tensor, codes: torch.Tensor, x_init: torch.Tensor) -> dict:
        """What reference-free metrics need of the videos `index` (j,), codes and x_init (j, N), of a batch."""
        uncond_ids, scale, trunc = (self.guidance[key] for key in ("uncond_ids", "guidance_scale", "guidance_trunc"))
        prompt_ids = self.choice_ids[(index // self.copies).to(self.choice_ids.device)]
        noise = self._noise(batch, JUDGE_NOISE)  # the same in every row
        made = judging.judge(self.ursa, codes, prompt_ids, uncond_ids, self.grid, noise, scale, trunc)
        if self._has_entropy(row):
            at_0 = scale if row.guided and trunc > 0 else 1.0  # the only pass is at t = 0
            network = self.networks[row.network]
            entropy = reference_free.pass_entropy(network, prompt_ids[:, 0], x_init, self.grid, at_0, uncond_ids)
            made["entropy"] = entropy.mean(1)
        return made

    def gather(self, made: dict[Job, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        """Concatenate the results of all jobs, {row: {"codes": (B, N), ...}}; what is judged is (P V', ...)."""
        rows: dict[str, list[dict[str, torch.Tensor]]] = {}
        for job in self.jobs():
            rows.setdefault(job.row, []).append(made[job])
        return {
            name: {
                key: torch.cat([torch.atleast_1d(part[key]) for part in parts if key in part])
                for key in dict.fromkeys(key for part in parts for key in part)
            }
            for name, parts in rows.items()
        }
