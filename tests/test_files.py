"""Whole or not at all: what an error or a kill leaves of a file and of a folder."""

import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from dimo import files
from dimo.files import (
    PARTIALS,
    clear_partials,
    save_file,
    save_torch,
    side_by_side,
    whole_file,
    whole_folder,
    write_text,
)


def test_write_text_leaves_the_old_file_when_it_fails(tmp_path):
    file = tmp_path / "a" / "b.json"
    write_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\udc80")
    assert file.read_text() == "old" and list(file.parent.iterdir()) == [file]


def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    """As /dev/null, which root could otherwise replace by a file."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "told")
    assert os.read(reader, 9) == b"told" and (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1
    os.close(reader)


def test_whoever_reads_the_old_file_reads_it_to_its_end(tmp_path):
    write_text(tmp_path / "a", "old")
    with open(tmp_path / "a") as reader:
        write_text(tmp_path / "a", "new")
        assert reader.read() == "old" and (tmp_path / "a").read_text() == "new"


def test_a_file_has_its_ending_while_it_is_written(tmp_path):
    with whole_file(tmp_path / "a.png") as beside:
        assert beside.suffix == ".png" and beside.parent == tmp_path
        beside.write_bytes(b"new")
        assert not (tmp_path / "a.png").exists()
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_is_replaced_as_a_whole_and_stays_after_an_error(tmp_path):
    folder = tmp_path / "f"
    with whole_folder(folder) as beside:
        (beside / "old").touch()
    with pytest.raises(RuntimeError):
        with whole_folder(folder) as beside:
            (beside / "new").touch()
            raise RuntimeError
    assert [f.name for f in folder.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [folder]
    with whole_folder(folder) as beside:
        (beside / "new").touch()
    assert [f.name for f in folder.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [folder]


def test_a_folder_takes_its_name_when_all_in_it_is_on_the_disk(monkeypatch, tmp_path):
    done = []
    monkeypatch.setattr(files, "sync", lambda path: done.append(path.name))
    monkeypatch.setattr(os, "rename", lambda old, new: done.append(f"to {new.name}"))
    with whole_folder(tmp_path / "x") as beside:
        (beside / "sub").mkdir()
        (beside / "sub" / "file").touch()
    assert sorted(done[:2]) == ["file", "sub"] and done[2:] == [".x.partial", "to x", tmp_path.name]


def test_the_bytes_of_a_saved_value_do_not_depend_on_the_files_name(tmp_path):
    values = {"w": torch.arange(5.0), "n": 3, "state": {"x": None}}
    for name in ("a.pt", ".another.123.partial.pt"):
        save_torch(values, tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / ".another.123.partial.pt").read_bytes()
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(loaded.pop("w"), torch.arange(5.0)) and loaded == {"n": 3, "state": {"x": None}}


def make(folder, name):
    with whole_folder(folder) as beside:
        (beside / name).touch()


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_name(monkeypatch, tmp_path):
    folder, rename = tmp_path / "f", os.rename
    make(folder, "old")

    def refuse(source, target):
        if source.name == ".f.partial":
            raise OSError(5, "Input/output error", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        make(folder, "new")
    assert [f.name for f in folder.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [folder]


KILLED_AT = """
import os, signal, sys
from dimo.files import whole_folder
rename, seen = os.rename, []
def killed(source, target):
    seen.append(source)
    if len(seen) == {rename}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = killed
with whole_folder(sys.argv[1]) as beside:
    (beside / "new").touch()
"""


@pytest.mark.parametrize("rename", [1, 2])
def test_a_kill_between_the_renames_loses_neither(tmp_path, rename):
    folder, other = tmp_path / "f", tmp_path / "g"
    make(folder, "old")
    code = KILLED_AT.format(rename=rename)
    assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode == -9
    assert folder.exists() == (rename == 1)
    shutil.copytree(tmp_path, other)
    clear_partials(tmp_path)
    assert [f.name for f in folder.iterdir()] == ["old"] and set(tmp_path.iterdir()) == {folder, other}
    make(other / "f", "next")  # whoever writes it next needs nobody to clear up before
    assert [f.name for f in other.rglob("*")] == ["f", "next"]


def test_what_stepped_aside_is_rubbish_once_the_new_one_is_there_and_a_removed_one_always(tmp_path):
    for name in ("f/new", ".f.old.partial/old", ".g.removed.partial/half", ".h.partial/half", ".i.7.partial.json/x"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / ".j.7.partial").symlink_to(tmp_path / "f")
    clear_partials(tmp_path)
    assert [f.name for f in tmp_path.rglob("*")] == ["f", "new"]


def test_a_folder_does_not_take_a_file_s_name(tmp_path):
    (tmp_path / "f").write_text("somebody's")
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "f"):
        raise AssertionError("hours of work would begin here")
    assert (tmp_path / "f").read_text() == "somebody's" and len(list(tmp_path.iterdir())) == 1


KILLED = """
import os, signal, sys
from dimo.files import whole_file, whole_folder
with {how}(sys.argv[1]) as beside:
    (beside / "new").touch() if {how} is whole_folder else beside.write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["whole_file", "whole_folder"])
def test_a_kill_leaves_only_what_partials_names(tmp_path, how):
    code = KILLED.format(how=how)
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.txt")]).returncode == -9
    assert not (tmp_path / "x.txt").exists() and list(tmp_path.iterdir()) == list(tmp_path.glob(PARTIALS)) != []


def test_side_by_side_keeps_the_order_and_begins_nothing_after_an_error():
    first, done = threading.Barrier(3), []

    def work(item):
        if item < 3:
            first.wait(60)  # passes only where three are at work at once
        else:
            time.sleep(0.01)
        done.append(item)
        if item == 1:
            raise OSError("no room")
        return item * item

    with pytest.raises(OSError, match="no room"):
        side_by_side(work, list(range(1000)), at_once=3)
    assert {0, 1, 2} <= set(done) and len(done) < 1000
    assert side_by_side(lambda item: item * item, list(range(100))) == [i * i for i in range(100)]
    assert side_by_side(work, []) == []


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_tensors_may_be_read_by_whoever_reads_the_other_files(tmp_path, mask):
    """A colleague who evaluates a run in a shared folder; safetensors alone writes for the owner only."""
    before = os.umask(mask)
    try:
        save_file({"w": torch.ones(2)}, tmp_path / "new.safetensors")
        write_text(tmp_path / "other", "")
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {0o666 & ~mask}
