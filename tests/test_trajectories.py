"""Training by the real command gives the recorded numbers; `scripts/trajectories.py` says how they were made."""

import json

import pytest
from forks import python
from trajectories import EVERYWHERE, RECORDED, RUNS, TOLERANCE, compare, follow, numbers


@pytest.mark.parametrize("name", RUNS)
def test_the_first_steps_are_the_recorded_ones(name, tmp_path):
    want = json.loads((RECORDED / f"{name}.json").read_text())
    assert len(numbers(want, EVERYWHERE)) > 100
    assert compare(want, follow(name, tmp_path, python.run), EVERYWHERE, TOLERANCE.get(name, 1e-4)) == []


def test_a_number_that_is_off_missing_or_new_is_said():
    row, tensor = {"step": 1, "loss": 2.0, "gone": 1.0}, {"3": {"student/w": (1.0, 0.5)}}
    want = {"metrics": [row], "tensors": tensor}
    got = {"metrics": [{"step": 1, "loss": 2.001, "new": 1.0}], "tensors": {"3": {"student/w": (1.0, float("nan"))}}}
    wrong = compare(want, got, 3, 1e-4)
    assert [line.split(" is ")[0] for line in wrong] == [
        "step 1 gone", "step 1 new", "step 1 loss", "step 3 student/w projection",
    ]  # fmt: skip
    assert compare(want, want, 3, 0.0) == []
