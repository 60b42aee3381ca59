"""The dashboard: it reads each row once, draws what a naive reader and a naive line would, and follows a training."""

import base64
import io
import json
import math
import random
import statistics
import sys
import threading
import time

import matplotlib.image
import numpy as np
import pytest
import torch

from dimo.config import load_config, to_yaml
from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.run.rows import RowReader
from dimo.views.alarms import MEMORY, SPIKE, WINDOW, Alarms
from dimo.views.dashboard import Dashboard, dashboard, nearest_checkpoint, place_in
from dimo.views.figure import Figure
from dimo.views.history import History, running_mean, thin
from dimo.views.live import HEADLESS
from dimo.views.panels import MOST_RUNS, NAMES, apart, dashboard_figure
from dimo.views.sheets import save_sheet


def row(step, value=1.0):
    return {"step": step, "loss/aux": value, "time/step_s": 0.5}


def log(run, *steps):
    for step in steps:
        run.log(row(step, 1.0 / step))


@pytest.fixture
def run(tmp_path):
    made = RunFolder(tmp_path / "run")
    made.path.mkdir()
    (made.path / "config.yaml").write_text(to_yaml(load_config("smoke")))
    return made


def naive(file):
    """Every line that has an end."""
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def test_rows_are_read_once_while_they_are_written_cut_back_and_removed(tmp_path):
    random.seed(0)
    file, seen = tmp_path / "metrics.jsonl", []
    reader, pending, step = RowReader(file), b"", 0
    kinds = set()
    for _ in range(300):
        kind = random.choice(["write", "write", "write", "row", "cut", "cut and go on", "remove"])
        if kind in ("write", "row"):
            if not pending:
                step += 1
                pending = json.dumps(row(step, random.random())).encode() + b"\n"
            count = len(pending) if kind == "row" else random.randint(1, len(pending))
            with open(file, "ab") as out:
                out.write(pending[:count])
            pending = pending[count:]
        elif kind == "remove":
            file.unlink(missing_ok=True)
            pending, step = b"", 0
        else:  # as RunFolder.cut_at does
            step, pending = random.randint(0, step), b""
            kept = [r for r in naive(file) if r["step"] <= step]
            kept += [row(step := step + 1, random.random()) for _ in range(9)] if kind == "cut and go on" else []
            (tmp_path / "beside").write_text("".join(json.dumps(r) + "\n" for r in kept))
            (tmp_path / "beside").replace(file)
        new, again = reader.read()
        seen = new if again else seen + new
        assert seen == naive(file)
        kinds.add((kind, again))
    assert {("cut", True), ("cut and go on", True), ("remove", True), ("write", False)} <= kinds
    assert reader.read() == ([], False)


@pytest.mark.parametrize("bad", ['{"step": 3', "[1]", "", '{"loss": 1}', "{}, {}"])
def test_a_damaged_line_ends_what_is_read(tmp_path, bad):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{{"step": 2}}\n{bad}\n{{"step": 4}}\n')
    reader = RowReader(tmp_path / "metrics.jsonl")
    assert reader.read() == ([{"step": 1}, {"step": 2}], False) and reader.read() == ([], False)


@pytest.mark.parametrize("n", [3, 64, 65, 66, 1000, 5000])
def test_of_every_pixel_column_the_extremes_are_left(n):
    g = np.random.default_rng(n)
    steps, values, columns = np.cumsum(g.integers(1, 30, n)).astype(float), g.standard_normal(n).round(1), 32
    kept = dict(zip(*thin(steps, values, columns)))
    assert list(kept) == sorted(kept) and len(kept) <= 2 * columns + 2
    naive = {}
    for step, value in zip(steps, values):
        column = min(int((step - steps[0]) / (steps[-1] - steps[0]) * columns), columns - 1)
        naive.setdefault(column, []).append((step, value))
    for points in naive.values():
        there = [value for step, value in points if step in kept]
        assert min(there) == min(v for _, v in points) and max(there) == max(v for _, v in points)
    full = dict(zip(steps, values))
    assert all(full[step] == value for step, value in kept.items()) and {steps[0], steps[-1]} <= kept.keys()
    with pytest.raises(DimoError, match="of one length and columns at least 1"):
        thin(steps, values[1:], columns)


@pytest.mark.parametrize("width", [1, 3, 50])
def test_running_mean(width):
    values = np.random.default_rng(0).standard_normal(40)
    naive = [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(40)]
    assert running_mean(values, width) == pytest.approx(naive, abs=1e-12)
    assert set(running_mean(np.full(40, 54.2), width)) == {54.2}  # else matplotlib shows the rounding
    with pytest.raises(DimoError, match="width must be at least 1, got 0"):
        running_mean(values, 0)


def test_labels_are_moved_apart_and_keep_their_order():
    random.seed(0)
    for n in (1, 2, 5, 12):
        places = [random.choice([0.1, 0.95, random.random(), -3.0]) for _ in range(n)]
        moved = apart(places, 0.135)
        assert all(-1e-9 <= place <= 1 + 1e-9 for place in moved)
        gaps = np.diff(sorted(moved))
        assert (gaps >= min(0.135, 1 / max(1, n - 1)) - 1e-9).all()
        assert all(a <= b for (p, a) in zip(places, moved) for (q, b) in zip(places, moved) if p < q)
    assert apart([0.2, 0.8], 0.135) == [0.2, 0.8]


def test_gradient_spikes_are_those_of_a_median_taken_anew_at_every_row():
    random.seed(0)
    norms = [random.lognormvariate(i / 400, 1.3) if random.random() < 0.9 else None for i in range(900)]
    alarms = Alarms()
    for i, norm in enumerate(norms):
        alarms.add({"step": i} | ({} if norm is None else {"grad_norm/student": norm}))
    expected, ringing = [], False
    for i, norm in enumerate(norms):
        known = [value for value in norms[max(0, i - MEMORY) : i + 1] if value is not None]
        if norm is not None and len(known) >= WINDOW:
            now = norm > SPIKE * statistics.median(known)
            expected += [i] if now and not ringing else []
            ringing = now
    assert [a.step for a in alarms.found] == expected and len(expected) > 10


def test_a_history_grows_and_is_cut_back_with_its_alarms(run):
    history = History(run, ["loss/aux", "entropy/aux"])
    assert not history.refresh() and history.progress() == "not begun"
    log(run, 1, 2)
    run.log({"step": 3, "loss/aux": float("nan"), "entropy/aux": 2.0})
    run.event({"step": 3, "event": "resumed"})
    assert history.refresh() and not history.refresh()
    assert history.points("loss/aux")[0].tolist() == [1, 2] and history.points("entropy/aux")[1].tolist() == [2.0]
    assert [a.name for a in history.alarms.found] == ["non_finite"] and len(history.events) == 1
    run.cut_at(2)
    assert history.refresh() and history.steps.tolist() == [1, 2] and history.alarms.found == []
    log(run, 3)
    assert history.refresh() and history.points("loss/aux")[1].tolist() == [1.0, 0.5, 1 / 3]
    run.write_status(state="running", step=3, max_steps=103)
    assert history.progress() == "dead, no process trains it, step 3 of 103, 2 steps/s"
    run._acquire()
    assert history.progress() == "still training, step 3 of 103, 2 steps/s, ETA 00:50"
    run.close()
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss/aux": "high"}\n')
    for _ in range(2):  # it is not forgotten
        with pytest.raises(DimoError, match="metrics.jsonl holds a value that dimo has not written"):
            history.refresh()


def panels(figure):
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def thick(axis):
    return [line for line in axis.lines if line.get_linewidth() == 1.6]


def test_one_run_has_a_line_for_each_network_with_its_name_and_log_K(run):
    entropies = {"entropy/student": 0.5, "entropy/aux": 0.4, "entropy/teacher": 0.4}
    for step in range(10, 40, 10):
        run.log({"step": step, **entropies, "lambda_ent": 0.01, "reward/mean": -1.0, "reward/baseline": -1.0})
    figure = dashboard_figure(str(run.path))
    axes = panels(figure)
    assert list(axes) == ["entropy (nats per token)", "reward: minus Jeffreys (nats)"]  # lambda_ent tells nothing
    axis = axes["entropy (nats per token)"]
    assert {line.get_label(): line.get_ydata().tolist() for line in thick(axis)} == {
        "student": [0.5] * 3, "auxiliary": [0.4] * 3, "teacher": [0.4] * 3
    }  # fmt: skip
    assert {text.get_text() for text in axis.texts} == {"student", "auxiliary", "teacher", "log K = 2.30"}
    assert [y for line in axis.lines for y in line.get_ydata()[:1]][-1] == math.log(10)  # smoke's world
    bound = next(text for text in axis.texts if text.get_text().startswith("log K"))
    figure.draw_without_rendering()
    box, to_pixels = bound.get_window_extent(), axis.transData.transform
    assert to_pixels((0, math.log(10)))[1] < box.y0 < box.y1 < axis.get_window_extent().y1  # no curve gets there
    assert [line.get_label() for line in thick(axes["reward: minus Jeffreys (nats)"])] == ["mean"]  # no baseline
    run.log({"step": 40, "lambda_ent": 0.05})
    bonus = panels(dashboard_figure(run))["weight of the entropy bonus"]
    assert thick(bonus)[0].get_ydata().tolist() == [0.01] * 3 + [0.05]
    assert len(bonus.collections) > 0 and "step 40 on  entropy_floor" in dashboard_figure(run).texts[0].get_text()


def test_of_runs_with_different_codebooks_no_curve_crosses_the_label_of_log_K(tmp_path, monkeypatch):
    """The entropy of the larger one begins where the smaller one's bound is."""
    sizes, runs = {"a": 10, "b": 64_000}, []
    monkeypatch.setattr(History, "codebook_size", lambda self: sizes[self.run.path.name])
    for name in sizes:
        runs.append(RunFolder.open(tmp_path / name, to_yaml(load_config("smoke"))))
        runs[-1].log({"step": 10, "entropy/student": math.log(10)})
        runs[-1].log({"step": 20, "entropy/student": math.log(sizes[name])})
    figure = dashboard_figure(runs)
    axis = panels(figure)["entropy, student (nats per token)"]
    (bound,) = (text for text in axis.texts if text.get_text().startswith("log K"))
    assert bound.get_text() == "log K = 2.30, 11.07"
    assert {math.log(10), math.log(64_000)} <= {y for line in axis.lines for y in line.get_ydata()[:1]}
    figure.draw_without_rendering()
    top = axis.transData.transform((0, math.log(64_000)))[1]
    assert top < bound.get_window_extent().y0 and bound.get_window_extent().x0 > axis.get_window_extent().x0


def test_several_runs_have_a_colour_and_a_dash_each_and_a_panel_for_each_metric(tmp_path):
    runs = []
    for i in range(3):
        runs.append(RunFolder(tmp_path / "a $1 and $2" / f"run{i}"))
        runs[i].path.mkdir(parents=True)
        for step in range(1, 4 + i):
            runs[i].log({"step": step, "entropy/student": float(i), "entropy/aux": 1.0, "loss/aux": step})
    figure = dashboard_figure([runs[0], str(runs[1].path), runs[2].path])
    titles = [f"entropy, {net} (nats per token)" for net in ("student", "auxiliary")]
    assert list(panels(figure)) == [*titles, "loss, auxiliary (nats per token)"]
    lines = thick(panels(figure)[titles[0]])
    assert [(len(line.get_xdata()), line.get_ydata()[-1]) for line in lines] == [(3, 0.0), (4, 1.0), (5, 2.0)]
    assert len({line.get_color() for line in lines}) == len({line.get_linestyle() + str(line._unscaled_dash_pattern)
                                                             for line in lines}) == 3  # fmt: skip
    legend = figure.legends[0]
    assert [text.get_text().split(":")[0] for text in legend.get_texts()] == ["1  run0", "2  run1", "3  run2"]
    assert [line.get_color() for line in legend.get_lines()] == [line.get_color() for line in lines]


def test_no_text_is_cut_or_lies_on_another(tmp_path):
    """Every panel there is, with alarms whose sentences are long."""
    for name in ("a", "b"):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        for step in range(1, 30):
            values = {n: 1.0 + step / 7 for n in NAMES} | {"collapse/least_share": 0.1, "collapse/sampled_entropy": 0.1}
            run.log({"step": step, **values, "reward/baseline": 0.0, "guard/skipped": step // 9})
            run.event({"step": step, "event": "entropy_bonus_raised"})
    for runs in (tmp_path / "a", [tmp_path / "a", tmp_path / "b"]):
        figure = dashboard_figure(runs)
        figure.draw_without_rendering()
        titles = [axis._left_title.get_window_extent() for axis in figure.axes]
        texts = [text.get_window_extent() for axis in figure.axes for text in axis.texts]
        boxes = [*titles, figure.texts[0].get_window_extent(), figure.legends[0].get_window_extent()]
        assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= figure.bbox.x1 and b.y1 <= figure.bbox.y1 for b in boxes + texts)
        assert len(boxes) > 16 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_line_far_above_zero_is_not_cut_off_at_the_top(run):
    for step in (1, 2, 3):
        run.log({"step": step, "memory/peak_gib": 1.22 + 0.001 * step})
    (axis,) = dashboard_figure(run).axes
    low, high = axis.get_ylim()
    assert low == 0 and (high - 1.223) / high > 0.03  # its panel has 150 pixels, the line 2


def test_what_is_drawn_does_not_grow_with_the_rows(run):
    g = np.random.default_rng(0)
    lines = (json.dumps(row(step, value)) for step, value in enumerate(g.standard_normal(20_000).tolist()))
    (run.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    axis = panels(dashboard_figure(run))["loss (nats per token)"]
    assert len(axis.lines) == 2
    for line in axis.lines:
        assert 100 < len(line.get_xdata()) <= 2 * axis.get_window_extent().width + 3


def test_bad_input_is_told(tmp_path, run):
    with pytest.raises(DimoError, match=f"there is no run in {tmp_path}/gone"):
        dashboard_figure(tmp_path / "gone")
    with pytest.raises(DimoError, match="there is no run in"):
        dashboard([run, tmp_path / "gone"])
    with pytest.raises(DimoError, match=rf"no step has been logged yet \({run.path}: not begun\)"):
        dashboard_figure(run)
    for runs in ([], [run] * (MOST_RUNS + 1)):
        with pytest.raises(DimoError, match=f"shows 1 to {MOST_RUNS} runs, got {len(runs)}"):
            dashboard_figure(runs)
    log(run, 1)
    (run.path / "status.json").write_text("{")
    (run.path / "metrics.jsonl").write_text(json.dumps(row(1)) + '\n{"step": 2, "lo')
    figure = dashboard_figure(run)
    assert "status.json" in figure.legends[0].get_texts()[0].get_text()
    assert [line.get_marker() for line in thick(figure.axes[0])] == ["o"]  # one step is seen, too


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def live(monkeypatch):
    monkeypatch.delenv(HEADLESS, raising=False)


def test_the_widget_follows_a_training_to_its_end_and_has_a_picture_beside_it(run, live):
    run.write_status(state="running", step=0, max_steps=2)
    run._acquire()
    board = dashboard(run, every_s=0.01)
    assert isinstance(board, Dashboard) and board.follow.value
    assert "no step has been logged yet" in board.about.value and "image/png" not in board._repr_mimebundle_()[0]
    log(run, 1, 2)
    until(lambda: board.png)
    first = board.png
    save_sheet(run.path / "samples" / "step-00000002.png", {"a": torch.rand(1, 3, 8, 8, 3)}, ["p"])
    log(run, 3)
    run.write_status(state="finished", step=3)
    run.close()
    until(lambda: not board.follow.value)
    data, about = board._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data and base64.b64decode(data["image/png"]) == board.png
    alt = about["image/png"]["alt"]
    assert alt.startswith(f"Curves of {run.path.name} (finished") and ": loss, " in alt and "no alarms" in alt
    assert board.png != first and board.image.box.png == board.png and board.about.value == ""
    shown, whole = (matplotlib.image.imread(io.BytesIO(png)) for png in (board.png, dashboard_figure(run).png()))
    assert np.array_equal(shown, whole)  # the widget and its twin
    assert board.sheets.images[0].value == (run.path / "samples" / "step-00000002.png").read_bytes()
    board.close()


def test_a_click_is_a_step_of_the_run_whose_line_is_nearest(tmp_path):
    runs = []
    for i in range(2):
        runs.append(RunFolder(tmp_path / f"run{i}"))
        runs[i].path.mkdir()
        for step in (10, 20, 30):
            runs[i].log({"step": step, "entropy/student": 1.0 + i, "loss/aux": float(step)})
    figure = dashboard_figure(runs)
    axis = panels(figure)["entropy, student (nats per token)"]
    for i, step in ((0, 13.0), (1, 27.0)):
        x, y = axis.transData.transform((step, 1.0 + i))
        found = place_in(figure, x / figure.bbox.width, 1 - (y - 9) / figure.bbox.height)  # a little below the line
        assert found == (i, pytest.approx(step))
    assert place_in(figure, 0.001, 0.999) is None
    run = runs[0]
    with pytest.raises(DimoError, match="run0 has no checkpoint yet"):
        nearest_checkpoint(run, 20)
    for name in ("step-00000010", "step-00000040", "final"):
        (run.path / "checkpoints" / name).mkdir(parents=True)
    run.write_status(state="finished", step=40, max_steps=40)
    assert [nearest_checkpoint(run, step) for step in (0, 24, 26, 99)] == [10, 10, "final", "final"]


def test_a_click_on_the_widget_opens_the_explorer_there(run, live, monkeypatch):
    log(run, 10, 20)
    board, opened = dashboard(run), []
    monkeypatch.setattr(
        "dimo.views.dashboard.explore", lambda *asked: opened.append(asked) or __import__("ipywidgets").Label()
    )
    axis = board.figure.axes[0]
    x, y = axis.transAxes.transform((0.5, 0.5))
    place = {"x": x / board.figure.bbox.width, "y": 1 - y / board.figure.bbox.height}
    board.image.box._handle_custom_msg(place, [])  # as the page sends it
    assert "has no checkpoint yet" in board.about.value and opened == []
    (run.path / "checkpoints" / "step-00000020").mkdir(parents=True)
    for _ in range(2):
        board.image.box._handle_custom_msg(place, [])
    assert opened == [(board.board.histories[0].run, (20,))] * 2 and len(board.explorer.children) == 1
    assert board.about.value == "below: run at step 20"
    (run.path / "checkpoints" / "step-00000010").mkdir()
    board.explore.click()  # the last step, as long as there are no samples
    save_sheet(run.path / "samples" / "step-00000008.png", {"a": torch.rand(1, 3, 8, 8, 3)}, ["p"])
    board.redraw()
    board.explore.click()
    assert [step for _, (step,) in opened[2:]] == [20, 10] and board.about.value == "below: run at step 10"
    board.close()


def test_a_cell_that_is_run_again_leaves_one_that_follows(run, live):
    log(run, 1)
    run._acquire()
    before = dashboard(run, every_s=0.01)
    after = dashboard(str(run.path), every_s=0.01)
    until(lambda: [t.name for t in threading.enumerate()].count("dashboard") == 1)
    assert not before.follow.value and after.follow.value
    after.close()
    until(lambda: "dashboard" not in [t.name for t in threading.enumerate()])
    run.close()


def test_headless_and_without_ipywidgets_it_is_the_figure(run, monkeypatch, capsys):
    log(run, 1, 2)
    monkeypatch.setenv(HEADLESS, "1")
    assert isinstance(dashboard(run), Figure)
    monkeypatch.delenv(HEADLESS)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert isinstance(dashboard(run), Figure)
    assert "a picture that stands still: ipywidgets is missing" in capsys.readouterr().out
