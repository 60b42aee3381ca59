"""The way from the command to the first step: its seconds in the log, and compiled layers kept for the next run."""

import os
import re
import time

import pytest

from dimo.config import load_config
from dimo.run import cold_start
from dimo.run.folder import RunFolder
from dimo.train.trainer import Trainer


def test_the_log_and_the_first_row_say_how_long_the_first_step_took_to_come(tmp_path, monkeypatch):
    began = time.time() - 100  # as `launch` tells its workers
    monkeypatch.setenv(cold_start.COMMAND_BEGAN, str(began))
    settings = [
        "model.device=cpu",
        "distill.batch_size_per_gpu=2",
        "training.max_train_steps=2",
        "experiment.log_every=1",
    ]
    Trainer(load_config("smoke", [*settings, f"experiment.output_dir={tmp_path}"])).train(progress=False)
    (line,) = (line for line in (tmp_path / "train.log").read_text().splitlines() if "to the end of the first" in line)
    whole, *parts = map(float, re.findall(r"[\d.]+(?= s from|,|$)", line.split(" ", 2)[2]))
    first, second = RunFolder(tmp_path).metrics()
    assert 100 < whole < time.time() - began and sum(parts) == pytest.approx(whole, abs=0.3) and parts[0] > 99
    assert first["time/first_step_s"] == pytest.approx(whole, abs=0.1) and "time/first_step_s" not in second
    assert re.search("until the trainer .* checkpoint .* networks and checks .* first step", line)


def test_a_command_began_when_its_process_did(monkeypatch):
    for value in (None, "soon"):
        monkeypatch.delenv(cold_start.COMMAND_BEGAN, raising=False)
        if value:
            monkeypatch.setenv(cold_start.COMMAND_BEGAN, value)
        with open("/proc/self/stat") as stat, open("/proc/stat") as machine:
            ticks = int(stat.read().rsplit(")", 1)[1].split()[19])
            booted = next(int(row.split()[1]) for row in machine if row.startswith("btime"))
        assert cold_start.command_began() == pytest.approx(booted + ticks / os.sysconf("SC_CLK_TCK"), abs=2)


def test_compiled_layers_are_kept_in_the_users_caches(tmp_path, monkeypatch):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(cold_start.COMPILED, "elsewhere")
    cold_start.keep_compiled()
    assert os.environ[cold_start.COMPILED] == "elsewhere" and not list(tmp_path.iterdir())
    monkeypatch.delenv(cold_start.COMPILED)
    cold_start.keep_compiled()
    assert cache_dir() == str(tmp_path / "dimo" / "compiled") and os.path.isdir(cache_dir())
    monkeypatch.delenv(cold_start.COMPILED)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cold_start.keep_compiled()
    assert cold_start.COMPILED not in os.environ
