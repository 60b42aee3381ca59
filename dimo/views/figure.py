"""A figure that shows itself in a notebook."""

from __future__ import annotations

import io

import matplotlib.figure


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook cell shows by returning it, without pyplot and without `%matplotlib inline`.

    With `%matplotlib inline` IPython's own formatter has precedence, so the figure is still shown once.

    Attributes:
        about: what is shown, for those who do not see it.
    """

    def __init__(self, *args, about: str = "", **kwargs):
        super().__init__(*args, **kwargs)
        self.about = about

    def png(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        return self.png(), {"alt": self.about}
