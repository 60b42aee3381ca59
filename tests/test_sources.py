"""Teacher and captions of a run are known by content, however they are named and wherever they lie."""

import os
import shutil

import pytest

from dimo.config import load_config, to_yaml
from dimo.errors import DimoError
from dimo.run import sources
from dimo.run.folder import RunFolder
from dimo.worlds import checkpoint_folder


def copy_of_the_teacher(folder):
    shutil.copytree(checkpoint_folder("shapes"), folder)
    return folder


def test_the_same_teacher_by_another_name_or_in_another_place_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy_of_the_teacher(tmp_path / "T")
    (tmp_path / "link").symlink_to("T")

    def open_with(teacher, folder="run"):
        return RunFolder.open(tmp_path / folder, to_yaml(load_config("smoke", [f"distill.teacher_ckpt={teacher}"])))

    for teacher in ("T", "T/", "./T", str(tmp_path / "T"), "link", "shapes"):
        open_with(teacher)
    os.mkdir("moved")
    os.rename("T", "moved/T")
    os.rename("run", "moved/run")
    shutil.copytree("moved", "copied")
    for parent in ("moved", "copied"):
        run = open_with(f"{parent}/T", f"{parent}/run")
        assert run.events()[-1]["changes"]["distill.teacher_ckpt"][1] == f"{parent}/T"
    (tmp_path / "copied/T/README.md").write_text("not a teacher's part")
    open_with("copied/T", "copied/run")


TOUCHED = {
    "a weight": "transformer/diffusion_pytorch_model.safetensors",
    "a size": "transformer/config.json",
    "the codebook": "scheduler/scheduler_model.pth",
    "a word": "tokenizer/tokenizer.json",
}


@pytest.mark.parametrize("what", TOUCHED)
def test_another_teacher_under_the_same_name_is_refused_and_the_file_named(tmp_path, what):
    teacher = copy_of_the_teacher(tmp_path / "T")
    config = to_yaml(load_config("smoke", [f"distill.teacher_ckpt={teacher}"]))
    RunFolder.open(tmp_path / "run", config)
    file = teacher / TOUCHED[what]
    data, times = bytearray(file.read_bytes()), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    data[-2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=times)  # of the same size and age
    with pytest.raises(DimoError, match=f"another distill.teacher_ckpt .*: {TOUCHED[what]} differs.*DELETE this run"):
        RunFolder.open(tmp_path / "run", config)
    data[-2] ^= 1
    file.write_bytes(data)
    RunFolder.open(tmp_path / "run", config)


def test_captions_may_move_and_not_change(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 100)  # a long file is read at 64 places

    def open_with(source):
        return RunFolder.open(tmp_path / "run", to_yaml(load_config("smoke", [f"distill.prompt_source={source}"])))

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "long.txt").write_text("a red ball\n" * 1000)
        (tmp_path / folder / "short.txt").write_text("a blue bar\n")
    open_with(tmp_path / "a")
    open_with(f"{tmp_path}/b/")
    last = (tmp_path / "b" / "long.txt").read_text()[:-2] + "k\n"
    for name, text, said in [
        ("short.txt", "a blue car\n", "short.txt differs"), ("long.txt", last, "long.txt differs"),
        ("new.txt", "more\n", "new.txt is new"),
    ]:  # fmt: skip
        old = (tmp_path / "b" / name).read_text() if name != "new.txt" else None
        (tmp_path / "b" / name).write_text(text)
        with pytest.raises(DimoError, match=f"another distill.prompt_source .*{said}"):
            open_with(tmp_path / "b")
        (tmp_path / "b" / name).write_text(old) if old else (tmp_path / "b" / name).unlink()
    open_with(tmp_path / "b")
    with pytest.raises(DimoError, match="another distill.prompt_source .* in world: long.txt is missing"):
        open_with("world")


def test_a_run_without_a_record_of_its_teacher_goes_on_under_its_name(tmp_path):
    teachers = [copy_of_the_teacher(tmp_path / name) for name in ("T", "U")]
    config, other = (to_yaml(load_config("smoke", [f"distill.teacher_ckpt={teacher}"])) for teacher in teachers)
    RunFolder.open(tmp_path / "run", config)
    (tmp_path / "run" / "sources.json").write_text("[")
    with pytest.raises(DimoError, match="sources.json is damaged; delete it"):
        RunFolder.open(tmp_path / "run", config)
    (tmp_path / "run" / "sources.json").unlink()
    with pytest.raises(DimoError, match="teacher_ckpt was .*/T', is .*/U'.*without sources.json"):
        RunFolder.open(tmp_path / "run", other)
    RunFolder.open(tmp_path / "run", config.replace("/T\n", "/../" + tmp_path.name + "/T\n"))
    RunFolder.open(tmp_path / "run", other)  # the same content, as is known now
