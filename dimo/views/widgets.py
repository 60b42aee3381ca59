"""Widgets for live notebooks, which need only run folders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dimo.errors import DimoError
from dimo.run.checkpoints import STEP, step_of
from dimo.run.folder import RunFolder


def require_ipywidgets():
    """The module ipywidgets.

    Raises:
        DimoError: it is missing.
    """
    try:
        import ipywidgets
    except ImportError as error:
        raise DimoError(
            "ipywidgets is missing; install dimo with its notebooks: pip install -e '.[notebooks]'"
        ) from error
    return ipywidgets


@functools.cache
def _clickable() -> type[Any]:
    import anywidget
    import traitlets

    class Clickable(anywidget.AnyWidget):
        _esm = (Path(__file__).parent / "picture.js").read_text(encoding="utf-8")
        png = traitlets.Bytes().tag(sync=True)
        about = traitlets.Unicode().tag(sync=True)

    return Clickable


class Picture:
    """A picture that can be replaced, and calls `clicked` with the place of a click if anywidget is installed.

    Args:
        about: for those who do not see it.
        clicked: gets x and y as shares of width and height, from the upper left corner.

    Attributes:
        box: the widget.
    """

    def __init__(self, about: str, clicked: Callable[[float, float], None]):
        widgets = require_ipywidgets()
        try:
            self.box = _clickable()(about=about)
        except ImportError:
            self.box = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        else:
            self.box.on_msg(lambda _, place, __: clicked(place["x"], place["y"]))
        self._trait = "png" if hasattr(self.box, "png") else "value"

    def show(self, png: bytes) -> None:
        setattr(self.box, self._trait, png)


class Sheets:
    """A slider over the steps at which any of `runs` wrote a sample sheet, and for each run its newest sheet by then.

    Attributes:
        box: the widget; hidden as long as there is no sheet.
    """

    def __init__(self, runs: Sequence[RunFolder]):
        widgets = require_ipywidgets()
        self.runs, self._files = list(runs), [dict[int, Path]() for _ in runs]
        self.slider = widgets.SelectionSlider(options=[("none", 0)], description="step", continuous_update=True)
        self.images = [widgets.Image(format="png") for _ in runs]
        names = [widgets.Label(run.path.resolve().name) for run in runs]
        columns = [widgets.VBox(pair) for pair in zip(names, self.images)] if len(self.runs) > 1 else self.images
        wrapped = widgets.Layout(flex_flow="row wrap")
        self.box = widgets.VBox([self.slider, widgets.Box(columns, layout=wrapped)])
        self.box.layout.display = "none"
        self.slider.observe(lambda _: self._show(), names="value")

    def refresh(self) -> bool:
        """Look for new sheets, and go to the newest unless the slider was moved away; returns whether there are any."""
        self._files = [
            {step_of(file): file for file in sorted((run.path / "samples").glob(f"{STEP}.png"))} for run in self.runs
        ]
        steps = sorted({step for files in self._files for step in files})
        if not steps:
            return False
        before, at_end = self.slider.options, self.slider.index == len(self.slider.options) - 1
        now = tuple((str(step), step) for step in steps)
        if now != before:
            kept = self.slider.value
            self.slider.options = now  # goes to the first
            self.slider.value = steps[-1] if at_end or kept not in steps else kept
            self._show()
            self.box.layout.display = None
        return True

    def _show(self) -> None:
        for files, image in zip(self._files, self.images):
            earlier = [file for step, file in files.items() if step <= self.slider.value]
            image.value = earlier[-1].read_bytes() if earlier and earlier[-1].exists() else b""
