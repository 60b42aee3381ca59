"""`dimo bench`: time and memory of a training step, its stages, generation, path sampling and the losses.

Everything is measured in one process on one device: the trainer's own step with its optimizers and, for comparison, a
large matrix product as the attainable speed and (`--against`) a naive step and upstream's pipeline.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import itertools
import json
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dimo.bench.attention import attention_alone
from dimo.bench.naive import naive_step, require_naive
from dimo.bench.parts import Clock, kernels_of, losses_alone, matrix_product, saving, stage_times, steps_until_replays
from dimo.bench.sizes import (
    model_flops,
    random_prompts,
    random_ursa,
    require_size,
    require_size_alone,
    step_flops,
    strides_for,
)
from dimo.config import Config, device_of, load_config
from dimo.errors import DimoError, nearest, reason
from dimo.files import require_place, write_text
from dimo.train.passes import passes_of
from dimo.train.trainer import Trainer
from dimo.ursa import UrsaTransformer, sample
from dimo.ursa.layout import require_checkpoint
from dimo.ursa.loading import import_upstream
from dimo.ursa.sampler import require_passes
from dimo.worlds import checkpoint_folder

PARTS = ("step", "generate", "path", "losses")
MORE_PARTS = ("attention", "kernels", "save")
AGAINST = ("naive", "upstream")


def bench(
    config: Config,
    size: str | None = None,
    parts: tuple[str, ...] = PARTS,
    against: tuple[str, ...] = (),
    repeats: int = 5,
    warmup: int = 2,
    generate_steps: tuple[int, ...] = (1, 25),
    progress: Callable[[str], None] = print,
) -> dict:
    """Run the benchmark and return the report.

    Args:
        config: sizes, batch and method.
        size: key of SIZES for random weights; None loads the configuration's checkpoint.
        parts: some of PARTS and MORE_PARTS.
        against: some of AGAINST.
        repeats: number of timed calls, whose median is reported.
        warmup: number of untimed calls before.
        generate_steps: numbers of sampling steps for the part "generate".
        progress: called with a line of text for each result.

    Returns:
        The content of the JSON report: times in seconds, memory in GiB, speed in TFLOP/s.

    Raises:
        DimoError: before anything is measured: an unknown part or size, invalid numbers, a method that the naive step
            does not support, or upstream cannot be imported or cannot run the checkpoint.
    """
    _require(config, size, parts, against, repeats, warmup, generate_steps)
    device = device_of(config)
    clock, d = Clock(device, repeats, warmup), config.distill
    report = {"device": _name(device), "torch": torch.__version__, "size": size or d.teacher_ckpt}
    report |= {"video": [d.num_frames, d.height, d.width], "batch": d.batch_size_per_gpu}
    report["product_tflops"] = matrix_product(clock)
    progress(f"{report['device']}, torch {torch.__version__}; a matrix product: {report['product_tflops']:.3g} TFLOP/s")

    ursa = prompts = None
    if size:
        ursa = random_ursa(size, device, strides_for(d.num_frames))
        prompts = random_prompts(ursa, d.max_prompt_length)
    trainer = Trainer(config, ursa, prompts)
    report["attention_used"] = trainer.attention.name
    progress(trainer.attention.about)
    network = trainer.networks.student.config
    text = trainer.prompts.batch(d.batch_size_per_gpu, trainer.generator.manual_seed(0)).to(device)
    sequence = text.shape[1] + 1 + trainer.num_visual_tokens
    forward = d.batch_size_per_gpu * model_flops(network, sequence, trainer.num_visual_tokens)
    passes = passes_of(config)
    report |= {"tokens": trainer.num_visual_tokens, "forward_tflop": forward / 1e12, "passes": passes}
    apart = dataclasses.replace(config, model=dataclasses.replace(config.model, aux_shared_layers=0))
    tflop, whole = (
        step_flops(one, network, d.batch_size_per_gpu, sequence, trainer.num_visual_tokens) / 1e12
        for one in (config, apart)
    )
    if "step" in parts:
        report |= _step(trainer, tflop, whole, report["product_tflops"], clock, progress)
    report |= _other_parts(trainer, text, parts, generate_steps, clock, progress)
    if "losses" in report and "step" in report:
        share = report["losses"]["all"]["seconds"] / report["step"]["seconds"]
        report["losses"]["share_of_step"] = share
        progress(f"    losses with their products: {100 * share:.2f}% of the step")
    kept = trainer.networks.teacher, trainer.path, text, trainer.uncond_ids, trainer.grid
    del trainer
    _free()
    if "naive" in against:
        report["naive"] = _naive(config, kept, whole, clock, report, progress)
    del kept
    _free()
    if "upstream" in against:
        report["upstream"] = _upstream(config, size, device, report, clock, progress)
    return report


def _require(config: Config, size: str | None, parts, against, repeats: int, warmup: int, generate_steps) -> None:
    for option, given, known in (("parts", parts, PARTS + MORE_PARTS), ("against", against, AGAINST)):
        for name in given:
            if name not in known:
                raise DimoError(f"--{option}: unknown name {name!r}{nearest(name, known)}")
    if not parts and not against:
        raise DimoError(f"--parts must name what to measure, some of {', '.join(PARTS + MORE_PARTS)}")
    if repeats < 1 or warmup < 0:
        raise DimoError(f"repeats must be at least 1 and warmup not negative, got {repeats} and {warmup}")
    if "generate" in parts and not generate_steps:
        raise DimoError("--generate must list numbers of passes, got none")
    for steps in generate_steps:
        require_passes("--generate", steps)
    if size:
        require_size(size)
    else:
        require_checkpoint(checkpoint_folder(config.distill.teacher_ckpt))
    if "naive" in against:
        require_naive(config)
    if "upstream" in against:
        _upstream_module().require_upstream(config, size)


def _upstream_module() -> types.ModuleType:
    import_upstream()  # its errors say what to install
    try:
        return importlib.import_module("dimo.bench.upstream")
    except Exception as error:  # incompatible versions fail in many ways
        raise DimoError(f"--against upstream: diffnext's pipeline cannot be imported: {reason(error)}") from error


def _step(trainer: Trainer, tflop: float, whole: float, product: float, clock: Clock, progress) -> dict:
    counter = itertools.count()
    begin = time.perf_counter()
    trainer.step(next(counter))
    clock.wait()
    report: dict[str, Any] = {"first_step_seconds": time.perf_counter() - begin}
    steps_until_replays(trainer, counter)
    spent = clock(lambda: trainer.step(next(counter)))
    if trainer.graphs is not None:  # its memory was allocated when it was captured
        spent["peak_gib"] = spent["reserved_gib"]
    report["step"] = _rated(spent, tflop, product)
    report["stages"] = stage_times(trainer, counter, clock) if trainer.graphs is None else {}
    progress(_line("step, with optimizers", report["step"]))
    if whole > tflop:
        report["step"]["tflops_not_shared"] = whole / report["step"]["seconds"]
        progress(
            f"    {report['step']['tflops_not_shared']:.3g} TFLOP/s if the layers that auxiliary and teacher share are "
            "counted as if they were not"
        )
    for name, seconds in report["stages"].items():
        progress(f"    {name:28}{1e3 * seconds:9.1f} ms")
    return report


def _other_parts(trainer: Trainer, text, parts, generate_steps, clock: Clock, progress) -> dict:
    report: dict[str, Any] = {}
    d, n, g = trainer.config.distill, trainer.networks, trainer.generator
    if "generate" in parts:
        report["generate"] = {}
        for steps in generate_steps:
            scale = 1.0 if steps == 1 else max(d.guidance_scale, 1.0)
            quick = clock if steps == 1 else dataclasses.replace(clock, repeats=1, warmup=min(clock.warmup, 1))

            def one(steps=steps, scale=scale):
                with trainer.engine.autocast():
                    sample(n.teacher, trainer.path, text, trainer.grid, steps, guidance_scale=scale,
                           guidance_trunc=d.guidance_trunc, uncond_ids=trainer.uncond_ids.expand_as(text),
                           generator=g)  # fmt: skip

            report["generate"][steps] = quick(one)
            progress(_line(f"generation, {steps} passes", report["generate"][steps]))
    if "path" in parts:
        x = torch.randint(trainer.path.codebook_size, (len(text), trainer.num_visual_tokens), device=trainer.device)
        report["path"] = clock(lambda: trainer.path.sample(x, 0.5, g))
        progress(_line("path sampling", report["path"]))
    if "losses" in parts:
        report["losses"] = losses_alone(trainer, len(text), clock)
        for name, result in report["losses"].items():
            progress(_line(f"losses: {name}", result))
    if "kernels" in parts:
        report["kernels"] = kernels_of(trainer, clock)
        for name, (seconds, calls) in list(report["kernels"].items())[:30]:
            progress(f"    {1e3 * seconds:9.2f} ms {calls:6} x {name[:100]}")
    if "save" in parts:
        result = report["save"] = saving(trainer, clock)
        progress(_line("copying a checkpoint to host memory", result))
        progress(f"    {result['gb']:.1f} GB; the first copy took {1e3 * result['first']:.1f} ms")
    if "attention" in parts:
        report["attention"] = {}
        for name, result in attention_alone(trainer, len(text), text.shape[1], clock):
            report["attention"][name] = result
            progress(_attention_line(name, result))
    return report


def _naive(
    config: Config, kept: tuple[UrsaTransformer, Any, torch.Tensor, torch.Tensor, tuple[int, int, int]],
    tflop: float, clock: Clock, report: dict, progress,
) -> dict:  # fmt: skip
    checkpointing = config.model.activation_checkpointing != "none"
    try:
        result = _rated(clock(naive_step(config, *kept, checkpointing)), tflop, report["product_tflops"])
    except torch.OutOfMemoryError as error:
        progress(f"the naive step does not fit into memory: {reason(error)[:120]}")
        return {"fits": False}
    result["checkpointing"] = "full" if checkpointing else "none"
    progress(_line("naive step, no optimizer", result))
    if "step" in report:
        result["ratio"] = result["seconds"] / report["step"]["seconds"]
        progress(f"    dimo's step is {result['ratio']:.2f} times as fast, optimizers included")
    return result


def _upstream(config: Config, size: str | None, device, report: dict, clock: Clock, progress) -> dict:
    ursa = random_ursa(size, device, strides_for(config.distill.num_frames)) if size else None
    call = _upstream_module().pipeline_call(config, ursa, device)
    result = dataclasses.replace(clock, repeats=min(clock.repeats, 3), warmup=1)(call)
    progress(_line("upstream's pipeline, 25 steps, guidance", result))
    if 1 in report.get("generate", {}):
        result["ratio"] = result["seconds"] / report["generate"][1]["seconds"]
        progress(f"    one pass of dimo is {result['ratio']:.1f} times as fast")
    return result


def _rated(result: dict, tflop: float, product: float) -> dict:
    rate = tflop / result["seconds"]
    return result | {"tflop": tflop, "tflops": rate, "share_of_product": rate / product}


def _line(name: str, result: dict) -> str:
    text = f"{name:44}{1e3 * result['seconds']:10.1f} ms ({1e3 * result['least']:.1f} to {1e3 * result['most']:.1f})"
    if "tflops" in result:
        text += f"  {result['tflops']:.3g} TFLOP/s, {100 * result['share_of_product']:.0f}% of the matrix product"
    if "peak_gib" in result:
        text += f"  {result['peak_gib']:.1f} GiB"
    if "extra_gib" in result:
        text += f" ({result['extra_gib']:.2f} GiB of it for the losses, including head gradients)"
    return text


def _attention_line(name: str, result: dict) -> str:
    if "why" in result:
        return f"attention of a layer: {name}: not here: {result['why'][:100]}"
    off = " ".join(f"{error:.1e}" for error in result["errors"].values())
    return _line(f"attention of a layer: {name}", result) + f"  off float32 (out, dq, dk, dv): {off}"


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bench_config(preset: str | None, size: str | None, overrides: list[str]) -> Config:
    """The configuration to measure: a preset, or for a size by default `distill_dimo` with all nine stages."""
    if size is None:
        return load_config(preset, overrides)
    require_size_alone(size, overrides)
    every_stage = ["distill.w_kd=0.1", "distill.max_prompt_length=320"]
    return load_config(preset or "distill_dimo", [*every_stage, *overrides])


def require_file(file: str | Path) -> None:
    """Raise unless a report can be written to the file; called before minutes of measuring."""
    if Path(file).is_dir():
        raise DimoError(f"--out must be a file, but {file} is a folder")
    require_place(file)


def write_report(report: dict, file: str | Path) -> None:
    """Write a report as JSON, atomically."""
    write_text(file, json.dumps(report, indent=2) + "\n")
