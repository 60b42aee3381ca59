"""`dimo ablate`: grid files, the runs they stand for, and the table."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from forks import python
from safetensors.torch import load_file

from dimo.config import load_config, to_yaml
from dimo.config.load import shipped_grids
from dimo.errors import DimoError
from dimo.evaluation.ablate import Run, _workers, ablate, teacher_folder, worth
from dimo.evaluation.grid import read_grid
from dimo.evaluation.intervals import cell, format_grid, interval, t_quantile
from dimo.run.signals import Preempted, Signals, stopping_at

TINY = Path(__file__).parent / "data" / "tiny-ursa"
SMALL = """
base:
  preset: tiles
  keys: {model.device: cpu, training.max_train_steps: 2, distill.batch_size_per_gpu: 2, evaluation.videos_per_prompt: 1,
         training.max_bad_steps: 1, optim.lr: 1e-3, optim.aux_lr: 4e-3, optim.muon_lr: 5e-3, optim.warmup_steps: 1,
         distill.t_draws: 1, distill.aux_steps: 1}
worlds:
  tiny:
    train: {world: tiles, frames: 2, codes: 16, layers: 1, hidden: 32, heads: 2, batch_size: 2, steps: 2}
    rate_scale: 2
arms:
  plain: {}
  by law: {distill.t_shift: 4}
rates: [1e-4, 2e-4]
seeds: [0, 1]
"""
GOOD = {"worlds": "{s: {teacher: shapes}}", "arms": "{a: {}, b: {distill.t_draws: 1}}"}


def written(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text if isinstance(text, str) else "\n".join(f"{k}: {v}" for k, v in text.items()))
    return str(file)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """To draw one takes longer than a run of two steps."""
    monkeypatch.setattr("dimo.views.sheets.save_sheet", lambda *_: None)


@pytest.mark.parametrize("name", shipped_grids())
def test_grids_that_ship_make_sense(name, tmp_path):
    grid = read_grid(name)
    grid.require_sense(tmp_path)
    assert len(grid.rates) >= 3 and len(grid.seeds) == 3 and len(grid.arms) >= 2 and not list(tmp_path.iterdir())


def test_the_stabilisers_are_a_factorial_of_equal_samples(tmp_path):
    grid = read_grid("stabilisers")
    seen = set()
    for name in grid.arms:
        folder, words = grid.run(grid.places["N = 320"], name, 1e-3, 1, tmp_path)
        config = load_config(grid.preset, words)
        d, steps = config.distill, config.training.max_train_steps
        assert (d.num_frames, d.height, d.width, d.guidance_scale, d.teacher) == (17, 64, 64, 3, "network")
        assert steps * d.batch_size_per_gpu == 3000 * 64 and d.t_curriculum_steps in (0, steps // 5)
        assert (d.corrupt_ratio, d.p_corrupt_fade, d.lambda_ent_high) == (0.2, 0, 0.05)
        assert (config.experiment.seed, config.evaluation.teacher_steps) == (1, [1]) and folder.parent == tmp_path
        seen.add((d.t_curriculum_steps > 0, d.p_corrupt, d.lambda_ent, d.batch_size_per_gpu))
    assert len(seen) == 9 == len(grid.arms) and (True, 0.2, 0.01, 8) in seen


def test_four_draws_and_four_times_the_batch_cost_the_same(tmp_path):
    """Counted by hand, a backward pass as two: student, teacher with and without prompt, fits, auxiliary at x_t."""
    grid, costs, pairs = read_grid("draws"), set(), set()
    for place, name in itertools.product(grid.places.values(), grid.arms):
        config = load_config(grid.preset, grid.run(place, name, 1e-3, 0, tmp_path)[1])
        d = config.distill
        video = 3 + d.t_draws * (1 + (d.guidance_scale > 1)) + 3 * d.aux_steps + d.t_draws
        costs.add(round(config.training.max_train_steps * d.batch_size_per_gpu * video / 6_048_000, 3))
        pairs.add((d.num_frames, d.t_draws, d.batch_size_per_gpu, d.guidance_scale, d.t_shift))
        assert d.t_draws * d.batch_size_per_gpu == 256 and (d.aux_pass, d.aux_objective, d.w_kd) == (
            "own",
            "denoise",
            0,
        )
    assert costs == {1.0} and len(pairs) == 16 == 2 * len(grid.arms)


def test_what_the_command_changes(tmp_path):
    file = written(tmp_path, SMALL + "  \n")
    grid = read_grid(file, "smoke", ["optim.aux_lr=2e-3", "distill.t_shift=2"], ["by law", "plain"], [1e-2], 5)
    place = grid.places["tiny"]
    configs = {arm: load_config(grid.preset, grid.run(place, arm, 1e-2, 0, tmp_path)[1]) for arm in grid.arms}
    assert configs["plain"].distill.t_shift == "2" and configs["by law"].distill.t_shift == "4"
    for config in configs.values():  # the ratio of the rates is the configuration's, and rate_scale is 2
        o = config.optim
        assert (o.lr, o.aux_lr, o.muon_lr) == pytest.approx((2e-2, 4e-2, 1e-1))
    assert grid.seeds == (0, 1, 2, 3, 4) and grid.preset == "smoke" and list(grid.arms) == ["plain", "by law"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sedes": "[1]"}, "the file has no 'sedes'; did you mean 'seeds'"),
        ({"arms": "{a: {distill.t_drws: 1}}"}, "arm a: unknown key 'distill.t_drws'; did you mean 'distill.t_draws'"),
        ({"arms": "{a: {}, a: {optim.lr: 1}}"}, "line 2: arms.a is set twice"),
        ({"arms": "{a: {}, b: {}}"}, "the arms 'a' and 'b' are the same"),
        ({"arms": "{a b: {}, a/b: {optim.beta2: 0.5}}"}, "the arms 'a b' and 'a/b' are the same"),
        ({"arms": "{a: {preset: smokey}}"}, "there is no preset 'smokey'; did you mean 'smoke'"),
        ({"arms": "{}"}, "arms must be a group of names, got nothing"),
        ({"arms": "{a: {distill.t_draws: many}}"}, "distill.t_draws: 'many' is not a whole number"),
        ({"arms": "{a: {distill.t_shift: 0.5}}"}, "arm 'a' on s: distill.t_shift as a number must be at least 1"),
        ({"arms": "{a: {optim.lr: 1e-3}}", "rates": "[1e-3]"}, "arm 'a' sets optim.lr, which is what the grid's rates"),
        ({"arms": "{a: {}, b: {distill.batch_size_per_gpu: 8}}"}, "samples, but on s 'a' has 128,000 and 'b' 16,000; "),
        ({"equal": "passes"}, r"many passes, but on s 'a' has 2,176,000 and 'b' 1,408,000; give"),
        ({"equal": "[time]"}, r"equal must be one of samples, passes, got \['time'\]"),
        ({"worlds": "{s: {}}"}, "world s must have either a teacher or what to train one with"),
        ({"worlds": "{s: {train: {world: tils}}}"}, "there is no world 'tils'; did you mean 'tiles'"),
        ({"worlds": "{s: {train: {world: tiles, hight: 8}}}"}, "train of s has no 'hight'; did you mean 'height'"),
        ({"worlds": "{s: {train: {world: tiles, palettes: 300}}}"}, "more than the 4096 that an exact posterior"),
        ({"worlds": "{s: {train: {world: tiles, height: tall}}}"}, "height of s: 'tall' is not a whole number"),
        ({"worlds": "{s: {teacher: /nowhere}}"}, "/nowhere is neither a folder nor a built-in world"),
        ({"worlds": f"{{s: {{teacher: {TINY}}}}}"}, "a grid needs worlds, whose oracles score the videos, but .*tiny"),
        ({"rates": "[0]"}, "rates must be positive"),
        ({"rates": "[fast]"}, "rates: 'fast' is not a number"),
        ({"seeds": "[1, 1]"}, r"each seed must be listed once, got \(1, 1\)"),
        ({"tuning_seeds": "[7, 7]"}, r"each seed must be listed once, got \(7, 7\)"),
        ({"seeds": "[100]"}, "seed 100 is reported and would also choose the rate"),
        ({"base": "{presets: smoke}"}, "base has no 'presets'; did you mean 'preset'"),
    ],
)  # fmt: skip
def test_grids_that_cannot_be(tmp_path, change, sentence):
    with pytest.raises(DimoError, match=sentence):
        ablate(read_grid(written(tmp_path, GOOD | change)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_grid_that_is_not_there():
    with pytest.raises(DimoError, match="stabilizers is neither a grid that ships .* did you mean 'stabilisers'"):
        read_grid("stabilizers")
    with pytest.raises(DimoError, match="has no arm 'magic'; choose from AdamW"):
        read_grid("methods", arms=["magic"])
    with pytest.raises(DimoError, match="p1.yaml has no world 'N = 49'; did you mean 'N = 48'"):
        read_grid("p1", worlds=["N = 49"])
    assert list(read_grid("p1", worlds=["N = 48"]).places) == ["N = 48"]


def test_a_grid_that_is_no_text(tmp_path):
    (tmp_path / "grid.yaml").write_bytes(b"arms: \xff\n")
    with pytest.raises(DimoError, match="grid.yaml is not valid YAML: 'utf-8' codec can't decode byte 0xff"):
        read_grid(str(tmp_path / "grid.yaml"))


def test_a_report_that_is_cut_off_is_named(tmp_path):
    words = ("model.device=cpu", f"experiment.output_dir={tmp_path / 'run'}")
    run = Run(tmp_path / "run", "smoke", words, tmp_path)
    run.folder.mkdir()
    (run.folder / "config.yaml").write_text(to_yaml(run.settings()))
    (run.folder / "report.json").write_text('{"student_1": {"validity": 0.')
    with pytest.raises(DimoError, match="run/report.json is damaged: .*; delete it, and the same command"):
        run.result()


def test_a_grid_is_tuned_reported_and_continued(tmp_path):
    file, out = written(tmp_path, SMALL), tmp_path / "out"
    with pytest.raises(Preempted, match=r"with 0 of 4 reported runs finished; the same command goes on"):
        ablate(read_grid(file), out, minutes=1e-9)
    assert json.loads((out / "grid.json").read_text())["tiny"]["plain"]["seeds"] == [] and not list(out.glob("tiny-*"))
    table = ablate(read_grid(file), out, together=2)
    result = json.loads((out / "grid.json").read_text())["tiny"]
    assert list(result) == ["plain", "by law"] and table == (out / "grid.md").read_text()
    for row in result.values():
        assert len(row["seeds"]) == 2 and list(row["tuning"]) == ["0.0001", "0.0002"] and row["rate"] in (2e-4, 4e-4)
        assert {"validity", "coverage_near", "token_accuracy", "coverage_of_teacher"} <= row["seeds"][0].keys()
    assert len(list(out.glob("tiny-*-seed100"))) == 4 and len(list(out.glob("tiny-*"))) == 8
    for run in out.glob("tiny-*"):  # no checkpoints are left, but the student is
        kept = {str(file.relative_to(run)) for file in (run / "checkpoints").rglob("*") if file.is_file()}
        assert kept == {
            f"checkpoints/final/student/{n}" for n in ("config.json", "diffusion_pytorch_model.safetensors")
        }
        teachers = [name for name in json.loads((run / "report.json").read_text()) if name.startswith("teacher")]
        assert teachers == ["teacher_1"]
    (teacher,) = out.glob("teacher-*")  # scored once, with 25 passes: no arm guides it
    rows = json.loads((teacher / "report.json").read_text())
    assert list(rows) == ["teacher_1", "teacher_25"]
    near = rows["teacher_25"]["coverage_near"]
    for row in [seed for arm in result.values() for seed in arm["seeds"]]:
        want = row["coverage_near"] and near and pytest.approx(row["coverage_near"] / near)
        assert row["coverage_of_teacher"] == want
    when = {file: file.stat().st_mtime_ns for file in out.rglob("report.json")}
    assert ablate(read_grid(file), out) == table
    moved = out.rename(tmp_path / "elsewhere")  # to another machine, say
    assert ablate(read_grid(file), moved) == table
    assert [file.stat().st_mtime_ns for file in moved.rglob("report.json")] == [
        when[out / f.relative_to(moved)] for f in moved.rglob("report.json")
    ]
    longer = read_grid(file, None, ["training.max_train_steps=3"], ["plain"], [1e-4, 1e30], 1)
    ablate(longer, moved)  # a report of fewer steps does not stand for it; the other rate cannot be trained with
    row = json.loads((moved / "grid.json").read_text())["tiny"]["plain"]
    assert row["rate"] == 2e-4 and "not finite" in row["tuning"]["1e+30"][0]["diverged"] and len(row["seeds"]) == 1
    with pytest.raises(DimoError, match="was made by another recipe than the grid's tiny; give another --out"):
        ablate(read_grid(written(tmp_path, SMALL.replace("steps: 2}", "steps: 3}"))), moved)


def test_teachers_of_one_name_are_not_one_teacher(tmp_path):
    def scores(teacher, out=tmp_path):
        return teacher_folder(load_config("tiles", [f"distill.teacher_ckpt={teacher}"]), out)

    assert scores("/a/tiles") != scores("/b/tiles")
    moved = scores(tmp_path / "elsewhere" / "world-tiles", tmp_path / "elsewhere").name
    assert scores(tmp_path / "world-tiles").name == moved != scores("/a/world-tiles").name


def test_runs_side_by_side_are_the_same_runs(tmp_path):
    file = written(tmp_path, SMALL.replace("rates: [1e-4, 2e-4]", "rates: [1e-4]"))
    for jobs in (1, 2):
        if jobs == 2:  # the same world, which need not be made again
            shutil.copytree(tmp_path / "1" / "world-tiny", tmp_path / "2" / "world-tiny")
            shutil.copy(tmp_path / "1" / "world-tiny.json", tmp_path / "2")
        words = ["--arm", "plain", "--jobs", str(jobs), "-o", str(tmp_path / str(jobs)), "evaluation.teacher_steps=[1]"]
        done = python.run(["-m", "dimo", "ablate", "--grid", str(file), *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for seed in (0, 1):
        one, other = (
            load_file(
                next((tmp_path / str(jobs)).glob(f"tiny-plain-*seed{seed}/checkpoints/final/student/*.safetensors"))
            )
            for jobs in (1, 2)
        )
        assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def _train_until_told(folder, name):
    """In a process of a grid: what a run does that a signal stops."""
    with Signals() as signals:
        (folder / f"begun-{name}").touch()
        while signals.received is None:
            time.sleep(0.05)
    (folder / f"saved-{name}").touch()
    raise Preempted(name)


def test_a_signal_lets_every_process_save_and_no_other_run_begin(tmp_path):
    def tell():
        while len(list(tmp_path.glob("begun-*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    with pytest.raises(Preempted, match="SIGTERM: runs in progress were saved"), _workers(2) as call:
        call(_train_until_told, [(tmp_path, n) for n in range(5)], "runs")
    assert multiprocessing.active_children() == []
    begun, saved = ({file.name[6:] for file in tmp_path.glob(f"{what}-*")} for what in ("begun", "saved"))
    assert begun == saved and len(saved) == 2


def test_from_the_deadline_on_a_run_is_asked_to_stop_until_it_does():
    """Also one that begins to listen later."""
    with stopping_at(time.time() - 5):
        time.sleep(1.2)  # the first signal meets no run
        with Signals() as signals:
            until = time.time() + 10
            while signals.received is None and time.time() < until:
                time.sleep(0.05)
    assert signals.received == "SIGTERM" and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("found", "best", "kept"),  # (validity, coverage) by rate
    [
        ({1e-4: (0.3, 0.97), 1e-3: (0.99, 0.03)}, 1e-4, True),  # every video valid, and nearly all the same
        ({1e-4: (0.3, 0.97), 1e-3: (0.9, 0.5)}, 1e-4, True),  # half collapsed, and ahead even by the product
        ({1e-4: (0.3, 0.81), 1e-3: (0.4, 0.99)}, 1e-3, True),
        ({1e-4: (0.5, 0.1), 1e-3: (0.2, 0.6)}, 1e-3, False),
        ({1e-4: (0.0, None), 1e-3: (0.1, None), 2e-3: (0.05, None)}, 1e-3, False),
    ],
)
def test_a_collapsed_student_does_not_win_its_rate(found, best, kept):
    rows = {
        lr: [{"validity": v, "coverage": c, "coverage_near": c, "token_accuracy": 0.5}] for lr, (v, c) in found.items()
    }
    rows[5e-3] = [{"diverged": "too fast"}]
    assert max(rows, key=lambda lr: worth(rows[lr])) == best and worth(rows[best])[0] == kept


def test_intervals():
    """Quantiles from tables of Student's t; the interval of 1, 2, 3 and 6 by hand."""
    for freedom, quantile in {1: 12.706, 2: 4.303, 9: 2.262, 11: 2.201, 15: 2.131, 30: 2.042, 100: 1.984}.items():
        assert t_quantile(freedom) == pytest.approx(quantile, abs=2e-3)
    mean, half = interval([1.0, 2.0, 3.0, 6.0])  # variance 14 / 3
    assert mean == 3 and half == pytest.approx(3.182 * (14 / 3 / 4) ** 0.5)
    assert cell([0.5, 0.7, None]) == "0.600 +- 1.271 (2 of 3)" and cell([0.5]) == "0.500 (1)"
    assert cell([None, None]) == "undefined" and cell([]) == "-"


def test_the_table_by_hand():
    seeds = [{"validity": 0.5, "coverage": None}, {"validity": 0.7, "coverage": None}, {"diverged": "why"}]
    text = format_grid({"N = 48": {"law": {"rate": 1e-3, "starred": True, "tuning": {}, "seeds": seeds}}})
    head, line, row = text.split("\n")[2:5]
    assert text.startswith("**N = 48**") and head.count("|") == line.count("|") == row.count("|")
    assert row.startswith("| law (1 diverged) | 0.001* | 0.600 +- 1.271 (2) | undefined | undefined |")
