"""The dashboard: runs that go on, or have ended, over each other in a widget that follows them."""

from __future__ import annotations

import base64
import threading

from dimo.errors import DimoError
from dimo.views.figure import Figure
from dimo.views.live import Board, is_live, repeat
from dimo.views.panels import Runs, dashboard_figure
from dimo.views.widgets import Sheets, require_ipywidgets

_open: dict[tuple, Dashboard] = {}  # by what they show


def dashboard(runs: Runs, every_s: float = 5.0) -> Dashboard | Figure:
    """Show one run or several: entropies, rewards, losses, collapse, speed, alarms, and samples at any step.

    In a live notebook it is a widget that follows the training without occupying the kernel, wherever the training is;
    it reads what is new and leaves a pause of ten times what drawing takes. Headless, or without ipywidgets, it is the
    same figure, which stands still.

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
        self.board, self.png = Board(runs), b""
        self.about = widgets.Label()
        self.follow = widgets.ToggleButton(description="follow", icon="refresh", tooltip="go on reading the runs")
        self.image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        self.sheets = Sheets([history.run for history in self.board.histories])
        self.box = widgets.VBox([widgets.HBox([self.follow, self.about]), self.image, self.sheets.box])
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
                    self.png = self.image.value = figure._repr_png_()
                self.sheets.refresh()
                self.about.value = "" if self.png else f"no step has been logged yet ({self.board.about})"
            except (DimoError, OSError) as error:  # the folder was removed, say; it may come back
                self.about.value = str(error)
            return running

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

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget for a live page, the picture for a page without a kernel."""
        data = self.box._repr_mimebundle_(**kwargs)
        if self.png:
            data["image/png"] = base64.b64encode(self.png).decode()
        return data
