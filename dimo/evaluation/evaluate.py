"""The evaluation run: the student at one step beside its teacher at 1..25, same prompts, noise and scorer.

Of a checkpoint that is no built-in world, `dimo.evaluation.unscored` tells what needs no truth.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import torch
from tqdm import tqdm

from dimo.errors import DimoError
from dimo.evaluation import unscored
from dimo.files import write_text
from dimo.train.config import Config, device_of
from dimo.train.prompts import open_prompts
from dimo.ursa import Ursa, UrsaTransformer, load_ursa, sample
from dimo.ursa.checkpoint import load_student
from dimo.worlds import checkpoint_folder, is_world, load_world, require_world
from dimo.worlds.oracle import score, summarise
from dimo.worlds.shapes import ShapesWorld

log = logging.getLogger(__name__)
COLUMNS = ("validity", "adherence", "token_accuracy", "coverage", "seconds_per_video")
UNITS = "seconds_per_video in s; codes_used a count; token_entropy and teacher_nll in nats per token; the rest shares"
SHEET_PROMPTS = 6


@torch.no_grad()
def evaluate(
    world: ShapesWorld,
    ursa: Ursa,
    student: UrsaTransformer,
    *,
    videos_per_prompt: int = 64,
    teacher_steps: tuple[int, ...] = (1, 2, 4, 8, 25),
    seed: int = 1234,
    batch_size: int = 512,
    max_prompt_length: int = 4,
    guidance_scale: float = 1.0,
    guidance_trunc: float = 0.9,
    negative_prompt: str = "",
    progress: bool = True,
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Score every sampler on every prompt of the world -> (rows by name, codes (B, N) by name).

    Every batch starts from noise of its own, derived from (seed, batch index) and the same in every row. Rows:
    student_1, student_1_argmax, untrained_1 (what the student started from), untrained_1_argmax, each one unguided
    pass, and teacher_<steps>, guided.
    """
    prompts = [p for p in world.prompts for _ in range(videos_per_prompt)]
    txt_ids = ursa.tokenize(prompts, max_prompt_length)
    uncond_ids = ursa.tokenize([negative_prompt], max_prompt_length)
    teacher = ursa.transformer
    guided = {"guidance_scale": guidance_scale, "guidance_trunc": guidance_trunc}
    samplers = {
        "student_1": (student, 1, {}),
        "student_1_argmax": (student, 1, {"argmax": True}),
        "untrained_1": (teacher, 1, {}),
        "untrained_1_argmax": (teacher, 1, {"argmax": True}),
    }
    samplers |= {f"teacher_{n}": (teacher, n, guided) for n in teacher_steps}
    rows, codes = {}, {}
    first = txt_ids[:batch_size]  # untimed: the first pass of a process is slower, and would be the student's
    g = torch.Generator(ursa.path.device).manual_seed(seed)
    sample(student, ursa.path, first, world.latents_shape, 1, shift=ursa.shift, generator=g)
    bar = tqdm(samplers.items(), desc="evaluate", unit="sampler", disable=not progress)
    for name, (network, steps, options) in bar:
        bar.set_postfix_str(name)
        parts, start = [], time.perf_counter()
        for i, ids in enumerate(txt_ids.split(batch_size)):
            # not one generator for all batches: rows draw different numbers on their way from one to the next
            g = torch.Generator(ursa.path.device).manual_seed((seed * 1_000_003 + i) % 2**63)
            parts.append(sample(
                network, ursa.path, ids, world.latents_shape, steps, shift=ursa.shift, generator=g,
                uncond_ids=uncond_ids.expand_as(ids), **options,
            ))  # fmt: skip
        codes[name] = torch.cat(parts).cpu()  # waits for the GPU, so the clock is right
        seconds = time.perf_counter() - start
        rows[name] = summarise(world, score(world, codes[name], prompts))
        rows[name]["seconds_per_video"] = seconds / len(prompts)
    return rows, codes


def columns_of(rows: dict) -> list[str]:
    """The figures that a report's rows hold: a world's oracle's, or those that need no truth."""
    return [c for c in dict.fromkeys((*COLUMNS, *unscored.COLUMNS)) if any(c in row for row in rows.values())]


def format_cell(value: float | int | None) -> str:
    """A figure for a table; None is undefined."""
    return "undefined" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def format_table(rows: dict) -> str:
    """The rows as text, for a terminal."""
    columns = columns_of(rows)
    lines = [f"{'':18}" + "".join(f"{c:>18}" for c in columns)]
    lines += [f"{name:18}" + "".join(f"{format_cell(row[c]):>18}" for c in columns) for name, row in rows.items()]
    return "\n".join(lines)


def evaluate_to_folder(config: Config, weights: str | Path, out: Path, progress: bool = True) -> dict:
    """Measure the student behind `weights` as `config.evaluation` says; write report.json and sheet.png into `out`.

    The sheet shows prompts x {teacher at its most passes, teacher at 1, student at 1}, all from the same noise; where
    the checkpoint's VAE cannot be run there is none, and a warning says why. A world's oracle scores the videos; with
    any other folder the prompts are the first of `distill.prompt_source`, and codes.safetensors keeps the videos.
    """
    e, d, folder = config.evaluation, config.distill, checkpoint_folder(config.distill.teacher_ckpt)
    if d.guidance_scale > 1:
        log.warning("guidance_scale=%g guides the teacher alone: the student's one pass is not guided, for guidance is "
                    "distilled into it", d.guidance_scale)  # fmt: skip
    world = load_world(folder) if is_world(folder) else None
    half = config.training.mixed_precision == "bf16" and world is None  # as URSA is run, and as long as its seconds are
    dtype = torch.bfloat16 if half else torch.float32
    ursa = load_ursa(folder, device_of(config), dtype, config.model.backend)
    grid = ursa.latents_shape(d.num_frames, d.height, d.width)
    steps = tuple(sorted({1, *e.teacher_steps}))
    options = {
        "teacher_steps": steps, "seed": e.seed, "max_prompt_length": d.max_prompt_length, "progress": progress,
        "guidance_scale": d.guidance_scale, "guidance_trunc": d.guidance_trunc, "negative_prompt": d.negative_prompt,
    }  # fmt: skip
    if world is not None:
        require_world(world, grid, ursa.path.codebook_size)
        prompts, copies = world.prompts, e.videos_per_prompt or 64
        student = load_student(ursa, weights)
        rows, codes = evaluate(world, ursa, student, videos_per_prompt=copies, batch_size=e.batch_size, **options)
    else:
        prompts, copies = open_prompts(config, ursa).examples, e.videos_per_prompt or 2
        student = load_student(ursa, weights)
        rows, codes = unscored.compare(ursa, student, prompts, grid, videos_per_prompt=copies, **options)
        unscored.save_codes(out / "codes.safetensors", codes, [p for p in prompts for _ in range(copies)], grid)
    first = {name: c[::copies].view(-1, *grid) for name, c in codes.items()}
    _write_sheet(out / "sheet.png", ursa, first, prompts, steps[-1])
    write_report(out / "report.json", rows)
    return rows


def _write_sheet(file: Path, ursa: Ursa, codes: dict[str, torch.Tensor], prompts: list[str], most_steps: int) -> None:
    """Codes (P, T, H, W) by row, one video per prompt."""
    from dimo.views.sheets import save_sheet  # matplotlib only when a picture is made

    if ursa.vae is None:
        file.unlink(missing_ok=True)  # that of an earlier student must not lie beside this report
        log.warning("there is no sheet.png: %s", ursa.no_vae)
        return
    shown = torch.linspace(0, len(prompts) - 1, min(SHEET_PROMPTS, len(prompts))).long()
    titles = {
        f"teacher, {most_steps} passes": f"teacher_{most_steps}",
        "teacher, 1 pass": "teacher_1",
        "student, 1 pass": "student_1",
    }
    columns = {title: ursa.decode(codes[name][shown].to(ursa.path.device)).cpu() for title, name in titles.items()}
    save_sheet(file, columns, [prompts[i] for i in shown.tolist()])


def write_report(file: Path, rows: dict) -> None:
    """report.json, whole or not at all."""
    if "student_1" not in rows:
        raise DimoError("rows must hold student_1")
    write_text(file, json.dumps(rows, indent=2) + "\n")
