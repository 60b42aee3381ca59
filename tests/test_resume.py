"""A run that was killed and continued is the run: `kill.py` with a few kills, and a change of the number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dimo.train.checkpoints import Checkpoints
from dimo.train.runfolder import RunFolder

TESTS = Path(__file__).parent


@pytest.mark.parametrize("processes", ["1", "2"])
def test_killed_runs_end_in_the_same_bits(processes):
    words = [sys.executable, str(TESTS / "kill.py"), "--points", "2", "--steps", "9", "--processes", processes]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bit-equal") == 2 and done.stdout.count("-9") >= 2


def launch(folder, processes, steps):
    """What `accelerate launch` does for several GPUs of one machine, on the CPU."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words += ["-m", "dimo.train", "config=smoke", "model.device=cpu", "--batch_size", "2", "--p_corrupt", "0.5"]
    words += [f"experiment.output_dir={folder}", f"training.max_train_steps={steps}"]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def test_another_number_of_processes_goes_on_and_says_so(tmp_path):
    assert launch(tmp_path, 2, 3).returncode == 0
    before = Checkpoints(tmp_path / "checkpoints", rank=0).load(tmp_path / "checkpoints" / "step-00000003")
    done = launch(tmp_path, 1, 5)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "dimo: 2 processes wrote step-00000003, 1 go on: 2 samples a step in place of 4" in done.stderr
    changed = [e for e in RunFolder(tmp_path).events() if e["event"] == "processes_changed"]
    assert [(e["step"], e["was"], e["is"]) for e in changed] == [(3, 2, 1)]
    assert [row["step"] for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())] == [3, 5]
    _, state, rank_state = Checkpoints(tmp_path / "checkpoints").load(tmp_path / "checkpoints" / "step-00000005")
    assert state["num_processes"] == 1 and not (tmp_path / "checkpoints/step-00000005/rank-00001.pt").exists()
    # the memory of x_hat goes on: two steps of two samples before what rank 0 remembered
    assert torch.equal(rank_state["x_init"]["x_hat"][4:], before[2]["x_init"]["x_hat"])
