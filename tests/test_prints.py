"""What commands print, read as a newcomer: slips, one line of progress, how good it is, and what comes next."""

import io
import json
import re
import shlex
import shutil
import sys

import pytest
from conftest import TINY

from dimo.commands.cli import main, parse
from dimo.commands.ending import ending, finished, program, sampling
from dimo.commands.report import write_run_report
from dimo.commands.sample import Request, sample_to_folder
from dimo.config import load_config, to_yaml
from dimo.errors import nearest
from dimo.evaluation.summary import format_summary
from dimo.run.folder import RunFolder
from dimo.run.progress import OneLine
from dimo.worlds import SHIPPED_STUDENT


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tran"], "dimo: there is no command 'tran'; did you mean 'train'?\n"),
        (["run", "shapes"], "got 'shapes'; a preset is given by -c shapes\n"),
        (["export"], "dimo: export needs RUN, OUT, as in `dimo export runs/ursa exported`; see dimo export --help\n"),
        (["world", "train"], "dimo: world train needs NAME, as in `dimo world train shapes -o "),
        (["sample", "--seed", "x"], "dimo: sample: argument --seed: "),
    ],
)
def test_a_slip_is_a_sentence_with_the_way_out(words, sentence, capsys):
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said_first"),
    [
        ([], "usage: dimo ["),
        (["help"], "usage: dimo ["),
        (["help", "train"], "usage: dimo train"),
        (["--version"], "dimo 0."),
    ],
)
def test_asking_for_help_is_no_error(words, said_first, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    said = capsys.readouterr()
    assert end.value.code == 0 and not said.err
    assert said.out.startswith(said_first)


class Terminal(io.StringIO):
    """Shows what a terminal of one line would: a carriage return and `erase` empty the line."""

    def isatty(self):
        return True

    def lines(self):
        return [line.split("\r\x1b[K")[-1] for line in self.getvalue().split("\n")]


def test_progress_of_another_process_is_one_line_in_a_terminal(monkeypatch):
    terminal, line = Terminal(), OneLine()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    line.write("step 40/720  loss 0.1\nstep 80/720  loss 0.2\n")
    line.write("dimo: a checkpoint is damaged\n")
    line.write(f"evaluate 5/90 passes  {'x' * 100}\n")
    assert terminal.lines()[0] == "dimo: a checkpoint is damaged" and len(terminal.lines()[1]) == 39
    line.clear()
    print("done", file=terminal)
    assert terminal.lines() == ["dimo: a checkpoint is damaged", "done", ""]


def test_progress_of_another_process_is_left_alone_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    text = "step 40/720  loss 0.1\nstep 80/720  loss 0.2\n"
    OneLine().write(text)
    assert sys.stderr.getvalue() == text


def shipped():
    return json.loads((SHIPPED_STUDENT / "report.json").read_text())


def test_the_summary_of_a_world_fits_a_terminal_and_says_what_the_report_says():
    rows, lines = shipped(), format_summary(shipped()).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["validity", "adherence", "coverage"]
    cells = next(line for line in lines if line.startswith("teacher, 4 passes")).split()[-3:]
    assert [float(cell) for cell in cells] == pytest.approx(
        [rows["teacher_4"][name] for name in ("validity", "adherence", "coverage")], abs=5e-4
    )
    assert lines[2].startswith("what it started from, 1 pass") and lines[2].endswith("undefined")
    assert len(lines) == 1 + 7 + 1 + 3  # without arg-max rows


def test_the_summary_without_an_oracle_has_the_judges_figures_and_the_floor():
    judged = {"recovered": 0.25, "retrieval": 0.5, "feature_coverage": None, "spread_ratio": 0.9, "spread": 1.0}
    lines = format_summary({name: judged for name in ("student_1", "student_2", "teacher_25", "teacher_25_again")})
    assert max(map(len, lines.splitlines()[:5])) <= 100
    assert lines.splitlines()[2].split() == ["student,", "2", "passes", "0.250", "0.500", "undefined", "0.900"]
    assert lines.splitlines()[4].startswith("teacher, 25 passes, other noise")
    alone = format_summary({"student_1": {"spread": 1.0, "distinct": 0.5}})
    assert alone.splitlines()[0].split() == ["spread", "distinct"]


@pytest.fixture
def run(tmp_path):
    made = RunFolder.open(tmp_path / "run", to_yaml(load_config("smoke")))
    for step, entropy in ((5, 0.4), (10, 0.1)):
        made.log({"step": step, "entropy/student": entropy, "loss/aux": 1.0})
    made.write_status(state="finished", step=10, max_steps=10)
    (made.path / "checkpoints" / "final").mkdir(parents=True)
    yield made
    made.close()


def test_the_end_of_a_training_names_what_was_made_and_commands_that_are_taken(run):
    said = finished(run, "shapes")
    assert f"finished: step 10 of {run.path}" in said and "0.400 at first, 0.100 now" in said
    made, _, following = said.partition("next:\n")
    assert f"{run.path / 'checkpoints/final'}" in made and "report.html" not in made
    commands = [shlex.split(line, comments=True) for line in following.splitlines()]
    assert [parse(words[words.index("dimo") + 1 :]).command for words in commands] == ["evaluate", "sample", "report"]
    assert "a red ball" in sampling(run.path, str(TINY))


def test_alarms_that_still_ring_are_told(run):
    run.log({"step": 20, "entropy/student": float("nan"), "loss/aux": 1.0})
    assert "alarm non_finite, since step 20: " in finished(run, "shapes")


def test_a_command_that_the_shell_would_not_find_is_printed_with_its_path(tmp_path, monkeypatch):
    own = tmp_path / "bin" / "dimo"
    own.parent.mkdir()
    own.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(own)])
    monkeypatch.setenv("PATH", "/nowhere")
    assert program() == str(own) and f"{own} runs" in ending(tmp_path, [], {"runs": "all runs"})
    monkeypatch.setenv("PATH", str(own.parent))
    assert program() == "dimo"


def test_without_a_checkpoint_the_student_that_ships_is_sampled(tmp_path, capsys):
    assert main(["sample", "--prompt", "blue bar moving up", "--out_dir", str(tmp_path)]) == 0
    how = json.loads((tmp_path / "0000.json").read_text())
    assert how["student_ckpt"] == str(SHIPPED_STUDENT) and how["steps"] == 1
    assert "(the student, 1 pass: blue bar moving up)" in capsys.readouterr().out


def test_a_path_with_a_space_is_one_word_of_the_next_command(tmp_path, capsys):
    folder = shutil.copytree(TINY, tmp_path / "my teacher")
    assert main(["inspect", str(folder)]) == 0
    following = [line.split("  # ")[0] for line in capsys.readouterr().out.split("next:\n")[1].splitlines()]
    assert len(following) == 2 and all(str(folder) in shlex.split(command) for command in following)
    run = RunFolder.open(tmp_path / "my run", to_yaml(load_config("smoke")))
    commands = finished(run, "shapes").split("next:\n")[1].splitlines()
    assert len(commands) == 3 and all(str(run.path) in shlex.split(c.split("  # ")[0]) for c in commands)


def test_the_page_of_a_run_whose_report_is_none_says_so(tmp_path):
    run = RunFolder.open(tmp_path / "run", to_yaml(load_config("smoke")))
    for text, sentence in (
        ('{"student_1": {"valid', "There is no table: .*report.json is damaged: "),
        ('{"diverged": "after step 3"}', "There is no table: the run diverged: after step 3"),
        ('{"rows": []}', "There is no table: .*report.json is not what `dimo evaluate` writes"),
    ):
        (run.path / "report.json").write_text(text)
        assert re.search(sentence, write_run_report(run).read_text())


def test_a_student_that_is_asked_for_other_passes_than_its_own_is_warned_of(tmp_path, caplog):
    def said(**request) -> list[str]:
        caplog.clear()
        sample_to_folder(Request(**request), ["blue bar moving up"], tmp_path)
        return caplog.messages

    sentence = "this student was trained for {}, and is asked for {}: its videos are likely worse"
    ships = {"student_ckpt": str(SHIPPED_STUDENT)}
    assert said(**ships, steps=2) == [sentence.format("1 pass", 2)] and said(**ships) == said(steps=2) == []
    run = RunFolder.open(tmp_path / "run", to_yaml(load_config("smoke", ["distill.student_steps=2"])))
    shutil.copytree(SHIPPED_STUDENT, run.path / "checkpoints" / "final")
    assert said(student_ckpt=str(run.path), steps=1) == [sentence.format("2 passes", 1)]
    assert said(student_ckpt=str(run.path)) == []


def test_a_folder_may_be_named_by_o_as_of_other_commands(tmp_path):
    for flag in ("-o", "--out", "--out_dir"):
        assert main(["sample", "--prompt", "blue bar moving up", flag, str(tmp_path / flag)]) == 0
        assert (tmp_path / flag / "0000.mp4").exists()


def test_names_with_commas_are_told_apart():
    assert nearest("nix", ["batch, shifted", "batch"]) == "; choose from 'batch', 'batch, shifted'"
    assert nearest("nix", ["draws", "batch"]) == "; choose from batch, draws"


def test_no_help_has_an_empty_default(capsys):
    with pytest.raises(SystemExit):
        main(["world", "train", "sprites", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: none)" in text and "(default: )" not in text
