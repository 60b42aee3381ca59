"""The explorer without a browser: requests and answers, its figure, and what a report stores."""

import base64
import dataclasses
import gzip
import io
import json
import re

import matplotlib.image
import nbformat
import numpy as np
import pytest

from dimo.commands.notebooks import _write_html
from dimo.errors import DimoError
from dimo.views import explorer as front
from dimo.views import explorer_view
from dimo.views.explorer_data import token_maps
from dimo.views.explorer_stored import Arrays, Tiles, stored
from dimo.views.explorer_twin import end_of_bars, twin
from dimo.views.explorer_view import ExplorerView, colours_of, named, scale_of
from dimo.views.models import open_models
from dimo.worlds import SHIPPED_STUDENT


@pytest.fixture(scope="module")
def view():
    return ExplorerView([open_models("shapes", student=SHIPPED_STUDENT)])


@pytest.fixture
def widget(view):
    pytest.importorskip("anywidget")
    return front._widget_class()(view)


def test_a_request_is_answered_and_a_bad_one_leaves_what_is_shown(widget, view):
    ask = widget.request | {"id": 7, "token": [2, 3, 1], "statistic": "rank"}
    widget.request = ask
    assert widget.view["id"] == 7 and widget.view["statistic"] == "rank" and widget.asked == ask
    values = widget.view["panes"][0]["values"]
    refused = {
        "t must lie in": {"t": 1.0}, "does not know the prompt 'a cat'": {"prompt": "a cat"},
        "rank is not defined for 'auxiliary'": {"of": "auxiliary"}, "model must lie in": {"model": 3},
    }  # fmt: skip
    for why, bad in refused.items():
        widget.request = ask | {"id": widget.view["id"] + 1, "panes": [ask["panes"][0] | bad]}
        assert why in widget.view["error"] and widget.view["panes"][0]["values"] == values and widget.asked == ask
    widget.request = ask | {"id": 99, "token": [3, 0, 0]}
    assert "token must lie in latents_shape (3, 4, 4)" in widget.view["error"] and widget.view["id"] == 99


def test_a_click_on_another_token_and_the_way_back_compute_no_map(view, monkeypatch):
    first = view.first_request()
    pane, counted, token_maps = first["panes"][0] | {"of": "one_pass"}, [], explorer_view.token_maps
    monkeypatch.setattr(explorer_view, "token_maps", lambda *args: counted.append(args[3:]) or token_maps(*args))
    asked = [("rank", (0, 0, 0), {}), ("rank", (2, 1, 3), {}), ("rank", (2, 1, 3), {"t": 0.6}), ("rank", (0, 0, 1), {})]
    asked += [("information", (0, 0, 0), {}), ("mean_entropy", (1, 1, 1), {"t": 0.3, "seed": 5})]
    shown = [
        view.view(first | {"statistic": statistic, "token": list(token), "panes": [pane | turned]})["panes"][0][
            "values"
        ]
        for statistic, token, turned in asked
    ]
    assert counted == [("rank", "one_pass"), ("rank", "one_pass"), ("information", "one_pass")]  # t does not change I
    assert shown[0] == shown[1] == shown[3] and shown[4] != shown[5]
    monkeypatch.setattr(explorer_view, "MAPS", 2)
    for t in (0.11, 0.12, 0.13):
        view.view(first | {"panes": [pane | {"t": t}]})
    assert len(view._maps) == 2


def test_it_can_be_moved_from_python(widget, tmp_path):
    widget.explorer.models[0].folder = tmp_path
    widget.show(t=0.6, of="student", statistic="tv", token=(1, 1, 1))
    assert widget.view["panes"][0]["asked"]["t"] == 0.6 and widget.view["request"]["statistic"] == "tv"
    with pytest.raises(DimoError, match="temprature cannot be shown; did you mean 'temperature'"):
        widget.show(temprature=1)
    assert widget.save().name.endswith("-t0.6-token1-1-1.json")
    told = []
    widget.send = told.append
    widget._told(None, {"kind": "test"}, [])
    assert told[0]["copy"] and "assert outcome.agrees" in told[0]["text"]
    before, widget.alignment = widget.alignment, {}
    widget._told(None, {"kind": "check"}, [])
    assert widget.alignment == before  # of so few tokens it is there from the first
    assert widget.alignment["found"] == "right" and len(widget.alignment["readings"]) > 10


def test_two_states_share_one_scale_and_the_figure_has_the_pages_pixels(view):
    first = view.first_request()
    a = first["panes"][0]
    made, about = view.view(first | {"panes": [a, a | {"t": 0.7, "seed": 3}], "token": [0, 1, 2]}), view.about()
    low, high = scale_of(made, about)
    values = [np.frombuffer(pane["values"], "<f4") for pane in made["panes"]]
    assert low == 0 and high == max(v.max() for v in values) and values[0].max() != values[1].max()
    alike = view.view(first | {"statistic": "kl_to_teacher", "panes": [a | {"of": "student"}]})
    alike["panes"][0]["values"] = np.full(48, 1e-7, "<f4").tobytes()
    assert scale_of(alike, about) == (0, 1e-3)  # rounding is one colour
    decided = view.view(first | {"statistic": "information", "panes": [a | {"of": "one_pass"}]})
    assert named(decided, about, decided["panes"][0]).endswith("student at x_init, one pass over 64 noises")
    figure = twin(made, about)
    images = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(images) == 3  # decoded frames, A, B
    for image, v in zip(images[1:], values):
        want = colours_of(v.reshape(3, 4, 4), low, high)
        assert np.array_equal(image[:4, :4], want[0]) and np.array_equal(image[:4, 5:9], want[1])
    bars = [axis for axis in figure.axes if axis.patches and not axis.images and axis.get_title(loc="left")]
    assert [bar.get_width() for bar in bars[0].patches] == pytest.approx(made["panes"][1]["top"][0]["p"])
    for p, end in ((0.9, 1), (0.02, 0.1), (1.6e-5 * 4, 1e-4)):  # of 64,000 codes a uniform one has p 1.6e-5
        for top in made["panes"][1]["top"]:
            top["p"] = [p, p / 2]
            top["codes"] = top["codes"][:2]
        drawn = [axis for axis in twin(made, about).axes if axis.patches and not axis.images and axis.get_title("left")]
        axis = drawn[0]
        assert axis.get_xlim() == (0, pytest.approx(end)) and axis.get_xticklabels()[-1].get_text() == f"p {end:g}"
    assert [end_of_bars(p) for p in ([1.0000001], [0.0], [float("nan")])] == [1, 1, 1]


def test_a_notebook_without_a_kernel_shows_the_figure(widget):
    data, _ = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data and data["text/plain"].startswith("Explorer('orange")
    picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(data["image/png"])))
    assert picture.shape[1] > 900 and picture[..., :3].std() > 0.05


def test_without_anywidget_the_figure_comes_with_a_sentence(monkeypatch, capsys, view):
    front._widget_class.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "anywidget", None)
    shown = front.explore(view.models[0])
    assert "anywidget is missing" in capsys.readouterr().err and shown.axes
    front._widget_class.cache_clear()


def test_pictures_are_of_the_codes_and_are_made_smaller_if_large(view, monkeypatch):
    first = view.first_request()
    models, _, answer = view.answer(first["panes"][0])
    size = view.view(first)["panes"][0]["picture"]
    picture = np.frombuffer(size["rgb"], np.uint8).reshape(*size["size"], 3)
    palette = (models.ursa.vae.palette[answer.x_hat.view(3, 4, 4)] * 255).numpy().astype(np.uint8)
    assert np.array_equal(picture[:, 4::8, 4::8], palette)
    patches = view.view(first)["patches"]
    own = np.frombuffer(patches["rgb"], np.uint8).reshape(-1, 8, 8, 3)
    assert np.array_equal(own[:, 3, 3], (models.ursa.vae.palette[patches["codes"]] * 255).numpy().astype(np.uint8))
    monkeypatch.setattr("dimo.views.explorer_view.PIXELS", 3 * 16 * 16)
    small = ExplorerView(view.models).view(first)["panes"][0]["picture"]
    assert small["size"] == [3, 16, 16]


def test_what_a_report_stores_is_what_the_explorer_says(view, capsys):
    data = json.loads(json.dumps(stored(view, most=200_000)))
    choices, arrays = data["about"]["choices"], gzip.decompress(base64.b64decode(data["arrays"]))
    assert len(data["states"]) == np.prod([len(c) for c in choices.values()]) <= 200_000 / 420 / 48

    def array(place, kind):
        return np.frombuffer(arrays[place[0] : sum(place)], kind)

    pane = data["first"]["panes"][0]
    state = data["states"]["|".join(f"{pane[k]:g}" if k != "prompt" else pane[k]
                                    for k in ("model", "prompt", "seed", "t", "guidance_scale"))]  # fmt: skip
    models, setting, answer = view.answer(pane)
    said = {}
    for name, kept in state["maps"].items():
        step = (kept["high"] - kept["low"]) / 65535
        said[name] = kept["low"] + array(kept["data"], np.uint16).astype(float) * step, step
    for top in state["top"]:  # the page draws these two maps by what the panels say
        said[f"entropy|{top['of']}"] = array(top["entropy"], "<f4"), 1e-6
        said[f"rank|{top['of']}"] = array(top["rank"], np.uint32), 0
    assert said.keys() == {f"{name}|{of}" for name, those in data["about"]["offered"][0].items() for of in those}
    for name, (got, step) in said.items():
        statistic, of = name.split("|")
        want = token_maps(models, answer, setting, statistic, of)[statistic].numpy().flatten()
        assert np.abs(got - want).max() <= step, name
    codes = array(state["top"][0]["codes"], np.uint16).reshape(48, -1)
    assert codes[0].tolist() == view.view(data["first"])["panes"][0]["top"][0]["codes"]
    tiles = array(data["tiles"]["rgb"], np.uint8).reshape(-1, *data["tiles"]["size"], 3)
    for name, kept in state["pictures"].items():
        picture = tiles[array(kept["tiles"], np.uint32)].reshape(3, 4, 4, 8, 8, 3).swapaxes(2, 3).reshape(3, 32, 32, 3)
        assert np.array_equal(picture, view.picture_of(models, pane, answer, name)) and kept["size"] == [3, 32, 32]
    at_size = stored(ExplorerView(view.models), most=1, progress=True)
    assert len(at_size["states"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("report 0/2 settings of the explorer  t ") and said[-1].startswith("report 2/2 ")
    both = stored(ExplorerView([*view.models, open_models("shapes")]), most=420 * 48 * 5)
    assert len(both["states"]) == 4 and {key[0] for key in both["states"]} == {"0", "1"}


def test_a_report_of_a_guided_run_opens_at_its_guidance(view, monkeypatch):
    for name, few in (("PROMPTS", 1), ("SEEDS", (0,)), ("TIMES", (0.5,))):
        monkeypatch.setattr(f"dimo.views.explorer_stored.{name}", few)
    guided = ExplorerView([dataclasses.replace(view.models[0], guidance_scale=2.0)])
    for most, choices in ((1, [2.0]), (10**6, [1.0, 2.0])):
        data = stored(guided, most)
        assert data["about"]["choices"]["guidance_scale"] == choices
        assert data["first"]["panes"][0]["guidance_scale"] == 2.0


def test_what_a_report_stores_twice_is_in_the_page_once():
    arrays, tiles = Arrays(), Tiles()
    places = [arrays.add(np.arange(5, dtype=np.uint16)), arrays.add(b"ab"), arrays.add(np.arange(5, dtype=np.uint16))]
    assert places == [[0, 10], [10, 2], [0, 10]]
    assert gzip.decompress(base64.b64decode(arrays.text())) == np.arange(5, dtype=np.uint16).tobytes() + b"ab"
    picture = np.zeros((2, 16, 8, 3), np.uint8)
    picture[1, :8] = 7
    assert tiles.add(picture).tolist() == [0, 0, 1, 0] and tiles.size == (8, 8)
    odd = np.zeros((2, 15, 8, 3), np.uint8)  # of a large video, which is shown smaller
    assert Tiles().add(odd).tolist() == [0, 0]


def test_models_of_different_sizes_are_refused(view):
    other = open_models("shapes")
    other.grid = (1, 4, 12)
    with pytest.raises(DimoError, match="models must have one latents_shape"):
        ExplorerView([*view.models, other])
    with pytest.raises(DimoError, match="models must hold at least one"):
        ExplorerView([])


def test_an_exported_notebook_shows_the_figure_and_loads_nothing(widget, tmp_path):
    """As papermill leaves a notebook: the widget's output, and the state of all widgets in the metadata."""
    ipywidgets = pytest.importorskip("ipywidgets")
    data, about = widget._repr_mimebundle_()
    output = nbformat.v4.new_output("execute_result", data, metadata=about, execution_count=1)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("explore(run)", outputs=[output])])
    state = ipywidgets.Widget.get_manager_state()
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": state}
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] in state["state"]
    nbformat.write(notebook, tmp_path / "x.ipynb")
    _write_html(tmp_path / "x.ipynb", tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert page.count('src="data:image/png') == 1 and data["image/png"][:200] in page
    assert 'alt="Explorer(' in page
    assert re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?!data:)([^"]+)"', page) == []
    assert "http" not in "".join(re.findall(r"<script[^>]*>(.*?)</script>", page, re.S))
