"""The evaluation run: the student at one step beside its teacher at 1..25, same prompts, noise and scorer."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from dimo.errors import DimoError
from dimo.ursa import Ursa, UrsaTransformer, sample
from dimo.ursa.checkpoint import load_weights, read_weights
from dimo.worlds.oracle import score, summarise
from dimo.worlds.shapes import ShapesWorld

COLUMNS = ("validity", "adherence", "token_accuracy", "coverage", "seconds_per_video")


def load_student(ursa: Ursa, weights: str | Path) -> UrsaTransformer:
    """The teacher's architecture with a student's weights: student.pt, a .safetensors file, or a folder of either."""
    import copy

    source = Path(weights)
    if (source / "student.pt").exists():
        source = source / "student.pt"
    student = copy.deepcopy(ursa.transformer)
    load_weights(student, read_weights(source), where=str(source))
    return student.to(ursa.path.device)


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
    from, decoded greedily), teacher_<steps>.
    """
    prompts = [p for p in world.prompts for _ in range(videos_per_prompt)]
    txt_ids = ursa.tokenize(prompts, max_prompt_length)
    teacher = ursa.transformer
    samplers = {
        "student_1": (student, 1, False),
        "student_1_argmax": (student, 1, True),
        "untrained_1": (teacher, 1, True),
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


def write_report(file: Path, rows: dict) -> None:
    """report.json, whole or not at all."""
    if "student_1" not in rows:
        raise DimoError("rows must hold student_1")
    beside = file.with_name(f".{file.name}.partial")
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps(rows, indent=2) + "\n")
    os.replace(beside, file)
