"""Folders as they really arrive: caches that were cleaned, downloads by half, variants, the wrong level, images."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dimo.commands.cli import main
from dimo.commands.inspect_folder import inspect_folder
from dimo.errors import DimoError
from dimo.ursa import load_ursa, save_student
from dimo.ursa.layout import default_size, require_checkpoint, vae_strides
from dimo.ursa.loading import load_student, load_transformer
from dimo.ursa.weights import read_weights, weight_files

TINY = Path(__file__).parent / "data" / "tiny-ursa"
NAME = "diffusion_pytorch_model"
WEIGHTS = f"transformer/{NAME}.safetensors"
POINTER = "version https://git-lfs.example/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "tiny-ursa")


@pytest.fixture
def cache(tmp_path):
    """The same as the Hugging Face tools keep it: links in a snapshot to blobs."""
    snapshot = tmp_path / "hub" / "models--some--URSA" / "snapshots" / "0a1b"
    blobs = tmp_path / "hub" / "models--some--URSA" / "blobs"
    blobs.mkdir(parents=True)
    for i, file in enumerate(f for f in sorted(TINY.rglob("*")) if f.is_file()):
        link = snapshot / file.relative_to(TINY)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / f"{i:04x}")
        link.symlink_to(Path(*[".."] * (len(link.relative_to(snapshot).parts) + 1), "blobs", f"{i:04x}"))
    return snapshot


def test_a_cache_is_read_and_its_other_levels_name_the_snapshot(cache, tmp_path):
    (cache / "tokenizer" / ".cache").mkdir()  # what tools leave there is in nobody's way
    (cache / "tokenizer" / ".gitkeep").touch()
    assert load_ursa(cache).path.codebook_size == 240
    for level in (cache.parent, cache.parent.parent, tmp_path / "hub", tmp_path):
        with pytest.raises(DimoError, match=f"has none of these; give the one inside it, {cache}$"):
            load_ursa(level)


@pytest.mark.parametrize(
    "file",
    [
        WEIGHTS, "transformer/config.json", "scheduler/scheduler_config.json", "scheduler/scheduler_model.pth",
        "tokenizer/tokenizer.json", "vae/config.json",
    ],
)  # fmt: skip
def test_a_link_to_nowhere_is_called_one(cache, file):
    blob = (cache / file).resolve()
    blob.unlink()
    with pytest.raises(DimoError, match=f"{cache / file} is a link to .*{blob.name}, which does not exist .*again"):
        load_ursa(cache)
    assert any(f"{cache / file} is a link to" in sentence for sentence in inspect_folder(cache, 1, 4, 4)[1])


def test_links_to_nowhere_of_shards_students_and_whole_folders(cache, tmp_path):
    names = {key: f"{NAME}-00001-of-00002.safetensors" for key in ("a", "b")}
    (cache / WEIGHTS).unlink()
    (cache / f"transformer/{NAME}.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (cache / "transformer" / names["a"]).symlink_to("../../../blobs/gone")
    with pytest.raises(DimoError, match="1 of 1 shards .*-00001-of-00002.safetensors: it is a link to .*gone"):
        weight_files(cache / "transformer")
    (tmp_path / "student.pt").symlink_to("elsewhere.pt")
    for source in (tmp_path, tmp_path / "student.pt"):
        with pytest.raises(DimoError, match="student.pt is a link to .*elsewhere.pt, which does not exist"):
            load_student(load_ursa(TINY), source)
    (tmp_path / "mine").symlink_to("moved")
    with pytest.raises(DimoError, match="mine is a link to .*moved, which does not exist"):
        load_ursa(tmp_path / "mine")


@pytest.mark.parametrize(
    "file", [WEIGHTS, "scheduler/scheduler_model.pth", "tokenizer/tokenizer.json", "vae/config.json"]
)
@pytest.mark.parametrize(("content", "sentence"), [(POINTER, "is a Git LFS pointer"), ("", r"is empty \(0 bytes\)")])
def test_pointers_and_empty_files_in_place_of_any_part(folder, file, content, sentence):
    (folder / file).write_text(content)
    with pytest.raises(DimoError, match=f"{folder / file} {sentence}"):
        load_ursa(folder)


@pytest.mark.parametrize(
    "left",
    [
        f"transformer/{NAME}.safetensors.incomplete",
        f"transformer/{NAME}.safetensors.aria2",
        f".cache/huggingface/download/transformer/{NAME}.safetensors.d4e5.incomplete",
    ],
)
def test_a_download_that_broke_off_is_called_one(folder, left):
    (folder / WEIGHTS).unlink()
    (folder / left).parent.mkdir(parents=True, exist_ok=True)
    (folder / left).write_bytes(b"half")
    with pytest.raises(DimoError, match=f"{folder / WEIGHTS} is missing, and {folder / left} is an unfinished"):
        load_ursa(folder)


def test_a_snapshot_whose_blob_is_still_coming(cache):
    (cache / WEIGHTS).unlink()
    (cache.parent.parent / "blobs" / "00ff.incomplete").write_bytes(b"half")
    with pytest.raises(DimoError, match="00ff.incomplete is an unfinished download"):
        load_ursa(cache)


def test_a_single_variant_is_read_and_plain_names_come_first(folder):
    plain, one = folder / WEIGHTS, folder / f"transformer/{NAME}.bf16.safetensors"
    want = read_weights(folder / "transformer")
    save_file({key: value.bfloat16() for key, value in want.items()}, one)
    assert weight_files(folder / "transformer") == [plain]
    plain.unlink()
    assert weight_files(folder / "transformer") == [one]
    got = load_transformer(folder / "transformer").state_dict()
    assert all(torch.equal(got[key], want[key].bfloat16().float()) for key in want)
    shutil.copy(one, one.with_name(f"{NAME}.fp16.safetensors"))
    with pytest.raises(DimoError, match="contains the weights in several variants, bf16 and fp16"):
        weight_files(folder / "transformer")


@pytest.mark.parametrize("name", [".fp16-0000{}-of-00002.safetensors", "-0000{}-of-00002.fp16.safetensors"])
def test_the_shards_of_a_variant_are_read(folder, name):
    name, want = NAME + name, load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = [dict(list(want.items())[i::2]) for i in range(2)]
    weight_map = {key: name.format(i + 1) for i, part in enumerate(parts) for key in part}
    for i, part in enumerate(parts):
        save_file(part, folder / "transformer" / name.format(i + 1))
    with pytest.raises(DimoError, match="the index of its shards, such as .*00001-of-00002.*, is missing"):
        weight_files(folder / "transformer")
    index = folder / f"transformer/{NAME}.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    got = read_weights(folder / "transformer")
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_json_with_a_byte_order_mark_is_read(folder):
    for file in ("transformer/config.json", "scheduler/scheduler_config.json", "vae/config.json", "model_index.json"):
        (folder / file).write_bytes(b"\xef\xbb\xbf" + (folder / file).read_bytes())
    ursa = load_ursa(folder)
    assert (ursa.transformer.config.hidden_size, ursa.path.alpha, ursa.strides) == (16, 0.9, (1, 2))


def test_the_wrong_level_names_the_right_one(folder, monkeypatch, capsys):
    for given in (folder / "transformer", folder / WEIGHTS, folder / "model_index.json"):
        what = f"{given} (has none of these|is a file); give the folder above it, {folder}"
        with pytest.raises(DimoError, match=what):
            require_checkpoint(given)
    monkeypatch.chdir(folder / "transformer")
    assert main(["inspect", "."]) == 2
    assert f"give the folder above it, {folder}\n" in capsys.readouterr().err
    assert main(["inspect", str(folder.parent)]) == 2
    assert f"give the one inside it, {folder}\n" in capsys.readouterr().err
    shutil.copytree(folder, folder.parent / "another")
    assert main(["plan", "--teacher_ckpt", str(folder.parent), "--num_frames", "1"]) == 2
    assert "give one of those inside it, such as " in capsys.readouterr().err
    assert main(["inspect", str(folder / "model_index.json")]) == 2
    assert f"give the folder above it, {folder}\n" in capsys.readouterr().err


def test_a_students_wrong_level_names_the_right_one(folder, tmp_path):
    tiny = load_ursa(TINY)
    with pytest.raises(DimoError, match=f"did you mean {folder / 'transformer'}"):
        load_student(tiny, folder)
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000005").mkdir(parents=True)
    (run / "status.json").write_text("{}")
    for unfinished in (run, run / "checkpoints" / "final"):  # as `dimo sample` and `dimo evaluate` name it
        with pytest.raises(DimoError, match="run is a run without checkpoints/final: it has not finished"):
            load_student(tiny, unfinished)
    for name in ("ema.safetensors", "manifest.json"):
        (run / "checkpoints" / "step-00000005" / name).touch()
    with pytest.raises(DimoError, match="step-00000005 is a checkpoint, from which training goes on; a student is"):
        load_student(tiny, run / "checkpoints" / "step-00000005")
    aux, milestone = (run / "checkpoints" / name for name in ("step-00000005/aux.safetensors", "milestone-00000004"))
    aux.touch()
    told = f"^{aux} is a network of a checkpoint, without model.final_logit_gain[^;]*; a student is"
    with pytest.raises(DimoError, match=f"{told} checkpoints/final, or a milestone"):
        load_student(tiny, aux)
    milestone.mkdir()
    with pytest.raises(DimoError, match=f"{told} {milestone}$"):
        load_student(tiny, aux)
    (run / "checkpoints" / "final").mkdir()
    torch.save(tiny.transformer.state_dict(), run / "checkpoints" / "final" / "student.pt")
    with pytest.raises(DimoError, match=f"did you mean {run / 'checkpoints' / 'final' / 'student.pt'}"):
        load_student(tiny, run / "checkpoints")
    with pytest.raises(DimoError, match=f"{told} {run}/checkpoints/final or {milestone}$"):
        load_student(tiny, aux)


def test_inspect_of_half_a_folder_says_all_that_is_not_there(folder):
    for part in ("transformer", "scheduler", "tokenizer"):
        shutil.rmtree(folder / part)
    (folder / "transformer").mkdir()
    (folder / "vae" / "config.json").unlink()
    missing = inspect_folder(folder)[1]
    for name in ("transformer/config.json", WEIGHTS, "scheduler/scheduler_config.json",
                 "scheduler/scheduler_model.pth", "tokenizer", "vae/config.json"):  # fmt: skip
        assert sum(str(folder / name) in sentence for sentence in missing) == 1, name
    assert len(missing) == 6
    (folder / "tokenizer").touch()
    (folder / "transformer" / "config.json").mkdir()
    missing = inspect_folder(folder)[1]
    assert f"{folder}/transformer/config.json is a folder, but a file is needed" in missing and len(missing) >= 4
    (folder / "transformer" / "config.json").rmdir()
    (folder / "tokenizer").unlink()
    (folder / "transformer").rmdir()
    assert len(inspect_folder(folder)[1]) == 5


def test_another_scheduler_is_refused(folder):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler", "alpha": 0.9, "c": 3.0}))
    with pytest.raises(DimoError, match=f"{file} is of class 'DDIMScheduler', but dimo only reads Kinetic"):
        load_ursa(folder)


@pytest.mark.parametrize(
    ("config", "strides", "size"),
    [
        ({"temporal_stride": 1, "spatial_stride": 16}, (1, 16), (1, 1024, 1024)),
        ({"_class_name": "AutoencoderVQ"}, (1, 16), (1, 1024, 1024)),
        ({"_class_name": "AutoencoderVQ", "spatial_stride": 8}, (1, 8), (1, 512, 512)),
        ({"_class_name": "AutoencoderVQCosmos3D"}, (4, 8), (17, 256, 256)),
        ({}, (4, 8), (17, 256, 256)),
    ],
)
def test_strides_and_sizes_are_the_vaes(tmp_path, config, strides, size):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    assert vae_strides(tmp_path) == strides and default_size(tmp_path) == size


@pytest.mark.parametrize("source", ["student", "student/diffusion_pytorch_model.safetensors", "student.pt"])
def test_a_student_of_a_teacher_with_other_positions_is_refused(folder, tmp_path, source):
    tiny = load_ursa(TINY)
    save_student(tmp_path / "student", tiny.transformer)
    torch.save(tiny.transformer.state_dict(), tmp_path / "student.pt")
    load_student(tiny, tmp_path / source)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 10_000}))
    said = "does not belong to the teacher .*tiny-ursa: .* rope_theta = 1000000, the teacher.s 10000"
    with pytest.raises(DimoError, match=said):
        load_student(load_ursa(folder), tmp_path / source)
