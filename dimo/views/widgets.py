"""Widgets for live notebooks, which need only run folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
