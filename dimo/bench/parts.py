"""The clock of `dimo bench`, and the parts that it times separately."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from dimo.distill import losses
from dimo.errors import trusted_values
from dimo.run.checkpoints import HostCopies
from dimo.train.trainer import Trainer
from dimo.ursa import Chunked
from dimo.ursa.token_losses import denoising

STAGES = (
    "1 prompts", "2 x_init", "3 student's pass", "4 x_t", "5 teacher", "6 auxiliary", "7 student at x_t",
    "8 distillation signal", "9 losses, update",
)  # fmt: skip


@dataclasses.dataclass
class Clock:
    """Times a function: seconds (median), least, most; on CUDA also the peak memory, in GiB."""

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
            result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            result["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return result

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def matrix_product(clock: Clock) -> float:
    """TFLOP/s of a large product of random matrices: bf16 on CUDA, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if clock.device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))

    def ten():
        for _ in range(10):
            a @ b

    return 10 * 2 * size**3 / clock(ten)["seconds"] / 1e12


def stage_times(trainer: Trainer, counter, clock: Clock) -> dict[str, float]:
    """Median seconds of each of the nine stages, with a device synchronisation after each.

    The times of several micro-batches are added. Stage 6 includes the auxiliary's backward passes and updates, stage 9
    the student's.
    """
    seconds: dict[str, list[float]] = {}
    for _ in range(max(1, clock.repeats // 2)):
        spent = dict.fromkeys(STAGES, 0.0)
        clock.wait()
        begin = time.perf_counter()
        with trusted_values():  # as in `Trainer.step`
            for number, _, _ in trainer.walk(next(counter)):
                clock.wait()
                now = time.perf_counter()
                spent[STAGES[number - 1]] += now - begin
                begin = now
        for name, value in spent.items():
            seconds.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in seconds.items()}


def losses_alone(trainer: Trainer, batch: int, clock: Clock) -> dict[str, dict]:
    """Time the losses from hidden states to their gradients, on random hidden states, and their head products alone."""
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
        return Chunked(hidden[0], student).sample(g)

    def aux_part():
        denoising(Chunked(hidden[1], aux), x, d.label_smoothing).backward()

    def student_part():
        beta = 0.0 if trainer.beta == "time" else trainer.beta
        losses.student_loss(
            Chunked(hidden[0], student), Chunked(hidden[3], teacher), Chunked(hidden[1], aux), x, logp, entropy,
            beta=beta, student_at_t=Chunked(hidden[2], student) if kd else None, w_kd=d.w_kd, lambda_ent=d.lambda_ent,
        ).total.backward()  # fmt: skip

    def all_parts():
        for part in (draw_part, aux_part, student_part):
            part()
        for leaf in (*learns, student, aux):
            leaf.grad = None

    def products():
        """The losses' matrix products with a head: 1 for sampling, 3 for the auxiliary, 4 to 8 for the student."""
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
        times["all"]["extra_gib"] = times["all"]["peak_gib"] - base / 2**30
    return times


def saving(trainer: Trainer, clock: Clock) -> dict[str, float]:
    """Time that a checkpoint blocks training, for copying it to host memory; the first copy allocates that memory."""
    copies = HostCopies()

    def copy():
        tensors, state = trainer.state()
        return copies([tensors, state, trainer.rank_state()])

    trainer.step(0)  # creates the optimizer states
    clock.wait()
    begin = time.perf_counter()
    made = copy()
    first = time.perf_counter() - begin
    size = sum(x.nbytes for x in tree_leaves(made) if isinstance(x, torch.Tensor))
    return clock(copy) | {"first": first, "gb": size / 1e9}


def steps_until_replays(trainer: Trainer, counter: Iterator[int]) -> None:
    """Make the ordinary steps with which a run with training.cuda_graph begins."""
    while trainer.graphs is not None and not trainer.graphs.captured:
        trainer.step(next(counter))


def kernels_of(trainer: Trainer, clock: Clock) -> dict[str, tuple[float, int]]:
    """Profile one step, a replay if there are such: {CUDA kernel, or operator on a CPU: (seconds, calls)}.

    The longest come first.
    """
    steps_until_replays(trainer, itertools.count())
    graphs = trainer.graphs
    index = next(i for i in itertools.count() if graphs is None or graphs.kind(i) in graphs.captured)
    cuda = clock.device.type == "cuda"
    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        trainer.step(index)
        clock.wait()
    rows = [(e.key, (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e6, e.count)
            for e in found.key_averages()]  # fmt: skip
    return {name: (seconds, calls) for name, seconds, calls in sorted(rows, key=lambda row: -row[1])}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0
