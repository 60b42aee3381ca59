"""What a run leaves of its student: sheets of samples on the way, milestones, and the final weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from dimo.errors import DimoError
from dimo.files import save_torch, whole_file
from dimo.run.folder import RunFolder
from dimo.ursa import sample, save_student
from dimo.ursa.loading import DTYPES, plain_state
from dimo.ursa.sampler import inputs_of_passes
from dimo.worlds import is_world

if TYPE_CHECKING:
    from dimo.train.trainer import Trainer


def write_samples(trainer: Trainer, run: RunFolder, done: int) -> None:
    """Save a sheet of the EMA student's videos for up to 8 example prompts, with the same noise every time.

    Sampling uses the batch size and precision of training, so it needs no more memory than training does.
    """
    if trainer.ursa.vae is None or not trainer.sheets:
        return
    trainer.look()
    g = torch.Generator(trainer.device).manual_seed(trainer.config.experiment.seed)
    examples, ids = trainer.prompts.examples, trainer.prompts.example_ids
    rows = torch.linspace(0, len(ids) - 1, min(8, len(ids))).long().to(trainer.device)
    x_init = torch.randint(
        trainer.path.codebook_size, (len(rows), trainer.num_visual_tokens), generator=g, device=trainer.device
    )
    size = trainer.config.distill.batch_size_per_gpu
    with trainer.engine.autocast():
        parts = []
        for part, x in zip(rows.split(size), x_init.split(size)):  # on every rank: the network may be sharded
            asked = trainer.networks.ema, trainer.path, ids[part]
            *_, x = inputs_of_passes(
                *asked, x, trainer.grid, trainer.student_times, trainer.draft_gain, trainer.dense, g
            )
            parts.append(sample(*asked, trainer.grid, 1, x_init=x, generator=g))
        codes = torch.cat(parts)
    if not run.writes:
        return
    from dimo.views.sheets import save_sheet, student_title  # imports matplotlib, so only when needed

    frames = trainer.ursa.vae.decode(codes.view(-1, *trainer.grid)).cpu()
    shown = [examples[i] for i in rows.tolist()]
    save_sheet(
        run.path / "samples" / f"step-{done:08d}.png", {student_title(len(trainer.student_times)): frames}, shown
    )


def write_final(trainer: Trainer, run: RunFolder) -> None:
    """Write the final weights to checkpoints/final: student/ (`write_student`) and student.pt, a plain state dict."""
    final = run.path / "checkpoints" / "final"
    weights = write_student(trainer, run, final / "student")
    if not run.writes:
        return
    try:
        with whole_file(final / "student.pt") as beside:
            save_torch(weights, beside)
    except (OSError, RuntimeError) as error:
        raise _not_written(final, error) from error


def write_student(trainer: Trainer, run: RunFolder, folder: Path) -> dict[str, torch.Tensor]:
    """Write the final weights to a folder with config.json and safetensors, in experiment.student_dtype. Collective.

    Returns:
        What was written; empty on ranks that do not write.
    """
    weights = trainer.final_weights()
    if not run.writes:
        return {}
    weights = plain_state(weights, student_dtype(trainer.config.experiment.student_dtype, trainer.ursa.folder))
    try:
        save_student(folder, trainer.networks.ema, state=weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise _not_written(folder, error) from error
    return weights


def _not_written(folder: Path, error: Exception) -> DimoError:
    return DimoError(f"{folder} could not be written: {error}; the last checkpoint is kept")


def student_dtype(name: str, teacher: Path) -> torch.dtype:
    """The dtype of a student's file for `experiment.student_dtype`; auto is bfloat16, or float32 in a world."""
    return DTYPES[("float32" if is_world(teacher) else "bfloat16") if name == "auto" else name]
