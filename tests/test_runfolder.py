"""The run folder: whole or absent, with a really full disk."""

import os
import resource
import subprocess
import sys

import pytest
import torch

from dimo.errors import DimoError
from dimo.train.config import load_config, to_yaml
from dimo.train.runfolder import RunFolder, write_text

CONFIG = to_yaml(load_config("smoke"))


def test_metrics_survive_a_torn_last_line_and_are_cut_at_the_checkpoint(tmp_path):
    run = RunFolder.open(tmp_path, CONFIG)
    for step in (5, 10, 15):
        run.log({"step": step, "loss/total": 1.0 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "loss/to')
    assert [row["step"] for row in run.metrics()] == [5, 10, 15]
    run.truncate_metrics(10)
    run.log({"step": 15, "loss/total": float("nan")})
    assert run.metrics()[-1] == {"step": 15, "loss/total": None, "non_finite": ["loss/total"]}
    assert [row["step"] for row in run.metrics()] == [5, 10, 15]


def test_checkpoints_come_back_bit_equal_and_only_the_last_are_kept(tmp_path):
    run = RunFolder.open(tmp_path, CONFIG)
    tensors = {"student": {"w": torch.randn(3, 4)}, "aux": {"w": torch.randn(2)}}
    for step in (1, 2, 10):
        run.save_checkpoint(step, tensors, {"step": step, "moments": torch.ones(2)})
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000010"]
    again, state = run.load_checkpoint(run.latest_checkpoint())
    assert state["step"] == 10 and torch.equal(again["student"]["w"], tensors["student"]["w"])


@pytest.mark.parametrize("file", ["student.safetensors", "state.pt"])
def test_a_damaged_checkpoint_is_named(tmp_path, file):
    run = RunFolder.open(tmp_path, CONFIG)
    folder = run.save_checkpoint(7, {"student": {"w": torch.randn(300)}}, {"step": 7})
    (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(DimoError, match="step-00000007 is damaged .*; remove it to resume from an older one"):
        run.load_checkpoint(folder)


def test_a_hostile_pickle_is_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    run = RunFolder.open(tmp_path / "run", CONFIG)
    folder = run.save_checkpoint(7, {"student": {"w": torch.zeros(1)}}, {"step": 7})
    torch.save({"step": Hostile()}, folder / "state.pt")
    with pytest.raises(DimoError, match="is damaged"):
        run.load_checkpoint(folder)
    assert not (tmp_path / "executed").exists()


def test_a_folder_of_another_run_is_refused_and_shows_the_difference(tmp_path):
    RunFolder.open(tmp_path, CONFIG)
    other = to_yaml(load_config("smoke", ["optim.lr=5e-4"]))
    with pytest.raises(DimoError, match=r"another configuration \(optim.lr was 0.\d+, is 0.0005\)"):
        RunFolder.open(tmp_path, other)
    with pytest.raises(DimoError, match="experiment.resume is false"):
        RunFolder.open(tmp_path, CONFIG, resume=False)
    RunFolder.open(tmp_path, to_yaml(load_config("smoke", ["experiment.log_every=1"])))  # how to log may change
    (tmp_path / "metrics.jsonl").write_text("{}")
    RunFolder.open(tmp_path, other, overwrite=True)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_status_keeps_what_is_not_changed(tmp_path):
    run = RunFolder.open(tmp_path, CONFIG)
    run.write_status(state="running", step=3)
    run.write_status(step=4)
    assert run.status()["state"] == "running" and run.status()["step"] == 4 and run.status()["pid"] == os.getpid()


def test_write_text_leaves_the_old_file_when_it_fails(tmp_path):
    file = tmp_path / "a.json"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\udc80")
    assert file.read_text() == "old"


FULL_DISK = """
import sys, torch
from dimo.errors import DimoError
from dimo.train.runfolder import RunFolder
run = RunFolder(sys.argv[1])
try:
    run.save_checkpoint(20, {"student": {"w": torch.zeros(2_000_000)}}, {"step": 20})
except DimoError as error:
    print(error)
    sys.exit(7)
"""


def test_a_full_disk_stops_with_a_sentence_and_keeps_the_older_checkpoint(tmp_path):
    """A process whose files may not grow past 1 MB: the kernel refuses the write, as a full disk does."""
    run = RunFolder.open(tmp_path, CONFIG)
    run.save_checkpoint(10, {"student": {"w": torch.ones(3)}}, {"step": 10})
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 7, result.stderr
    assert "checkpoint of step 20 could not be written" in result.stdout
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
    assert run.load_checkpoint(run.latest_checkpoint())[1]["step"] == 10
