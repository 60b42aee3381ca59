"""The time of a step is the step's alone: a run whose every part takes a known time, on a clock of the test's own."""

from types import SimpleNamespace

import pytest

from dimo.config import load_config
from dimo.run.checkpoints import Checkpoints
from dimo.run.folder import RunFolder
from dimo.train import loop
from dimo.train.trainer import Trainer
from dimo.train.watch import Watch

SECONDS = {"step": 1, "save": 100, "milestone": 1_000, "sheet": 10_000, "row": 100_000}


@pytest.fixture
def clock(monkeypatch):
    """now[0] advances only where a part of the run that `SECONDS` names is done."""
    now = [0.0]

    def lengthen(where, name, part):
        inner = getattr(where, name)

        def longer(*args):
            now[0] += SECONDS[part]
            return inner(*args)

        monkeypatch.setattr(where, name, longer)

    lengthen(Trainer, "step", "step")
    lengthen(Checkpoints, "save", "save")
    lengthen(RunFolder, "log", "row")
    lengthen(loop, "write_student", "milestone")
    lengthen(loop, "write_samples", "sheet")
    monkeypatch.setattr("dimo.train.clock.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Watch, "is_due", lambda self, done: False)
    return now


def test_checkpoints_sheets_and_rows_are_no_part_of_a_steps_time(tmp_path, clock):
    keys = ["model.device=cpu", "distill.batch_size_per_gpu=2", "training.max_train_steps=10", "experiment.log_every=3"]
    keys += ["experiment.save_every=4", "experiment.keep_every=8", "experiment.sample_every=5"]
    trainer = Trainer(load_config("smoke", [*keys, f"experiment.output_dir={tmp_path}"]))
    trainer.train(progress=False)
    rows = {row["step"]: row for row in RunFolder(tmp_path).metrics()}
    assert {row["time/step_s"] for row in rows.values()} == {1.0}
    assert {row["tokens_per_s"] for row in rows.values()} == {trainer.tokens_per_step}
    pauses = {step: (row.get("time/checkpoint_s"), row.get("time/samples_s")) for step, row in rows.items()}
    # saved after 4 and 8, where a milestone is kept too, and a sheet drawn after 5
    assert pauses == {3: (None, None), 6: (100, 10_000), 9: (1_100, None), 10: (None, None)}
