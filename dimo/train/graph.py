"""Training steps as CUDA graphs (`training.cuda_graph`): a step of a small world is bound by its kernel launches.

The first steps of a run are ordinary ones: they fill the memory of x_init and create the optimizers' states. Then the
nine stages, both updates and the sums of metrics are captured once and replayed. Random draws, captions, learning rates
and all else that a schedule changes are set before each replay, in tensors that the graph reads, so a replay makes the
step that the trainer would make, up to rounding. The moving average is updated after it, in the steps that do. Steps of
another kind (after the time curriculum, or with stage 7 if distill.kd_every leaves it out of some) have a graph of
their own.

What differs from training without a graph:

- A replay cannot stop at a value that is not finite. It records the step, and `look`, which everything that reads the
  run's state calls first, then stops the run: no metrics, no checkpoint and no picture contain such a step or a later
  one. Steps are not skipped, and training.max_bad_steps counts the ordinary ones only.
- A switch of the entropy bonus takes effect in its step, as ever, but the event has the step at which it was noticed,
  that of the next line of metrics.jsonl.
- The unconditional half of a guided teacher always runs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dimo.distill.stages import Step
from dimo.distill.step import nine_stages
from dimo.errors import DimoError, Diverged
from dimo.run.checkpoints import Checkpoints
from dimo.train.metrics import measured
from dimo.train.prompts import StreamedPrompts
from dimo.ursa.cuda_graph import ORDINARY, make_capturable, on_stream, record

if TYPE_CHECKING:
    from dimo.train.trainer import Trainer

COMPILED = 64  # graphs of torch.compile for one function: each size, and the networks of each seed, have their own
CHECKED = ("loss/total", "entropy/student", "entropy/teacher", "entropy/aux")


def require_capturable(trainer: Trainer) -> None:
    """Raise DimoError if the trainer's step cannot become a CUDA graph; `dimo.config.load` has checked the keys."""
    if trainer.device.type != "cuda":
        raise DimoError("training.cuda_graph=true needs a GPU, and PyTorch finds none")
    if trainer.engine.world_size > 1:
        raise DimoError(f"training.cuda_graph=true needs a single process, got {trainer.engine.world_size}")


@dataclasses.dataclass
class _Captured:
    """A captured step: what replays it, and its results, which each replay overwrites."""

    replay: Callable[[], None] = lambda: None
    step: Step = dataclasses.field(default_factory=Step)
    norms: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()  # of the metrics that it adds to the sums


class StepGraphs:
    """The CUDA graphs of a trainer's step, one for each kind of step, on a stream of their own.

    Until a kind is captured its steps are those of `Trainer.walk`. Changes the trainer: everything that a schedule sets
    becomes a scalar tensor.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, device = trainer, trainer.device
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # the networks were made there
        for learner in (trainer.student, trainer.aux):
            make_capturable(learner.optimizers, device)
        trainer.x_init.fade = torch.zeros((), device=device)
        trainer.entropy_bonus.fade = torch.zeros((), dtype=torch.float64, device=device)
        if trainer.lambda_ent > 0:
            trainer.lambda_ent = torch.tensor(trainer.lambda_ent, dtype=torch.float64, device=device)
        if trainer.settings.t_power_start:
            trainer.t_power = torch.zeros((), device=device)
        self.txt_ids: torch.Tensor | None = None  # (B, L): captions, which come from the host
        if isinstance(trainer.prompts, StreamedPrompts):
            self.txt_ids = trainer.prompts.example_ids[:1].repeat(trainer.settings.batch_size_per_gpu, 1)
        self.index = torch.zeros((), dtype=torch.int64, device=device)
        self.bad = torch.full((), -1, dtype=torch.int64, device=device)  # the first step that was not finite
        self.latest = 0
        self.forget()
        if self.stream is not None:
            torch._dynamo.config.recompile_limit = max(COMPILED, torch._dynamo.config.recompile_limit)

    def forget(self) -> None:
        """Drop all graphs, since tensors that they read were replaced."""
        self.captured: dict[tuple, _Captured] = {}
        self.ordinary: Counter[tuple] = Counter()
        self.noticed: tuple[bool, float] | None = None  # of the entropy bonus: raised, lambda_ent

    def kind(self, index: int) -> tuple[bool, bool]:
        """What in step `index` is decided by the step's number: (time curriculum, stage 7)."""
        d = self.trainer.settings
        return index < d.t_curriculum_steps, d.w_kd > 0 and index % d.kd_every == 0

    def step(self, index: int) -> tuple[Step, dict[str, torch.Tensor | float]]:
        """Run training step `index` without waiting for it; returns what `Trainer.step` does."""
        trainer, kind = self.trainer, self.kind(index)
        with on_stream(self.stream):
            if self.noticed is None:
                self._note_switch()
            self.latest = index
            if kind not in self.captured and (self.ordinary[kind] < ORDINARY or not trainer.x_init.full):
                *_, (_, step, values) = trainer.walk(index)
                self.ordinary[kind] += trainer.guard.in_a_row == 0  # a skipped step may have created nothing
                self._note_switch()
                return step, values
            if kind not in self.captured:
                self.captured[kind] = self._capture(index)
            captured = self.captured[kind]
            values = trainer.prepare(index)
            self.index.fill_(index)
            if self.txt_ids is not None:
                self.txt_ids.copy_(trainer.draw_prompts())
            captured.replay()
            trainer.update_ema()
            trainer.averages.count(captured.names)
        return captured.step, captured.norms | values | {"guard/skipped": trainer.guard.skipped}

    def _capture(self, index: int) -> _Captured:
        """Capture the step; this runs nothing. Of `index` only its kind matters."""
        captured = _Captured()
        captured.replay = record(lambda: self._run(index, captured), self.stream, self.trainer.generator)
        return captured

    def _run(self, index: int, into: _Captured) -> None:
        trainer, step, norms = self.trainer, Step(dense=self.trainer.dense), dict[str, torch.Tensor]()
        trainer.drawn = self.txt_ids
        try:
            for _ in nine_stages(trainer, index, [step], norms):
                pass
        finally:
            trainer.drawn = None
        values = measured(step)
        trainer.averages.accumulate(values)
        finite = torch.stack([*norms.values(), *(values[name].detach() for name in CHECKED)]).isfinite().all()
        self.bad.copy_(torch.where(finite | (self.bad >= 0), self.bad, self.index))
        into.step, into.norms, into.names = step, norms, tuple(values)

    def look(self) -> None:
        """Read back what replays could not report. Waits for the GPU.

        Raises:
            Diverged: a replayed step was not finite; the run's state is worthless since then.
        """
        with on_stream(self.stream):
            bad = int(self.bad)
            self._note_switch()
        if bad < 0:
            return
        saved = Checkpoints(Path(self.trainer.config.experiment.output_dir) / "checkpoints").all()
        last = f"the last checkpoint is {saved[-1].name}" if saved else "there is no checkpoint yet"
        raise Diverged(
            f"step {bad + 1} met a value that is not finite, and a CUDA graph cannot skip a step, so nothing since "
            f"then was saved; {last}. Continue with training.cuda_graph=false, which skips such steps, or lower "
            "optim.lr or optim.aux_lr"
        )

    def _note_switch(self) -> None:
        """Make an event of a switch of the entropy bonus since the last call."""
        trainer, before = self.trainer, self.noticed
        if trainer.settings.lambda_ent == 0:
            return
        raised, now = bool(trainer.entropy_bonus.raised), float(trainer.lambda_ent)
        self.noticed = raised, now
        if before is not None and before[0] != raised:
            event = "entropy_bonus_raised" if raised else "entropy_bonus_lowered"
            trainer.events.append({"step": self.latest + 1, "event": event, "was": before[1], "is": now})
