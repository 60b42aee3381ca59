"""What a teacher makes is kept for its next student, and never taken where anything differs."""

import importlib.util
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

import dimo
from dimo.commands.report import write_run_report
from dimo.config import load_config, to_yaml
from dimo.evaluation import kept
from dimo.evaluation.comparison import Comparison
from dimo.evaluation.evaluate import evaluate_to_folder, open_comparison
from dimo.evaluation.summary import teachers_of
from dimo.run.folder import RunFolder
from dimo.ursa import load_ursa, save_student

TINY = Path(__file__).parent / "data" / "tiny-ursa"
SMALL = [
    "model.device=cpu", "distill.num_frames=5", "distill.height=8", "distill.width=16", "distill.max_prompt_length=9",
    "evaluation.teacher_steps=[1,3]", "evaluation.judged_videos=3", "evaluation.videos_per_prompt=1",
    "evaluation.batch_size=3", "training.mixed_precision=no",  # many CPUs have no fast bf16
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, overrides) of a teacher, its captions and two runs, whose students differ."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(TINY, folder / "teacher")
    (folder / "captions.txt").write_text("a red ball\na dog that jumps\nrain\n", encoding="utf-8")
    words = [*SMALL, f"distill.teacher_ckpt={folder / 'teacher'}", f"distill.prompt_source={folder / 'captions.txt'}"]
    network = load_ursa(TINY).transformer
    for name, scale in (("a", 1.5), ("b", 3.0)):
        RunFolder.open(folder / name, to_yaml(load_config("distill_dimo", words))).close()
        with torch.no_grad():
            network.lm_head.weight.mul_(scale)
        save_student(folder / name / "checkpoints" / "final" / "student", network)
    return folder, words


def evaluated(run, words, out):
    """(figures without what the clock says, names of the rows that were made)."""
    made, inner = [], Comparison.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dimo.views.sheets.save_sheet", lambda *_: None)  # to draw one takes longer
        patch.setattr(Comparison, "run", lambda self, job: made.append(job.row) or inner(self, job))
        rows = evaluate_to_folder(load_config("distill_dimo", words), run / "checkpoints" / "final", out, False)
    figures = {name: {k: v for k, v in row.items() if k != "seconds_per_video"} for name, row in rows.items()}
    return figures, set(made)


def test_another_teacher_than_the_students_own_is_said(runs, tmp_path, caplog):
    folder, words = runs
    shutil.copytree(folder / "teacher", tmp_path / "same")
    shutil.copytree(folder / "teacher", tmp_path / "other")
    teacher = load_ursa(TINY).transformer
    with torch.no_grad():
        teacher.lm_head.weight[3, 1] += 1e-3
    save_student(tmp_path / "other" / "transformer", teacher)
    run = RunFolder(folder / "a")
    for name in ("same", "other"):
        more = [f"distill.teacher_ckpt={tmp_path / name}", "evaluation.teacher_steps=[1]", "evaluation.judged_videos=0"]
        rows, _ = evaluated(run.path, [*words, *more], run.path)
        told = f"Teacher: {tmp_path / name}, but the student was distilled from another one, {folder / 'teacher'}."
        differs = name == "other"
        assert (f"another teacher ({folder / 'teacher'}) than the one it is measured against" in caplog.text) == differs
        assert (teachers_of(rows) == told) == (told in write_run_report(run, most=1).read_text()) == differs
        assert all(row.get("distilled_from") == (str(folder / "teacher") if differs else None) for row in rows.values())


def test_the_second_student_has_the_teachers_rows_of_the_first(runs, tmp_path):
    folder, words = runs
    first, made = evaluated(folder / "a", words, tmp_path / "a")
    assert made == first.keys() == {
        *(f"{who}_1{how}" for who in ("student", "untrained") for how in ("", "_argmax")),
        "teacher_1", "teacher_3", "teacher_3_again",
    }  # fmt: skip
    second, made = evaluated(folder / "b", words, tmp_path / "b")
    assert made == {"student_1", "student_1_argmax"}
    apart = Path(shutil.copytree(folder / "b", tmp_path / "elsewhere" / "b"))
    alone, made = evaluated(apart, words, tmp_path / "alone")
    assert len(made) == 7 and alone == second != first
    more, made = evaluated(folder / "a", [*words, "evaluation.teacher_steps=[1,2,3]"], tmp_path / "a")
    assert made == {"student_1", "student_1_argmax", "teacher_2"} and more.items() >= first.items()


CHANGES = (
    "evaluation.seed=7", "evaluation.videos_per_prompt=3", "evaluation.judged_videos=9", "distill.guidance_scale=5",
    "distill.width=24", "distill.max_prompt_length=8", "training.mixed_precision=bf16", "model.attention=math",
    "transformer/diffusion_pytorch_model.safetensors", "scheduler/scheduler_model.pth", "vae/config.json",
)  # fmt: skip


def test_whatever_changes_it_is_made_again(runs, monkeypatch):
    (folder, words), seen = runs, []

    def is_new():
        config, weights = load_config("distill_dimo", words), folder / "a" / "checkpoints" / "final"
        where = kept.kept_beside(weights, open_comparison(config, weights, networks=False)[0], config)
        assert where.parent == folder / ".teachers"
        seen.append(where)
        return where not in seen[:-1]

    assert is_new() and not is_new()
    words = [*words, "evaluation.teacher_steps=[9]"]  # more rows, and the others stay
    assert not is_new()
    for change in CHANGES:
        if "=" in change:
            words = [*words, change]
        else:
            os.utime(folder / "teacher" / change)  # written again
        assert is_new(), change
    (folder / "captions.txt").write_text("a red ball\nfog\nrain\n", encoding="utf-8")
    assert is_new()
    monkeypatch.setattr(kept, "own_code", lambda: "edited")
    assert is_new()
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert is_new() and not is_new()


def test_the_folders_that_were_used_last_stay(runs, tmp_path, monkeypatch):
    folder, words = runs
    config = load_config("distill_dimo", words)
    comparison, _ = open_comparison(config, folder / "a", networks=False)
    days = [*range(40)]  # since each was used
    for day in days:
        about = tmp_path / f"{day:032x}" / "about.json"
        about.parent.mkdir()
        about.write_text("{}")
        os.utime(about, (time.time() - (day * 86_400 + 60),) * 2)
    for other in ("notes", "f" * 31):
        (tmp_path / other).mkdir()
        shutil.copy(about, tmp_path / other)
        os.utime(tmp_path / other / "about.json", (0, 0))
    own = kept.kept_in(tmp_path, comparison, config)
    assert {f.name for f in tmp_path.iterdir()} == {own.name, "notes", "f" * 31, *(f"{day:032x}" for day in days[:15])}
    os.utime(own / "about.json", (0, 0))
    monkeypatch.setattr(kept, "MOST", 1)
    assert kept.kept_in(tmp_path, comparison, config) == own and own.is_dir()  # used now, so it is the newest
    left = {f.name for f in tmp_path.iterdir()}
    assert left == {own.name, "notes", "f" * 31, f"{0:032x}"}  # the other may be in use: it was, within a day


def test_code_that_is_edited_after_its_import_does_not_count(monkeypatch, tmp_path):
    spec = importlib.util.find_spec("dimo.evaluation.kept")
    imported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imported)
    want = kept.own_code()
    monkeypatch.setattr(dimo, "__file__", str(tmp_path / "__init__.py"))
    assert imported.own_code() == want


def test_where_it_cannot_be_kept_it_is_made(runs, tmp_path):
    folder, words = runs
    config = load_config("distill_dimo", words)
    comparison, _ = open_comparison(config, folder / "a", networks=False)
    assert kept.kept_beside(folder / "teacher" / "transformer", comparison, config) is None  # of no run
    run = Path(shutil.copytree(folder / "a", tmp_path / "a"))
    (tmp_path / ".teachers").write_text("a file")
    assert kept.kept_beside(run, comparison, config) is None
    assert json.loads((kept.kept_in(tmp_path / "new", comparison, config) / "about.json").read_text())["seed"] == 1234
