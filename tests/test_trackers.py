"""Trackers and the progress of a run: what is refused, what is written, what a person sees."""

import io
import json
import sys

import pytest

from dimo.commands.cli import main
from dimo.config import load_config
from dimo.errors import DimoError
from dimo.run import trackers
from dimo.run.progress import CostBar, Progress


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    trackers.require_trackers(["tensorboard"])
    with pytest.raises(DimoError, match="includes wandb, which is not installed: pip install wandb"):
        trackers.require_trackers(["tensorboard", "wandb"])
    for command in ("train", "run"):
        words = [command, "-c", "smoke", "experiment.trackers=[wandb]", f"experiment.output_dir={tmp_path}/run"]
        assert main(words) == 2 and "pip install wandb" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DimoError, match="unknown tracker 'excel'; choose from tensorboard, trackio, wandb"):
        load_config("smoke", ["experiment.trackers=[excel]"])


class Recorder:
    """Stands in for accelerate's tracker classes."""

    name, requires_logging_directory = "wandb", False
    made = []

    def __init__(self, project, **kwargs):
        self.project, self.kwargs, self.rows, self.config, self.ended = project, kwargs, [], None, False
        self.made.append(self)

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        self.rows.append((step, values))

    def finish(self):
        self.ended = True


def test_a_tracker_gets_every_logged_row_and_one_identity_for_a_resumed_run(tmp_path, monkeypatch):
    from accelerate import tracking

    Recorder.made = []
    there = [tracking.LoggerType.WANDB]
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: there)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: there)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    words = ["train", "-c", "smoke", f"experiment.output_dir={tmp_path}/run", "experiment.trackers=[wandb]"]
    words += ["experiment.log_every=2", "distill.batch_size_per_gpu=1", "training.max_train_steps=6"]
    assert main(words) == 0 and main(words) == 0  # the second time nothing is left to do
    first, again = Recorder.made
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in first.rows] == [row["step"] for row in rows] == [2, 4, 6]
    assert all(values == {k: v for k, v in row.items() if k != "step"} for (_, values), row in zip(first.rows, rows))
    assert (
        first.ended
        and first.config["optim.lr"] == load_config("smoke").optim.lr
        and first.kwargs["id"] == again.kwargs["id"]
    )


def test_tensorboard_reads_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    words = ["train", "-c", "smoke", f"experiment.output_dir={run}", "experiment.trackers=[tensorboard]"]
    assert main([*words, "distill.batch_size_per_gpu=1", "training.max_train_steps=10"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(run / "tensorboard" / "dimo")).Reload()
    for name in ("loss/total", "entropy/student"):
        read = {event.step: event.value for event in events.Scalars(name)}
        assert read == pytest.approx({row["step"]: row[name] for row in rows}, rel=1e-5)


METRICS = {"loss/total": 1.25, "entropy/student": 0.5, "reward/mean": -0.125}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_per_logged_step_where_there_is_no_terminal(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    progress = Progress(10, 30)
    for index in progress:
        if (index + 1) % 10 == 0:
            progress.show(index + 1, METRICS)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and "\r" not in out.getvalue()
    assert lines[0].startswith("step 20/30  loss 1.250  entropy 0.500  reward -0.125  ")
    assert "steps/s  ETA 0" in lines[0]
    assert lines[1].endswith("ETA 00:00")


def test_the_speed_is_that_of_the_steps_to_come_not_of_compiling(monkeypatch):
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr("dimo.run.progress.time.perf_counter", lambda: now[0])
    progress = Progress(0, 1000)
    for index in progress:
        now[0] += 70 if index in (0, 3) else 0.5  # the first step compiles, the fourth another shape
        if index + 1 in (1, 10):
            progress.show(index + 1, METRICS)
        if index == 10:
            break
    first, tenth = out.getvalue().splitlines()
    assert first.endswith("70.0 s/step  ETA 19:25:30")  # nothing else is known yet
    assert tenth.endswith("2.00 steps/s  ETA 08:15")


def test_work_whose_pieces_cost_differently(monkeypatch):
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setattr("dimo.run.progress.time.perf_counter", lambda: now[0])
    with CostBar("evaluate", 100, "passes") as bar:
        for seconds, done in ((0, 20), (40, 20), (8, 30), (4, 40), (1, 41), (13, 60), (20, 100), (1, 100)):
            now[0] += seconds
            bar.show(done, "teacher_25")
    assert out.getvalue().splitlines() == [
        "evaluate 20/100 passes  teacher_25",  # done before: no measure of speed
        "evaluate 30/100 passes  teacher_25  ETA 00:56",  # 10 passes in 8 s
        "evaluate 60/100 passes  teacher_25  ETA 00:26",
        "evaluate 100/100 passes  teacher_25  ETA 00:00",
    ]


def test_a_bar_in_a_terminal_and_nothing_where_it_is_not_wanted(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    progress = Progress(0, 10)
    for index in progress:
        progress.show(index + 1, METRICS)
    text = out.getvalue()
    assert "10/10" in text and "\r" in text and "loss=1.250" in text and "reward=-0.125" in text
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        quiet = Progress(0, 3, shown=False)
        for index in quiet:
            quiet.show(index + 1, METRICS)
        assert stream.getvalue() == ""
