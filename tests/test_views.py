"""Figures are drawn from what they are given; their doors refuse the rest."""

import logging
import warnings

import pytest
import torch

from dimo.errors import DimoError
from dimo.train.runfolder import RunFolder
from dimo.views import fonts
from dimo.views.checks import Checks
from dimo.views.figures import curves, histogram, input_map, lines, token_maps
from dimo.views.sheets import save_sheet, video_sheet
from dimo.views.widgets import sample_slider


def test_curves_plot_the_rows_with_units():
    rows = [{"step": s, "entropy/student": 1.0 / s, "loss/aux": None if s == 2 else 0.5} for s in (1, 2, 3)]
    figure = curves(rows, smooth=2)
    entropy = figure.axes[0].lines[0]
    assert entropy.get_xdata().tolist() == [1, 2, 3]
    assert entropy.get_ydata().tolist() == pytest.approx([1.0, 0.75, (1 / 2 + 1 / 3) / 2])
    assert figure.axes[1].lines[0].get_xdata().tolist() == [1, 3]  # a missing value is left out, not drawn as zero
    assert "nats per token" in figure.axes[0].get_title(loc="left") and figure.axes[0].get_xlabel() == "step"
    with pytest.raises(DimoError, match="at least one logged step"):
        curves([])
    with pytest.raises(DimoError, match="smooth must be at least 1"):
        curves(rows, 0)


def test_token_maps_share_one_scale():
    a, b = torch.rand(2, 3, 3), 2 + torch.rand(2, 3, 3)
    figure = token_maps({"a": a, "b": b}, "nats")
    images = [ax.images[0] for ax in figure.axes if ax.images]
    assert {i.get_clim() for i in images[:4]} == {(0.0, b.max().item())}
    assert torch.allclose(torch.tensor(images[3].get_array().data), b[1])
    with pytest.raises(DimoError, match=r"maps\['b'\] must have shape \(2, H, W\)"):
        token_maps({"a": a, "b": b[:1]}, "nats")


def test_sheet_shows_each_videos_own_pixels(tmp_path):
    frames = torch.rand(2, 9, 32, 32, 3)
    prompts = ["blue bar moving up", "for $ or $$, " + "a long caption " * 50]
    figure = video_sheet({"teacher": frames, "student": 1 - frames}, prompts, shown=3)
    assert torch.allclose(torch.tensor(figure.axes[9 + 2].images[0].get_array().data), 1 - frames[1, 8])
    save_sheet(tmp_path / "a" / "sheet.png", {"teacher": frames}, prompts)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["sheet.png"]
    with pytest.raises(DimoError, match=r"columns\['teacher'\] must have shape"):
        video_sheet({"teacher": frames[:1]}, ["p", "q"])


def labels_of(prompts, tmp_path, caplog):
    """Beside the rows of a sheet, which is drawn without a word of complaint."""
    videos = {"student": torch.rand(len(prompts), 5, 8, 8, 3)}
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        save_sheet(tmp_path / "sheet.png", videos, prompts)
        figure = video_sheet(videos, prompts)
    assert caplog.messages == []
    return [axis.get_ylabel() for axis in figure.axes[::3]]


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
    with pytest.raises(DimoError, match="no check was added"):
        checks.finish()
    checks.add("good", True, 1.0)
    checks.finish()
    checks.add("bad", False, "7 of 9")
    with pytest.raises(DimoError, match="1 of 2 checks failed: bad"):
        checks.finish()
    assert "FAIL bad" in capsys.readouterr().out


def test_the_slider_moves_through_the_samples(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(DimoError, match="has no samples yet"):
        sample_slider(run)
    for step in (5, 50):
        save_sheet(tmp_path / "samples" / f"step-{step:08d}.png", {"a": torch.rand(1, 9, 8, 8, 3)}, [str(step)])
    slider, image = sample_slider(run).children
    newest = image.value
    slider.index = 0
    assert image.value != newest and slider.label == "5"
