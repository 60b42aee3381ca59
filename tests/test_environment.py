"""What a shell has left in the environment is no launch, and a system that dimo does not train on is told so."""

import os
import subprocess
import sys

import pytest
from forks import python

from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.run.ranks import LAUNCH, MISLEADING, launched_or_alone, read_launch

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    for name in {*LAUNCH, *MISLEADING}:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_single_process_trains_whatever_another_program_left(tmp_path):
    words = ["-c", "smoke", "model.device=cpu", "distill.batch_size_per_gpu=2", "training.max_train_steps=1"]
    left = {"LOCAL_RANK": "3", "RANK": "3", "WORLD_SIZE": "8", "OMPI_COMM_WORLD_SIZE": "8", "PMI_SIZE": "8"}
    left |= {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3"}
    done = python.run(
        ["-m", "dimo", "train", *words, f"experiment.output_dir={tmp_path}"],
        env=os.environ | left, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and RunFolder(tmp_path).status()["state"] == "finished", done.stderr
    assert "dimo: ignored in the environment: RANK, WORLD_SIZE, LOCAL_RANK, PMI_SIZE, OMPI_COMM" in done.stderr


@pytest.mark.parametrize("missing", LAUNCH)
def test_a_launch_is_whole_or_none(environment, capsys, missing):
    for name, value in WHOLE.items():
        environment.setenv(name, value)
    assert read_launch() == "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=localhost MASTER_PORT=29500"
    assert all(os.environ[name] == value for name, value in WHOLE.items()) and not capsys.readouterr().err
    environment.setenv(missing, "")
    assert read_launch() == "" and not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys()
    assert f"which without {missing} is not a launch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "2"), ("RANK", "x"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "-1"), ("MASTER_PORT", "0")]
)
def test_a_launch_that_cannot_be_is_a_sentence(environment, name, value):
    for key, given in (WHOLE | {name: value}).items():
        environment.setenv(key, given)
    with pytest.raises(DimoError, match=f"{name}={value} .*is not a valid launch; unset all five"):
        read_launch()


def test_processes_that_do_not_meet_are_a_sentence(environment):
    for key, given in WHOLE.items():
        environment.setenv(key, given)
    with pytest.raises(DimoError, match="the other processes .* could not be reached: address in use; unset all five"):
        with launched_or_alone():
            raise RuntimeError("address in use")


WINDOWS = """
import signal, sys
sys.modules["fcntl"] = None
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
    delattr(signal, name)
from dimo.__main__ import main
sys.exit(main())
"""


def test_without_fcntl_it_is_a_sentence():
    done = subprocess.run([sys.executable, "-c", WINDOWS, "train", "-c", "smoke"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.endswith("dimo: training runs on Linux and macOS only; on Windows, use WSL\n")
