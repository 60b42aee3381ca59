"""A terminal, a pipe or a disk that takes no more output: what runs goes on, and ends with its own exit code."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios

import pytest
from forks import python

from dimo.commands.cli import main
from dimo.output import LastingStream
from dimo.run.folder import RunFolder

# imports nothing that takes long; what is said last is in a file
WORK = """
import os, sys
from dimo.output import lasting_output
with lasting_output():
    print("begun", flush=True)
    sys.stdin and sys.stdin.readline()
    for _ in range(3):
        print("x" * 100_000)
        print("y", file=sys.stderr, flush=True)
    raw = [os.write(number, b"raw") for number in (1, 2)]
    with open(sys.argv[1], "w") as file:
        file.write(f"done {raw} {file.fileno()}")
    print("buffered to the end")
sys.exit(7)
"""


def work(tmp_path, out, err, **more):
    words = [sys.executable, "-c", WORK, str(tmp_path / "said")]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=out, stderr=err, text=True, **more)


@pytest.mark.parametrize("kind", ["pipe", "pty"])
def test_who_has_nobody_to_read_it_goes_on(tmp_path, kind):
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    process = work(tmp_path, writer, writer, start_new_session=True)
    os.close(writer)
    assert os.read(reader, 5) == b"begun"
    os.close(reader)
    process.communicate("go on\n")
    # its descriptors lead to nowhere now, so that a library's own write is not refused either
    assert process.returncode == 7 and (tmp_path / "said").read_text().startswith("done [3, 3]")


def test_closed_descriptors_are_no_file_s_number(tmp_path):
    words = f"exec {sys.executable} -c '{WORK}' {tmp_path}/said <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", words]).returncode == 7
    said = (tmp_path / "said").read_text()
    assert said.startswith("done [3, 3]") and int(said.split()[-1]) > 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has /dev/full")
def test_a_full_disk_under_the_output_is_no_end_and_no_exit_code(tmp_path):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", WORK.replace("raw = ", "raw = 0 and "), str(tmp_path / "said")],
            input="\n", stdout=full, stderr=full, text=True,
        )  # fmt: skip
    assert process.returncode == 7 and (tmp_path / "said").read_text().startswith("done 0")


def test_output_that_has_room_again_is_written_again():
    class Full:
        room, text = False, ""

        def write(self, text):
            if not self.room:
                raise OSError(28, "No space left on device")
            self.text += text

        flush = lambda self: None  # noqa: E731

    stream = LastingStream(Full())
    print("lost", file=stream)
    stream.stream.room = True
    print("kept", file=stream)
    assert stream.stream.text == "kept\n" and stream.lost[0].errno == 28


def test_what_a_terminal_cannot_spell_is_replaced(tmp_path):
    with open(tmp_path / "a", "w", encoding="ascii") as file:
        print("caf\xe9", file=LastingStream(file))
    assert (tmp_path / "a").read_text() == "caf?\n"


def test_a_command_whose_result_is_what_it_prints_says_that_it_was_lost(monkeypatch, capsys):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        flush = lambda self: None  # noqa: E731

    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["config", "-c", "smoke"]) == 2
    assert capsys.readouterr().err == "dimo: the output could not be written: No space left on device\n"


@pytest.mark.parametrize("kind", ["pipe", "pty"])
def test_training_outlives_its_terminal(tmp_path, kind):
    """A bar in a terminal, lines in a pipe (`dimo train ... | head -1`); both are gone after the first step."""
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    if kind == "pty":
        termios.tcsetwinsize(writer, (24, 120))  # else the bar has no room
    words = ["train", "-c", "smoke", "model.device=cpu", "distill.batch_size_per_gpu=2", "experiment.log_every=1"]
    words += [f"experiment.output_dir={tmp_path}", "training.max_train_steps=12", "experiment.sample_every=99"]
    process = python.start(
        ["-m", "dimo", *words], stdin=subprocess.DEVNULL, stdout=writer, stderr=writer,
        # as for `nohup` or `disown`: else a terminal's end is a SIGHUP
        start_new_session=True, ignored=[signal.SIGHUP],
    )  # fmt: skip
    os.close(writer)
    seen = b""
    while not re.search(rb"[1-9]\d*/12", seen):
        seen += os.read(reader, 4096)
    os.close(reader)
    assert process.wait() == 0
    assert RunFolder(tmp_path).status()["state"] == "finished"
    assert [row["step"] for row in RunFolder(tmp_path).metrics()] == list(range(1, 13))
