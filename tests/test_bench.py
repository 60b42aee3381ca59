"""`dimo bench` refuses before it measures: what was asked for, what the machine lacks, where the report cannot go."""

import importlib.util
import shlex
from types import SimpleNamespace

import pytest
import torch

from dimo import bench
from dimo.bench.parts import Clock, kernels_of
from dimo.commands.cli import main
from dimo.commands.examples import EXAMPLES


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch, tmp_path):
    """Whoever comes as far as the clock fails; the current folder is empty."""

    def measured(clock):
        raise AssertionError("measured before it was refused")

    monkeypatch.setattr(bench, "matrix_product", measured)
    monkeypatch.chdir(tmp_path)


def refusal(capsys, *arguments) -> str:
    assert main(["bench", "-c", "shapes", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dimo: ") and error.count("\n") == 1
    return error


def test_the_examples_of_its_help_come_as_far_as_the_clock():
    for words in EXAMPLES["bench"]:
        with pytest.raises(AssertionError, match="measured before it was refused"):
            main(["bench", *shlex.split(words)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--against", "naive,upstrem"], "--against: unknown name 'upstrem'; did you mean 'ups"),
        (["--parts", "step,loses"], "--parts: unknown name 'loses'; did you mean 'losses'"),
        (["--size", "17B"], "size must be one of 0.6B, 1.7B, tiny, got '17B'; did you mean '1.7B'"),
        (
            ["--against", "naive", "distill.estimator=reinforce"],
            "naive needs distill.estimator=dimo distill.divergence=fo",
        ),
        (
            ["--against", "naive", "distill.divergence=forward", "distill.t_draws=1"],
            "naive needs distill.aux_steps=1, got distill.aux_steps=2\n",
        ),
        (["model.device=cuda"], "cuda"),
        (["--parts", ""], "--parts must name what to measure, some of step, "),
        (["--teacher_ckpt", __file__], f"{__file__} is a file"),
        (
            ["--size", "tiny", "--teacher_ckpt", "shapes"],
            "--size tiny stands for a teacher without weights, so",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_first(arguments, sentence, capsys, tmp_path):
    if arguments == ["model.device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert sentence in refusal(capsys, *arguments) and list(tmp_path.iterdir()) == []


def test_upstream_that_is_not_installed_is_said_first(capsys, tmp_path):
    if importlib.util.find_spec("diffnext"):
        pytest.skip("diffnext is installed; tests/test_upstream.py has what it cannot run")
    assert "diffnext is not installed: pip install " in refusal(capsys, "--against", "upstream")
    assert "diffnext is not installed: pip install " in refusal(capsys, "--size", "tiny", "--against", "upstream")
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_could_not_be_written_is_refused_first(capsys, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert "--out must be a file, but folder is a folder" in refusal(capsys, "-o", "folder")
    assert "file is a file, not a folder" in refusal(capsys, "-o", "file/deep/bench.json")


def test_with_a_cuda_graph_a_replay_is_profiled():
    taken: list[tuple[int, str]] = []
    graphs = SimpleNamespace(captured={}, kind=lambda index: index % 2)

    def step(index):
        taken.append((index, "replay" if graphs.kind(index) in graphs.captured else "ordinary"))
        if index == 3:
            graphs.captured[graphs.kind(index)] = "a graph"

    kernels_of(SimpleNamespace(graphs=graphs, step=step), Clock(torch.device("cpu")))
    assert taken == [*((index, "ordinary") for index in range(4)), (1, "replay")]
