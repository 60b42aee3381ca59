"""`dimo plan`: memory per GPU and training time of a configuration, and what to change if it does not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dimo.bench.sizes import require_size_alone
from dimo.commands.dry_run import DryRun, dry_run, empty_ursa
from dimo.commands.inspect_folder import inspect_folder
from dimo.config import Config, load_config, to_flat
from dimo.errors import DimoError
from dimo.run.launch import engine_kind
from dimo.run.progress import CostBar
from dimo.ursa.layout import require_checkpoint
from dimo.worlds import checkpoint_folder, is_world

GIB = 2**30
SPARE = 2 * GIB  # for what is not covered
HALVED = ("none", "swiglu")  # kinds of checkpointing with which compiled layers keep half, see `Plan.expected`
NETWORKS = {"teacher": "teacher", "student": "student", "aux": "auxiliary", "ema": "moving average"}
UNSEEN = (
    "not covered: values, speed, workspaces of GPU kernels, allocator fragmentation, NCCL buffers, the CUDA context "
    "(about 0.5 GiB), and whether all ranks call their collectives in the same order"
)


@dataclasses.dataclass
class Plan:
    """The memory and time that a configuration needs.

    Attributes:
        run: result of the dry run.
        parts: memory per GPU by part, in bytes.
        seconds: time per step, in seconds, if measured.
        measured: peak memory of the measurement, in bytes.
        no_probe: why nothing was measured.
    """

    config: Config
    run: DryRun
    parts: dict[str, int]
    seconds: float | None = None
    measured: int | None = None
    no_probe: str = ""

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def counts_too_much(self) -> bool:
        """Whether the count is too high: it is without compilation, and compiled layers save fewer activations.

        With full activation checkpointing there is no difference.
        """
        return self.config.model.compile and self.config.model.activation_checkpointing != "full"

    @property
    def expected(self) -> int:
        """Memory per GPU in bytes with compiled layers, about; `total` for settings of which nothing was measured.

        URSA-1.7B at 5,120 tokens on an H100 had 18.8 of 37.4 GiB of activations with none, and 32 of 68.4 with swiglu
        and a batch of 2; the head was not trained.
        """
        m = self.config.model
        halved = m.compile and not m.train_head and m.activation_checkpointing in HALVED
        return self.total - halved * self.parts.get("activations and logits", 0) // 2


def make_plan(config: Config, size: str | None = None, memory_gib: float | None = None, probe: bool = True) -> Plan:
    """Do a dry run, and measure a few real steps if there is a GPU and the step seems to fit.

    Args:
        size: "0.6B" or "1.7B", instead of the folder distill.teacher_ckpt.
        memory_gib: memory of one GPU, in GiB; None: that of the GPU here, else 80.
        probe: measure real steps.

    Raises:
        DimoError: see `dry_run`.
    """
    plan = _go_through(config, size)
    if not probe or not torch.cuda.is_available():
        plan.no_probe = "no GPU here" if probe else "not asked for"
    elif plan.total > gpu_memory(memory_gib) and not plan.counts_too_much:
        plan.no_probe = "it would not fit"
    else:
        plan.seconds, plan.measured, plan.no_probe = _probe(config, size)
    return plan


def _go_through(config: Config, size: str | None) -> Plan:
    run, n = dry_run(config, size, config.training.num_processes), config.training.num_processes
    return Plan(config, run, parts_of(run, engine_kind(config.training.engine), n))


def gpu_memory(memory_gib: float | None) -> float:
    """Memory of one GPU in bytes; default: that of the GPU here, else 80 GiB."""
    if memory_gib is not None:
        return memory_gib * GIB
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80 * GIB


def parts_of(run: DryRun, kind: str, num_processes: int) -> dict[str, int]:
    """Memory per GPU by part, in bytes; `kind` is the engine.

    deepspeed_zero2 is computed from a dry run as ddp: ZeRO-2 replicates the weights and shards gradients, optimizer
    states and a second copy of the trained weights.
    """
    n, activations = max(1, num_processes), max(0, run.peak - run.gradients)
    kept, gradients = run.kept, run.gradients
    if kind == "deepspeed_zero2":
        kept, gradients = (kept + sum(run.trained.values())) // n, gradients // n
    parts = {f"weights of the {NETWORKS.get(name, name)}": size for name, size in run.weights.items()}
    parts |= {"bf16 copies of the weights": run.copies} if run.copies else {}
    return parts | {"optimizers": kept, "gradients": gradients, "activations and logits": activations}


def _probe(config: Config, size: str | None) -> tuple[float | None, int | None, str]:
    """Measure steps in one process: (median seconds after two warm-up steps, peak bytes, "" or why it failed)."""
    torch.cuda.reset_peak_memory_stats()
    try:
        return _seconds(config, size), torch.cuda.max_memory_allocated(), ""
    except torch.OutOfMemoryError:
        return None, None, "it did not fit on this GPU"
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _seconds(config: Config, size: str | None) -> float:
    """Median seconds of three steps after two warm-up steps."""
    from dimo.train.prompts import WorldPrompts
    from dimo.train.trainer import Trainer

    ursa = empty_ursa(size, config.distill, "cuda")
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, cuda_graph=False))
    trainer = Trainer(config, ursa, WorldPrompts(["a red ball"], ursa, config.distill.max_prompt_length))
    seconds = []
    for index in range(5):
        start = time.perf_counter()
        trainer.step(index)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def alternatives(plan: Plan, size: str | None, preset: str | None, overrides: Sequence[str]) -> dict[str, int]:
    """Dry runs of changes that save memory: {change, as overrides: bytes per GPU}.

    Args:
        size: see `make_plan`.
        preset, overrides: the configuration to change, see `load_config`.
    """
    n, d = plan.config.training.num_processes, plan.config.distill
    flat, sparing = to_flat(plan.config), []
    if flat["training.mixed_precision"] == "no":
        sparing.append("training.mixed_precision=bf16")
    if flat["model.activation_checkpointing"] != "full":
        sparing.append("model.activation_checkpointing=full")
    if flat["model.train_embeddings"]:
        sparing.append("model.train_embeddings=false")
    if flat["model.train_head"]:
        sparing.append("model.train_head=false")
    if d.t_draws > 1:
        sparing.append("distill.t_draws=1")
    if d.batch_size_per_gpu > 1:
        more = f"training.gradient_accumulation_steps={2 * flat['training.gradient_accumulation_steps']}"
        sparing.append(f"distill.batch_size_per_gpu={d.batch_size_per_gpu // 2} {more}")
    changes = [[change] for change in sparing] + ([sparing] if len(sparing) > 1 else [])
    if n > 1 and engine_kind(plan.config.training.engine) == "ddp":
        engines = [f"training.engine={engine}" for engine in ("deepspeed_zero2", "fsdp2")]
        changes += [[*some, engine] for engine in engines for some in ([], sparing)[: 1 + bool(sparing)]]
    found = {}
    with CostBar("plan", len(changes), "changes tried") as bar:
        for i, change in enumerate(changes):
            bar.show(i, " ".join(change))
            with contextlib.suppress(DimoError):  # the engine does not support the optimizer
                words = [word for some in change for word in some.split()]
                found[" ".join(change)] = _go_through(load_config(preset, [*overrides, *words]), size).expected
        bar.show(len(changes), "done")
    return found


def largest_batch(plan: Plan, size: str | None, preset: str | None, overrides: Sequence[str], memory: float) -> str:
    """The largest batch per GPU in `memory` bytes less SPARE, as text; arguments as in `alternatives`.

    In place of no activation checkpointing it is that with swiglu, which costs hardly any time. Memory grows in
    proportion to the batch, so two dry runs tell it.
    """
    how, batch = plan.config.model.activation_checkpointing, plan.config.distill.batch_size_per_gpu
    how, totals = "swiglu" if how == "none" else how, []
    for samples in (batch, 2 * batch):
        print(f"dimo: trying {how}, batch {samples}", file=sys.stderr)
        words = f"model.activation_checkpointing={how}", f"distill.batch_size_per_gpu={samples}"
        totals.append(_go_through(load_config(preset, [*overrides, *words]), size).expected)
    each = (totals[1] - totals[0]) / batch
    more = max(0, int((memory - SPARE - totals[0]) // each))
    takes = (totals[0] + more * each) / GIB
    keys = f"model.activation_checkpointing={how} distill.batch_size_per_gpu={batch + more}"
    return f"{keys}, {takes:.2f} GiB"


def format_plan(plan: Plan, name: str, memory: float) -> str:
    """The plan as text; `name` is the model, `memory` that of one GPU, in bytes."""
    d, t, n = plan.config.distill, plan.config.training, plan.run.num_visual_tokens
    videos = d.batch_size_per_gpu * t.num_processes // t.sequence_parallel * t.gradient_accumulation_steps
    lines = [
        f"{name} at {d.num_frames}x{d.height}x{d.width}: {n:,} tokens per video, {d.batch_size_per_gpu} video(s) per "
        f"GPU, {t.num_processes} GPU(s), engine {t.engine}, mixed_precision {t.mixed_precision}, "
        f"attention {plan.config.model.attention}",
        "",
        f"{'per GPU':32}{'GiB':>8}",
        *(f"{part:32}{size / GIB:8.2f}" for part, size in plan.parts.items()),
        f"{'total':32}{plan.total / GIB:8.2f}   {_verdict(plan, memory)} {memory / GIB:.0f}",
    ]
    if plan.expected < plan.total:
        lines.append(f"{'compiled, about':32}{plan.expected / GIB:8.2f}   as compiled layers keep half the activations")
    if plan.measured is not None:
        alone = "measured here, unsharded" if plan.config.training.num_processes > 1 else "measured here"
        lines.append(f"{alone:32}{plan.measured / GIB:8.2f}")
    lines += ["", *_collectives(plan)]
    tokens = t.max_train_steps * videos * n
    lines.append(f"{t.max_train_steps:,} steps: {t.max_train_steps * videos:,} videos, {tokens:.3g} tokens")
    if plan.seconds is None:
        lines.append(f"time per step: not measured ({plan.no_probe})")
    else:
        days = t.max_train_steps * plan.seconds / 86_400
        lines.append(
            f"time per step: {plan.seconds:.3f} s, median of 3 on one GPU without communication; "
            f"{days:.1f} days, {days * 24 * t.num_processes:.0f} GPU-hours"
        )
    return "\n".join([*lines, UNSEEN])


def _verdict(plan: Plan, memory: float) -> str:
    if plan.total <= memory:
        return "fits into"
    if plan.expected <= memory:
        return "counted without compilation, with which it should fit into"
    if plan.counts_too_much:
        return "counted without compilation, with which layers need less; so counted, it does NOT fit into"
    return "does NOT fit into"


def _collectives(plan: Plan) -> list[str]:
    moved = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in plan.run.collectives.items())
    return [f"communication per step: {moved}"] if moved else []


def format_alternatives(found: dict[str, int], memory: float) -> str:
    """The results of `alternatives` as text, in order of decreasing memory."""
    if not found:
        return "to make it fit, use fewer frames, a smaller height and width, or a GPU with more memory"
    wide = max(map(len, found))
    rows = sorted(found.items(), key=lambda row: -row[1])
    fits = any(size <= memory for size in found.values())
    text = "\n".join(
        f"  {change:{wide}}  {size / GIB:8.2f} GiB{'   fits' if size <= memory else ''}" for change, size in rows
    )
    return f"to make it fit:\n{text}" + ("" if fits else "\n  and also fewer frames, or a smaller height and width")


def plan_report(
    preset: str | None,
    overrides: Sequence[str],
    size: str | None = None,
    memory_gib: float | None = None,
    only_dry_run: bool = False,
) -> str:
    """The output of `dimo plan`.

    Args:
        preset, overrides: see `load_config`; with a size the default preset is distill_dimo.
        size, memory_gib: see `make_plan`.
        only_dry_run: report only that the step runs, its peak memory and communication.

    Raises:
        DimoError: memory_gib is not positive, or see `make_plan`.
    """
    if memory_gib is not None and not memory_gib > 0:
        raise DimoError(f"--memory must be positive, in GiB, got {memory_gib}")
    if size is not None:
        require_size_alone(size, overrides)
        preset = preset or "distill_dimo"
    config = load_config(preset, overrides)
    if only_dry_run:
        plan = _go_through(config, size)
        tokens = plan.run.num_visual_tokens
        went = f"one step ran as rank 0 of {config.training.num_processes}; {tokens:,} tokens per video"
        return "\n".join([went, f"peak: {plan.total / GIB:.2f} GiB", *_collectives(plan), UNSEEN])
    name = f"URSA-{size}" if size else str(config.distill.teacher_ckpt)
    if size or (Path(name).is_dir() and not is_world(Path(name))):
        if not size:
            require_checkpoint(name)
        print(f"plan: a step of {name} on tensors without values; half a minute for 1.7B", file=sys.stderr, flush=True)
    plan, memory = make_plan(config, size, memory_gib), gpu_memory(memory_gib)
    text = format_plan(plan, name, memory)
    if plan.expected > memory:
        text += "\n\n" + format_alternatives(alternatives(plan, size, preset, overrides), memory)
    elif size is not None or not is_world(checkpoint_folder(config.distill.teacher_ckpt)):
        text += f"\n\nlargest batch: {largest_batch(plan, size, preset, overrides, memory)}"
    missing = [] if size else inspect_folder(checkpoint_folder(config.distill.teacher_ckpt))[1]
    if missing:  # planned all the same: weights may still be on their way
        text += f"\n\n{name} cannot be trained as it is: {missing[0]}"
    return text
