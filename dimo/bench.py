"""`dimo bench`: what a training step, its stages, generation, path sampling and the losses cost on this machine.

Everything is measured in one process on the same card: the trainer's own step with its optimizers, and beside it a
matrix product, whose speed is what the machine can do, and (`--against`) the naive step and upstream's pipeline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from dimo.bench_naive import naive_step
from dimo.distill import fused, stages
from dimo.errors import DimoError, nearest
from dimo.files import write_text
from dimo.train.config import Config, device_of, load_config
from dimo.train.prompts import WorldPrompts
from dimo.train.trainer import Trainer
from dimo.ursa import MetricPath, Ursa, UrsaConfig, UrsaTransformer, sample
from dimo.ursa.answer import Answer, draw
from dimo.ursa.checkpoint import INSTALL
from dimo.ursa.transformer import ATTENTION

SIZES = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7B": {},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 155_765,
             "lm_head_size": 4096},
}  # fmt: skip
PARTS = ("step", "generate", "path", "losses")
MORE_PARTS = ("attention", "kernels")
STAGES = (
    "draw_x_init", "student_pass", "renoise", "teacher_pass", "auxiliary_pass", "distil_knowledge",
    "distillation_loss", "total_loss",
)  # fmt: skip


@dataclasses.dataclass
class Clock:
    """Median seconds of a call, and the peak of the device's memory."""

    device: torch.device
    repeats: int = 5
    warmup: int = 2

    def __call__(self, function: Callable[[], object]) -> dict[str, float]:
        for _ in range(self.warmup):
            function()
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(self.repeats):
            begin = time.perf_counter()
            function()
            self.wait()
            seconds.append(time.perf_counter() - begin)
        result = {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
        if self.device.type == "cuda":
            result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            result["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        return result

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class RandomIds:
    """In a tokenizer's place where there is none: a prompt becomes ids drawn from its own length."""

    def __init__(self, lm_vocab_size: int):
        self.lm_vocab_size = lm_vocab_size

    def __call__(self, prompts: list[str], max_length: int, **_):
        rows = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
        ids = [torch.randint(self.lm_vocab_size, (max_length,), generator=row) for row in rows]
        return dataclasses.make_dataclass("Encoding", ["input_ids"])(torch.stack(ids))


def random_ursa(size: str, device: torch.device) -> Ursa:
    """A checkpoint of URSA's sizes with random weights and no files.

    Raises:
        DimoError: a size that there is not.
    """
    if size not in SIZES:
        raise DimoError(f"size must be one of {', '.join(SIZES)}, got {size!r}{nearest(size, SIZES)}")
    config = UrsaConfig.from_dict(SIZES[size])
    with device:
        torch.manual_seed(0)
        transformer = UrsaTransformer(config)
        path = MetricPath(torch.randn(config.codebook_size, 32), alpha=0.9, c=3.0)
    return Ursa(transformer, path, RandomIds(config.lm_vocab_size), None, 1.0, Path(tempfile.gettempdir()), "random")


def model_flops(config: UrsaConfig, sequence: int, tokens: int) -> float:
    """Of one forward pass of one sample: products of the layers, attention, and the head on the visual tokens."""
    attention_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * attention_width + 2 * kv_width + 3 * config.intermediate_size)
    layers = config.num_hidden_layers * (2 * layer * sequence + 4 * sequence**2 * attention_width)
    return layers + 2 * config.hidden_size * config.lm_head_size * tokens


def passes_of(config: Config) -> dict[str, int]:
    """Passes of a step, in forwards: a gradient is two more. What checkpointing computes again does not count."""
    d = config.distill
    return {
        "student at x_init": 3,
        "teacher": 1 if d.guidance_scale == 1 else 2,
        "auxiliary's fit": 3 * d.aux_steps,
        "auxiliary at x_t": 1 if d.aux_pass == "own" else 0,
        "student at x_t": 3 if d.w_kd > 0 and d.kd_every == 1 else 0,
    }


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
    """Measure and return all figures; `progress` gets a line as each is known.

    Args:
        config: sizes, batch and method; its checkpoint is loaded unless `size`, of SIZES, asks for random weights.
        parts: some of PARTS and MORE_PARTS.
        against: "naive", "upstream".

    Raises:
        DimoError: an unknown part, or upstream where it is not installed or has no checkpoint to load.
    """
    for given, known in ((parts, PARTS + MORE_PARTS), (against, ("naive", "upstream"))):
        for name in given:
            if name not in known:
                raise DimoError(f"there is nothing called {name!r} to measure{nearest(name, known)}")
    device = device_of(config)
    clock, d = Clock(device, repeats, warmup), config.distill
    report = {"device": _name(device), "torch": torch.__version__, "size": size or d.teacher_ckpt}
    report |= {"video": [d.num_frames, d.height, d.width], "batch": d.batch_size_per_gpu}
    report["product_tflops"] = matrix_product(clock)
    progress(f"{report['device']}, torch {torch.__version__}; a matrix product: {report['product_tflops']:.3g} TFLOP/s")

    ursa = prompts = None
    if size:
        ursa = random_ursa(size, device)
        texts = ["a red ball rolls over green grass" + "." * i for i in range(64)]
        prompts = WorldPrompts(texts, ursa, d.max_prompt_length)
    trainer = Trainer(config, ursa, prompts)
    network = trainer.networks.student.config
    text = trainer.prompts.batch(d.batch_size_per_gpu, trainer.generator.manual_seed(0)).to(device)
    sequence = text.shape[1] + 1 + trainer.num_visual_tokens
    forward = d.batch_size_per_gpu * model_flops(network, sequence, trainer.num_visual_tokens)
    passes = passes_of(config)
    report |= {"tokens": trainer.num_visual_tokens, "forward_tflop": forward / 1e12, "passes": passes}
    tflop = forward * sum(passes.values()) / 1e12
    if "step" in parts:
        counter = iter(range(10**9))
        begin = time.perf_counter()
        trainer.step(next(counter))
        clock.wait()
        report["first_step_seconds"] = time.perf_counter() - begin
        result = clock(lambda: trainer.step(next(counter)))
        report["step"] = _rated(result, tflop, report["product_tflops"])
        report["stages"] = stage_times(trainer, counter, clock)
        progress(_line("step, with optimizers", report["step"]))
        for name, seconds in report["stages"].items():
            progress(f"    {name:28}{1e3 * seconds:9.1f} ms")
    report |= _other_parts(trainer, text, parts, generate_steps, clock, progress)
    if "losses" in report and "step" in report:
        share = report["losses"]["all"]["seconds"] / report["step"]["seconds"]
        report["losses"]["share_of_step"] = share
        progress(f"    losses with their products: {100 * share:.2f}% of the step")
    kept = trainer.networks.teacher, trainer.path, text, trainer.uncond_ids, trainer.grid
    trainer = None
    _free()
    if "naive" in against:
        report["naive"] = _naive(config, kept, tflop, clock, report, progress)
    kept = None
    _free()
    if "upstream" in against:
        report["upstream"] = _upstream(config, size, device, report, clock, progress)
    return report


def _other_parts(trainer: Trainer, text, parts, generate_steps, clock: Clock, progress) -> dict:
    report, d, n, g = {}, trainer.config.distill, trainer.networks, trainer.generator
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
    if "attention" in parts:
        report["attention"] = {}
        for name, result in attention_alone(trainer, len(text), text.shape[1], clock):
            report["attention"][name] = result
            progress(_line(f"attention of a layer: {name}", result) if result else f"attention: {name} does not serve")
    return report


def losses_alone(trainer: Trainer, batch: int, clock: Clock) -> dict[str, dict]:
    """All between hidden states and their gradients, on random hidden states; then its products with heads alone."""
    d, device, n = trainer.config.distill, trainer.device, trainer.networks
    dtype = torch.bfloat16 if trainer.config.training.mixed_precision == "bf16" else torch.float32
    shape = batch, trainer.num_visual_tokens, n.student.config.hidden_size
    codes = trainer.path.codebook_size
    g = torch.Generator(device).manual_seed(0)
    student, aux = (n.lm_head.weight[-codes:].detach().requires_grad_() for n in (n.student, n.aux))
    teacher = n.teacher.lm_head.weight[-codes:].to(dtype)
    hidden = [torch.randn(shape, device=device, dtype=dtype, generator=g) for _ in range(4)]
    learns = [h.requires_grad_() for h in hidden[:3]]
    tokens, kd = batch * trainer.num_visual_tokens, d.w_kd > 0
    base = _allocated(device)

    def draw_part():
        return draw(Answer(hidden[0], student), g)

    def aux_part():
        fused.denoising(Answer(hidden[1], aux), x, d.label_smoothing).backward()

    def student_part():
        beta = 0.0 if trainer.beta == "time" else trainer.beta
        fused.student_losses(
            Answer(hidden[0], student), Answer(hidden[3], teacher), Answer(hidden[1], aux), x, logp, entropy, beta=beta,
            student_at_t=Answer(hidden[2], student) if kd else None, w_kd=d.w_kd, lambda_ent=d.lambda_ent,
        ).total.backward()  # fmt: skip

    def all_parts():
        for part in (draw_part, aux_part, student_part):
            part()
        for leaf in (*learns, student, aux):
            leaf.grad = None

    def products():
        """As many of the size of a head as the losses need: 1 to draw, 3 for the auxiliary, 4 to 8 for the student."""
        size = min(tokens, 4096)
        some, head = hidden[3].view(-1, shape[-1])[:size], teacher
        z = some @ head.T
        for _ in range(-(-tokens // size)):
            for _ in range(1 + 1 + 2 + (d.lambda_ent > 0) + kd):
                torch.mm(some, head.T, out=z)
            for _ in range(1 + 1 + kd):
                torch.mm(z, head)
                torch.mm(z.T, some)

    x, logp, entropy = draw_part()
    times = {"draw": clock(draw_part), "auxiliary": clock(aux_part), "student": clock(student_part)}
    for leaf in (*learns, student, aux):
        leaf.grad = None
    times |= {"all": clock(all_parts), "its products alone": clock(products)}
    if device.type == "cuda":
        times["all"]["extra_gb"] = times["all"]["peak_gb"] - base / 1e9
    return times


def kernels_of(trainer: Trainer, clock: Clock) -> dict[str, tuple[float, int]]:
    """{kernel: (seconds, calls)} of one step, longest first, by torch's profiler; of operators on a CPU."""
    cuda = clock.device.type == "cuda"
    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        trainer.step(10**6)
        clock.wait()
    rows = [(e.key, (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e6, e.count)
            for e in found.key_averages()]  # fmt: skip
    return {name: (seconds, calls) for name, seconds, calls in sorted(rows, key=lambda row: -row[1])}


def attention_alone(trainer: Trainer, batch: int, text: int, clock: Clock) -> Iterator[tuple[str, dict | None]]:
    """Forward and backward of one layer's attention, by kernel, with grouped keys and with keys repeated."""
    config, device = trainer.networks.student.config, trainer.device
    dtype = torch.bfloat16 if trainer.config.training.mixed_precision == "bf16" else torch.float32
    length = text + 1 + trainer.num_visual_tokens
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def leaf(heads):
        return torch.randn(batch, length, heads, size, device=device, dtype=dtype).transpose(1, 2).requires_grad_()

    for backend in ATTENTION[:-1]:
        for grouped in (True, False):
            q, k, v = leaf(heads), *(leaf(kv_heads if grouped else heads) for _ in range(2))
            grad = torch.randn_like(q)

            def both(backend=backend, grouped=grouped, q=q, k=k, v=v, grad=grad):
                with sdpa_kernel(backend):
                    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
                torch.autograd.grad(out, (q, k, v), grad)

            tflop, result = 3 * 4 * batch * heads * length**2 * size / 1e12, None
            with contextlib.suppress(RuntimeError):  # the kernel says that it cannot
                result = clock(both)
                result["tflops"] = tflop / result["seconds"]
                result["share_of_product"] = result["tflops"] / matrix_product(clock)
            yield f"{backend.name.removesuffix('_ATTENTION').lower()}, {'grouped' if grouped else 'repeated'}", result


def stage_times(trainer: Trainer, counter, clock: Clock) -> dict[str, float]:
    """Median seconds of each stage function, of backward passes and updates; the device is waited for after each."""
    seconds: dict[str, list[float]] = {}

    def timed(name, function):
        def call(*args, **kwargs):
            clock.wait()
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                clock.wait()
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - begin

        return call

    with contextlib.ExitStack() as undo:
        for name in STAGES:
            undo.callback(setattr, stages, name, getattr(stages, name))
            setattr(stages, name, timed(name, getattr(stages, name)))
        inner = stages.auxiliary_losses
        undo.callback(setattr, stages, "auxiliary_losses", inner)
        stages.auxiliary_losses = lambda *a, **k: iter(Timed(inner(*a, **k), timed))
        for learner, who in ((trainer.aux, "auxiliary"), (trainer.student, "student")):
            for method in ("backward", "gradient_norm", "update"):
                undo.callback(delattr, learner, method)
                setattr(learner, method, timed(f"{who}: {method}", getattr(learner, method)))
        undo.callback(delattr, trainer, "_update_ema")
        trainer._update_ema = timed("update_ema", trainer._update_ema)
        for _ in range(max(1, clock.repeats // 2)):
            spent: dict[str, float] = {}
            trainer.step(next(counter))
            for name, value in spent.items():
                seconds.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Timed:
    """An iterator whose every next is timed as `auxiliary_losses`."""

    def __init__(self, inner, timed):
        self.next = timed("auxiliary_losses", lambda: next(inner))

    def __iter__(self):
        return self

    def __next__(self):
        return self.next()


def matrix_product(clock: Clock) -> float:
    """TFLOP/s of a large product of random matrices in the precision that training uses there."""
    size, dtype = (8192, torch.bfloat16) if clock.device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))

    def ten():
        for _ in range(10):
            a @ b

    return 10 * 2 * size**3 / clock(ten)["seconds"] / 1e12


def _naive(config, kept: tuple, tflop: float, clock: Clock, report: dict, progress) -> dict:
    checkpointing = config.model.activation_checkpointing != "none"
    try:
        result = _rated(clock(naive_step(config, *kept, checkpointing)), tflop, report["product_tflops"])
    except torch.OutOfMemoryError as error:
        progress(f"the naive step does not fit into this memory: {str(error).splitlines()[0][:120]}")
        return {"fits": False}
    result["checkpointing"] = "full" if checkpointing else "none"
    progress(_line("naive step, no optimizer", result))
    if "step" in report:
        result["ratio"] = result["seconds"] / report["step"]["seconds"]
        progress(f"    ours is {result['ratio']:.2f} times as fast, optimizers included")
    return result


def _upstream(config: Config, size: str | None, device, report: dict, clock: Clock, progress) -> dict:
    try:
        from dimo.bench_upstream import pipeline_call
    except ImportError as error:
        raise DimoError(f"--against upstream needs diffnext ({error}); {INSTALL}") from error
    call = pipeline_call(config, random_ursa(size, device) if size else None, device)
    result = dataclasses.replace(clock, repeats=min(clock.repeats, 3), warmup=1)(call)
    progress(_line("upstream's pipeline, 25 steps, guidance", result))
    if 1 in report.get("generate", {}):
        result["ratio"] = result["seconds"] / report["generate"][1]["seconds"]
        progress(f"    one pass of ours is {result['ratio']:.1f} times as fast")
    return result


def _rated(result: dict, tflop: float, product: float) -> dict:
    rate = tflop / result["seconds"]
    return result | {"tflop": tflop, "tflops": rate, "share_of_product": rate / product}


def _line(name: str, result: dict) -> str:
    text = f"{name:44}{1e3 * result['seconds']:10.1f} ms ({1e3 * result['least']:.1f} to {1e3 * result['most']:.1f})"
    if "tflops" in result:
        text += f"  {result['tflops']:.3g} TFLOP/s, {100 * result['share_of_product']:.0f}% of the product"
    if "peak_gb" in result:
        text += f"  {result['peak_gb']:.1f} GB"
    if "extra_gb" in result:
        text += f" ({result['extra_gb']:.2f} GB of it the losses' own, gradients of heads included)"
    return text


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bench_config(preset: str | None, size: str | None, overrides: list[str]) -> Config:
    """The configuration to measure: a preset, or for random weights of a size all nine stages of `distill_dimo`."""
    if size is None:
        return load_config(preset, overrides)
    every_stage = ["distill.w_kd=0.1", "distill.max_prompt_length=320"]
    return load_config(preset or "distill_dimo", [*every_stage, *overrides])


def write_report(report: dict, file: str | Path) -> None:
    """As JSON, whole or not at all."""
    write_text(file, json.dumps(report, indent=2) + "\n")
