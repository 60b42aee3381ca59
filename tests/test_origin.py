"""A student is sampled and evaluated with the configuration of the run that it lies in, and of no other folder."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from dimo.commands.cli import main
from dimo.commands.sample import Request, sample_to_folder
from dimo.config import load_config, to_yaml
from dimo.errors import DimoError
from dimo.run.origin import require_comparable, run_of
from dimo.run.sources import SOURCES, read_sources, to_json
from dimo.ursa import load_ursa, save_student
from dimo.worlds import DATA

TINY = Path(__file__).parent / "data" / "tiny-ursa"
STUDENT = DATA / "shapes" / "student"
SIZE = ["distill.num_frames=5", "distill.height=8", "distill.width=16", "distill.max_prompt_length=9"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a checkpoint, captions and a run begun in it, all with relative names; one is somewhere else."""
    work = tmp_path / "work"
    shutil.copytree(TINY, work / "teachers" / "tiny")
    (work / "captions.txt").write_text("a red ball\nrain\n")
    own = ["distill.teacher_ckpt=teachers/tiny", "distill.prompt_source=captions.txt", "experiment.name=slow"]
    final = work / "runs" / "slow" / "checkpoints" / "final"
    save_student(final / "student", load_ursa(TINY).transformer)
    torch.save(load_ursa(TINY).transformer.state_dict(), final / "student.pt")
    (work / "runs" / "slow" / "config.yaml").write_text(to_yaml(load_config("smoke", [*SIZE, *own])))
    (work / "runs" / "slow" / "status.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return work


@pytest.fixture
def asked(monkeypatch):
    """What `dimo evaluate` would evaluate: (config, weights, out)."""
    calls = []
    rows = {"student_1": {"spread": 1.0, "distinct": 1.0}}
    monkeypatch.setattr("dimo.evaluation.evaluate.evaluate_to_folder", lambda *call: calls.append(call) or rows)
    return calls


@pytest.mark.parametrize("student", ["", "checkpoints/final/student", "checkpoints/final/../final/student"])
@pytest.mark.parametrize("where", [".", "work", "work/runs/slow", "work/runs/slow/checkpoints/final"])
def test_evaluate_and_sample_read_the_run_from_wherever_it_is_named(student, where, work, tmp_path, asked, monkeypatch):
    monkeypatch.chdir(tmp_path / where)
    source = os.path.relpath(work / "runs" / "slow" / student)
    assert main(["evaluate", source]) == 0
    config, weights, out = asked.pop()
    d = config.distill
    assert (d.num_frames, d.height, d.width, d.max_prompt_length) == (5, 8, 16, 9)
    assert Path(d.teacher_ckpt).samefile(work / "teachers" / "tiny")
    assert Path(d.prompt_source).samefile(work / "captions.txt")
    assert out == (Path("runs/evaluation") if student else Path(source)) and Path(source) in (weights, *weights.parents)


@pytest.mark.parametrize(("student", "more", "width"), [("", [], 16), ("checkpoints/final", ["--width=24"], 24)])
def test_a_sample_is_as_large_as_what_the_run_was_trained_on(student, more, width, work):
    source = str(work / "runs" / "slow" / student)
    assert main(["sample", "--prompt", "rain", "--student_ckpt", source, *more, "--out_dir", "out"]) == 0
    told = json.loads(Path("out", "0000.json").read_text())
    assert (told["num_frames"], told["height"], told["width"], told["max_prompt_length"]) == (5, 8, width, 9)
    assert Path(told["teacher_ckpt"]).samefile(work / "teachers" / "tiny")


def test_where_training_began_comes_before_where_one_is(work, tmp_path, asked):
    Path("captions.txt").write_text("somebody else's\n")
    assert main(["evaluate", str(work / "runs" / "slow")]) == 0
    assert Path(asked.pop()[0].distill.prompt_source).samefile(work / "captions.txt")
    assert main(["evaluate", str(work / "runs" / "slow"), "distill.prompt_source=captions.txt"]) == 0
    assert asked.pop()[0].distill.prompt_source == "captions.txt"  # said here


def test_the_configuration_of_something_else_is_none(tmp_path, asked, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = to_yaml(load_config("smoke", ["evaluation.seed=77"]))
    for name, config, used in (
        ("a", "defaults: [base]\nlr: 3\n", "checkpoints/final"),  # a stranger's, beside checkpoints/
        ("b", ours, "models"),  # dimo's, and the student is in none of its checkpoints
        ("c", ours, "x/y"),  # nor is this
    ):
        shutil.copytree(STUDENT, Path(name, used, "student"))
        Path(name, "config.yaml").write_text(config)
        assert run_of(Path(name, used, "student")) is None
        assert main(["evaluate", f"{name}/{used}/student"]) == 0
        assert asked.pop()[0] == load_config()
    shutil.copytree(STUDENT, Path("b", "checkpoints", "final", "student"))
    assert main(["evaluate", "b/checkpoints/final/student"]) == 0 and asked.pop()[0].evaluation.seed == 77
    assert run_of("b/models/student") is None


def test_links_lead_to_the_run(work, tmp_path):
    os.symlink(work / "runs" / "slow", "latest")
    os.symlink(work / "runs" / "slow" / "checkpoints" / "final" / "student", "student")
    assert run_of("latest/checkpoints/final").samefile(work / "runs" / "slow")
    assert run_of("student") == work / "runs" / "slow"
    shutil.move(work / "runs" / "slow" / "checkpoints", tmp_path / "large disk")
    os.symlink(tmp_path / "large disk", work / "runs" / "slow" / "checkpoints")
    assert run_of(work / "runs" / "slow" / "checkpoints" / "final") == work / "runs" / "slow"


def test_a_damaged_configuration_of_a_run_is_not_passed_over(work, capsys):
    run = work / "runs" / "slow"
    (run / "status.json").write_text('{"state": "finished", "pid": 1, "host": "x"}')
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "optim: {lr: 1}\n")
    assert main(["evaluate", str(run)]) == 2 and "optim is set twice" in capsys.readouterr().err
    with pytest.raises(DimoError, match="optim is set twice"):
        sample_to_folder(Request(student_ckpt=str(run)), ["rain"], work / "out")


@pytest.fixture
def another(work, tmp_path):
    """Makes a copy of the run's teacher, whose content the run has recorded, with one of its files changed."""
    recorded = read_sources({"distill": {"teacher_ckpt": str(work / "teachers" / "tiny")}})
    (work / "runs" / "slow" / SOURCES).write_text(to_json(recorded))

    def make(file, change):
        folder = shutil.copytree(TINY, tmp_path / "another", dirs_exist_ok=True)
        change(folder / file)
        return folder

    return make


def turn_codebook(file):
    torch.save({name: values.flip(0) for name, values in torch.load(file, weights_only=True).items()}, file)


def exchange_two_words(file):
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        ("scheduler/scheduler_model.pth", turn_codebook, "codebook"),
        ("tokenizer/tokenizer.json", exchange_two_words, "vocabulary"),
    ],
)
def test_a_teacher_whose_ids_mean_something_else_is_refused(file, change, what, work, another, tmp_path, capsys):
    run, teacher, out = work / "runs" / "slow", another(file, change), tmp_path / "out"
    for words in (["evaluate", str(run)], ["sample", "--student_ckpt", str(run), "--prompt", "rain"]):
        assert main([*words, "--teacher_ckpt", str(teacher), "--out_dir", str(out)]) == 2
        error = capsys.readouterr().err
        assert f"was trained with another {what} than that of {teacher}: {file} differs" in error
        assert not out.exists()


def test_another_teacher_of_the_same_meaning_and_another_size_are_taken_and_the_size_is_said(work, another, caplog):
    teacher = another("scheduler/scheduler_config.json", lambda file: file.write_text(file.read_text() + "\n"))
    run = work / "runs" / "slow"
    for more, said in (([], ""), (["distill.width=32"], "for videos of 5x8x16, and is evaluated at 5x8x32")):
        caplog.clear()
        require_comparable(run, load_config(run / "config.yaml", [f"distill.teacher_ckpt={teacher}", *more]))
        assert bool(caplog.text) == bool(said) and said in caplog.text
