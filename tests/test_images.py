"""Image models (a VAE without a stride in time): sizes and presets by themselves, and all commands on tests/data."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dimo.commands import sample as sampling
from dimo.commands.cli import main
from dimo.commands.dry_run import dry_run
from dimo.commands.inspect_folder import inspect_folder
from dimo.commands.sample import Request, sample_to_folder
from dimo.config import load_config
from dimo.errors import DimoError
from dimo.ursa import load_ursa
from dimo.views.sheets import video_sheet

TINY = Path(__file__).parent / "data" / "tiny-ursa"  # strides 1 and 2


def with_strides(tmp_path, time, space):
    folder = shutil.copytree(TINY, tmp_path / f"strides-{time}-{space}")
    file = folder / "vae" / "config.json"
    strides = {"temporal_stride": time, "spatial_stride": space}
    file.write_text(json.dumps(json.loads(file.read_text()) | strides))
    return folder


def test_an_image_models_defaults_are_one_image_and_its_own_preset(tmp_path):
    image, video = with_strides(tmp_path, 1, 16), with_strides(tmp_path, 4, 8)
    config = load_config(None, [f"distill.teacher_ckpt={image}"])
    assert config == load_config("distill_dimo_image", [f"distill.teacher_ckpt={image}"])
    d = config.distill
    assert (d.num_frames, d.height, d.width, d.t_per) == (1, 1024, 1024, "sample")
    assert d.lambda_ent > 0 and d.t_curriculum_steps > 0 and d.p_corrupt > 0  # as distill_dimo has them
    assert "1x1024x1024 -> latents 1x64x64 = 4,096 visual tokens" in dict(inspect_folder(image)[0])["video"]
    assert load_config(None, [f"distill.teacher_ckpt={video}"]).distill.num_frames == 17
    assert "17x256x256 -> latents 5x32x32" in dict(inspect_folder(video)[0])["video"]


def test_activations_are_kept_by_the_tokens_of_the_folders_own_strides(tmp_path):
    image = with_strides(tmp_path, 1, 16)
    for size, kept in ((1024, "none"), (2048, "selective"), (4096, "full")):  # 4,096, 16,384 and 65,536 tokens
        words = [f"distill.teacher_ckpt={image}", f"distill.height={size}", f"distill.width={size}"]
        assert load_config(None, words).model.activation_checkpointing == kept


@pytest.mark.parametrize(
    ("strides", "size", "sentence"),
    [
        ((1, 16), (1, 1032, 1024), "height must be a multiple of 16, got 1032; the nearest are 1024 or 1040"),
        ((1, 2), (1, 12, 15), "width must be a multiple of 2, got 15"),
        ((8, 8), (13, 64, 64), "num_frames must be a multiple of 8 plus 1, got 13; the nearest are 9 or 17"),
    ],
)
def test_sizes_are_held_against_the_folders_own_strides(tmp_path, strides, size, sentence):
    folder = with_strides(tmp_path, *strides)
    words = [f"distill.{key}={n}" for key, n in zip(("num_frames", "height", "width"), size)]
    with pytest.raises(DimoError, match=sentence):
        load_config("distill_dimo", [f"distill.teacher_ckpt={folder}", *words])


def test_sample_makes_and_plan_counts_one_image_of_the_same_size(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sampling, "sample", lambda n, p, ids, grid, *_, **__: drawn.append(grid) or torch.zeros(grid))
    image = with_strides(tmp_path, 1, 4)
    sample_to_folder(Request(teacher_ckpt=str(image), max_prompt_length=4), ["a red ball"], tmp_path / "out")
    told = json.loads((tmp_path / "out" / "0000.json").read_text())
    assert drawn == [(1, 64, 64)] and (told["num_frames"], told["height"], told["width"]) == (1, 256, 256)
    words = [f"distill.teacher_ckpt={image}", "distill.height=32", "distill.width=64", "training.mixed_precision=no"]
    assert dry_run(load_config(None, words)).num_visual_tokens == 8 * 16


def test_a_sheet_shows_an_image_once():
    columns = {name: torch.rand(2, 1, 4, 4, 3) for name in ("teacher", "student")}
    assert len(video_sheet(columns, ["a dog", "a cat"]).axes[0].images) == 4
    assert len(video_sheet({"teacher": torch.rand(2, 9, 4, 4, 3)}, ["a dog", "a cat"]).axes[0].images) == 6


def test_text_to_image_through_train_sample_and_evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.txt").write_text("a red ball\na dog that jumps\na cat\n")
    size = ["--teacher_ckpt", str(TINY), "--height", "12", "--width", "16", "--max_prompt_length", "8"]
    words = ["--prompt_file", "captions.txt", "--num_steps", "3", "--device", "cpu", "--out_dir", "run"]
    assert main(["train", *size, *words, "--log_every", "1", "--save_every", "3", "--batch_size", "2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(math.isfinite(row["loss/total"]) for row in rows)
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.distill.num_frames, config.distill.t_per) == (1, "sample")

    assert main(["sample", *size, "--prompt", "a red ball", "--student_ckpt", "run", "--out_dir", "out"]) == 0
    made = json.loads((tmp_path / "out" / "0000.json").read_text())
    assert made["num_frames"] == 1 and (tmp_path / "out" / made["file"]).exists()
    if load_ursa(TINY).vae is None:
        assert load_file(tmp_path / "out" / "0000.safetensors")["codes"].shape == (1, 6, 8)
    else:
        assert made["file"] == "0000.png"

    assert main(["evaluate", "run", "evaluation.teacher_steps=[2]"]) == 0
    capsys.readouterr()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report.keys() >= {"student_1", "teacher_2"} and report["student_1"]["diversity"] > 0
    assert load_file(tmp_path / "run" / "codes.safetensors")["student_1"].shape == (6, 1, 6, 8)
