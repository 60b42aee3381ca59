"""The evaluation: the student beside its teacher at several steps, on the same prompts and noise.

Videos of a built-in world are scored by its oracle, those of other checkpoints by reference-free metrics
(`dimo.evaluation.metrics`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from dimo.config import Config, device_of, to_flat, to_yaml
from dimo.errors import DimoError
from dimo.evaluation.comparison import AGAIN, Comparison
from dimo.evaluation.jobs import Parts, alone_in, announce, run_here, run_in_processes
from dimo.evaluation.kept import kept_beside, kept_in, own_code
from dimo.evaluation.metrics import columns_of, measure
from dimo.evaluation.reference_free import save_codes
from dimo.evaluation.spent import format_spent, seconds_of_jobs
from dimo.evaluation.videos import NUMBERS, Videos
from dimo.files import write_text
from dimo.run.origin import other_teacher, require_comparable, trained_steps
from dimo.run.sources import teacher_files
from dimo.train.prompts import evaluation_prompts, require_prompts_fit, trained_on
from dimo.ursa import Ursa, UrsaTransformer, load_ursa
from dimo.ursa.attention import use_for_sampling
from dimo.ursa.layout import student_file
from dimo.ursa.loading import load_student
from dimo.ursa.sampler import videos_at_once
from dimo.worlds import checkpoint_folder, is_world, load_world, require_world
from dimo.worlds.exact import exact_teacher
from dimo.worlds.oracle import score
from dimo.worlds.protocol import World, prompt_index, prompt_length, prompts_to_score, title_of
from dimo.worlds.registry import READERS

log = logging.getLogger(__name__)
SHEET_PROMPTS = 6
WIDE = 140  # characters of a table
PARTS = "evaluation_jobs"  # unlikely to exist already, unlike runs/evaluation for `dimo evaluate -o runs`


def evaluate(
    world: World,
    ursa: Ursa,
    student: UrsaTransformer,
    *,
    videos_per_prompt: int = 64,
    teacher_steps: tuple[int, ...] = (1, 2, 4, 8, 25),
    seed: int = 1234,
    batch_size: int = 512,
    **guidance,
) -> tuple[dict, dict[str, torch.Tensor]]:
    """Score every sampler on every prompt of a world, in this process.

    The arguments, `guidance` included, are those of `Comparison`, where the rows are listed.

    Returns:
        ({row: {metric: value}}, {row: codes (B, N)}).
    """
    comparison = Comparison(
        ursa, student, prompts_to_score(world), world.latents_shape, videos_per_prompt=videos_per_prompt,
        teacher_steps=teacher_steps, batch_size=batch_size, seed=seed, max_prompt_length=prompt_length(world),
        **guidance,
    )  # fmt: skip
    made = comparison.gather({job: comparison.run(job) for job in comparison.jobs()})
    return rows_of(comparison, made, world), {name: row["codes"] for name, row in made.items()}


def rows_of(comparison: Comparison, made: dict[str, dict[str, torch.Tensor]], world: World | None) -> dict:
    """The metrics of every row."""
    videos = {name: videos_of(comparison, row, world) for name, row in made.items()}
    again = next((name for name in videos if name.endswith(AGAIN)), "")
    for name, row in videos.items() if again else ():  # the teacher's two rows are compared with each other
        teacher = again.removesuffix(AGAIN)
        row.reference = videos[again if name == teacher else teacher]
    return {name: measure(row) for name, row in videos.items()}


def videos_of(comparison: Comparison, row: dict[str, torch.Tensor], world: World | None = None) -> Videos:
    """The `Videos` of a row from its gathered jobs (`Comparison.gather`), scored by the world's oracle if given."""
    different = comparison.prompts[:: comparison.copies]
    copies = len(row["codes"]) // len(different)  # fewer of the teacher's other videos
    prompts = [prompt for prompt in different for _ in range(copies)]
    videos = Videos(
        row["codes"].view(-1, *comparison.grid), prompts, copies, row["seconds"].sum().item(),
        score(world, row["codes"].to(comparison.ursa.path.device), prompts) if world else None, comparison.ursa.path,
        {name: value for name, value in row.items() if name not in ("codes", *NUMBERS)},
        decode_seconds=row["decode_seconds"].sum().item() if "decode_seconds" in row else None,
        peak_bytes=int(row["peak_bytes"].max()) if "peak_bytes" in row else 0,
    )  # fmt: skip
    if world and world.name in READERS:  # of videos that no teacher judges it reads one of each prompt
        some = videos.by_prompt[:, : videos.judged_videos // len(different) if videos.judged else 1]
        index = prompt_index(world, different).repeat_interleave(some.shape[1])
        videos.judged["read"] = READERS[world.name](world, some.flatten(0, 1), index)
    return videos


def format_cell(row: dict, column: str) -> str:
    """A metric of a row as text for a table, with its interval if there is one."""
    value, interval = row.get(column), row.get("intervals", {}).get(column)
    if value is not None and interval:
        return f"{value:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]"
    return "undefined" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def student_row(rows: Iterable[str]) -> str:
    """Name of a report's row with the student in its own number of passes, student_<S>, the largest there is."""
    made = [int(name.split("_")[1]) for name in rows if name.startswith("student_")]
    return f"student_{max(made)}"


def format_table(rows: dict, wide: int = WIDE) -> str:
    """The rows of a report as text: tables of at most `wide` characters below each other, if it has many columns."""
    names = ["", *rows]
    first, tables = 2 + max(len(name) for name in names), list[list[str]]()
    for column in columns_of(rows):
        cells = [column, *(format_cell(row, column) for row in rows.values())]
        width = max(18, 2 + max(len(cell) for cell in cells))
        if not tables or len(tables[-1][0]) + width > wide:
            tables.append([f"{name:{first}}" for name in names])
        tables[-1] = [line + f"{cell:>{width}}" for line, cell in zip(tables[-1], cells)]
    return "\n\n".join("\n".join(lines) for lines in tables)


def evaluate_to_folder(config: Config, weights: str | Path, out: Path, progress: bool = True) -> dict:
    """Evaluate a student as `config.evaluation` says; write report.json, sheet.png and clips.mp4 into `out`.

    Sheet and clips show, for a few prompts, videos of the teacher at its largest number of steps, the teacher in one
    step and the student in one step and in its own number of steps, all from the same noise. They are omitted with a
    warning if the VAE cannot be run. For other checkpoints than a world's the prompts are held-out captions
    (`evaluation_prompts`), and the videos are saved in codes.safetensors.

    The work is divided among `training.num_processes` processes, at most one per GPU. Finished jobs are kept in
    `out`/PARTS until the end, so that the same call resumes a killed evaluation.

    Args:
        weights: student.pt, its folder or a run's checkpoints/final.
        out: output folder, created if needed.
        progress: show a progress bar.

    Returns:
        {row: {metric: value}}, the content of report.json.

    Raises:
        DimoError: see `open_comparison` and `require_comparable`; another process evaluates into `out`; or a process
            failed.
    """
    begin = time.perf_counter()
    require_comparable(weights, config)
    comparison, world = open_comparison(config, weights, networks=processes_for(config) == 1)
    with alone_in(out):
        return _evaluate_alone(config, weights, out, progress, comparison, world, begin)


def _evaluate_alone(
    config: Config, weights: str | Path, out: Path, progress: bool, comparison: Comparison, world: World | None,
    begin: float,
) -> dict:  # fmt: skip
    teachers, kept = _teachers(config, weights), kept_beside(weights, comparison, config)
    parts, jobs = parts_of(config, weights, out, comparison.prompts, kept), comparison.jobs()
    parts.forget_damaged(jobs)
    missing = parts.missing(jobs)
    most = processes_for(config)
    processes = max(1, min(most, len(missing)))
    if progress:
        announce(comparison, jobs, missing, processes, kept)
    opened = time.perf_counter()
    if most == 1:
        run_here(comparison, jobs, parts, progress)
    elif missing:
        write_text(parts.folder / "config.yaml", to_yaml(config))
        words = [sys.executable, "-m", "dimo.evaluation.worker", str(os.getpid()), str(parts.folder)]
        words += [str(kept or ""), str(weights)]
        run_in_processes(lambda rank, of: [*words, str(rank), str(of)], jobs, parts, processes, progress)
    finished, loaded = time.perf_counter(), parts.load(jobs)
    made = comparison.gather(loaded)
    rows, codes = rows_of(comparison, made, world), {name: row["codes"] for name, row in made.items()}
    if world is None:
        _count_overlap(rows, config, weights, comparison)
    for row in rows.values():
        row |= teachers | ({"world": title_of(world)} if world else {})
    scored = time.perf_counter()
    if world is None:
        save_codes(out / "codes.safetensors", codes, comparison.prompts, comparison.grid)
    first = {name: c[:: comparison.copies].view(-1, *comparison.grid) for name, c in codes.items()}
    prompts = comparison.prompts[:: comparison.copies]
    write_report(out / "report.json", rows)  # first, as pictures may fail
    _write_pictures(out, comparison.ursa, first, prompts, max(config.evaluation.teacher_steps))
    parts.remove()
    if progress:
        around = {"loading the networks": opened - begin, "scoring": scored - finished,
                  "sheet and files": time.perf_counter() - scored}  # fmt: skip
        in_jobs = seconds_of_jobs(comparison, loaded, missing)
        print(format_spent(in_jobs, finished - opened, around, processes), file=sys.stderr, flush=True)
    return rows


def evaluate_teacher(config: Config, place: Path) -> dict[str, dict]:
    """The rows of the teacher alone, {row: {metric: value}}, in this process; its jobs are kept in `place` (`kept_in`).

    Raises:
        DimoError: see `open_comparison`.
    """
    comparison, world = open_comparison(config, None)
    folder, jobs = kept_in(place, comparison, config), comparison.jobs()
    parts = Parts(folder, teachers=folder)
    parts.forget_damaged(jobs)
    run_here(comparison, jobs, parts, progress=False)
    return rows_of(comparison, comparison.gather(parts.load(jobs)), world)


def _teachers(config: Config, weights: str | Path) -> dict[str, str]:
    """The teacher and the one that the student was distilled from, for every row, where they are known to differ."""
    teacher = config.distill.teacher_ckpt
    own = other_teacher(weights, teacher)
    if not own:
        return {}
    log.warning("the student was distilled from another teacher (%s) than the one it is measured against (%s)", own,
                teacher)  # fmt: skip
    return {"teacher": teacher, "distilled_from": own}


def _count_overlap(rows: dict, config: Config, weights: str | Path, comparison: Comparison) -> None:
    """Say in every row how many of the prompts the student was trained on, and how many it never saw, if known."""
    prompts = comparison.prompts[:: comparison.copies]
    known = trained_on(config, weights, prompts)
    held_out = comparison.held_out if known is None else len(prompts) - known
    for row in rows.values():
        row |= {"prompts_held_out": held_out, "prompts_trained_on": known}


def open_comparison(
    config: Config, weights: str | Path | None, networks: bool = True
) -> tuple[Comparison, World | None]:
    """The comparison that `config.evaluation` asks for, and the world if the teacher belongs to one.

    Args:
        weights: the student; None: a world's teacher alone.
        networks: False leaves teacher and student without weights, where other processes run the jobs.

    Raises:
        DimoError: teacher, student or prompts cannot be loaded or do not fit each other.
    """
    e, d, folder = config.evaluation, config.distill, checkpoint_folder(config.distill.teacher_ckpt)
    if d.guidance_scale > 1:
        log.warning("guidance_scale=%g applies to the teacher only: the student is not guided, since guidance is "
                    "distilled into it", d.guidance_scale)  # fmt: skip
    world = load_world(folder) if is_world(folder) else None
    ursa = load_for_evaluation(config, networks)
    grid = ursa.latents_shape(d.num_frames, d.height, d.width)
    if world is not None:
        require_world(world, grid, ursa.path.codebook_size)
        require_prompts_fit(ursa, world.prompts, d.max_prompt_length)
    if networks and config.model.backend == "native":
        use_for_sampling(ursa.transformer, math.prod(grid), config.model.attention)
    prompts, held_out = (prompts_to_score(world), None) if world else evaluation_prompts(config, ursa, str(weights))
    student = None if weights is None else load_student(ursa, weights) if networks else ursa.transformer
    batch = (e.batch_size or videos_at_once(math.prod(grid), ursa.path.device)) if world else 1
    return Comparison(
        ursa, student, prompts, grid,
        videos_per_prompt=e.videos_per_prompt or (64 if world else 2), batch_size=batch,
        teacher_steps=tuple(sorted({1, *e.teacher_steps})), seed=e.seed, max_prompt_length=d.max_prompt_length,
        guidance_scale=d.guidance_scale, guidance_trunc=d.guidance_trunc, negative_prompt=d.negative_prompt,
        judged=e.judged_videos, held_out=held_out,
        teacher=exact_teacher(folder, ursa.path) if d.teacher == "exact" else None,
        student_steps=d.student_steps if d.student_steps > 1 or weights is None else trained_steps(weights),
    ), world  # fmt: skip


def load_for_evaluation(config: Config, weights: bool = True) -> Ursa:
    """Load the teacher for evaluation: a world's in float32, URSA in bf16 if it is trained in bf16, as it is used."""
    folder = checkpoint_folder(config.distill.teacher_ckpt)
    half = config.training.mixed_precision == "bf16" and not is_world(folder)
    dtype = torch.bfloat16 if half else torch.float32
    ursa = load_ursa(folder, device_of(config), dtype, config.model.backend, weights)
    ursa.transformer.requires_grad_(False)
    return ursa


def processes_for(config: Config) -> int:
    """Number of processes: `training.num_processes`, at most one per GPU of this machine."""
    processes = config.training.num_processes
    return min(processes, torch.cuda.device_count()) if device_of(config).type == "cuda" else processes


def parts_of(config: Config, weights: str | Path, out: Path, prompts: list[str], kept: Path | None = None) -> Parts:
    """The finished jobs in `out`; valid for the same settings, prompts, code and weight files of both networks.

    Those of the teacher are in `kept`, if that is given.
    """
    flat, source = to_flat(config), student_file(weights)
    student = sorted(source.iterdir()) if source.is_dir() else [source]
    networks = [*student, *teacher_files(config.distill.teacher_ckpt).values()]
    seen = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in networks]
    keys = [key for key in flat if key.startswith(("distill.", "evaluation."))]
    keys += ["model.device", "model.backend", "model.attention", "training.mixed_precision"]
    about = {key: flat[key] for key in keys} | {"networks": seen, "prompts": prompts, "code": own_code()}
    return Parts(out / PARTS, about, kept)


def _write_pictures(out: Path, ursa: Ursa, codes: dict[str, torch.Tensor], prompts: list[str], most_steps: int) -> None:
    """Decode codes, {row: (P, T, H, W)} with one video per prompt, and write sheet.png and clips.mp4."""
    from dimo.views.clips import save_clips
    from dimo.views.sheets import save_sheet, student_title  # imports matplotlib, so only when needed

    sheet, clips = out / "sheet.png", out / "clips.mp4"
    if ursa.vae is None:
        for file in (sheet, clips):  # they would show an earlier student
            file.unlink(missing_ok=True)
        log.warning("sheet.png and clips.mp4 are not written: %s", ursa.no_vae)
        return
    shown = torch.linspace(0, len(prompts) - 1, min(SHEET_PROMPTS, len(prompts))).long()
    own = student_row(codes)
    titles = {
        f"teacher, {most_steps} passes": f"teacher_{most_steps}",
        "teacher, 1 pass": "teacher_1",
        student_title(1): "student_1",
        student_title(int(own.removeprefix("student_"))): own,
    }
    columns = {title: ursa.decode(codes[name][shown].to(ursa.path.device)).cpu() for title, name in titles.items()}
    some = [prompts[i] for i in shown.tolist()]
    save_sheet(sheet, columns, some)
    try:
        save_clips(clips, columns, some)
    except DimoError as error:
        log.warning("clips.mp4 is not written: %s", error)


def write_report(file: Path, rows: dict) -> None:
    """Write report.json atomically."""
    if "student_1" not in rows:
        raise DimoError("rows must contain student_1")
    write_text(file, json.dumps(rows, indent=2) + "\n")
