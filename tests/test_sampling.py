"""`dimo sample` and `dimo inspect`: what they write and print, checked against the pieces they are made of."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import load_file, save_file

from dimo.commands import sample as sampling
from dimo.commands.cli import main
from dimo.commands.inspect_folder import inspect_folder
from dimo.commands.sample import Request, read_prompts, sample_to_folder
from dimo.errors import DimoError
from dimo.ursa import chunks, jump, sample
from dimo.views.clips import write_frames
from dimo.worlds import checkpoint_folder

TINY = Path(__file__).parent / "data" / "tiny-ursa"
STUDENT = checkpoint_folder("shapes") / "student"
PROMPTS = ["blue bar moving up", "pink square moving left"]


def noise_and_codes(ursa, prompt, seed, steps, grid):
    g = torch.Generator().manual_seed(seed)
    ids = ursa.tokenize([prompt], 4)
    return sample(ursa.transformer, ursa.path, ids, grid, steps, generator=g).view(1, *grid)


def test_what_takes_longer_than_a_pass_says_what_it_is_at(tmp_path, capsys):
    one = PROMPTS[0]
    for prompts, steps, told in (
        ([one], 1, []),
        ([one], 2, [(0, 1, one), (1, 1, "done")]),
        (PROMPTS, 1, [(0, 2, one)]),
    ):
        sample_to_folder(Request(steps=steps), prompts, tmp_path)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) >= len(told) and (lines != []) == (told != [])
        assert all(line.startswith(f"sample {i}/{n} videos  {what}") for line, (i, n, what) in zip(lines, told))


def test_videos_are_those_of_the_sampler_and_the_json_says_how(ursa, world, tmp_path):
    files = sample_to_folder(Request(seed=5, steps=4), PROMPTS, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000.json", "0000.mp4", "0001.json", "0001.mp4"]
    for file, prompt in zip(files, PROMPTS):
        want = ursa.decode(noise_and_codes(ursa, prompt, 5, 4, world.latents_shape))[0]
        got = torch.from_numpy(iio.imread(file)).float() / 255
        assert got.shape == want.shape == (9, 32, 32, 3)
        assert (got - want).abs().mean() < 0.06  # the codec is lossy, its colour at half resolution
        told = json.loads(file.with_suffix(".json").read_text())
        assert (told["prompt"], told["seed"], told["steps"], told["frames"]) == (prompt, 5, 4, 9)
        assert told["teacher_ckpt"] == "shapes" and told["guidance_scale"] == 1.0 and told["dtype"] == "float32"


def test_the_json_makes_the_video_again(tmp_path):
    first = sample_to_folder(Request(seed=9, student_ckpt=str(STUDENT)), PROMPTS, tmp_path / "a")[1]
    told = json.loads(first.with_suffix(".json").read_text())
    fields = Request.__dataclass_fields__
    again = sample_to_folder(Request(**{k: told[k] for k in fields}), [told["prompt"]], tmp_path / "b")[0]
    assert first.read_bytes() == again.read_bytes()
    other = sample_to_folder(Request(seed=10, student_ckpt=str(STUDENT)), PROMPTS, tmp_path / "c")[1]
    assert first.read_bytes() != other.read_bytes()


def test_the_students_weights_are_used(ursa, world, tmp_path):
    """A run folder whose student knows nothing (all logits zero) paints something else than its teacher."""
    state = {k: v.clone() for k, v in ursa.transformer.state_dict().items()}
    state["model.norm.weight"].zero_()
    torch.save(state, tmp_path / "student.pt")
    run = tmp_path / "run" / "checkpoints" / "final"
    run.mkdir(parents=True)
    shutil.move(tmp_path / "student.pt", run)
    blank = sample_to_folder(Request(student_ckpt=str(tmp_path / "run"), seed=1), PROMPTS[:1], tmp_path / "out")[0]
    taught = sample_to_folder(Request(seed=1), PROMPTS[:1], tmp_path / "taught")[0]
    assert blank.read_bytes() != taught.read_bytes()


def test_one_frame_is_a_png_and_exact(tmp_path, generator):
    frames = torch.randint(0, 256, (1, 8, 16, 3), generator=generator)
    file = write_frames(tmp_path / "one", frames / 255)
    assert file.name == "one.png" and torch.equal(torch.from_numpy(iio.imread(file)).long(), frames[0])


@pytest.mark.parametrize("size", [(8, 8), (24, 40)])
def test_a_video_keeps_its_size_and_its_order(tmp_path, size):
    frames = torch.linspace(0, 1, 9).view(9, 1, 1, 1).expand(9, *size, 3)
    got = torch.from_numpy(iio.imread(write_frames(tmp_path / "video", frames))).float() / 255
    assert got.shape == frames.shape and (got - frames).abs().max() < 0.05


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_frames(tmp_path / "video", torch.zeros(5, 8, 8, 3))
    assert list(tmp_path.iterdir()) == []


def test_an_ffmpeg_that_is_not_installed_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "imageio_ffmpeg" else find(name))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "imageio.plugins.ffmpeg", raising=False)
    with pytest.raises(DimoError, match="could not write .*install --force-reinstall imageio-ffmpeg"):
        write_frames(tmp_path / "video", torch.zeros(5, 8, 8, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_video_writer_is_said_before_anything_is_sampled(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "imageio_ffmpeg" else find(name))
    with pytest.raises(DimoError, match="pip install imageio imageio-ffmpeg"):
        sample_to_folder(Request(), PROMPTS, tmp_path)
    assert list(tmp_path.iterdir()) == []


FFMPEGS = {
    "without libx264": ("exit 0", "encoder libx264, but .*ffmpeg lacks it: .*pip install .*; nothing was sam"),
    "that does not start": (None, r"ffmpeg, which writes videos, cannot be run here \(.*No such .*; nothing was"),
}


def another_ffmpeg(tmp_path, monkeypatch, script):
    file = tmp_path / "ffmpeg"
    if script:
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(file))


@pytest.mark.parametrize("which", FFMPEGS)
def test_an_ffmpeg_that_does_not_serve_is_said_before_anything_is_sampled(tmp_path, monkeypatch, which):
    script, sentence = FFMPEGS[which]
    another_ffmpeg(tmp_path, monkeypatch, script)
    monkeypatch.setattr(sampling, "sample", None)
    with pytest.raises(DimoError, match=sentence):
        sample_to_folder(Request(), PROMPTS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", ["exit 1", "cat > /dev/null; exit 1"])
def test_where_ffmpeg_fails_later_the_codes_are_kept_and_named(ursa, world, tmp_path, monkeypatch, ending):
    lists = 'case "$*" in *-encoders*|*-version*) echo "ffmpeg version 9 libx264"; exit 0;; esac'
    another_ffmpeg(tmp_path, monkeypatch, f"{lists}\n{ending}")
    with pytest.raises(DimoError, match="ffmpeg .*pip install .*; the video.s codes were saved to .*0000") as refusal:
        sample_to_folder(Request(seed=5), PROMPTS, tmp_path / "out")
    assert "partial" not in str(refusal.value)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["0000.safetensors"]
    codes = load_file(tmp_path / "out" / "0000.safetensors")["codes"]
    assert torch.equal(codes, noise_and_codes(ursa, PROMPTS[0], 5, 1, world.latents_shape)[0])


def test_without_a_decoder_the_codes_are_written_and_the_sentence_said(tmp_path, monkeypatch, caplog):
    load = sampling.load_ursa

    def without_vae(*arguments):
        ursa = load(*arguments)
        ursa.vae, ursa.no_vae = None, "diffnext cannot be used here"
        return ursa

    monkeypatch.setattr(sampling, "load_ursa", without_vae)
    request = Request(teacher_ckpt=str(TINY), num_frames=2, height=4, width=6, steps=3, guidance_scale=2.0,
                      negative_prompt="blurry", max_prompt_length=7)  # fmt: skip
    file = sample_to_folder(request, ["a red ball"], tmp_path)[0]
    assert file.name == "0000.safetensors" and "diffnext cannot be used here" in caplog.text
    ursa, g = load(TINY), torch.Generator().manual_seed(0)
    want = sample(ursa.transformer, ursa.path, ursa.tokenize(["a red ball"], 7), (2, 2, 3), 3, guidance_scale=2.0,
                  uncond_ids=ursa.tokenize(["blurry"], 7), generator=g)  # fmt: skip
    assert torch.equal(load_file(file)["codes"].flatten(), want[0])
    assert json.loads((tmp_path / "0000.json").read_text())["no_frames"] == "diffnext cannot be used here"


def test_a_prompt_that_is_cut_is_said_on_stderr_and_in_its_json(ursa, world, tmp_path, caplog):
    request = Request(max_prompt_length=2, guidance_scale=2.0, negative_prompt="pink square moving left")
    files = sample_to_folder(request, ["blue bar moving up"], tmp_path / "cut")
    assert [json.loads(f.with_suffix(".json").read_text())["prompt_cut_to"] for f in files] == ["blue bar"]
    said = "the prompt {!r} has 4 tokens, but max_prompt_length is 2: it is truncated to {!r}"
    wanted = [(request.negative_prompt, "pink square"), ("blue bar moving up", "blue bar")]
    assert caplog.messages == [said.format(*pair) for pair in wanted]
    caplog.clear()
    file = sample_to_folder(Request(), ["blue bar moving up"], tmp_path / "whole")[0]
    assert caplog.messages == [] and json.loads(file.with_suffix(".json").read_text())["prompt_cut_to"] is None


def test_a_student_that_is_guided_a_second_time_is_warned_of(tmp_path, caplog):
    def said(**request) -> str:
        caplog.clear()
        sample_to_folder(Request(**request), PROMPTS[:1], tmp_path)
        return caplog.text

    student = {"student_ckpt": str(STUDENT)}
    assert "guidance_scale=3 guides the student a second time" in said(guidance_scale=3.0, **student)
    assert "guides" not in said(**student) + said(guidance_scale=3.0) + said(
        guidance_scale=3.0, guidance_trunc=0.0, **student
    )


@pytest.mark.parametrize("chunk", [10, 70, 10_000])  # entries: one token, seven, all
def test_codes_are_drawn_where_their_logits_are_whatever_the_chunk(ursa, generator, monkeypatch, chunk):
    monkeypatch.setitem(chunks.ENTRIES, "cpu", chunk)
    want = torch.randint(10, (3, 48), generator=generator)
    logits = 100.0 * torch.nn.functional.one_hot(want, 10)
    drawn, x_1 = jump(ursa.path, logits, torch.zeros_like(want), 0.5, None, generator)
    assert torch.equal(drawn, want) and torch.equal(x_1, want)


def test_guidance_below_one_is_refused_by_the_sampler_too(ursa, world):
    ids = ursa.tokenize(PROMPTS, 4)
    for scale in (0.5, float("nan")):
        with pytest.raises(DimoError, match="guidance_scale must be at least 1"):
            sample(ursa.transformer, ursa.path, ids, world.latents_shape, 1, guidance_scale=scale, uncond_ids=ids)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "prompts must not be empty; give --prompt or --prompt_file"),
        (["--prompt", "x"], "the shapes world does not know the prompt 'x'"),
        (["--prompt", PROMPTS[0], "--guidance_scale", "0.5"], "guidance_scale must be at least 1"),
        (["--prompt", PROMPTS[0], "--guidance_trunc", "1.5"], r"guidance_trunc must lie in \[0, 1\]"),
        (["--prompt", PROMPTS[0], "--steps", "0"], r"steps must lie in \[1, 1000\], got 0"),
        (["--prompt", PROMPTS[0], "--steps", "100000000"], r"steps must lie in \[1, 1000\], got 100000000"),
        (
            ["--prompt", PROMPTS[0], "--height", "250"],
            "height must be a multiple of 8, got 250; the nearest are 248",
        ),
        (["--prompt", PROMPTS[0], "--width", "64"], "this world's latents_shape is"),
        (["--prompt", PROMPTS[0], "--max_prompt_length", "-3"], "max_prompt_length must not be negative, got -3"),
        (["--prompt", PROMPTS[0], "--seed", str(2**70)], r"seed must lie in \[0, 2\*\*63\), got 11805"),
        (["--prompt", PROMPTS[0], "--device", "tpu"], "device must be one of auto, cpu, cuda"),
        (["--prompt", PROMPTS[0], "--dtype", "int8"], "dtype must be one of auto, float32"),
        (["--prompt", PROMPTS[0], "--backend", "upstream"], "heads of 128|diffnext"),
        (["--prompt", PROMPTS[0], "--student_ckpt", "nowhere.pt"], "weights file nowhere.pt does not exist"),
        (["--prompt", PROMPTS[0], "--student_ckpt", str(TINY / "transformer")], "do not fit the teacher"),
        (["--prompt_file", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--teacher_ckpt", "shaps"], "did you mean 'shapes'|prompts must not"),
    ],
)
def test_bad_input_is_a_sentence_and_leaves_no_folder(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", *arguments, "--out_dir", "out"]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error) and "Traceback" not in error and list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_output_folder_is_said_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dimo.commands.sample.open_sampler", None)
    (tmp_path / "out").touch()
    assert main(["sample", "--prompt", PROMPTS[0], "--out_dir", str(tmp_path / "out")]) == 2
    assert f"cannot be written: {tmp_path / 'out'} is a file, not a folder\n" in capsys.readouterr().err


def test_a_prompt_file_gives_its_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa dog\n\n  a café \n", encoding="utf-8")
    assert read_prompts(file) == ["a dog", "a café"]
    file.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(DimoError, match="prompts.txt cannot be read as txt: it is UTF-16"):
        read_prompts(file)
    file.write_text(" \n\n")
    with pytest.raises(DimoError, match="holds no prompt"):
        read_prompts(file)


def test_inspect_counts_what_is_there(capsys):
    assert main(["inspect", str(TINY), "--num_frames", "3", "--height", "12", "--width", "16"]) == 0
    text = capsys.readouterr().out
    parameters = sum(v.numel() for v in load_file(TINY / "transformer/diffusion_pytorch_model.safetensors").values())
    for line in (f"parameters  {parameters:,};", "272 text ids (BOV 3), then 240 codes", "240 columns: the codebook",
                 "metric; alpha 0.9, c 3, shift 1", "latents 3x6x8 = 144 visual tokens; 465 positions",
                 "AutoencoderVQ, 1 frames and 2x2 pixels", "missing     nothing"):  # fmt: skip
        assert line in text


def test_inspect_of_ursa_1_7b_gives_its_published_sizes(tmp_path):
    """From config.json alone: 49x320x512 is 33,280 tokens, whose bf16 logits are 4.0 GiB."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    rows, missing = inspect_folder(tmp_path, 49, 320, 512)
    assert "13x40x64 = 33,280 visual tokens; 33,601 positions" in dict(rows)["video"]
    assert dict(rows)["logits"].startswith("for one video: 3.97 GiB at bf16, 7.93")
    assert len(missing) == 3 and all(str(tmp_path) in sentence for sentence in missing)


def test_inspect_of_a_small_model_has_sizes_that_say_something():
    """174,816 parameters, by hand: x 2 / 2^20 = .33; logits of 48 tokens x 10 codes are 960 bytes."""
    rows = dict(inspect_folder(checkpoint_folder("shapes"))[0])
    assert rows["parameters"] == "174,816; 0.33 MiB at bf16, 0.67 MiB at float32"
    assert rows["weights"].endswith("(0.67 MiB, float32)") and "0.00 MiB at bf16" in rows["logits"]


def test_inspect_says_all_that_is_missing_and_exits_with_two(tmp_path, capsys):
    folder = shutil.copytree(TINY, tmp_path / "broken")
    shutil.rmtree(folder / "tokenizer")
    (folder / "scheduler" / "scheduler_model.pth").unlink()
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state.pop("lm_head.weight")
    save_file(state, weights)
    assert main(["inspect", str(folder)]) == 2
    out, error = capsys.readouterr()
    assert "3 part(s)" in error and out.count("missing     ") == 3
    assert "lacks lm_head.weight" in out and "scheduler_model.pth is missing" in out and "tokenizer is missing" in out
    assert "AutoencoderVQ" in out
    assert main(["inspect", "/nowhere"]) == 2


def test_inspect_of_a_world_uses_its_only_size(capsys):
    assert main(["inspect", "shapes"]) == 0
    assert "9x32x32 -> latents 3x4x4 = 48 visual tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, size",
    [(["sprites"], "17x128x128"), ([str(TINY), *"--num_frames 5 --height 8 --width 16".split()], "5x8x16")],
)
def test_the_plan_that_inspect_names_is_of_the_same_videos(words, size, capsys, monkeypatch):
    monkeypatch.setattr("dimo.commands.plan.largest_batch", lambda *_: "")  # two more dry runs
    assert main(["inspect", *words]) == 0
    plan = capsys.readouterr().out.splitlines()[-1].split("  # ")[0].split(" dimo ")[1]
    assert main([*shlex.split(plan), "--memory", "80"]) == 0
    assert f"at {size}: " in capsys.readouterr().out.splitlines()[0]


def test_inspect_counts_the_text_as_training_does(capsys):
    for words, positions in (([], 48 + 1 + 4), (["--max_prompt_length", "7"], 48 + 1 + 7)):
        assert main(["inspect", "shapes", *words]) == 0
        assert f"{positions} positions" in capsys.readouterr().out
    assert main(["inspect", "shapes", "--max_prompt_length", "-400"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error == "dimo: max_prompt_length must not be negative, got -400\n"


def test_a_folder_without_a_vae_lacks_nothing_that_training_needs(tmp_path, capsys):
    folder = shutil.copytree(TINY, tmp_path / "bare", ignore=lambda _, names: {"vae"} & set(names))
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "VAE         none: not needed for training" in out and "missing     nothing" in out
    shutil.copytree(TINY / "vae", folder / "vae")
    for file in (folder / "vae").glob("*.safetensors"):
        file.unlink()
    assert main(["inspect", str(folder)]) == 2  # one that is there, and not whole
