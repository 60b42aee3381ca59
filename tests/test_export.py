"""`dimo export`: what is in the folder, whose weights, and what is refused. Upstream loads it in test_upstream.py."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dimo.commands import export as exporting
from dimo.commands.cli import main
from dimo.commands.export import MARKER, copy_part, export
from dimo.commands.sample import Request, open_sampler
from dimo.config import load_config, to_yaml
from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.train.trainer import Trainer
from dimo.ursa import load_ursa
from dimo.ursa.loading import load_student

TINY = Path(__file__).parent / "data" / "tiny-ursa"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def content(folder):
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def weights(folder):
    return load_file(folder / WEIGHTS)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps at 5x16x16, a checkpoint after each, with logit gains that show in the weights."""
    folder = tmp_path_factory.mktemp("run")
    captions = folder / "captions.txt"
    captions.write_text("a red ball\na dog\n")
    sizes = ["distill.num_frames=5", "distill.height=16", "distill.width=16", "distill.max_prompt_length=12"]
    Trainer(load_config("smoke", [
        *sizes, f"distill.teacher_ckpt={TINY}", f"distill.prompt_source={captions}", "model.device=cpu",
        f"experiment.output_dir={folder / 'run'}", "training.max_train_steps=2", "distill.batch_size_per_gpu=1",
        "experiment.save_every=1", "experiment.keep_every=1", "model.logit_gain=2", "model.final_logit_gain=6",
        "optim.lr=0.01",
    ])).train(progress=False)  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "student"
    export(run, out)
    return out


def test_every_file_but_the_weights_is_a_copy_of_the_teachers(run, tmp_path):
    before = {file: (file.stat().st_mtime_ns, file.stat().st_nlink) for file in TINY.rglob("*")}
    was = content(TINY)
    export(run, tmp_path / "out")
    theirs = {name: digest for name, digest in was.items() if "/" in name or name == "model_index.json"}
    ours = content(tmp_path / "out")
    assert ours.keys() == theirs.keys() | {MARKER, "README.md"}
    assert [name for name in theirs if ours[name] != theirs[name]] == [WEIGHTS]
    assert content(TINY) == was  # nor touched, nor linked to
    assert {file: (file.stat().st_mtime_ns, file.stat().st_nlink) for file in TINY.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_it_holds_the_students_weights_with_their_gain(run, exported):
    """The final student, loaded beside its teacher; and the moving average by itself, times 6 / 2, in bf16."""
    theirs = load_student(load_ursa(TINY), run).state_dict()
    assert same(load_ursa(exported).transformer.state_dict(), theirs)
    ema = load_file(run / "checkpoints" / "step-00000002" / "ema.safetensors")
    ema["model.norm.weight"] = ema["model.norm.weight"] * 3
    assert same(weights(exported), {key: value.bfloat16() for key, value in ema.items()})
    assert not torch.equal(weights(exported)["model.layers.1.mlp.down_proj.weight"],
                           weights(TINY)["model.layers.1.mlp.down_proj.weight"].bfloat16())  # fmt: skip


def test_as_a_checkpoint_it_makes_the_students_videos(run, exported):
    student = open_sampler(Request(teacher_ckpt=str(TINY), student_ckpt=str(run)), ["a red ball"])
    size = {"num_frames": 5, "height": 16, "width": 16, "max_prompt_length": 12}
    alone = open_sampler(Request(teacher_ckpt=str(exported), **size), ["a red ball"])
    assert torch.equal(student.codes("a red ball", 3), alone.codes("a red ball", 3))
    assert not torch.equal(student.codes("a red ball", 4), alone.codes("a red ball", 3))


def test_marker_and_readme_say_where_it_comes_from_and_how_it_is_called(run, exported, tmp_path, capsys):
    about = json.loads((exported / MARKER).read_text())
    assert (about["run"], about["step"], about["from"]) == (str(run), 2, "checkpoints/final")
    assert about["config"]["model.final_logit_gain"] == 6 and about["teacher"] == str(TINY.resolve())
    assert main(["export", str(run), str(tmp_path / "out"), "--step", "1"]) == 0
    said, readme = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    assert readme in said and f"written: {tmp_path / 'out'}" in said
    for words in ("num_frames=5, height=16, width=16", "num_inference_steps=1, guidance_scale=1, max_prompt_length=12",
                  f'from_pretrained("{tmp_path / "out"}", torch_dtype=torch.bfloat16)', "of dimo, at step 1",
                  "step-00000001", "--distributed"):  # fmt: skip
        assert words in readme


def test_a_checkpoints_moving_average_is_exported_by_step_or_as_the_newest(run, exported, tmp_path):
    for step in ("1", "2", "newest"):
        export(run, tmp_path / step, step)
    assert same(weights(tmp_path / "2"), weights(exported)) and same(weights(tmp_path / "newest"), weights(exported))
    assert not same(weights(tmp_path / "1"), weights(exported))
    assert json.loads((tmp_path / "newest" / MARKER).read_text())["step"] == 2


def test_a_milestone_is_exported_by_its_step_as_its_checkpoint_was(run, tmp_path):
    export(run, tmp_path / "before", "1")
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "step-00000001")
    export(copy, tmp_path / "after", "1")
    assert same(weights(tmp_path / "after"), weights(tmp_path / "before"))
    about = json.loads((tmp_path / "after" / MARKER).read_text())
    assert (about["step"], about["from"]) == (1, "checkpoints/milestone-00000001")
    with pytest.raises(DimoError, match="got '3'; checkpoints are of the steps 2, milestones of 1, 2$"):
        export(copy, tmp_path / "other", "3")


def test_a_damaged_checkpoint_is_a_sentence_and_the_newest_is_the_newest_whole_one(run, tmp_path, caplog):
    copy = shutil.copytree(run, tmp_path / "run")
    file = copy / "checkpoints" / "step-00000002" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DimoError, match="step-00000002 is damaged: ema.safetensors has another checksum"):
        export(copy, tmp_path / "out", "2")
    export(copy, tmp_path / "out", "newest")
    assert json.loads((tmp_path / "out" / MARKER).read_text())["step"] == 1
    assert "step-00000002 is damaged and passed over: ema.safetensors has another checksum" in caplog.text
    shutil.rmtree(copy / "checkpoints" / "final")
    with pytest.raises(
        DimoError, match=r"has not finished; --step exports a checkpoint \(.* the steps 1, 2, milestones of 1, 2\)"
    ):
        export(copy, tmp_path / "other")


def test_only_an_older_export_is_replaced_and_only_when_asked(run, exported, tmp_path, monkeypatch):
    out = shutil.copytree(exported, tmp_path / "out")
    (out / "notes.txt").write_text("of the older export")
    with pytest.raises(DimoError, match="already holds an export; give another folder, or --overwrite"):
        export(run, out)
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "save_file", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
        with pytest.raises(OSError):
            export(run, out, overwrite=True)
    assert (out / "notes.txt").exists() and list(tmp_path.iterdir()) == [out]  # a full disk leaves it as it was
    export(run, out, overwrite=True)
    assert content(out).keys() == content(exported).keys()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(DimoError, match="holds files that `dimo export` did not write, so it is not replaced"):
        export(run, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")
    with pytest.raises(DimoError, match="must be a folder apart from the teacher"):
        export(run, TINY / "exported")


def test_what_cannot_be_exported_is_a_sentence(run, tmp_path):
    def refused(sentence, folder=run, **more):
        with pytest.raises(DimoError, match=sentence):
            export(folder, tmp_path / "out", **more)
        assert not (tmp_path / "out").exists()

    refused("tests is not a run folder of dimo", Path(__file__).parent)
    refused("final is not a run folder of dimo", run / "checkpoints" / "final")
    refused("--step must be newest or the step of a checkpoint .* got '7'; checkpoints are of the steps 1, 2", step="7")
    refused("got 'last'", step="last")
    refused("teacher_ckpt /nowhere is neither a folder", teacher_ckpt="/nowhere")
    other = shutil.copytree(TINY, tmp_path / "other")
    (other / "transformer" / "config.json").write_text((TINY / "transformer" / "config.json").read_text() + "\n")
    refused(f"other is not the teacher that {run} was trained with; give the folder that is", teacher_ckpt=str(other))
    (other / "model_index.json").unlink()
    refused("model_index.json is missing", teacher_ckpt=str(other))
    torn = shutil.copytree(TINY, tmp_path / "torn")
    (torn / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    refused("the teacher is not whole, and .*torn/vae/diffusion_pytorch_model.* does not exist", teacher_ckpt=str(torn))
    moved = shutil.copytree(TINY, tmp_path / "moved")
    export(run, tmp_path / "out", teacher_ckpt=str(moved))


def test_a_run_on_a_world_is_a_sentence(tmp_path):
    config = load_config("smoke", [f"experiment.output_dir={tmp_path / 'run'}"])
    run = RunFolder.open(tmp_path / "run", to_yaml(config))
    run.write_status(state="finished", step=1, max_steps=1)
    with pytest.raises(DimoError, match="shapes is the teacher of a world, which URSA's pipeline cannot load"):
        export(tmp_path / "run", tmp_path / "out")


def test_links_of_a_download_cache_become_files_and_hidden_files_stay_behind(tmp_path):
    source = tmp_path / "vae"
    (source / ".cache").mkdir(parents=True)
    (tmp_path / "blob").write_text("weights")
    (source / "diffusion_pytorch_model.bin").symlink_to(tmp_path / "blob")
    (source / "parts").mkdir()
    (source / "parts" / "a.txt").write_text("a")
    copy_part(source, tmp_path / "copy")
    assert sorted(content(tmp_path / "copy")) == ["diffusion_pytorch_model.bin", "parts/a.txt"]
    assert not (tmp_path / "copy" / "diffusion_pytorch_model.bin").is_symlink()
