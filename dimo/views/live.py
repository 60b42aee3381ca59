"""What a live notebook needs: the repository as its folder, and curves that follow a training."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dimo.config import Config, load_config, to_flat
from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.run.overview import progress_of

if TYPE_CHECKING:
    from dimo.views.figure import Figure

HEADLESS = "DIMO_HEADLESS"  # set in the kernels that `dimo run` starts
ROOT = Path(__file__).parents[2]
PATIENCE = 10  # a drawing is followed by a pause of so many times its duration, so that training is not slowed down
CLOCK_S = 0.1  # by which the time of a file may lag behind the clock


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


def draw_run(run: RunFolder) -> Figure | None:
    """The curves of a run so far, under a line that says how far it is; None before its first logged step."""
    from dimo.views.plots import curves  # imports matplotlib, so only when needed

    rows = run.metrics()
    if not rows:
        return None
    figure = curves(rows, smooth=5)
    figure.suptitle(f"{run.path.name}: {progress_of(run)}", fontsize=12, x=0.01, ha="left")
    return figure


def watch(run: RunFolder, every_s: float = 5.0) -> None:
    """Draw a run's curves, again and again until its training ends; for one that has ended, once.

    The training may be in another notebook, process or terminal. Interrupting the cell ends the watching alone.
    """
    shown = _display(f"{run.path.resolve()}: {progress_of(run)}")
    try:
        while True:
            held, begin = run.is_held(), time.monotonic()
            figure = draw_run(run)
            shown.update(figure or _Text(f"{run.path.resolve()}: {progress_of(run)}"))
            if not held:
                return
            time.sleep(max(every_s, PATIENCE * (time.monotonic() - begin)))
    except KeyboardInterrupt:
        print(f"no longer watched: {run.path.name}, {progress_of(run)}")


@contextlib.contextmanager
def following(output_dir: str | Path, every_s: float = 5.0) -> Iterator[bool]:
    """In this context the curves of a training are drawn below the cell while it runs.

    Yields whether they are. Headless they are not, and the training should print its progress.
    """
    if not is_live():
        yield False
        return
    run, shown, over = RunFolder(output_dir, writes=False), _display("starting"), threading.Event()
    begun = time.time()
    importlib.import_module("dimo.views.plots")  # matplotlib takes a second, which would count as drawing

    def follow() -> None:
        pause = every_s
        while not over.wait(pause):
            pause = max(every_s, PATIENCE * _redraw(run, shown, begun))

    thread = threading.Thread(target=follow, name="curves", daemon=True)
    thread.start()
    try:
        yield True
    finally:
        over.set()
        thread.join()
        _redraw(run, shown, 0)  # also what was finished before


def _redraw(run: RunFolder, shown, begun: float) -> float:
    """Draw again, unless the run folder is still that of an earlier training; returns the seconds that it took."""
    begin = time.monotonic()
    with contextlib.suppress(DimoError, OSError, ValueError):  # a file that is being written; the next time is soon
        if (run.path / "metrics.jsonl").stat().st_mtime > begun - CLOCK_S:
            figure = draw_run(run)
            if figure:
                shown.update(figure)
    return time.monotonic() - begin


def _display(text: str):
    """A place below the cell, of a text or figure that can be replaced."""
    from IPython.display import display

    return display(_Text(text), display_id=True)


class _Text:
    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text
