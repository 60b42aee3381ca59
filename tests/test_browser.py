"""A real browser on the explorer: in JupyterLab, where clicks and keys reach Python, and in a report by itself."""

import importlib
import json
import os
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import python
from safetensors.torch import save_file

from dimo.commands.report import write_run_report
from dimo.config import load_config, to_yaml
from dimo.run.folder import RunFolder
from dimo.train.trainer import Trainer
from dimo.ursa.weights import read_weights
from dimo.views.explorer_twin import end_of_bars
from dimo.views.explorer_view import ExplorerView, colours_of, scale_of
from dimo.views.models import open_models
from dimo.views.sheets import save_sheet
from dimo.worlds import SHIPPED_STUDENT, checkpoint_folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REQUIRED = bool(os.environ.get("DIMO_NEEDS_BROWSER"))  # where a skip is a failure
pytestmark = pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="chromium is not installed")
if not REQUIRED:
    pytest.importorskip("anywidget")
playwright = importlib.import_module("playwright.sync_api") if REQUIRED else pytest.importorskip("playwright.sync_api")
PIXELS = """(canvas) => {
  const pen = canvas.getContext("2d"), all = pen.getImageData(0, 0, canvas.width, canvas.height).data, found = {};
  for (let i = 0; i < all.length; i += 4) if (all[i + 3] === 255) {
    const key = [all[i], all[i + 1], all[i + 2]].join(); found[key] = (found[key] || 0) + 1;
  }
  return found;
}"""
TOP = """() => [...document.querySelectorAll(".dimo .panel")].map((panel) => [panel.dataset.of,
  [...panel.querySelectorAll(".row")].map((row) => [+row.dataset.code, +row.dataset.p])])"""

# how far the bold text of a row, of code 63,999, is wider than its column
TOO_WIDE = """() => Math.max(...[...document.querySelectorAll(".dimo .panel .row")].flatMap((row) => {
  row.className = "row x_hat"; row.querySelector("span").textContent = "▸63999";
  return [...row.querySelectorAll("span")].map((span) => {
    const text = document.createRange(); text.selectNodeContents(span);
    return text.getBoundingClientRect().width - span.getBoundingClientRect().width; }); }))"""


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, "chromium is not installed: apt-get install -y --no-install-recommends chromium fonts-dejavu-core"
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def page_of(browser):
    """A page, and what must stay empty: complaints on its console, and requests off this machine."""
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    wrong = []
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    here = ("http://127.0.0.1", "ws://127.0.0.1", "file://", "data:", "blob:")
    page.on("request", lambda request: request.url.startswith(here) or wrong.append(request.url))
    return page, wrong


def cell_of(canvas, frame, row, column, grid=(3, 4, 4)):
    """The middle of a token on a map, in CSS pixels."""
    across, cell, gap, head = (int(canvas.get_attribute(f"data-{n}")) for n in ("across", "cell", "gap", "head"))
    x = frame % across * (cell * grid[2] + gap) + 2 + (column + 0.5) * cell
    y = frame // across * (cell * grid[1] + head + gap) + head + (row + 0.5) * cell
    ratio = canvas.evaluate("(c) => c.getBoundingClientRect().width / c.width")
    return {"x": x * ratio, "y": y * ratio}


def colours_shown(canvas):
    return {tuple(map(int, key.split(","))): count for key, count in canvas.evaluate(PIXELS).items()}


def expected(explorer, request):
    view, about = explorer.view(request), explorer.about()
    values = np.frombuffer(view["panes"][-1]["values"], "<f4")
    return {tuple(map(int, c)) for c in colours_of(values, *scale_of(view, about))}


def same_top(shown, top):
    """The panels have the codes and probabilities of a live answer, as far as these are not negligible."""
    want = [[one["of"], [[c, p] for c, p in zip(one["codes"], one["p"]) if p > 1e-6]] for one in top]
    got = [[of, [row for row in rows if row[1] > 1e-6]] for of, rows in shown]
    same = [[of, [code for code, _ in rows]] for of, rows in got] == [[of, [c for c, _ in rows]] for of, rows in want]
    off = max(abs(a[1] / b[1] - 1) for (_, g), (_, w) in zip(got, want) for a, b in zip(g, w))
    return same and off < 1e-3


def same_pixels(canvas, explorer, request):
    """Every colour of the twin's map covers at least a third of a cell; nothing else but frame and labels is drawn."""
    shown = colours_shown(canvas)
    least = int(canvas.get_attribute("data-cell")) ** 2 / 3
    return all(shown.get(colour, 0) > least for colour in expected(explorer, request))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of a few steps."""
    folder = tmp_path_factory.mktemp("runs") / "few"
    keys = ["training.max_train_steps=4", "experiment.save_every=2", "experiment.sample_every=4"]
    keys += ["experiment.log_every=1"]
    keys += ["distill.batch_size_per_gpu=2", "model.device=cpu", f"experiment.output_dir={folder}"]
    Trainer(load_config("smoke", keys)).train(progress=False)
    return folder, keys


@pytest.fixture(scope="module")
def lab(tmp_path_factory, trained):
    """JupyterLab, whose kernels have imported what it has; yields its address. The tour has few videos."""
    tmp_path = tmp_path_factory.mktemp("lab")
    (tmp_path / "root").mkdir()
    given = {
        "00_tour": "prompts_shown, videos_per_prompt, seed = 2, 4, 0",
        "01_inputs": f"config, overrides, clips, passes = 'smoke', {trained[1]}, 64, 25",
        "04_diagnostics": f"config, overrides, follow = 'smoke', {trained[1]}, False",
    }
    for name, parameters in given.items():
        notebook = json.loads((Path(__file__).parents[1] / "notebooks" / f"{name}.ipynb").read_text())
        for cell in notebook["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                cell["source"] = parameters
        (tmp_path / "root" / f"{name}.ipynb").write_text(json.dumps(notebook))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {f"JUPYTER_{n}_DIR": str(tmp_path / n.lower()) for n in ("CONFIG", "DATA", "RUNTIME")}
    (tmp_path / "config").mkdir()
    words = [
        "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
        "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={tmp_path / 'root'}",
        "--expose-app-in-browser", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    env = os.environ | places | {"PYTHONPATH": str(Path(__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "log", "w") as log:
        process = python.start(words, env=env, stdout=log, stderr=log, cwd=tmp_path)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/lab"
    finally:
        process.terminate()
        process.wait(20)


OPEN = """async (name) => { const app = jupyterapp; await app.restored; app.shell.currentWidget?.dispose();
  const w = await app.commands.execute("docmanager:open", { path: name });
  await w.context.ready; await w.sessionContext.ready; await w.sessionContext.session.kernel.info; }"""
RUN = "() => jupyterapp.commands.execute('notebook:run-all-cells')"
ASK = """async (code) => { let said = ""; const kernel = jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  const asked = kernel.requestExecute({ code });
  asked.onIOPub = (m) => { if (m.header.msg_type === "stream") said += m.content.text; };
  await asked.done; return said; }"""


@pytest.fixture(scope="module")
def lab_page(browser, lab):
    """JupyterLab's page, which takes as long to load as a notebook to run, and what must stay empty."""
    page, wrong = page_of(browser)
    page.goto(lab)
    page.wait_for_function("() => window.jupyterapp", timeout=60_000)
    yield page, wrong
    page.close()


def run_all(page, name):
    """Open a notebook in place of the one before and run all of its cells; returns what its checks say, by name."""
    page.evaluate(OPEN, f"{name}.ipynb")
    page.evaluate(RUN)
    return json.loads(page.evaluate(ASK, "import json; print(json.dumps(checks.rows))"))


def said_by(page, code):
    return json.loads(page.evaluate(ASK, f"import json; print(json.dumps({code}))"))


def until(page, condition):
    for _ in range(100):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it did not come")


def test_in_jupyterlab_the_checks_of_notebook_01_are_all_there(lab_page):
    page, wrong = lab_page
    rows = run_all(page, "01_inputs")
    assert all(passed for passed, _ in rows.values()) and "training's slice, of logits is not misread" in rows
    assert wrong == []


def test_in_jupyterlab_notebook_04_leads_from_a_curve_to_a_token(lab_page, trained):
    """Clicks on a token and on the dashboard, keys, and t."""
    page, wrong = lab_page
    rows = run_all(page, "04_diagnostics")
    unsure = {name for name, (passed, _) in rows.items() if passed is None}  # a run of four steps is not watched
    assert unsure == {"no alarm of collapse rings at the end"} and False not in [passed for passed, _ in rows.values()]
    assert "the student has not collapsed" in rows
    page.wait_for_selector(".dimo .panel .row", timeout=60_000)
    explorer = ExplorerView([open_models(trained[0])])
    first, canvas = explorer.first_request(), page.query_selector_all(".dimo canvas.map")[1]
    canvas.scroll_into_view_if_needed()
    assert same_pixels(canvas, explorer, first)
    before = page.evaluate(TOP)
    canvas.click(position=cell_of(canvas, 2, 0, 1))
    until(page, lambda: page.evaluate(TOP) != before)
    assert same_top(page.evaluate(TOP), explorer.view(first | {"token": [2, 0, 1]})["panes"][0]["top"])
    assert said_by(page, "explorer.asked['token']") == [2, 0, 1]
    colours = colours_shown(canvas)
    slider = page.query_selector(".dimo input[aria-label=t]")
    slider.press("ArrowRight")
    until(page, lambda: colours_shown(canvas) != colours)
    until(page, lambda: said_by(page, "explorer.asked['panes'][0]['t']") == 0.21)
    for key, where in (("ArrowDown", [2, 1, 1]), ("PageUp", [1, 1, 1])):
        canvas.press(key)
        until(page, lambda where=where: said_by(page, "explorer.asked['token']") == where)
    canvas.press("s")
    until(page, lambda: said_by(page, "explorer.asked['statistic']") == "kl_from_teacher")

    curves = page.query_selector("img[alt^='curves of the training']")
    curves.scroll_into_view_if_needed()
    x, y = said_by(page, "(lambda b, f: [b.x0 / f.width + 0.02, 1 - b.y1 / f.height + 0.02])"
                         "(board.figure.axes[0].bbox, board.figure.bbox)")  # fmt: skip
    box = curves.bounding_box()
    curves.click(position={"x": x * box["width"], "y": y * box["height"]})
    until(page, lambda: said_by(page, "board.about.value").startswith("below: "))
    assert said_by(page, "board.about.value") == "below: few at step 2"
    page.wait_for_function("() => document.querySelectorAll('.dimo').length === 2")
    assert said_by(page, "board.explorer.children[0].about['models']") == ["few, step 2"]
    assert wrong == []


def test_in_jupyterlab_a_click_and_a_key_reach_python(lab_page):
    page, wrong = lab_page
    rows = run_all(page, "00_tour")
    assert all(passed for passed, _ in rows.values()) and len(rows) == 3
    page.wait_for_selector(".dimo .panel .row", timeout=60_000)
    canvas = page.query_selector_all(".dimo canvas.map")[1]
    explorer = ExplorerView([open_models("shapes", student=SHIPPED_STUDENT)])
    canvas.scroll_into_view_if_needed()
    first = explorer.first_request()
    assert same_pixels(canvas, explorer, first)

    shown = f"() => JSON.stringify(({TOP})())"
    before = page.evaluate(shown)
    canvas.click(position=cell_of(canvas, 1, 2, 3))
    page.wait_for_function(f"(before) => ({shown})() !== before", arg=before)
    assert same_top(page.evaluate(TOP), explorer.view(first | {"token": [1, 2, 3]})["panes"][0]["top"])
    assert page.evaluate(ASK, "print(explorer.asked['token'])").strip() == "[1, 2, 3]"

    colours = colours_shown(canvas)
    canvas.press(".")
    page.wait_for_function("() => document.querySelector('.dimo').innerText.includes('t 0.21')")
    assert colours_shown(canvas) != colours
    canvas.press("ArrowLeft")
    page.wait_for_function("() => document.querySelector('.dimo').innerText.includes('frame 1, row 2, column 2')")
    pane = first["panes"][0] | {"t": 0.21}
    until(page, lambda: said_by(page, "explorer.asked['token']") == [1, 2, 2])
    assert said_by(page, "explorer.asked['panes']") == [pane]
    assert same_pixels(canvas, explorer, first | {"panes": [pane], "token": [1, 2, 2]})

    said = page.evaluate(
        ASK, "explorer.show(t=0.9, statistic='kl_from_teacher', of='student'); print(len(explorer.view['panes']))"
    )
    assert said.strip() == "1"
    page.wait_for_function(
        "() => document.querySelector('.dimo').innerText.includes('KL(teacher || network), student, t 0.9')"
    )
    assert wrong == []


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a run whose student is the one that ships."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    config = load_config("smoke", ["model.device=cpu", f"experiment.output_dir={folder}"])
    run = RunFolder.open(folder, to_yaml(config))
    run.write_status(state="finished", step=50, max_steps=50)
    run.write_environment()
    for step in (1, 25, 50):
        run.log({"step": step, "entropy/student": 1.0 / step, "loss/aux": 0.5})
        save_sheet(run.path / "samples" / f"step-{step:08d}.png", {"a": torch.rand(1, 3, 8, 8, 3)}, ["p"])
    first = folder / "checkpoints" / "step-00000010"
    first.mkdir(parents=True)
    for name in ("student", "aux"):
        save_file(read_weights(checkpoint_folder("shapes") / "transformer"), first / f"{name}.safetensors")
    final = folder / "checkpoints" / "final"
    final.mkdir()
    torch.save(read_weights(SHIPPED_STUDENT), final / "student.pt")
    return write_run_report(run)


def test_a_report_without_a_checkpoint_has_its_dashboard(browser, tmp_path):
    config = load_config("smoke", ["model.device=cpu", f"experiment.output_dir={tmp_path / 'new'}"])
    run = RunFolder.open(tmp_path / "new", to_yaml(config))
    run.write_status(state="running", step=2, max_steps=50)
    for step in (1, 2):
        run.log({"step": step, "entropy/student": 1.0 / step})
    page, wrong = page_of(browser)
    page.goto(write_run_report(run).as_uri())
    assert "There is none: " in page.inner_text("body") and "no checkpoint yet" in page.inner_text("body")
    page.focus(".curves")
    page.keyboard.press("ArrowLeft")
    told = page.inner_text(".told")
    assert "Step 1\n" in told and "entropy (nats per token): 1.00" in told and "explorer" not in told
    assert wrong == []
    page.close()


def test_a_report_works_from_a_file_by_click_and_key(browser, report):
    page, wrong = page_of(browser)
    page.goto(report.as_uri())
    page.wait_for_selector(".dimo .panel .row")
    assert report.stat().st_size < 10_000_000
    canvas = page.query_selector_all(".dimo canvas.map")[1]
    before = page.evaluate(TOP)
    canvas.click(position=cell_of(canvas, 2, 1, 0))
    assert "frame 2, row 1, column 0" in page.inner_text(".dimo") and page.evaluate(TOP) != before
    colours = colours_shown(canvas)
    canvas.press(".")
    assert "t 0.5" in page.inner_text(".dimo") and colours_shown(canvas) != colours
    explorer = ExplorerView([open_models(report.parent)])
    live = explorer.first_request()
    live["panes"][0] |= {"t": 0.5, "prompt": page.input_value(".dimo select.prompt")}
    live["token"] = [2, 1, 0]
    tops = explorer.view(live)["panes"][0]["top"]
    assert same_top(page.evaluate(TOP), tops)
    longest = page.evaluate("() => [...document.querySelectorAll('.dimo .panel')].map((panel) => "
                            "parseFloat(panel.querySelector('.track > i').style.width) / 100)")  # fmt: skip
    assert longest == pytest.approx([top["p"][0] / end_of_bars(top["p"]) for top in tops], abs=0.01)
    for key in "ans":  # pin A; the next network; the next statistic, which A's network, the teacher, does not have
        canvas.press(key)
    assert len([c for c in page.query_selector_all(".dimo canvas.map") if c.is_visible()]) == 3
    assert "A: KL(teacher || network), student, t 0.5" in page.inner_text(".dimo")
    same_colours = colours_shown(canvas)
    canvas.press("l")
    assert colours_shown(canvas) != same_colours and "log scale" in page.inner_text(".dimo")

    curves = page.query_selector(".curves img")
    curves.scroll_into_view_if_needed()
    left, top, width, height = json.loads(page.inner_text("#logged"))["panels"][0]["box"]
    box, select = curves.bounding_box(), page.query_selector(".dimo select")
    assert "Step 50" in page.inner_text(".told") and select.input_value() == "0"
    curves.click(position={"x": (left + 0.05 * width) * box["width"], "y": (top + 0.5 * height) * box["height"]})
    told = page.inner_text(".told")
    assert "Step 1\n" in told and "entropy (nats per token): 1.00" in told and "at step 10," in told
    assert select.input_value() == "1" and page.get_attribute("#samples img", "alt") == "samples at step 1"
    page.focus(".curves")
    keys = ("ArrowRight", 25, "1"), ("ArrowRight", 50, "0"), ("ArrowRight", 50, "0"), ("Home", 1, "1")
    for key, step, model in keys:
        page.keyboard.press(key)
        assert f"Step {step}\n" in page.inner_text(".told") and select.input_value() == model
        assert page.get_attribute(".curves", "aria-valuenow") == str(step)
    said = page.evaluate(TOP)
    page.keyboard.press("End")
    assert page.evaluate(TOP) != said  # of another checkpoint
    assert all(page.evaluate("() => [...document.images].map((i) => i.alt && i.naturalWidth > 0)"))
    clips = page.query_selector_all(".clip")
    assert len(clips) == 4 and all(clip.query_selector("video[loop]") for clip in clips)
    clips[0].focus()
    for clip in clips:  # one stop of Tab for each; a key stops it and lets it go on
        assert clip.evaluate("(it) => it === document.activeElement") and "stop the student" in clip.get_attribute(
            "aria-label"
        )
        page.wait_for_function("(it) => !it.firstChild.paused", arg=clip)
        for key, stops in (("Space", True), ("Enter", False), ("Enter", True)):
            page.keyboard.press(key)
            assert (
                clip.evaluate("(it) => it.firstChild.paused") == (clip.get_attribute("aria-pressed") == "true") == stops
            )
        page.keyboard.press("Tab")
    assert wrong == [] and page.evaluate(TOO_WIDE) <= 0
    page.close()
