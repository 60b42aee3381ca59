"""Terminals and pipes that know less than UTF-8, and arguments that are not it."""

import io
import json
import os
import subprocess
import sys

import pytest

from dimo.commands.cli import main
from dimo.config import load_config, to_yaml
from dimo.run.folder import RunFolder


@pytest.fixture
def runs(tmp_path):
    run = RunFolder.open(tmp_path / "Größe-猫", to_yaml(load_config("smoke")))
    run.write_status(state="failed", step=3, max_steps=50, error="captions of 猫.csv")
    return tmp_path


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_a_terminal_cannot_show_is_replaced(runs, monkeypatch, errors):
    shown = io.TextIOWrapper(io.BytesIO(), "ascii", errors)
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(["runs", str(runs)]) == 0
    shown.flush()
    assert b"Gr??e-?\n" in shown.buffer.getvalue() and b"captions of ?.csv" in shown.buffer.getvalue()


def test_a_process_with_an_ascii_stdout_shows_runs_and_writes_its_files_in_utf8(runs):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONPATH": os.getcwd()}

    code = "import sys; from dimo.commands.cli import main; sys.exit(main(['runs', '.']) or main())"
    words = [sys.executable, "-c", code, "sample", "--prompt", "blue bar moving up", "--out_dir", "Größe"]
    told = subprocess.run(words, env=environment, capture_output=True, cwd=runs)
    assert told.returncode == 0 and b"Gr??e-?" in told.stdout and b"Traceback" not in told.stderr
    assert b"written: Gr??e/0000.mp4" in told.stdout
    assert json.loads((runs / "Größe" / "0000.json").read_text(encoding="utf-8"))["prompt"] == "blue bar moving up"


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "--prompt", "caf\udce9"],
        ["sample", "--prompt=caf\udce9"],
        ["evaluate", "distill.negative_prompt=caf\udce9"],
        ["train", "--name", "caf\udce9"],
        ["inspect", "caf\udce9"],
    ],
)
def test_an_argument_that_is_not_utf8_is_refused_in_a_sentence(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "caf\\udce9' is not UTF-8" in error and "Traceback" not in error and not list(tmp_path.iterdir())


def test_the_bytes_of_a_real_argument_are_refused():
    words = [sys.executable.encode(), b"-m", b"dimo", b"sample", b"--prompt", b"caf\xe9"]
    told = subprocess.run(words, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True)
    assert told.returncode == 2 and b"is not UTF-8" in told.stderr and b"Traceback" not in told.stderr
