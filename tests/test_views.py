"""Figures are drawn from what they are given; their doors refuse the rest."""

import io
import logging
import warnings
from itertools import combinations

import imageio.v3 as iio
import matplotlib
import matplotlib.image
import numpy
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats

from dimo.commands.report import BESIDE, write_run_report
from dimo.config import load_config, to_yaml
from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.views import fonts
from dimo.views.checks import Checks
from dimo.views.clips import save_clips, side_by_side
from dimo.views.plots import histogram, input_map, lines, path_maps, token_maps
from dimo.views.sheets import save_sheet, video_sheet
from dimo.views.widgets import Sheets


def pixels(figure):
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return matplotlib.image.imread(io.BytesIO(picture.getvalue()))


def test_a_figure_shows_itself_once_with_and_without_the_inline_backend():
    figure = lines({"a": [1, 2]}, "step", "nats")
    shell = InteractiveShell()
    data, _ = shell.display_formatter.format(figure)
    assert sorted(data) == ["image/png", "text/plain"]
    shown = matplotlib.image.imread(io.BytesIO(data["image/png"]))
    assert numpy.array_equal(shown, pixels(figure)) and shown.std() > 0
    select_figure_formats(shell, {"png"})  # what `%matplotlib inline` does to IPython
    data, _ = shell.display_formatter.format(figure)
    assert sorted(data) == ["image/png", "text/plain"]


@pytest.mark.parametrize("frames", [1, 3, 5, 9, 13])
def test_no_label_of_a_map_is_cut(frames):
    maps = {f"entropy of the {net}": torch.rand(frames, 4, 4) for net in ("student at x_init", "teacher at x_t")}
    shown = pixels(token_maps(maps, "nats per token"))
    edges = (shown[:, :2], shown[:, -2:], shown[:2], shown[-2:])
    assert all((edge == 1).all() for edge in edges)  # white


def test_no_text_of_a_figure_lies_on_another_or_is_cut():
    maps = {f"entropy of the {net}": torch.rand(3, 4, 4) for net in ("student at x_init", "teacher at x_t")}
    inputs = input_map(torch.arange(53), torch.rand(53, 3), 4)
    for figure in (token_maps(maps, "nats per token"), inputs, path_maps({0.0: torch.full((4, 9), 1 / 9)})):
        figure.draw_without_rendering()
        boxes = [axis.yaxis.label.get_window_extent() for axis in figure.axes if axis.get_ylabel()]
        boxes += [axis.get_legend().get_window_extent() for axis in figure.axes if axis.get_legend()]
        assert len(boxes) > 1 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= figure.bbox.x1 and b.y1 <= figure.bbox.y1 for b in boxes)
    for axis in inputs.axes:  # beside what is drawn, not on it
        assert not axis.get_legend().get_window_extent().overlaps(axis.get_window_extent())


def test_an_input_map_gives_every_meaning_a_colour_of_its_own():
    def colour(handle):
        found = handle.get_color() if hasattr(handle, "get_color") else handle.get_facecolor()
        return matplotlib.colors.to_hex(found if isinstance(found, str) else numpy.ravel(found))

    figure = input_map(torch.arange(53), torch.rand(53, 3), 4)
    meanings = {(name, colour(h)) for a in figure.axes for h, name in zip(*a.get_legend_handles_labels())}
    assert len(meanings) == len(dict(meanings)) == len({c for _, c in meanings}) == 6


def test_equal_lines_are_both_seen():
    """The one drawn last covers the other, but for its gaps."""
    figure = lines({"right": [0, 0, 0], "before": [1, 2, 3], "after": [1, 2, 3]}, "t", "nats", x=[0.1, 0.2, 0.9])
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines] == [[0.1, 0.2, 0.9]] * 3
    figure.axes[0].get_legend().remove()
    image = pixels(figure)[..., :3]
    for line in figure.axes[0].lines:
        colour = numpy.array(matplotlib.colors.to_rgb(line.get_color()))
        assert (abs(image - colour).max(-1) < 0.02).sum() > 100, line.get_label()
    with pytest.raises(DimoError, match=r"series\['a'\] must have as many values as x .3., got 2"):
        lines({"a": [1, 2]}, "t", "nats", x=[1, 2, 3])
    with pytest.raises(DimoError, match="series must hold 1 to 3 lines, got 4"):
        lines({c: [1] for c in "abcd"}, "t", "nats")


def test_path_maps_draw_the_first_codes_of_every_t():
    prob = {t: torch.rand(4, 9).softmax(-1) for t in (0.0, 0.7)}
    figure = path_maps(prob)
    for axis, (t, p) in zip(figure.axes, prob.items()):
        assert torch.equal(torch.tensor(axis.images[0].get_array().data), p[:, :4])
        assert (axis.get_title(), axis.get_xlabel()) == (f"t = {t:g}", "x (code)")
        assert axis.images[0].get_clim() == pytest.approx((0.01 / 9, 1))
    assert figure.axes[0].get_ylabel() == "x_1 (code)" and figure.axes[2].get_ylabel() == "p_t(x | x_1)"
    with pytest.raises(DimoError, match=r"prob\[0.7\] must have shape \(4, 9\)"):
        path_maps(prob | {0.7: torch.rand(3, 9)})
    with pytest.raises(DimoError, match="at least one t"):
        path_maps({})


def test_token_maps_share_one_scale():
    a, b = torch.rand(2, 3, 3), 2 + torch.rand(2, 3, 3)
    figure = token_maps({"a": a, "b": b}, "nats")
    images = [ax.images[0] for ax in figure.axes if ax.images]
    assert {i.get_clim() for i in images[:4]} == {(0.0, b.max().item())}
    assert torch.allclose(torch.tensor(images[3].get_array().data), b[1])
    with pytest.raises(DimoError, match=r"maps\['b'\] must have shape \(2, H, W\)"):
        token_maps({"a": a, "b": b[:1]}, "nats")


def test_a_map_of_small_values_beside_one_of_large_ones_is_not_of_one_colour():
    after = 0.02 * torch.linspace(0.05, 1, 9).view(1, 3, 3).expand(2, 3, 3)
    shown = [ax.images[0] for ax in token_maps({"before": 1 + torch.rand(2, 3, 3), "after": after}, "nats").axes[:4]]
    colours = shown[2].norm(shown[2].get_array())
    assert colours.max() - colours.min() > 0.2 and len({i.get_clim() for i in shown}) == 1


def test_maps_that_are_not_together_have_scales_of_their_own():
    large, small, none = 10 + torch.rand(2, 3, 3), 0.2 + 0.1 * torch.rand(2, 3, 3), torch.full((2, 3, 3), 1e-7)
    figure = token_maps({"a": large, "b": large + 1, "c": small, "d": none}, "nats", together=(2, 1, 1))
    limits = [ax.images[0].get_clim() for ax in figure.axes[:8:2]]
    most = (large.max().item() + 1, small.max().item(), 1e-3)  # rounding is one colour
    assert limits == [(0, pytest.approx(high)) for high in (most[0], *most)]
    colours = figure.axes[4].images[0].norm(small[0])
    assert colours.min() > 0.5 and colours.max() - colours.min() > 0.1
    assert [ax.get_ylabel() for ax in figure.axes[8:]] == ["nats"] * 3
    figure.draw_without_rendering()
    boxes = [ax.yaxis.label.get_window_extent() for ax in figure.axes[8:]]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    with pytest.raises(DimoError, match=r"together must be numbers of at least 1 that add up to 2 maps, got \(1, 2\)"):
        token_maps({"a": large, "b": large}, "nats", together=(1, 2))


def test_sheet_shows_each_videos_own_pixels(tmp_path):
    frames = torch.rand(2, 9, 32, 32, 3)
    prompts = ["blue bar moving up", "for $ or $$, " + "a long caption " * 50]
    figure = video_sheet({"teacher": frames, "student": 1 - frames}, prompts, shown=3)
    images = figure.axes[0].images
    assert len(images) == 2 * 2 * 3 and torch.allclose(torch.tensor(images[-1].get_array().data), 1 - frames[1, 8])
    places = [image.get_extent() for image in images]  # left, right, bottom, top; downwards
    apart = [a[1] <= b[0] or b[1] <= a[0] or a[2] <= b[3] or b[2] <= a[3] for a, b in combinations(places, 2)]
    assert all(apart) and len({(bottom, top) for _, _, bottom, top in places}) == 2
    save_sheet(tmp_path / "a" / "sheet.png", {"teacher": frames}, prompts)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["sheet.png"]
    with pytest.raises(DimoError, match=r"columns\['teacher'\] must have shape"):
        video_sheet({"teacher": frames[:1]}, ["p", "q"])


def lettered(page):
    """Whether there is anything but white on a page (H, W, 3)."""
    return bool((page < 0.5).any())


def test_clips_play_each_video_in_its_own_place(tmp_path):
    frames = torch.rand(2, 5, 16, 32, 3)
    prompts = ["for $ or $$, 日本", "a long caption " * 50]
    page = side_by_side({"teacher": frames, "student": 1 - frames}, prompts)
    assert page.shape == (5, 22 + 2 * (22 + 80), 2 * 160 + 8, 3)  # five times as large; a line above each row and all
    for row, column, videos in ((0, 0, frames), (1, 1, 1 - frames)):
        top, left = 44 + row * 102, column * 168
        assert torch.equal(page[:, top : top + 80 : 5, left : left + 160 : 5], videos[row])
    assert all(lettered(page[0, a : a + 22, left : left + 160]) for a, left in ((0, 0), (0, 168), (22, 0), (124, 168)))
    assert (page[:, :, 160:168][:, 44:124] == 1).all()  # the gap
    save_clips(tmp_path / "clips.mp4", {"teacher": frames}, prompts)
    seen = torch.from_numpy(iio.imread(tmp_path / "clips.mp4")).float() / 255
    want = side_by_side({"teacher": frames}, prompts)
    assert seen.shape == want.shape and (seen - want).abs().mean() < 0.2  # noise at full contrast is not kept
    save_clips(tmp_path / "clips.mp4", {"teacher": frames[:, :1]}, prompts)  # images
    assert not (tmp_path / "clips.mp4").exists()
    large = torch.rand(1, 2, 320, 512, 3)
    page = side_by_side({"a": large}, ["p"])
    assert page.shape == (2, 204, 256, 3)
    assert torch.allclose(page[:, 44:], large[0].unflatten(2, (256, 2)).unflatten(1, (160, 2)).mean((2, 4)), atol=1e-6)
    with pytest.raises(DimoError, match=r"columns\['teacher'\] must have shape"):
        side_by_side({"teacher": frames[:1]}, prompts)


@pytest.mark.parametrize("there", [BESIDE, BESIDE + 1])
def test_clips_that_a_report_has_no_room_for_are_a_link(there, tmp_path):
    run = RunFolder.open(tmp_path / "new", to_yaml(load_config("smoke", [f"experiment.output_dir={tmp_path / 'new'}"])))
    (run.path / "clips.mp4").write_bytes(bytes(there))
    page = write_run_report(run, most=1).read_text()
    assert ("data:video/mp4;base64,AAAA" in page) == (there == BESIDE) != ("<a href='clips.mp4'>" in page)


def labels_of(prompts, tmp_path, caplog):
    """Beside the rows of a sheet, which is drawn without a word of complaint."""
    videos = {"student": torch.rand(len(prompts), 5, 8, 8, 3)}
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        save_sheet(tmp_path / "sheet.png", videos, prompts)
        figure = video_sheet(videos, prompts)
    assert caplog.messages == []
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_captions_that_no_font_has_are_spelled_out(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(fonts, "CJK", ("No Such Font",))
    captions = ["café, фильм\n1", "日本", "日語", "a 𠜎 b"]
    spelled = [captions[0], "\\u65e5\\u672c", "\\u65e5\\u8a9e", "a \\U0002070e b"]
    assert labels_of(captions, tmp_path, caplog) == spelled


def test_captions_are_drawn_by_a_font_that_has_them(tmp_path, caplog, monkeypatch):
    """matplotlib's own symbols stand for a font of CJK: the one it draws text with does not have them either."""
    monkeypatch.setattr(fonts, "CJK", ("No Such Font", "STIXNonUnicode"))
    captions = ["a \ue000", "a \ue001 日"]
    assert labels_of(captions, tmp_path, caplog) == ["a \ue000", "a \ue001 \\u65e5"]


def test_small_figures_refuse_wrong_shapes():
    with pytest.raises(DimoError, match=r"rope_pos must have shape \(3, 3\)"):
        input_map(torch.zeros(3), torch.zeros(4, 3), 1)
    with pytest.raises(DimoError, match="values must have shape"):
        histogram(torch.zeros(2, 2), torch.ones_like, "t")
    assert len(lines({"a": [1, 2], "b": [2, 3]}, "step", "nats").axes[0].lines) == 2


def test_checks_show_everything_and_raise_what_failed(capsys):
    checks = Checks()
    with pytest.raises(DimoError, match="no checks were added"):
        checks.finish()
    checks.add("good", True, 1.0)
    checks.finish()
    checks.add("bad", False, "7 of 9")
    checks.add("good", True, 2.0)  # its cell was run again
    with pytest.raises(DimoError, match=r"1 of 2 checks failed: bad \(7 of 9\)"):
        checks.finish()
    assert "FAIL bad" in capsys.readouterr().out
    checks.add("one more", False, "a sentence " * 12, turn="raise distill.lambda_ent")
    with pytest.raises(DimoError, match="2 of 3 checks failed"):
        checks.finish()
    checks.add("one more", True, "a sentence " * 12, turn="raise distill.lambda_ent")
    said = capsys.readouterr().out
    assert "\n         -> raise distill.lambda_ent\n" in said and max(map(len, said.splitlines())) <= 88
    with pytest.raises(DimoError):
        checks.finish()
    assert "-> raise" not in capsys.readouterr().out  # nothing to turn where it passed
    checks = Checks()
    checks.add("blind", None, "cannot tell", turn="make two videos")
    checks.finish()
    assert capsys.readouterr().out.splitlines() == ["?    blind  cannot tell", "         -> make two videos"]
    checks.add("bad", False)
    with pytest.raises(DimoError, match="1 of 2 checks failed: bad$"):
        checks.finish()


def test_the_sheets_of_several_runs_are_those_of_the_same_time(tmp_path):
    runs = [RunFolder(tmp_path / name) for name in "ab"]
    files = {}
    for run, steps in zip(runs, [(5, 50), (20,)]):
        for step in steps:
            file = files[run, step] = run.path / "samples" / f"step-{step:08d}.png"
            save_sheet(file, {"a": torch.rand(1, 9, 8, 8, 3)}, [str(step)])
    sheets = Sheets(runs)
    assert sheets.box.layout.display == "none" and sheets.refresh() and sheets.box.layout.display is None

    def shown():
        return [image.value for image in sheets.images]

    assert [step for _, step in sheets.slider.options] == [5, 20, 50]
    assert shown() == [files[runs[0], 50].read_bytes(), files[runs[1], 20].read_bytes()]
    sheets.slider.value = 5
    assert shown() == [files[runs[0], 5].read_bytes(), b""]
    save_sheet(runs[1].path / "samples" / "step-00000100.png", {"a": torch.rand(1, 9, 8, 8, 3)}, ["p"])
    assert sheets.refresh() and sheets.slider.value == 5  # the one looked at stays
    sheets.slider.value = 100
    save_sheet(runs[0].path / "samples" / "step-00000150.png", {"a": torch.rand(1, 9, 8, 8, 3)}, ["p"])
    assert sheets.refresh() and sheets.slider.value == 150  # the newest is followed
