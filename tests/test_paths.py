"""Paths as people write them: ~, and folders that are called as a built-in world."""

import os
from pathlib import Path

import pytest

from dimo.commands.cli import main, parse
from dimo.config import load_config, to_flat
from dimo.errors import DimoError
from dimo.run.launch import engine_settings
from dimo.worlds import DATA, checkpoint_folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with some files, and another folder to be in."""
    (tmp_path / "home" / "T" / "transformer").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    (tmp_path / "home" / "mine.yaml").write_text("experiment: {output_dir: ~/out}\ntraining: {engine: '~/e.yaml'}\n")
    (tmp_path / "home" / "e.yaml").write_text("num_processes: 3\n")
    (tmp_path / "home" / "p.txt").write_text("a red ball\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_tilde_is_the_home_in_every_key_that_is_a_path(home):
    paths = ["experiment.output_dir", "distill.teacher_ckpt", "distill.prompt_source", "training.engine"]
    config = to_flat(load_config("smoke", [f"{key}=~/x y" for key in paths] + ["distill.negative_prompt=~/x"]))
    assert [config[key] for key in paths] == [f"{home}/x y"] * 4 and config["distill.negative_prompt"] == "~/x"
    config = load_config("~/mine.yaml")
    assert config.experiment.output_dir == f"{home}/out"
    assert engine_settings(config.training.engine) == {"num_processes": 3}
    assert load_config(None, ["distill.teacher_ckpt=~/T"]).optim.optimizer == "adamw"  # of URSA's preset
    assert checkpoint_folder("~/T") == home / "T" and engine_settings("~/e.yaml") == {"num_processes": 3}
    with pytest.raises(DimoError, match="there is no user 'nobody-at-all'; .* write ./~nobody-at-all$"):
        load_config("smoke", ["experiment.output_dir=~nobody-at-all/x"])
    assert load_config("smoke", ["experiment.output_dir=./~x"]).experiment.output_dir == "./~x"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("train -c ~/x", "config"),
        ("evaluate ~/x", "student"),
        ("evaluate --student_ckpt=~/x", "student_ckpt"),
        ("evaluate -o ~/x", "out"),
        ("evaluate --out_dir=~/x", "out"),
        ("ablate -o ~/x", "out"),
        ("bench --out=~/x", "out"),
        ("inspect ~/x", "folder"),
        ("runs ~/x", "folder"),
        ("sample --teacher_ckpt=~/x", "teacher_ckpt"),
        ("sample --student_ckpt=~/x", "student_ckpt"),
        ("sample --prompt_file=~/x", "prompt_file"),
        ("sample --out_dir=~/x", "out_dir"),
        ("world train shapes -o ~/x", "out"),
    ],
)
def test_a_tilde_is_the_home_in_every_command(words, name, home):
    assert getattr(parse(words.split()), name) == f"{home}/x"


def test_nothing_is_called_tilde_after_a_run(home):
    words = ["train", "-c", "smoke", "--num_steps=1", "--batch_size=2", "model.device=cpu", "--out_dir=~/run"]
    assert main(words) == 0 and (home / "run" / "checkpoints" / "final" / "student.pt").exists()
    assert main(["runs", "~/run"]) == 0
    assert list(Path.cwd().iterdir()) == []


def test_a_folder_that_is_called_as_a_world_is_ambiguous(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder("shapes") == DATA / "shapes"
    os.makedirs("shapes/transformer")
    with pytest.raises(DimoError, match="use ./shapes for the folder, .*shapes for the built-in world") as refused:
        checkpoint_folder("shapes")
    assert checkpoint_folder("./shapes").samefile("shapes") and str(DATA / "shapes") in str(refused.value)
    assert checkpoint_folder(str(DATA / "shapes")) == DATA / "shapes"
    Path("shapes", "config.yaml").touch()  # a run, into which somebody trains
    assert checkpoint_folder("shapes") == DATA / "shapes"
    monkeypatch.chdir(DATA)
    assert checkpoint_folder("shapes") == DATA / "shapes"
