"""The five notebooks, really executed at smoke size; and what the repository promises about them."""

import base64
import functools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from forks import python
from jupyter_client.launcher import launch_kernel

import docs
from dimo.commands.notebooks import is_done, notebook_folder, print_summary, run_notebooks
from dimo.commands.report import write_run_report
from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.run.origin import run_config

pytestmark = pytest.mark.usefixtures("forked_kernels", "short_reports")
TINY = str(Path(__file__).parent / "data" / "tiny-ursa")
NAMES = ["01_inputs", "02_losses", "03_train", "04_diagnostics", "05_evaluation"]
# parameters of the run that most tests look at: a notebook's own, and keys by their short names and by their whole one
GIVEN = ["min_share=0.0", "max_train_steps=10", "batch_size=2", "videos_per_prompt=1", "evaluation.seed=3"]
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+\.png)\)")
TOUR = "00_tour"  # of what ships: `dimo run` does not need it; test_browser.py executes it


def cells(name):
    return json.loads((notebook_folder() / f"{name}.ipynb").read_text())["cells"]


def printed_in(notebook):
    return "".join(t for c in notebook["cells"] for o in c.get("outputs", []) for t in o.get("text", []))


def test_there_are_five_and_a_tour():
    assert sorted(p.stem for p in notebook_folder().glob("*.ipynb")) == [TOUR, *NAMES]


@pytest.mark.parametrize("name", [TOUR, *NAMES])
def test_notebooks_are_thin_and_carry_no_output(name):
    code = [c for c in cells(name) if c["cell_type"] == "code"]
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in code)
    assert [i for i, c in enumerate(code) if "parameters" in c["metadata"].get("tags", [])] == [0]
    assert "".join(code[-1]["source"]) == "checks.finish()"
    assert any("work_in_repository()" in "".join(c["source"]) for c in code)  # else slices and runs go astray
    assert max(len(c["source"]) for c in code) <= 45


@pytest.fixture(scope="module")
def short_reports():
    """Reports whose explorer has one setting: test_browser looks at whole ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dimo.commands.notebooks.write_run_report", functools.partial(write_run_report, most=1))
        yield


@pytest.fixture(scope="module")
def executed(tmp_path_factory, forked_kernels, short_reports):
    folder = tmp_path_factory.mktemp("run") / "smoke"
    settings = [f"experiment.output_dir={folder}", "model.device=cpu"]
    return run_notebooks("smoke", settings, GIVEN), settings


def test_all_five_execute_and_leave_a_report(executed):
    run, _ = executed
    assert sorted(p.name for p in (run.path / "notebooks").iterdir()) == sorted(
        f"{n}.{end}" for n in NAMES for end in ("ipynb", "html")
    )
    page = (run.path / "report.html").read_text()
    assert "student_1_argmax" in page and "sheet.png" in page and "notebooks/03_train.html" in page
    clips = base64.b64encode((run.path / "clips.mp4").read_bytes()).decode()  # in the page itself
    assert f'src="data:video/mp4;base64,{clips}"' in page
    assert run.status()["state"] == "finished" and (run.path / "curves.png").exists()
    last = json.loads((run.path / "notebooks" / "05_evaluation.ipynb").read_text())
    printed = printed_in(last)
    assert "ok   the teacher needs its passes" in printed and "FAIL" not in printed
    assert "?    the student has not collapsed" in printed and "-> evaluation.videos_per_prompt=2 or more" in printed
    assert "(reported, not checked: min_share is 0)" in printed and "the student reaches" not in printed
    assert last["metadata"]["papermill"]["parameters"]["overrides"][-1] == "evaluation.seed=3"


def test_every_figure_is_shown_as_a_picture(executed):
    run, _ = executed
    figures = {}
    for name in NAMES:
        notebook = json.loads((run.path / "notebooks" / f"{name}.ipynb").read_text())
        data = [o.get("data", {}) for c in notebook["cells"] for o in c.get("outputs", [])]
        figures[name] = [d for d in data if "".join(d.get("text/plain", "")).startswith("<Figure ")]
        pictures = [d["image/png"] for d in data if "image/png" in d]
        assert all("image/png" in d for d in figures[name]) and len(set(pictures)) == len(pictures)
        page = (run.path / "notebooks" / f"{name}.html").read_text()
        assert page.count('src="data:image/png') == len(pictures)
        described = re.findall(r'<img[^>]*alt="([^"]*)"', page.replace("\n", " "))
        assert len(described) == len(pictures) and min(map(len, described), default=9) > 8
        assert not any("No description" in text for text in described)
    assert [len(shown) for shown in figures.values()] == [3, 3, 1, 3, 0]


def test_the_documentation_shows_them_with_their_pictures(executed):
    run, _ = executed
    pages = docs.notebooks(sorted((run.path / "notebooks").glob("*.ipynb")), "Executed here.")
    index = pages["notebooks/index.md"]
    assert all(f"({name}.md)" in index for name in NAMES) and "[02 " in index and "Executed here." in index
    pictures = {path for path in pages if path.endswith(".png")}
    shown = {f"notebooks/{path}" for name in NAMES for path in PICTURE.findall(pages[f"notebooks/{name}.md"])}
    assert len(pictures) >= 10 and shown == pictures
    assert str(Path.cwd()) not in "".join(pages[f"notebooks/{name}.md"] for name in NAMES)


def test_a_second_time_nothing_is_executed_again(executed, capsys):
    run, settings = executed
    before = {p: p.stat().st_mtime_ns for p in (run.path / "notebooks").glob("*.ipynb")}
    run_notebooks("smoke", settings, GIVEN)
    assert capsys.readouterr().out.count("already done") == 5
    assert before == {p: p.stat().st_mtime_ns for p in (run.path / "notebooks").glob("*.ipynb")}


def test_a_failed_check_is_a_sentence_and_leaves_the_executed_copy(executed):
    run, settings = executed
    with pytest.raises(
        DimoError, match="notebook 05_evaluation failed: DimoError: 1 of .* checks failed: the student reaches 500%"
    ):
        run_notebooks("smoke", settings, ["min_share=5", *GIVEN[1:]], only=["05_evaluation"])
    failed = json.loads((run.path / "notebooks" / "05_evaluation.failed.ipynb").read_text())
    (error,) = [o for c in failed["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert len(error["traceback"]) == 1 and error["traceback"][0].startswith("DimoError: 1 of ")


def test_a_folder_of_another_configuration_is_refused_before_anything_starts(executed):
    run, settings = executed
    with pytest.raises(DimoError, match="belongs to a run with another configuration"):
        run_notebooks("smoke", [*settings, "optim.lr=1e-5"], GIVEN)


def test_all_five_take_it_as_training_does_in_bf16_from_hidden_states(tmp_path):
    """Preset distill_dimo, guidance included, on a checkpoint of URSA's layout, which is no world."""
    tiny = notebook_folder().parent / "tests" / "data" / "tiny-ursa"
    (tmp_path / "captions.txt").write_text("a red ball\na dog that jumps over the wall\n", encoding="utf-8")
    settings = [
        f"experiment.output_dir={tmp_path / 'run'}", "model.device=cpu", f"distill.teacher_ckpt={tiny}",
        f"distill.prompt_source={tmp_path / 'captions.txt'}", "distill.num_frames=2", "distill.height=8",
        "distill.width=16", "distill.max_prompt_length=9", "training.max_train_steps=6", "evaluation.teacher_steps=[2]",
        "evaluation.judged_videos=1",
    ]  # fmt: skip
    run = run_notebooks("distill_dimo", settings, ["clips=8", "passes=2"])
    pages = {name: (run.path / "notebooks" / f"{name}.ipynb").read_text() for name in NAMES}
    assert all("FAIL" not in page for page in pages.values())
    first = pages["01_inputs"]
    assert "latents_shape (2, 4, 8), K = 240" in first and "ok   BOV sits at (L, L, L)" in first
    assert "8 clips: the teacher's own samples in" in first and len(list((tmp_path / "clean_tokens").iterdir())) == 1
    assert first.count("ok   training's slice, of ") == 2 and "undecided between" in first  # random weights
    assert "keeps hidden states" in pages["02_losses"] and "ok   dimo: the gap opens at once" in pages["02_losses"]
    assert "ok   all metrics are finite" in pages["03_train"]
    assert "skipped: " in pages["04_diagnostics"] or "samples/" in (run.path / "report.html").read_text()
    assert "ok   every figure is finite" in pages["05_evaluation"]
    assert "ok   the student has not collapsed" in pages["05_evaluation"]
    assert "1/2 by chance" in " ".join(printed_in(json.loads(pages["05_evaluation"])).split())
    report = (run.path / "report.html").read_text()
    assert "<th>teacher_nll</th>" in report and "teacher_2" in report and "validity" not in report


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A folder of notebooks of one's own, the first without most cells, and the settings of a run."""
    folder = tmp_path / "notebooks"
    shutil.copytree(notebook_folder(), folder)
    notebook = json.loads((folder / "01_inputs.ipynb").read_text())
    notebook["cells"] = notebook["cells"][:3]  # with the imports
    (folder / "01_inputs.ipynb").write_text(json.dumps(notebook))
    monkeypatch.setattr("dimo.commands.notebooks.notebook_folder", lambda: folder)
    return folder, [f"experiment.output_dir={tmp_path / 'run'}", "model.device=cpu"]


def test_copies_are_left_alone_and_a_damaged_notebook_is_named_where_it_is_needed(copied, capsys):
    folder, settings = copied
    text = (folder / "01_inputs.ipynb").read_text()
    (folder / "01_inputs-Copy1.ipynb").write_text("not even a notebook")
    (folder / "05_evaluation.ipynb").write_text("<<<<<<< HEAD\n" + text)
    (folder / "04_diagnostics.ipynb").write_text(text[: len(text) // 2])
    (folder / "03_train.ipynb").write_text('{"cells": "none"}')
    (folder / "02_losses.ipynb").unlink()
    run = run_notebooks("smoke", settings, only=["01_inputs"])
    assert [p.name for p in (run.path / "notebooks").glob("*.ipynb")] == ["01_inputs.ipynb"]
    for name in NAMES[1:]:
        with pytest.raises(DimoError, match=f"{name}.ipynb is not a readable notebook .*git checkout"):
            run_notebooks("smoke", settings, only=[name])
    assert "05_evaluation: the student" not in capsys.readouterr().out


def test_the_kernel_is_this_python_whatever_is_installed_under_its_name(copied, tmp_path, monkeypatch, capfd):
    folder, settings = copied
    stale = tmp_path / "jupyter" / "kernels" / "python3"
    stale.mkdir(parents=True)
    spec = {"argv": ["/gone/python", "-f", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (stale / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", launch_kernel)  # a real one
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = json.loads((folder / "01_inputs.ipynb").read_text())
    look = "import sys\nfrom ipykernel.connect import get_connection_info\n"
    look += "print(sys.executable, get_connection_info(unpack=True)['transport'])"
    cell = {"cell_type": "code", "execution_count": None, "id": "look", "metadata": {}, "outputs": [], "source": look}
    notebook["cells"] = [*notebook["cells"][:2], cell]
    (folder / "01_inputs.ipynb").write_text(json.dumps(notebook))
    run = run_notebooks("smoke", settings, only=["01_inputs"])
    executed = json.loads((run.path / "notebooks" / "01_inputs.ipynb").read_text())
    assert "".join(executed["cells"][-1]["outputs"][0]["text"]).strip() == f"{sys.executable} ipc"
    assert "without encryption" not in capfd.readouterr().err


def test_without_its_page_a_notebook_counts_as_executed(copied, monkeypatch, capsys):
    _, settings = copied

    def broken(*_, **__):
        raise ValueError("No template sub-directory with name 'classic' found")

    monkeypatch.setattr("nbconvert.HTMLExporter", broken)
    for said in ("done in", "already done"):
        run = run_notebooks("smoke", settings, only=["01_inputs"])
        printed = capsys.readouterr()
        assert said in printed.out
        assert ("was not written: No template" in printed.err) == (said == "done in")
    assert not list((run.path / "notebooks").glob("*.html"))


def test_a_failure_is_told_as_its_own_and_not_as_the_last_ones(copied):
    folder, settings = copied
    out = RunFolder(settings[0].partition("=")[2])
    for name, words in (("01_inputs", "first trouble"), ("02_losses", "second trouble")):
        notebook = json.loads((folder / f"{name}.ipynb").read_text())
        fails = {"cell_type": "code", "execution_count": None, "id": "fails", "metadata": {}, "outputs": []}
        notebook["cells"] = [*notebook["cells"][:2], fails | {"source": f"raise ValueError('{words}')"}]
        (folder / f"{name}.ipynb").write_text(json.dumps(notebook))
        with pytest.raises(DimoError, match=words):
            run_notebooks("smoke", settings, only=[name])
        assert out.status()["state"] == "failed" and words in out.status()["error"]


def test_parameters_are_read_by_their_last_part_and_refused_before_anything_starts(executed, tmp_path):
    run, settings = executed
    with pytest.raises(DimoError, match="parameter min_share must be like its default 0.0, got 'high'"):
        run_notebooks("smoke", settings, ["min_share=high"])
    for parameter, sentence in [
        ("max_train_stps=3", "nor a configuration key; did you mean 'max_train_steps'"),
        ("max_train_steps=many", "training.max_train_steps"),
        ("num_processes=0", "training.num_processes must be at least 1"),
        ("engine=fsdp9", "training.engine 'fsdp9' is neither"),
        ("teacher_ckpt=/nowhere", "/nowhere"),
        ("prompt_file=/nowhere/captions.txt", "distill.prompt_source must be world.*'/nowhere/captions.txt' does not"),
    ]:
        with pytest.raises(DimoError, match=sentence):
            run_notebooks("smoke", [f"experiment.output_dir={tmp_path}/new"], [parameter])
    assert list(tmp_path.iterdir()) == []


def test_from_only_and_force(executed, capsys):
    run, settings = executed
    run_notebooks("smoke", settings, GIVEN, start="04_diagnostics")
    assert capsys.readouterr().out.count("already done") == 2
    with pytest.raises(DimoError, match="select no notebook"):
        run_notebooks("smoke", settings, GIVEN, only=["01_inputs"], start="03_train")
    with pytest.raises(DimoError, match="there is no notebook '6'"):
        run_notebooks("smoke", settings, GIVEN, start="6")
    before = (run.path / "notebooks" / "05_evaluation.ipynb").stat().st_mtime_ns  # which takes least: figures are kept
    run_notebooks("smoke", settings, GIVEN, only=["05_evaluation"], force=True)
    assert (run.path / "notebooks" / "05_evaluation.ipynb").stat().st_mtime_ns > before
    assert run.status()["state"] == "finished"
    report = (run.path / "report.html").read_text()  # not of this notebook alone
    assert all(f'href="notebooks/{name}.html"' in report for name in NAMES)


def test_a_short_name_is_the_key(executed):
    run, _ = executed
    config = run_config(run.path)
    assert config.training.max_train_steps == 10 and config.distill.batch_size_per_gpu == 2
    assert config.evaluation.videos_per_prompt == 1 and run.metrics()[-1]["step"] == 10


@pytest.mark.parametrize(("only", "state"), [("01_inputs", "failed"), ("03_train", "failed")])
def test_a_killed_kernel_is_a_failure_that_status_tells(tmp_path, only, state):
    """In-process training: the kernel is the training."""
    out = tmp_path / "run"
    words = ["-m", "dimo", "run", "-c", "smoke", "--only", only, f"experiment.output_dir={out}"]
    words += ["experiment.log_every=1", "model.device=cpu", "training.max_train_steps=2000"]
    process = python.start(words, stderr=subprocess.PIPE, text=True)
    started = out / ("metrics.jsonl" if only == "03_train" else f"notebooks/.{only}.partial.ipynb")
    end = time.monotonic() + 60
    kernel = None
    while not (kernel and started.exists()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
        kernel = next((p for p in psutil.Process(process.pid).children() if p.name().startswith("ipykernel")), None)
    kernel.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "the same command continues" in err and "Traceback" not in err
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == state and only in status["error"]
    assert not (out / "notebooks" / f"{only}.ipynb").exists()


def test_importing_the_engine_does_not_import_jupyter_or_pictures():
    engine = "dimo, dimo.train.trainer, dimo.commands.cli, dimo.commands.suite_worker, dimo.evaluation.worker"
    code = f"import sys, {engine}; print([m for m in sys.modules if m in " \
           "('IPython', 'papermill', 'matplotlib', 'nbconvert', 'datasets', 'diffnext')])"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("text", ["", '{"cells": [', "null", "{}", '{"cells": [{}]}'])
def test_a_damaged_executed_notebook_is_executed_again(tmp_path, text):
    source, done = notebook_folder() / "01_inputs.ipynb", tmp_path / "01_inputs.ipynb"
    notebook = json.loads(source.read_text(encoding="utf-8"))
    notebook["metadata"]["papermill"] = {"parameters": {"config": "smoke"}}
    done.write_text(json.dumps(notebook), encoding="utf-8")
    assert is_done(done, source, {"config": "smoke"})
    done.write_text(text, encoding="utf-8")
    assert not is_done(done, source, {"config": "smoke"})


@pytest.mark.parametrize(
    ("teacher", "said", "unsaid"), [(TINY, "export ", "-c shapes"), ("shapes", "-c shapes", "export")]
)
def test_what_comes_next_suits_the_teacher(teacher, said, unsaid, tmp_path, capsys):
    (tmp_path / "checkpoints" / "final").mkdir(parents=True)
    print_summary(RunFolder(tmp_path, writes=False), teacher)
    following = capsys.readouterr().out.split("next:")[1]
    assert said in following and unsaid not in following
