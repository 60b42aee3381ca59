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
from dimo.worlds import checkpoint_folder, load_world
from dimo.worlds.protocol import Scores, prompt_index, title_of
from dimo.worlds.sprites import SpritesWorld
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


def naive_interval(one, other, families):
    """95% percentiles of the rank correlation over lists of students, drawn family by family."""
    names = sorted(set(families))
    found = []
    drawn = torch.randint(len(names), (trust.RESAMPLES, len(names)), generator=torch.Generator().manual_seed(0))
    for some in drawn.tolist():
        index = [i for name in some for i, family in enumerate(families) if family == names[name]]
        rho = trust.spearman(*(torch.tensor([values[i] for i in index]) for values in (one, other)))
        if rho is not None:
            found.append(rho)
    return torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()


def test_the_interval_is_that_of_students_listed_again():
    draw = random.Random(2)
    families = [draw.choice("abcde") for _ in range(17)]
    one, other = ([float(draw.randrange(6)) for _ in families] for _ in range(2))  # with many ties
    assert trust.correlation(one, other, families)["interval"] == pytest.approx(
        naive_interval(one, other, families), abs=1e-5
    )
    one, other, families = [1.0, 1.0, 2.0, 2.0], [1.0, 2.0, 3.0, 1.0], ["a", "a", "b", "b"]
    found = trust.correlation(one, other, families)  # undefined where one family is drawn twice
    assert found["interval"] == pytest.approx(naive_interval(one, other, families), abs=1e-5)


def test_what_ships_names_metrics_and_was_measured_on_enough_students():
    known = REFERENCE_FREE | JUDGED
    assert trust.STANDS_FOR.keys() <= known.keys() and "shapes" in trust.worlds()
    for about in trust.worlds().values():
        assert about["students"] >= 20 and about["families"] >= 8 and len(about["metrics"]) >= 12
        assert about["command"].startswith("python scripts/trust.py OUT") and "/" not in about["command"][23:]
        for name, row in about["metrics"].items():
            assert row["oracle"] == trust.STANDS_FOR[name] and row["students"] >= 20
            assert -1 <= row["interval"][0] <= row["rho"] <= row["interval"][1] <= 1


def test_the_guides_table_is_what_ships():
    def cell(row, mark=""):
        return f"{mark}{row['rho']:.2f} [{row['interval'][0]:.2f}, {row['interval'][1]:.2f}]" if row else "-"

    lines = (Path(__file__).parents[1] / "docs" / "guides" / "evaluation.md").read_text(encoding="utf-8").splitlines()
    rows = lines[lines.index("| metric | stands for | shapes | shapes, healthy | tiles | tiles, healthy |") + 2 :]
    rows = [line.strip("| ").split(" | ") for line in rows[: rows.index("")]]
    known = [trust.worlds()[world]["metrics"] for world in ("shapes", "tiles (codes=1000, palettes=4, strays=25)")]
    assert {row[0].strip("`") for row in rows} == known[0].keys() | known[1].keys()
    for quoted, oracle, *cells in rows:
        metric, expected = quoted.strip("`"), []
        for world, metrics in zip(("shapes", "tiles (codes=1000, palettes=4, strays=25)"), known):
            row = metrics.get(metric)
            weak = "**weak** " if trust.is_weak(metric, world) else ""
            expected += [cell(row, weak), cell(row and row["healthy"])]
        assert oracle == trust.STANDS_FOR[metric] and cells == expected, metric


@pytest.fixture
def two_worlds(monkeypatch):
    """Where `motion` is weak in one world, and `flicker` was not measured there."""
    rows = {
        rho: {"oracle": "token_accuracy", "rho": rho, "interval": [0.1, 0.95], "students": 30, "healthy": None}
        for rho in (0.9, 0.5)
    }
    made = {
        "shapes": {"metrics": {"motion": rows[0.9], "flicker": rows[0.9]}},
        title_of(TilesWorld(codes=1000)): {"metrics": {"motion": rows[0.5]}},
    }
    monkeypatch.setattr(trust, "worlds", lambda: made)


def test_a_report_quotes_the_figures_of_its_own_world(two_worlds):
    motion = {
        title: next(line for line in legend({"student_1": {"motion": 1.0, **world}}) if line.startswith("motion"))
        for title, world in (
            ("shapes", {"world": "shapes"}),
            ("tiles", {"world": "tiles (codes=1000)"}),
            ("larger", {"world": title_of(TilesWorld(frames=5, height=8, width=8, codes=1000))}),
            ("none", {}),
        )
    }
    of_shapes = "0.90 [0.10, 0.95] with token_accuracy over 30 students of shapes"
    of_tiles = "0.50 [0.10, 0.95] with token_accuracy over 30 students of tiles (codes=1000)"
    assert motion["shapes"].endswith(f"Its rank correlation with the oracle was {of_shapes}.")
    assert motion["tiles"].endswith(f"Its rank correlation with the oracle was {of_tiles}: weak.")
    for other in ("larger", "none"):  # weak in one of the worlds
        assert motion[other].endswith(f"Its rank correlation with the oracle was {of_shapes}; {of_tiles}: weak.")


def test_a_report_says_on_which_worlds_its_figures_rest(two_worlds):
    def said(rows):
        return [line for line in legend({"student_1": rows}) if line.startswith("Rank correlations")]

    own = "Rank correlations: measured on students of this world, shapes."
    assert said({"motion": 1.0, "world": "shapes"}) == [own]
    both = "students of shapes and tiles (codes=1000)"
    others = f"Rank correlations: measured on {both}, not of the teacher of this report."
    assert said({"motion": 1.0}) == said({"motion": 1.0, "world": "tiles"}) == [others]
    assert said({"seconds_per_video": 1.0}) == said({"flicker": 1.0, "world": "tiles (codes=1000)"}) == []


def test_weak_metrics_are_named_once(two_worlds):
    names = ["motion", "flicker", "seconds_per_video"]
    assert trust.weak_ones(names, "shapes") == ""
    weak = "Weak, by a rank correlation below 0.8 with the oracle of"
    assert trust.weak_ones(names, "tiles (codes=1000)") == f"{weak} tiles (codes=1000): motion."
    assert trust.weak_ones(names, None) == f"{weak} shapes or tiles (codes=1000): motion."


def test_a_worlds_title_has_the_sizes_that_are_not_the_defaults():
    assert title_of(TilesWorld()) == "tiles" and title_of(load_world(checkpoint_folder("shapes"))) == "shapes"
    assert title_of(TilesWorld(codes=1000, strays=25)) == "tiles (codes=1000, strays=25)"


SCRIPT = Path(__file__).parents[1] / "scripts" / "trust.py"


def scores_of(prompt, bins):
    n = len(prompt)
    free = {"places": (torch.arange(n) % bins, bins)}
    return Scores(torch.ones(n), torch.ones(n) > 0, torch.ones(n) > 0, prompt, free)


def test_held_out_prompts_are_found_among_all_prompts():
    """Evaluation asks for these alone, and the oracle knows a clip's prompt by its place among all."""
    script, world = runpy.run_path(str(SCRIPT)), SpritesWorld(sprites=3, textures=2)
    bench = argparse.Namespace(world=world, prompts=world.held_out)
    asked = prompt_index(world, world.held_out).repeat_interleave(4)
    figures = script["Bench"].oracle(bench, scores_of(asked, 4), 4)
    assert figures["right_prompt"] == 1 and figures["coverage"] == pytest.approx(1, abs=0.1)
    assert script["Bench"].oracle(bench, scores_of(asked.roll(4), 4), 4)["right_prompt"] == 0
    with pytest.raises(DimoError, match="--videos must be at least 16, as many as a free factor has values, got 4"):
        script["Bench"].oracle(bench, scores_of(asked, 16), 4)


def test_the_command_that_is_kept_has_no_paths(monkeypatch):
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setattr("sys.argv", ["trust.py", "--steps", "9", "a/b/", "distill.teacher_ckpt=/of/mine", "optim.lr=1"])
    kept = script["command"](argparse.Namespace(out=Path("a/b")))
    assert kept == "python scripts/trust.py --steps 9 OUT distill.teacher_ckpt=FOLDER optim.lr=1"


def test_a_guided_worlds_students_are_measured_under_the_guided_teacher(tmp_path):
    recipe = TeacherRecipe(layers=1, hidden=32, heads=2, head_dim=16, batch_size=2, steps=1)
    make_teacher(TilesWorld(frames=2, codes=16), recipe, tmp_path / "world", videos_per_prompt=1)
    own = [f"distill.teacher_ckpt={tmp_path / 'world'}", "distill.num_frames=5", "distill.height=32"]
    own += ["distill.width=32", "model.device=cpu"]
    script = runpy.run_path(str(SCRIPT))
    for scale in (1, 3):
        overrides = [*own, f"distill.guidance_scale={scale}"]
        bench = script["Bench"](argparse.Namespace(preset="tiles", overrides=overrides, videos=16, judged=4))
        row = bench.measure(bench.draw(None, 1, 1, 16))
        assert ("guided_nll" in row["metrics"]) == (scale > 1)
        assert row["oracle"].keys() == {*script["ORACLE"]} and row["metrics"]["teacher_nll"] > 0
