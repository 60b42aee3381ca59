"""Skip an update on all ranks if any of them met a value that is not finite, and stop after too many such steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from dimo.distill.stages import Step
from dimo.errors import Diverged, NonFiniteError
from dimo.files import save_file, whole_file
from dimo.run.ranks import everywhere
from dimo.train.engine import Engine

REPLAYED = ("txt_ids", "x_init", "x_hat", "x_t", "t")


class Guard:
    """Lets the ranks agree on bad steps and counts them: `skipped` in total, `in_a_row` up to now."""

    def __init__(self, engine: Engine, max_bad_steps: int):
        self.engine, self.max_bad_steps = engine, max_bad_steps
        self.skipped = self.in_a_row = 0

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Context around stages: a NonFiniteError on one rank is raised on all, once all have reached the end.

        Code inside must not fail before a collective that is also inside: the other ranks would wait forever.
        """
        error = None
        try:
            yield
        except NonFiniteError as found:
            error = found
        if self.engine.any(error is not None):
            raise error or NonFiniteError("another process met a value that is not finite")

    def count(self, error: NonFiniteError | None) -> dict:
        """Count a step, `error` being None for a good one; collective for a bad one.

        Returns:
            Fields for the event of a bad step: {"why": one message per rank, "in_a_row": count}; {} for a good step.
        """
        if error is None:
            self.in_a_row = 0
            return {}
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        return {"why": everywhere(str(error)), "in_a_row": self.in_a_row}

    def stop_if_hopeless(self, folder: str | Path, index: int, seed: int, steps: list[Step]) -> None:
        """After `max_bad_steps` skipped steps in a row, save each rank's batch for replay and stop.

        Args:
            folder: run folder.
            index: training step.
            seed: seed of this rank's generator at that step.
            steps: one `Step` per micro-batch.

        Raises:
            Diverged: too many steps were skipped in a row.
        """
        if self.in_a_row < self.max_bad_steps:
            return
        name = f"replay-{index + 1:08d}"
        for part, step in enumerate(steps):
            piece = f"-part{part}" if len(steps) > 1 else ""
            save_replay(
                Path(folder) / "slices" / f"{name}-rank{self.engine.rank}{piece}.safetensors", step, index, seed
            )
        raise Diverged(
            f"{self.in_a_row} steps in a row were skipped for values that are not finite; the last batch is saved in "
            f"{Path(folder) / 'slices'}/{name}-*. Lower optim.lr or optim.aux_lr, or check the teacher"
        )

    def state_dict(self) -> dict:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def save_replay(file: Path, step: Step, index: int, seed: int) -> None:
    """Save the draws of a failed step (txt_ids, x_init, x_hat, x_t, t, as far as it got), its index and seed."""
    drawn = {name: getattr(step, name) for name in REPLAYED}
    tensors = {name: value.detach().cpu().contiguous() for name, value in drawn.items() if value is not None}
    numbers = {"step": torch.tensor(index), "seed": torch.tensor(seed)}
    with whole_file(file) as beside:
        save_file(tensors | numbers, beside)
