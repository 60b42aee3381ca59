"""A training that a notebook starts in a process of its own: followed, found again, stopped and continued."""

import os
import subprocess
import sys
import time

import psutil
import pytest
from forks import in_place_of_popen

from dimo.commands import apart
from dimo.commands.apart import Training, start
from dimo.config import load_config, to_yaml
from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.run.signals import Preempted
from dimo.views.live import HEADLESS

STEPS = 12  # of which a few are over when it is stopped


@pytest.fixture(autouse=True)
def live(monkeypatch):
    monkeypatch.delenv(HEADLESS, raising=False)
    monkeypatch.setenv("JPY_SESSION_NAME", "03_train.ipynb")


@pytest.fixture
def starts_quickly(monkeypatch):
    """The process that trains is forked: it imports nothing."""
    monkeypatch.setattr("subprocess.Popen", in_place_of_popen)


def config(folder, *keys):
    words = ["model.device=cpu", "distill.batch_size_per_gpu=2", "experiment.log_every=1", "experiment.save_every=999"]
    words += ["experiment.sample_every=999", f"training.max_train_steps={STEPS}", f"experiment.output_dir={folder}"]
    return load_config("smoke", [*words, *keys])


def test_it_is_followed_found_again_stopped_and_continued(tmp_path, monkeypatch, capsys, request, starts_quickly):
    folder = tmp_path / "run"
    training = start(config(folder))
    request.addfinalizer(training.stop)  # whatever fails below
    assert training.pid != os.getpid() and os.getsid(training.pid) != os.getsid(0)  # which Jupyter interrupts
    assert psutil.Process(training.pid).is_running() and training.run.is_held()
    again = start(config(folder))  # as after a restart of the kernel
    assert again.pid == training.pid and again.is_running()
    with pytest.raises(
        DimoError, match=f"being trained by process {training.pid} on .* with .*_steps was {STEPS}, is 999"
    ):
        start(config(folder, "training.max_train_steps=999"))
    until = time.monotonic() + 60
    while not training.run.metrics():
        assert training.is_running() and time.monotonic() < until
        time.sleep(0.05)

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(apart.time, "sleep", interrupted)
        with pytest.raises(DimoError, match=f"no longer waited for: still training, step .* of {STEPS}; training.stop"):
            again.wait()
    assert training.is_running()
    again.stop()
    assert not again.is_running() and not folder.joinpath("checkpoints", "final").exists()
    done = training.run.status()
    assert done["state"] == "preempted" and "stopped, step" in capsys.readouterr().out
    with pytest.raises(Preempted, match=f"stopped at step {done['step']}; starting it again continues"):
        training.wait()
    run = start(config(folder)).wait()
    assert run.status()["state"] == "finished"
    assert [row["step"] for row in run.metrics()] == [*range(1, STEPS + 1)]


def test_what_it_cannot_train_is_told_and_not_what_was_there_before(tmp_path):
    run = RunFolder.open(tmp_path, to_yaml(config(tmp_path)))
    run.write_status(state="finished", step=STEPS)
    with pytest.raises(DimoError, match="training failed: .* already contains a run and experiment.resume is false"):
        start(config(tmp_path, "experiment.resume=false")).wait()
    with pytest.raises(DimoError, match="neither a preset nor"):
        start(config(tmp_path, "training.engine=./none"))


def test_of_a_killed_process_it_is_told_what_killed_it_and_not_its_line_of_progress(tmp_path, request, starts_quickly):
    training = start(config(tmp_path / "run", "training.max_train_steps=9999"))
    request.addfinalizer(training.stop)
    until = time.monotonic() + 60
    while not training.run.metrics():
        assert training.is_running() and time.monotonic() < until
        time.sleep(0.05)
    psutil.Process(training.pid).kill()
    with pytest.raises(
        DimoError, match=r"^training failed: SIGKILL killed its process at step \d+, as a machine .* goes on"
    ):
        training.wait()


def test_a_process_that_no_longer_trains_is_left_alone(tmp_path):
    """It may be a stranger's: another one has taken the folder over, and the number was given away again."""
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run = RunFolder(tmp_path)
    run._acquire()
    try:
        with pytest.raises(DimoError, match=f"is being trained by process {os.getpid()} on .* by now; start it again"):
            Training(run, stranger.pid).stop()
        assert stranger.poll() is None
    finally:
        run.close()
        stranger.communicate(b"\n")
    assert stranger.returncode == 0


@pytest.mark.parametrize("headless", [True, False])  # `dimo run`, or papermill by itself
def test_without_a_server_of_notebooks_it_trains_here(tmp_path, monkeypatch, headless):
    if headless:
        monkeypatch.setenv(HEADLESS, "1")
    else:
        monkeypatch.delenv("JPY_SESSION_NAME")
    run = RunFolder(tmp_path)
    monkeypatch.setattr(apart, "train", lambda config: run.write_status(state="finished", step=1) or run)
    training = start(config(tmp_path))
    assert isinstance(training, Training) and training.pid is None and training.wait() is run
