"""The training loop: step after step, into a run folder that can be killed at any moment."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from dimo.train.config import to_yaml
from dimo.train.runfolder import RunFolder
from dimo.ursa import sample, save_student
from dimo.ursa.checkpoint import DTYPES, plain_state

if TYPE_CHECKING:
    from dimo.train.trainer import Trainer


def run_training(trainer: Trainer, progress: bool = True) -> RunFolder:
    """Run to max_train_steps, resuming from the folder's newest checkpoint, and write checkpoints/final."""
    c = trainer.config.experiment
    if trainer.accelerator.is_main_process:
        run = RunFolder.open(c.output_dir, to_yaml(trainer.config), c.resume, c.overwrite)
    trainer.accelerator.wait_for_everyone()
    if not trainer.accelerator.is_main_process:
        run = RunFolder(c.output_dir, writes=False)
    last = trainer.config.training.max_train_steps
    try:
        _train(trainer, run, last, progress)
    except BaseException as error:  # also Ctrl-C: the folder must say how the run ended
        state = "preempted" if isinstance(error, KeyboardInterrupt) else "failed"
        run.write_status(state=state, error=f"{type(error).__name__}: {error}")
        raise
    return run


def _train(trainer: Trainer, run: RunFolder, last: int, progress: bool) -> None:
    c, first = trainer.config.experiment, 0
    checkpoint = run.latest_checkpoint()
    if checkpoint is not None:
        tensors, state = run.load_checkpoint(checkpoint)
        trainer.load_state(tensors, state, state["rank_state"])
        first = state["step"]
    run.truncate_metrics(first)
    run.write_environment()
    run.write_status(state="running", step=first, max_steps=last)
    bar = tqdm(
        range(first, last),
        initial=first,
        total=last,
        desc="distil",
        unit="step",
        disable=not (progress and run.writes),
    )
    clock, since = time.perf_counter(), first
    for index in bar:
        step, extra = trainer.step(index)
        done = index + 1
        if done % c.log_every == 0 or done == last:
            values = trainer.metrics(step) | {k: float(v) for k, v in extra.items()}
            seconds = (time.perf_counter() - clock) / (done - since)
            values["time/step_s"] = seconds
            values["tokens_per_s"] = trainer.config.distill.batch_size_per_gpu * trainer.num_visual_tokens / seconds
            if trainer.device.type == "cuda":
                values["memory/peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
            run.log({"step": done, **values})
            run.write_status(state="running", step=done, max_steps=last)
            bar.set_postfix(reward=f"{values['reward/mean']:.3f}", H=f"{values['entropy/student']:.3f}", refresh=False)
            clock, since = time.perf_counter(), done
        if done % c.sample_every == 0 or done == last:
            write_samples(trainer, run, done)
        if done % c.save_every == 0 or done == last:
            tensors, state = trainer.state()
            run.save_checkpoint(done, tensors, {**state, "step": done, "rank_state": trainer.rank_state()})
    write_student(trainer, run)
    run.write_status(state="finished", step=last, max_steps=last)


def write_samples(trainer: Trainer, run: RunFolder, done: int) -> None:
    """One-step videos of the EMA student for the first prompts, the same noise every time: tokens and a picture."""
    if trainer.ursa.vae is None:
        return
    g = torch.Generator(trainer.device).manual_seed(trainer.config.experiment.seed)
    examples, ids = trainer.prompts.examples, trainer.prompts.example_ids
    rows = torch.linspace(0, len(ids) - 1, min(8, len(ids))).long().to(trainer.device)
    codes = sample(trainer.networks.ema, trainer.path, ids[rows], trainer.grid, 1, generator=g)  # all processes: cut
    if not run.writes:
        return
    from dimo.views.sheets import save_sheet  # matplotlib only when a picture is made

    frames = trainer.ursa.vae.decode(codes.view(-1, *trainer.grid)).cpu()
    shown = [examples[i] for i in rows.tolist()]
    save_sheet(run.path / "samples" / f"step-{done:08d}.png", {"student, 1 pass": frames}, shown)


def write_student(trainer: Trainer, run: RunFolder) -> None:
    """checkpoints/final: student.pt (plain state dict) and student/ (config.json + safetensors), EMA weights."""
    weights = trainer.engine.whole_state(trainer.networks.ema)  # gathered by all processes
    if not run.writes:
        return
    final = run.path / "checkpoints" / "final"
    final.mkdir(parents=True, exist_ok=True)
    dtype = DTYPES[trainer.config.experiment.student_dtype]
    save_student(final / "student", trainer.networks.ema, state=weights, dtype=dtype)
    partial = final / ".student.pt.partial"
    torch.save(plain_state(weights, dtype), partial)
    partial.replace(final / "student.pt")
