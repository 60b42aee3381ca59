"""The evaluation run: the student at one step beside its teacher at 1..25, same prompts, noise and scorer."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from dimo.errors import DimoError
from dimo.train.config import Config, device_of
from dimo.train.runfolder import write_text
from dimo.ursa import Ursa, UrsaTransformer, latents_shape_for, load_ursa, sample
from dimo.ursa.checkpoint import load_student
from dimo.worlds import checkpoint_folder, load_world, require_grid
from dimo.worlds.oracle import score, summarise
from dimo.worlds.shapes import ShapesWorld

COLUMNS = ("validity", "adherence", "token_accuracy", "coverage", "seconds_per_video")
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
    progress: bool = True,
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Score every sampler on every prompt of the world -> (rows by name, codes (B, N) by name).

    Every row starts from the same noise. Rows: student_1, student_1_argmax, untrained_1 (what the student started
    from), untrained_1_argmax, teacher_<steps>.
    """
    prompts = [p for p in world.prompts for _ in range(videos_per_prompt)]
    txt_ids = ursa.tokenize(prompts, max_prompt_length)
    teacher = ursa.transformer
    samplers = {
        "student_1": (student, 1, False),
        "student_1_argmax": (student, 1, True),
        "untrained_1": (teacher, 1, False),
        "untrained_1_argmax": (teacher, 1, True),
    }
    samplers |= {f"teacher_{n}": (teacher, n, False) for n in teacher_steps}
    rows, codes = {}, {}
    bar = tqdm(samplers.items(), desc="evaluate", unit="sampler", disable=not progress)
    for name, (network, steps, argmax) in bar:
        bar.set_postfix_str(name)
        g = torch.Generator(ursa.path.device).manual_seed(seed)
        parts, start = [], time.perf_counter()
        for ids in txt_ids.split(batch_size):
            options = {"shift": ursa.shift, "argmax": argmax, "generator": g}
            parts.append(sample(network, ursa.path, ids, world.latents_shape, steps, **options))
        codes[name] = torch.cat(parts).cpu()  # waits for the GPU, so the clock is right
        seconds = time.perf_counter() - start
        rows[name] = summarise(world, score(world, codes[name], prompts))
        rows[name]["seconds_per_video"] = seconds / len(prompts)
    return rows, codes


def format_table(rows: dict) -> str:
    """The rows as text, for a terminal."""
    lines = [f"{'':18}" + "".join(f"{c:>18}" for c in COLUMNS)]
    for name, row in rows.items():
        cells = [f"{row[c]:.4f}" if row[c] is not None else "undefined" for c in COLUMNS[:-1]]
        cells.append(f"{row['seconds_per_video']:.2e}")
        lines.append(f"{name:18}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def evaluate_to_folder(config: Config, weights: str | Path, out: Path, progress: bool = True) -> dict:
    """Score the student behind `weights` as `config.evaluation` says; write report.json and sheet.png into `out`.

    The sheet shows prompts x {teacher at its most passes, teacher at 1, student at 1}, all from the same noise.
    """
    from dimo.views.sheets import save_sheet  # matplotlib only when a picture is made

    e, folder = config.evaluation, checkpoint_folder(config.distill.teacher_ckpt)
    world, ursa = load_world(folder), load_ursa(folder, device_of(config), backend=config.model.backend)
    d = config.distill
    require_grid(world, latents_shape_for(d.num_frames, d.height, d.width))
    student = load_student(ursa, weights)
    steps = tuple(sorted({1, *e.teacher_steps}))
    rows, codes = evaluate(
        world,
        ursa,
        student,
        videos_per_prompt=e.videos_per_prompt,
        teacher_steps=steps,
        seed=e.seed,
        batch_size=e.batch_size,
        max_prompt_length=d.max_prompt_length,
        progress=progress,
    )
    shown = torch.linspace(0, len(world.prompts) - 1, SHEET_PROMPTS).long()
    columns = {
        f"{title}": ursa.vae.to("cpu").decode(codes[name][shown * e.videos_per_prompt].view(-1, *world.latents_shape))
        for title, name in (
            (f"teacher, {steps[-1]} passes", f"teacher_{steps[-1]}"),
            ("teacher, 1 pass", "teacher_1"),
            ("student, 1 pass", "student_1"),
        )
    }
    save_sheet(out / "sheet.png", columns, [world.prompts[i] for i in shown.tolist()])
    write_report(out / "report.json", rows)
    return rows


def write_report(file: Path, rows: dict) -> None:
    """report.json, whole or not at all."""
    if "student_1" not in rows:
        raise DimoError("rows must hold student_1")
    write_text(file, json.dumps(rows, indent=2) + "\n")
