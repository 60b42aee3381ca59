"""Widgets for live notebooks, which need only a run folder."""

from __future__ import annotations

from dimo.errors import DimoError
from dimo.run.folder import RunFolder


def sample_slider(run: RunFolder):
    """A slider over the sample sheets of a run, from oldest to newest.

    Raises:
        DimoError: the run has no samples yet, or ipywidgets is missing.
    """
    try:
        import ipywidgets
    except ImportError as error:
        raise DimoError(
            "ipywidgets is missing; install dimo with its notebooks: pip install -e '.[notebooks]'"
        ) from error
    pictures = sorted((run.path / "samples").glob("*.png"))
    if not pictures:
        raise DimoError(f"{run.path} has no samples yet")
    image = ipywidgets.Image(value=pictures[-1].read_bytes(), format="png")
    slider = ipywidgets.SelectionSlider(
        options=[(p.stem.removeprefix("step-").lstrip("0"), p) for p in pictures],
        value=pictures[-1],
        description="step",
    )
    slider.observe(lambda change: setattr(image, "value", change["new"].read_bytes()), names="value")
    return ipywidgets.VBox([slider, image])
