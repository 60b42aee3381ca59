"""A figure that shows itself in a notebook."""

from __future__ import annotations

import io

import matplotlib.figure


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook cell shows by returning it, without pyplot and without `%matplotlib inline`.

    With `%matplotlib inline` IPython's own formatter has precedence, so the figure is still shown once.
    """

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()
