"""Training by the real command gives the recorded numbers; `scripts/trajectories.py` says how they were made."""

import subprocess
import time
from pathlib import Path

import pytest
from forks import python
from trajectories import EVERYWHERE, RUNS, TOLERANCE, compare, follow, numbers, recordings

from dimo.run.signals import PREEMPTED


def stopped(words, cwd, env, **_):
    """`python.run` of a training command, stopped as soon as the steps to be compared are written."""
    out = Path(words[-1].partition("=")[2])
    metrics, saved = out / "metrics.jsonl", out / "checkpoints" / f"step-{EVERYWHERE:08d}"
    with open(out.with_suffix(".txt"), "w+") as said:
        process = python.start(words, cwd=cwd, env=env, stdout=said, stderr=said)
        while process.poll() is None and not (saved.exists() and metrics.read_text().count("\n") >= EVERYWHERE):
            time.sleep(0.02)
        process.terminate()
        code = process.wait()
        return subprocess.CompletedProcess(words, 0 if code == PREEMPTED else code, stderr=Path(said.name).read_text())


@pytest.mark.parametrize("name", RUNS)
def test_the_first_steps_are_the_recorded_ones(name, tmp_path):
    got, wrong = follow(name, tmp_path, stopped, (EVERYWHERE,)), []
    for want in recordings(name):
        assert len(numbers(want, EVERYWHERE)) > 100
        wrong.append(compare(want, got, EVERYWHERE, TOLERANCE.get(name, 1e-4)))
    assert [] in wrong, min(wrong, key=len)


def test_a_number_that_is_off_missing_or_new_is_said():
    row, tensor = {"step": 1, "loss": 2.0, "gone": 1.0}, {"3": {"student/w": (1.0, 0.5)}}
    want = {"metrics": [row], "tensors": tensor}
    got = {"metrics": [{"step": 1, "loss": 2.001, "new": 1.0}], "tensors": {"3": {"student/w": (1.0, float("nan"))}}}
    wrong = compare(want, got, 3, 1e-4)
    assert [line.split(" is ")[0] for line in wrong] == [
        "step 1 gone", "step 1 new", "step 1 loss", "step 3 student/w projection",
    ]  # fmt: skip
    assert compare(want, want, 3, 0.0) == []
