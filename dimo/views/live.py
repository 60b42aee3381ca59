"""What a live notebook needs: the repository as its folder, and a dashboard that follows a training."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dimo.config import Config, load_config, to_flat

if TYPE_CHECKING:
    from dimo.views.figure import Figure
    from dimo.views.panels import Runs

HEADLESS = "DIMO_HEADLESS"  # set in the kernels that `dimo run` starts
ROOT = Path(__file__).parents[2]
PATIENCE = 10  # a drawing is followed by a pause of so many times its duration, so that training is not slowed down


def is_live() -> bool:
    """Whether somebody may be looking, that is, `dimo run` has not started this kernel."""
    return HEADLESS not in os.environ


def work_in_repository() -> Path:
    """Leave notebooks/, where Jupyter starts kernels, for the repository, so that runs/ is where commands look for it.

    Returns:
        The working directory.
    """
    if is_live() and (ROOT / "notebooks").is_dir() and Path.cwd() == ROOT / "notebooks":
        os.chdir(ROOT)
    return Path.cwd()


def describe_settings(config: str, settings: Config) -> str:
    """The run's folder, and the keys in which the settings differ from the preset or file they were made from."""
    given, now = to_flat(load_config(config)), to_flat(settings)
    changed = [f"  {key} = {value}" for key, value in now.items() if value != given[key]]
    about = [f"run folder: {Path(settings.experiment.output_dir).resolve()}"]
    about += [f"{config}, and changed from it:", *changed] if changed else [f"{config}, with nothing changed"]
    return "\n".join([*about, f"all keys: dimo config -c {config}"])


class Board:
    """The dashboard of runs that go on.

    Attributes:
        about: how far they are, in words.
    """

    def __init__(self, runs: Runs):
        from dimo.views.panels import attach  # imports matplotlib, so only when needed

        self.histories, self.about = attach(runs), ""

    def news(self) -> Figure | None:
        """The figure, if anything has changed since the last call and a step has been logged."""
        from dimo.views.panels import draw

        changed = [history.refresh() for history in self.histories]
        before, self.about = self.about, "; ".join(f"{h.run.path.resolve()}: {h.progress()}" for h in self.histories)
        if not any(len(history.steps) for history in self.histories) or (before == self.about and not any(changed)):
            return None
        return draw(self.histories)

    def is_running(self) -> bool:
        """Whether a live process trains any of the runs."""
        return any(history.run.is_held() for history in self.histories)


def repeat(redraw: Callable[[], bool], every_s: float, wait: Callable[[float], bool | None]) -> None:
    """Call `redraw` until it returns false or `wait`, called with the seconds to pause, returns true."""
    while True:
        begin = time.monotonic()
        if not redraw() or wait(max(every_s, PATIENCE * (time.monotonic() - begin))):
            return


def watch(runs: Runs, every_s: float = 5.0) -> None:
    """Draw the dashboard of a run or several, again and again until no training goes on; for ended ones, once.

    The training may be in another notebook, process or terminal. Interrupting the cell ends the watching alone.
    `dimo.views.dashboard.dashboard` does the same without occupying the kernel.
    """
    board, shown = Board(runs), _display("starting")

    def redraw() -> bool:
        running, figure = board.is_running(), board.news()
        if figure or not any(len(history.steps) for history in board.histories):
            shown.update(figure or _text(board.about))
        return running

    try:
        repeat(redraw, every_s, time.sleep)
    except KeyboardInterrupt:
        print(f"no longer watched: {board.about}")


def _display(text: str):
    """A place below the cell, of a text or figure that can be replaced."""
    from IPython.display import display

    return display(_text(text), display_id=True)


def _text(text: str):
    from IPython.display import Pretty  # a string would be shown in quotes

    return Pretty(text)
