"""A run that was killed and continued is the run, also on another number of processes."""

import json
import threading
from pathlib import Path

import pytest
import torch
from forks import python
from processes import launch_forked

from dimo.config import load_config
from dimo.errors import DimoError
from dimo.run import checkpoints
from dimo.run.checkpoints import Checkpoints
from dimo.run.folder import RunFolder
from dimo.train.trainer import Trainer

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize(("processes", "points"), [("1", 1), ("2", 2)])  # the first while a checkpoint is written
def test_killed_runs_end_in_the_same_bits(processes, points):
    """test_trainer kills one process after a checkpoint."""
    words = [SCRIPTS / "kill.py", "--points", str(points), "--steps", "7", "--processes", processes]
    done = python.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bit-equal") == points and done.stdout.count("-9") >= points


def launch(folder, processes, steps):
    words = ["-m", "dimo.train", "config=smoke", "model.device=cpu", "--batch_size", "2", "--p_corrupt", "0.5"]
    words += [f"experiment.output_dir={folder}", f"training.max_train_steps={steps}"]
    return launch_forked(folder, *words, processes=processes)


def test_another_number_of_processes_goes_on_and_says_so(tmp_path):
    assert launch(tmp_path, 2, 3).returncode == 0
    before = Checkpoints(tmp_path / "checkpoints", rank=0).load(tmp_path / "checkpoints" / "step-00000003")
    done = launch(tmp_path, 1, 5)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "dimo: step-00000003 was written by 2 processes and is continued by 1: 2 samples per step" in done.stderr
    changed = [e for e in RunFolder(tmp_path).events() if e["event"] == "processes_changed"]
    assert [(e["step"], e["was"], e["is"]) for e in changed] == [(3, 2, 1)]
    assert [row["step"] for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())] == [3, 5]
    _, state, rank_state = Checkpoints(tmp_path / "checkpoints").load(tmp_path / "checkpoints" / "step-00000005")
    assert state["num_processes"] == 1 and not (tmp_path / "checkpoints/step-00000005/rank-00001.pt").exists()
    # the memory of x_hat goes on: two steps of two samples before what rank 0 remembered
    assert torch.equal(rank_state["x_init"]["x_hat"][4:], before[2]["x_init"]["x_hat"])


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(tmp_path, capsys):
    def train(steps):
        settings = ["model.device=cpu", "distill.batch_size_per_gpu=2", "experiment.save_every=2"]
        settings += [f"experiment.output_dir={tmp_path}", f"training.max_train_steps={steps}"]
        Trainer(load_config("smoke", settings)).train(progress=False)

    train(4)
    file = tmp_path / "checkpoints" / "step-00000004" / "ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    train(6)
    said = "step-00000004 is damaged and skipped: ema.safetensors has another checksum than when it was written"
    assert said in capsys.readouterr().err and said in (tmp_path / "train.log").read_text()
    events = [(e["event"], e["step"]) for e in RunFolder(tmp_path).events()]
    assert events == [("config_changed", 4), ("damaged_checkpoint", 4), ("resumed", 2)]
    names = sorted(f.name for f in (tmp_path / "checkpoints").iterdir())
    assert names == ["final", "step-00000004", "step-00000006"]
    assert Checkpoints(tmp_path / "checkpoints").newest() == (tmp_path / "checkpoints" / "step-00000006", {})
    assert checkpoints.what_is_wrong(tmp_path / "checkpoints" / "step-00000004") is None  # taken and written again


def test_the_checkpoint_being_written_when_a_step_fails_is_completed_and_events_are_kept(tmp_path, monkeypatch):
    settings = ["model.device=cpu", "distill.batch_size_per_gpu=2", "experiment.save_every=2"]
    trainer = Trainer(load_config("smoke", [*settings, f"experiment.output_dir={tmp_path}"]))
    failing, inner, write = threading.Event(), trainer.step, checkpoints.save_file
    monkeypatch.setattr(checkpoints, "save_file", lambda *a: (failing.wait(10), write(*a)))

    def step(index):
        trainer.events.append({"step": index + 1, "event": "noticed"})
        if index == 2:
            failing.set()
            raise DimoError("no more")
        return inner(index)

    trainer.step = step
    with pytest.raises(DimoError, match="no more"):
        trainer.train(progress=False)
    assert Checkpoints(tmp_path / "checkpoints").newest() == (tmp_path / "checkpoints" / "step-00000002", {})
    assert [(e["event"], e["step"]) for e in RunFolder(tmp_path).events()] == [("noticed", s) for s in (1, 2, 3)]
    assert RunFolder(tmp_path).status()["error"] == "no more"
