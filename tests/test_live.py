"""What a live notebook does that a headless one does not: it works in the repository, finds runs and follows them."""

import os

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from dimo.config import load_config
from dimo.errors import DimoError, NonFiniteError
from dimo.run.folder import RunFolder
from dimo.run.overview import existing_run, newest_student, progress_of
from dimo.run.signals import Preempted
from dimo.views import live
from dimo.views.live import HEADLESS, describe_settings, watch, work_in_repository


class Place:
    """In place of IPython's display handle."""

    def __init__(self, first):
        self.shown = [first]

    def update(self, what):
        self.shown.append(what)


@pytest.fixture
def places(monkeypatch):
    made = []
    monkeypatch.setattr(live, "_display", lambda text: made.append(Place(text)) or made[-1])
    monkeypatch.delenv(HEADLESS, raising=False)
    return made


def log(run, *steps):
    for step in steps:
        run.log({"step": step, "loss/aux": 1.0 / step})


def titles(place):
    return [figure.legends[0].get_texts()[0].get_text() for figure in place.shown[1:]]


def test_kernels_leave_the_folder_of_notebooks_and_no_other(monkeypatch, tmp_path):
    monkeypatch.setattr(live, "ROOT", tmp_path)
    (tmp_path / "notebooks" / "mine").mkdir(parents=True)
    monkeypatch.setenv(HEADLESS, "1")  # `dimo run` was started there on purpose
    monkeypatch.chdir(tmp_path / "notebooks")
    assert work_in_repository() == tmp_path / "notebooks"
    monkeypatch.delenv(HEADLESS)
    assert work_in_repository() == tmp_path and os.getcwd() == str(tmp_path)
    monkeypatch.chdir(tmp_path / "notebooks" / "mine")
    assert work_in_repository() == tmp_path / "notebooks" / "mine"


def test_a_run_that_is_not_there_is_told_with_those_that_are(tmp_path, monkeypatch):
    with pytest.raises(DimoError, match=f"no run in {tmp_path}/demo; {tmp_path} has no runs. Train it"):
        existing_run(tmp_path / "demo")
    for name, state in (("old", "finished"), ("new", "running")):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        run.write_status(state=state, step=3, max_steps=9)
    os.utime(tmp_path / "old" / "status.json", (1, 1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DimoError, match=rf"first: {tmp_path}/new \(dead, step 3/9\); {tmp_path}/old \(finished, step"):
        existing_run("demo")
    assert existing_run("old").status()["step"] == 3


def test_the_newest_student_of_a_live_and_of_an_ended_run(tmp_path):
    run = RunFolder(tmp_path)
    run.write_status(state="running", step=75, max_steps=600)
    run._acquire()
    assert progress_of(run) == "still training, step 75 of 600"
    with pytest.raises(DimoError, match="still training, step 75 of 600, and no checkpoint yet"):
        newest_student(run)
    for step in (25, 50):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "ema.safetensors").touch()
    weights, about = newest_student(run)
    assert weights == folder / "ema.safetensors" and "step 75 of 600: the student is the moving average" in about
    (tmp_path / "checkpoints" / "final").mkdir()  # that of a shorter training, which is continued
    assert newest_student(run)[0] == weights
    run.close()
    run.write_status(state="finished", step=600, max_steps=600)
    assert newest_student(run)[0] == tmp_path / "checkpoints" / "final"
    assert progress_of(run) == "finished, step 600 of 600"


def test_watching_draws_until_the_training_ends_and_an_interrupt_ends_only_the_watching(
    tmp_path, places, monkeypatch, capsys
):
    run = RunFolder(tmp_path)
    run.write_status(state="running", step=5, max_steps=9)
    run._acquire()
    log(run, 5)
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt
        log(run, 6)
        run.close()
        run.write_status(state="finished", step=9)

    monkeypatch.setattr(live.time, "sleep", sleep)
    watch(run)
    assert titles(places[0]) == [
        f"{tmp_path.name}: still training, step 5 of 9",
        f"{tmp_path.name}: finished, step 9 of 9",
    ]
    run._acquire()
    run.write_status(state="running", step=9, max_steps=12)
    watch(run)
    assert "no longer watched" in capsys.readouterr().out
    run.close()


def test_settings_are_told_by_what_differs():
    settings = load_config("smoke", ["optim.lr=1e-5", "experiment.output_dir=/x/y"])
    told = describe_settings("smoke", settings).splitlines()
    assert told[0] == "run folder: /x/y" and told[2:4] == ["  experiment.output_dir = /x/y", "  optim.lr = 1e-05"]
    assert len(told) == 5


@pytest.mark.parametrize("error", [DimoError("a sentence"), NonFiniteError("a sentence"), Preempted("a sentence")])
def test_a_notebook_shows_the_sentence_alone(error, capsys):
    def deep():
        try:
            torch.zeros(1)[5]
        except IndexError as cause:
            raise error from cause

    shell = InteractiveShell()
    shell.push({"deep": deep})
    result = shell.run_cell("deep()")
    assert result.error_in_exec is error  # which papermill fails with
    printed = capsys.readouterr()
    assert (printed.out + printed.err).strip() in ("a sentence", f"{type(error).__name__}: a sentence")
