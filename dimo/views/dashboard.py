"""The dashboard: runs that go on, or have ended, over each other in a widget that follows them."""

from __future__ import annotations

import base64
import math
import threading

import numpy as np

from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.views.explorer import explore
from dimo.views.figure import Figure
from dimo.views.history import History
from dimo.views.live import Board, is_live, repeat
from dimo.views.models import checkpoints_of
from dimo.views.panels import Runs, dashboard_figure
from dimo.views.widgets import Picture, Sheets, require_ipywidgets

_open: dict[tuple, Dashboard] = {}  # by what they show


def dashboard(runs: Runs, every_s: float = 5.0) -> Dashboard | Figure:
    """Show one run or several: entropies, rewards, losses, collapse, speed, alarms, and samples at any step.

    In a live notebook it is a widget that follows the training without occupying the kernel, wherever the training is;
    it reads what is new and leaves a pause of ten times what drawing takes. A click on a panel opens the explorer on
    the checkpoint nearest to that step, of several runs that of the nearest line. Headless, or without ipywidgets, it
    is the same figure, which stands still.

    Args:
        runs: a run folder, or up to 12.
        every_s: seconds between two looks, at least.

    Raises:
        DimoError: there is no such run, there are too many, or, headless, none has logged a step yet.
    """
    if not is_live():
        return dashboard_figure(runs)
    try:
        require_ipywidgets()
    except DimoError as missing:
        print(f"a picture that stands still: {missing}")
        return dashboard_figure(runs)
    board = Dashboard(runs, every_s)
    key = tuple(history.run.path.resolve() for history in board.board.histories)
    if key in _open:  # its cell was run again
        _open[key].close()
    _open[key] = board
    return board


class Dashboard:
    """See `dashboard`. Beside the widget it gives the figure as a picture, for wherever there is no kernel.

    Attributes:
        board: what it shows.
        box: the widget.
    """

    def __init__(self, runs: Runs, every_s: float = 5.0):
        widgets = require_ipywidgets()
        self.board, self.png, self.figure = Board(runs), b"", Figure()
        self.about = widgets.Label()
        self.follow = widgets.ToggleButton(description="follow", icon="refresh", tooltip="go on reading the runs")
        self.explore = widgets.Button(
            description="explore", tooltip="open the explorer at the step of the samples below, else at the last"
        )
        self.explore.on_click(lambda _: self._explore_samples())
        self.image = Picture("curves of the training; a click opens the explorer at that step", self.open_explorer)
        self.explorer = widgets.VBox()
        self.sheets = Sheets([history.run for history in self.board.histories])
        top = widgets.HBox([self.follow, self.explore, self.about])
        self.box = widgets.VBox([top, self.image.box, self.explorer, self.sheets.box])
        self._over, self._every_s = threading.Event(), every_s
        self._lock = threading.Lock()  # a thread may not have ended when the next begins
        self.redraw()
        self.follow.observe(lambda change: self._start() if change["new"] else self._over.set(), names="value")
        self.follow.value = self.board.is_running()

    def redraw(self) -> bool:
        """Show what is new; returns whether to go on."""
        with self._lock:
            running = self.board.is_running()  # asked first, so that the last rows are drawn
            try:
                figure = self.board.news()
                if figure:
                    self.png, self.figure = figure.png(), figure
                    self.image.show(self.png)
                self.sheets.refresh()
                self.about.value = "" if self.png else f"no step has been logged yet ({self.board.about})"
            except (DimoError, OSError) as error:  # the folder was removed, say; it may come back
                self.about.value = str(error)
            return running

    def open_explorer(self, x: float, y: float) -> None:
        """Open the explorer on the checkpoint nearest to what is drawn at (x, y), shares of the picture's size."""
        chosen = place_in(self.figure, x, y)
        if chosen is not None:
            self._explore(self.board.histories[chosen[0]], chosen[1])

    def _explore_samples(self) -> None:
        """The same by a button, for those who have no mouse, of the first run."""
        history = self.board.histories[0]
        self._explore(history, self.sheets.slider.value or max(history.steps, default=0))

    def _explore(self, history: History, step: float) -> None:
        try:
            at = nearest_checkpoint(history.run, step)
            self.about.value = f"opening {history.run.path.name} at {named(at)}, the checkpoint nearest to it"
            shown = explore(history.run, (at,))
        except (DimoError, OSError) as error:
            self.about.value = str(error)
            return
        for before in self.explorer.children:
            before.close()
        self.explorer.children = (shown,)
        self.about.value = f"below: {history.run.path.name} at {named(at)}"

    def close(self) -> None:
        """Stop following, and remove the widget."""
        self.follow.value = False
        self.box.close()

    def _start(self) -> None:
        over = self._over = threading.Event()

        def run() -> None:
            repeat(self.redraw, self._every_s, over.wait)
            if not over.is_set():  # the training has ended
                self.follow.value = False

        # the figure has no pyplot, whose state belongs to the main thread
        threading.Thread(target=run, name="dashboard", daemon=True).start()

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        """The widget for a live page, the picture for a page without a kernel."""
        data = self.box._repr_mimebundle_(**kwargs)
        if self.png:
            data["image/png"] = base64.b64encode(self.png).decode()
        return data, {"image/png": {"alt": self.figure.about}}


def place_in(figure: Figure, x: float, y: float) -> tuple[int, float] | None:
    """(run, step) drawn at (x, y), shares of the figure's size from its upper left corner; None outside the panels.

    Of several runs it is the one whose line passes nearest.
    """
    place = x * figure.bbox.width, (1 - y) * figure.bbox.height
    for axis in figure.axes:
        if axis.bbox.contains(*place):
            lines = [line for line in axis.lines if isinstance(line.get_gid(), int)]
            step = axis.transData.inverted().transform(place)[0]

            def away(line, step=step, axis=axis) -> float:
                height = np.interp(step, line.get_xdata(), line.get_ydata())
                return abs(axis.transData.transform((step, height))[1] - place[1])

            return min(lines, key=away).get_gid(), float(step)
    return None


def nearest_checkpoint(run: RunFolder, step: float) -> int | str:
    """The checkpoint of a run that is nearest to a step: its number, or "final" for the last one of a finished run.

    Raises:
        DimoError: there is none yet.
    """
    there = checkpoints_of(run.path)
    if not there:
        raise DimoError(f"{run.path.name} has no checkpoint yet, so there is nothing to look into")
    last = run.status().get("max_steps", math.inf)

    def away(one: int | str) -> tuple[float, bool]:
        return abs((last if isinstance(one, str) else one) - step), isinstance(one, int)

    return min(there, key=away)


def named(checkpoint: int | str) -> str:
    return checkpoint if isinstance(checkpoint, str) else f"step {checkpoint}"
