"""`dimo runs`: a run at work, one that died, one that ended; with real processes."""

import os
import signal
import subprocess

import pytest
from forks import python

from dimo.commands.cli import main
from dimo.config import load_config, to_yaml
from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.run.overview import list_runs

CONFIG = to_yaml(load_config("smoke"))
AT_WORK = """
import sys, time
from dimo.run.folder import RunFolder
run = RunFolder.open(sys.argv[1], open(sys.argv[2]).read(), hold=True)
run.write_status(state="running", step=7, max_steps=50)
print("at work", flush=True)
time.sleep(60)
"""


def ended(folder, state, step, age, **more):
    run = RunFolder.open(folder, CONFIG)
    run.write_status(state=state, step=step, max_steps=50, **more)
    stamp = (folder / "status.json").stat().st_mtime - age
    os.utime(folder / "status.json", (stamp, stamp))
    return run


def test_a_dead_run_is_told_from_a_live_one(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(CONFIG)
    ended(tmp_path / "old", "finished", 50, 3 * 86_400).log({"step": 50, "time/step_s": 0.25})
    ended(tmp_path / "sweep" / "a", "failed", 9, 7_300, error="the disk is full")
    (tmp_path / "empty").mkdir()
    words = ["-c", AT_WORK, str(tmp_path / "now"), str(tmp_path / "c.yaml")]
    with python.start(words, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        assert {run.name: run.state for run in list_runs(tmp_path)} == {
            "old": "finished", "sweep/a": "failed", "now": "running"
        }  # fmt: skip
        process.send_signal(signal.SIGKILL)
    assert [(run.name, run.state, run.step) for run in list_runs(tmp_path)] == [
        ("old", "finished", 50), ("sweep/a", "failed", 9), ("now", "dead", 7)
    ]  # fmt: skip
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["state", "step", "steps/s", "age", "name"],
        ["finished", "50/50", "4", "3d", "old"],
        ["failed", "9/50", "-", "2h", "sweep/a"],
    ]
    assert lines[3].strip() == "the disk is full" and lines[4].split()[:2] == ["dead", "7/50"]


def test_a_run_itself_an_unreadable_one_and_none(tmp_path, capsys):
    run = ended(tmp_path / "a", "preempted", 3, 5)
    assert [(r.name, r.state) for r in list_runs(run.path)] == [(str(run.path), "preempted")]
    (run.path / "metrics.jsonl").write_text("[1]\n")
    assert [r.state for r in list_runs(tmp_path)] == ["preempted"]
    (run.path / "metrics.jsonl").write_text('{"step": 1, "time/step_s": "fast"}\n')
    assert [(r.state, r.steps_per_s) for r in list_runs(tmp_path)] == [("preempted", None)]
    (run.path / "metrics.jsonl").unlink()
    (run.path / "metrics.jsonl").mkdir()
    assert [(r.state, r.steps_per_s) for r in list_runs(tmp_path)] == [("preempted", None)]
    for text in ("[]", "", "{", '{"state": 3}', '{"state": "failed", "error": ["disk", "full"]}', "{}"):
        (run.path / "status.json").write_text(text)
        assert [(r.state, r.error) for r in list_runs(tmp_path)] == [("unreadable", "status.json cannot be read")]
        assert main(["runs", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["runs", str(tmp_path / "a" / "checkpoints")]) == 2
    (tmp_path / "none").mkdir()
    assert main(["runs", str(tmp_path / "none")]) == 0 and capsys.readouterr().out.startswith("no runs; ")
    with pytest.raises(DimoError, match="is not a folder"):
        list_runs(tmp_path / "nowhere")
