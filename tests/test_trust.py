"""Rank correlations against closed forms and scipy's recorded values, and what reports say of them."""

import argparse
import random
import runpy
from pathlib import Path

import pytest
import torch

from dimo.errors import DimoError
from dimo.evaluation import trust
from dimo.evaluation.metrics import JUDGED, REFERENCE_FREE, legend
from dimo.worlds.teacher import TeacherRecipe, make_teacher
from dimo.worlds.tiles import TilesWorld


def plain_spearman(one, other):
    """1 - 6 sum d^2 / (n (n^2 - 1)), which holds without ties."""
    n = len(one)
    place = [{v: i for i, v in enumerate(sorted(values))} for values in (one, other)]
    return 1 - 6 * sum((place[0][a] - place[1][b]) ** 2 for a, b in zip(one, other)) / (n * (n * n - 1))


def test_spearman():
    draw = random.Random(0)
    one, other = ([draw.random() for _ in range(30)] for _ in range(2))
    got = trust.spearman(torch.tensor(one).double(), torch.tensor(other).double())
    assert got == pytest.approx(plain_spearman(one, other))
    x = torch.tensor([1.0, 2, 2, 3, 5])
    assert trust.ranks(x).tolist() == [1, 2.5, 2.5, 4, 5]
    assert trust.spearman(x, x.exp()) == pytest.approx(1) and trust.spearman(x, -x) == pytest.approx(-1)
    # scipy.stats.spearmanr([1, 2, 2, 3, 5], [2, 1, 3, 3, 4]) by hand: ranks 1, 2.5, 2.5, 4, 5 and 2, 1, 3.5, 3.5, 5
    assert trust.spearman(x, torch.tensor([2.0, 1, 3, 3, 4])) == pytest.approx(7.25 / 9.5)
    assert trust.spearman(x, torch.ones(5)) is None


def test_the_interval_draws_families_and_not_students():
    draw = random.Random(1)
    truth = [draw.gauss(0, 1) for _ in range(40)]
    figure = [value + draw.gauss(0, 1) for value in truth]
    alone = trust.correlation(figure, truth, [str(i) for i in range(40)])
    low, high = alone["interval"]
    assert low < alone["rho"] < high and alone["students"] == 40 and high - low < 0.5
    assert alone == trust.correlation(figure, truth, [str(i) for i in range(40)])
    # every student four times: as students the interval would shrink to a half, as families it stays
    often = trust.correlation(figure * 4, truth * 4, [str(i) for i in range(40)] * 4)
    assert often["rho"] == pytest.approx(alone["rho"], abs=1e-3)
    assert often["interval"] == pytest.approx(alone["interval"], abs=0.02)
    assert trust.correlation([1.0, 1.0], [0.0, 1.0], ["a", "b"]) is None
    with pytest.raises(DimoError, match="of one length, got 1, 2 and 2"):
        trust.correlation([1.0], [1.0, 2.0], ["a", "b"])


def test_goodness_is_high_where_a_metric_is_good():
    assert trust.goodness("higher", 2) > trust.goodness("higher", 1)
    assert trust.goodness("lower", 1) > trust.goodness("lower", 2)
    assert trust.goodness("nearer to 1", 0.9) == pytest.approx(trust.goodness("nearer to 1", 1.1))
    assert trust.goodness("nearer to 0", -0.5) < trust.goodness("nearer to 0", 0.1)
    with pytest.raises(DimoError, match="better must be higher, lower or nearer to a number, got None"):
        trust.goodness(None, 1)


def test_what_ships_names_metrics_and_reports_quote_it():
    known, measured = REFERENCE_FREE | JUDGED, trust.measured()
    assert measured.keys() <= trust.STANDS_FOR.keys() <= known.keys() and len(measured) >= 12
    for name, worlds in measured.items():
        for row in worlds.values():
            assert row["oracle"] == trust.STANDS_FOR[name] and row["students"] >= 20
            assert -1 <= row["interval"][0] <= row["rho"] <= row["interval"][1] <= 1
    said = {line.split(" (")[0]: line for line in legend({"student_1": dict.fromkeys(known, 0.0)})}
    assert all(trust.sentence(name) in said[name] for name in measured)
    weak = [name for name in measured if trust.is_weak(name)]
    assert 0 < len(weak) < len(measured) and all(said[name].endswith(": weak.") for name in weak)
    assert trust.sentence("seconds_per_video") == "" and not trust.is_weak("seconds_per_video")
    assert trust.weak_ones(weak[:1] + ["seconds_per_video"]).startswith("Weak") and trust.weak_ones([]) == ""


def test_a_guided_worlds_students_are_measured_under_the_guided_teacher(tmp_path):
    recipe = TeacherRecipe(layers=1, hidden=32, heads=2, head_dim=16, batch_size=2, steps=1)
    make_teacher(TilesWorld(frames=2, codes=16), recipe, tmp_path / "world", videos_per_prompt=1)
    own = [f"distill.teacher_ckpt={tmp_path / 'world'}", "distill.num_frames=5", "distill.height=32"]
    own += ["distill.width=32", "model.device=cpu"]
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "trust.py"))
    for scale in (1, 3):
        overrides = [*own, f"distill.guidance_scale={scale}"]
        bench = script["Bench"](argparse.Namespace(preset="tiles", overrides=overrides, videos=4))
        row = bench.measure(bench.teacher.by_prompt)
        assert ("guided_nll" in row["metrics"]) == (scale > 1)
        assert row["oracle"].keys() == {*script["ORACLE"]} and row["metrics"]["teacher_nll"] > 0
