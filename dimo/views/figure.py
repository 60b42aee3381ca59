"""A figure that shows itself in a notebook."""

from __future__ import annotations

import io

import matplotlib.figure


class Figure(matplotlib.figure.Figure):
    """A figure that a cell shows by returning it, though it is not pyplot's and nobody said `%matplotlib inline`.

    Where somebody did, IPython's own formatter goes first, and the figure is still shown once.
    """

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()
