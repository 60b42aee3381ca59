"""Which files a prompt source names: all of a folder or a sentence, under whatever name they have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from captions import make, write

from dimo.commands.cli import main
from dimo.commands.sample import read_prompts
from dimo.data.stream import PromptStream
from dimo.errors import DimoError


def test_endings_in_capitals_are_read(tmp_path):
    for name, text in (("part_10.csv", "c"), ("part_1.CSV", "a"), ("part_2.Csv", "b")):
        make(tmp_path, name, f"caption\n{text}\n".encode())
    assert read_prompts(tmp_path) == ["a", "b", "c"]
    assert sorted(PromptStream(tmp_path).take(3)) == ["a", "b", "c"]
    assert read_prompts(make(tmp_path / "one", "A.TXT", b"a\nb\n")) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("part_2.csv.gz", "is packed: unpack it, or move it out of"),
        ("part_2.CSV.ZST", "is packed"),
        ("rest.zip", "is packed"),
        ("part_2.csv.part", "looks like an unfinished download or a copy"),
        ("part_2.csv~", "looks like an unfinished download or a copy"),
        ("part_2.txt", "mixes file types .csv, txt"),
        ("part_2.PARQUET", "mixes file types .csv, parquet"),
        ("part_2.json", "is not a txt, jsonl, csv or parquet file: convert it, or move it out of"),
        ("part-00002", "is not a txt, jsonl, csv or parquet file"),
        ("more/part_2.csv", "more is a subfolder: give a folder"),
        ("more.csv/part_2.csv", "more.csv is a subfolder"),
    ],
)
def test_nothing_in_a_folder_is_passed_over(name, sentence, tmp_path):
    make(tmp_path, "part_1.csv", b"caption\na\n")
    make(tmp_path, name, b"caption\nb\n")
    for read in (PromptStream, read_prompts):
        with pytest.raises(DimoError, match=sentence):
            read(tmp_path)


def test_links_are_followed_and_dangling_ones_refused(tmp_path):
    make(tmp_path / "a", "part_1.csv", b"caption\na\n")
    link = tmp_path / "a" / "part_2.csv"
    link.symlink_to(make(tmp_path / "b", "blob", b"caption\nb\n"))
    assert read_prompts(tmp_path / "a") == ["a", "b"]
    (tmp_path / "b" / "blob").unlink()
    with pytest.raises(DimoError, match="part_2.csv is a link to .*blob, which does not exist: fix the link"):
        read_prompts(tmp_path / "a")
    with pytest.raises(DimoError, match="part_2.csv is a link to .*blob, which does not exist"):
        read_prompts(link)
    link.unlink()
    os.mkfifo(link)
    with pytest.raises(DimoError, match="part_2.csv is not a regular file"):
        read_prompts(tmp_path / "a")
    with pytest.raises(DimoError, match="part_2.csv is not one"):
        read_prompts(link)


def test_what_is_left_out_is_said(tmp_path, caplog):
    make(tmp_path, "part_1.txt", b"a\n")
    for name in ("README.txt", "LICENSE", "notes.md", ".part_2.txt.x8sD"):
        make(tmp_path, name, b"b\n")
    make(tmp_path, "_SUCCESS", b"")
    assert read_prompts(tmp_path) == ["a"]
    left = ".part_2.txt.x8sD, LICENSE, README.txt, _SUCCESS, notes.md"
    assert caplog.messages == [f"{tmp_path}: not read as captions: {left}"]


def test_numbers_that_are_written_in_two_ways_have_one_order(tmp_path, monkeypatch):
    for name in ("p01.txt", "p1.txt", "p001.txt"):
        make(tmp_path, name, name.encode())
    found = list(Path.iterdir(tmp_path))
    for entries in (found, found[::-1]):
        monkeypatch.setattr(Path, "iterdir", lambda self, entries=entries: iter(entries))
        assert read_prompts(tmp_path) == ["p001.txt", "p01.txt", "p1.txt"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", ["a::b", "zip:", "*", "a?b", "[ab]", "file:", "s3:", "a#b", "a%20b", "{a,b}", "${x}"])
def test_a_name_means_itself(name, kind, tmp_path, monkeypatch):
    file = write(tmp_path / f"{name}.{kind}", ["one", "two"])
    moved = tmp_path / "folder" / name / f"{name}.{kind}"
    moved.parent.mkdir(parents=True)
    os.rename(file, moved)
    monkeypatch.chdir(tmp_path / "folder")
    for path in (moved, moved.parent, f"{name}/{name}.{kind}", name):
        assert read_prompts(path) == ["one", "two"]
        assert sorted(PromptStream(path).take(2)) == ["one", "two"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_sample_reads_captions_as_training_does(kind, tmp_path, capsys):
    write(tmp_path / "captions" / f"a.{kind}", ["blue bar moving up", "no such words"])
    for source in (tmp_path / "captions", tmp_path / "captions" / f"a.{kind}"):
        assert main(["sample", "--prompt_file", str(source), "--out_dir", str(tmp_path / "out")]) == 2
        assert "does not know the prompt 'no such words'" in capsys.readouterr().err  # the second, so both are there
    write(tmp_path / "captions" / f"a.{kind}", ["blue bar moving up"])
    assert main(["sample", "--prompt_file", str(tmp_path / "captions"), "--out_dir", str(tmp_path / "out")]) == 0
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".json", ".mp4"]


OFFLINE = """
import socket, sys
def refuse(*a, **k): raise RuntimeError("the network was asked for")
socket.socket.connect = socket.getaddrinfo = refuse
from dimo.data.stream import PromptStream
print([len(PromptStream(f"{sys.argv[1]}/a.{kind}").take(50)) for kind in ("txt", "jsonl", "csv", "parquet")])
"""


def test_nothing_is_fetched_cached_or_copied(tmp_path):
    for kind in ("txt", "jsonl", "csv", "parquet"):
        write(tmp_path / "captions" / f"a.{kind}", [f"prompt {i}" for i in range(60)])
    home = tmp_path / "home"
    home.mkdir()
    env = {"HOME": str(home), "HF_HOME": str(home / "hf"), "TMPDIR": str(home), "PATH": "/usr/bin:/bin"}
    env["PYTHONPATH"] = ":".join(sys.path)
    command = [sys.executable, "-c", OFFLINE, tmp_path / "captions"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[50, 50, 50, 50]\n"), done.stderr
    assert list(home.iterdir()) == [] and len(list((tmp_path / "captions").iterdir())) == 4
