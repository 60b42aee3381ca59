"""The explorer in a notebook: one widget, whose figure stands in where there is no kernel or no anywidget."""

from __future__ import annotations

import base64
import copy
import functools
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dimo.errors import DimoError, nearest
from dimo.paths import quoted
from dimo.run.folder import RunFolder
from dimo.views.explorer_twin import twin
from dimo.views.explorer_view import ExplorerView
from dimo.views.models import Models, open_models
from dimo.views.slices import save_slice, write_test
from dimo.worlds import is_world

HERE = Path(__file__).parent
PAGE, STYLE = HERE / "explorer.js", HERE / "explorer.css"
FEW_TOKENS = 256  # of so few, the slice is checked at once; of more, at a click
INSTALL = "dimo: anywidget is missing, so this is a picture; pip install -e '.[notebooks]' makes it an explorer"


def explore(
    source: str | Path | RunFolder | Models | Sequence[Models], steps: Sequence[int | str] = (), **how: Any
) -> Any:
    """An explorer of teacher, auxiliary and student, to show as the last line of a cell.

    Click a token, or move it with the arrow keys; page keys change the frame, comma and full stop t, s the statistic,
    n the network, l the scale, a pins this state beside the next.

    Args:
        source: a run folder, a checkpoint folder or a built-in world, as in `open_models`; or models that are open.
        steps: of a run, several checkpoints to choose from, such as (360, "final"); empty: the newest.
        how: further arguments of `open_models`, such as `student`.

    Returns:
        A widget whose `show` changes what it shows; without anywidget a figure, and a sentence on stderr.

    Raises:
        DimoError: see `open_models`; or the steps have different sizes.
    """
    if isinstance(source, Models):
        models = [source]
    elif isinstance(source, str | Path | RunFolder):
        models = [open_models(source, step, **how) for step in (steps or (how.pop("step", None),))]
    else:
        models = list(source)
    explorer = ExplorerView(models)
    try:
        widget = _widget_class()
    except ImportError:
        print(INSTALL, file=sys.stderr)
        return twin(explorer.view(explorer.first_request()), explorer.about())
    return widget(explorer)


class _Front:
    """What the widget does, but for its traits."""

    explorer: ExplorerView
    asked: dict
    about: dict
    view: dict
    alignment: dict
    send: Any

    def _ask(self, request: dict) -> None:
        """Answer; what cannot be answered leaves what is shown, with a sentence."""
        try:
            self.view = self.explorer.view(request)
            self.asked = copy.deepcopy(request)
        except DimoError as error:
            self.view = self.view | {"id": request.get("id", 0), "error": str(error)}

    def show(self, **changes: Any) -> None:
        """Change what is shown: t, seed, prompt, guidance_scale, temperature, of, statistic, token, picture, model.

        Raises:
            DimoError: an unknown name, or a value that is out of range.
        """
        request = copy.deepcopy(self.asked)
        for name, value in changes.items():
            place = request if name in ("statistic", "token", "picture") else request["panes"][-1]
            if name not in place:
                raise DimoError(f"{name} cannot be shown{nearest(name, [*request, *request['panes'][-1]])}")
            place[name] = list(value) if name == "token" else value
        view = self.explorer.view(request | {"id": self.view["id"] + 1})
        self.asked, self.view = request, view | {"request": request}

    def check(self) -> dict:
        """Compare the logits slice with moved targets, as `find_misalignment` does, and show it."""
        self.alignment = self.explorer.alignment(self.asked["panes"][-1]["model"])
        return self.alignment

    def save(self) -> Path:
        """Save the passes behind what is shown as a slice; see `dimo.views.slices`."""
        models, setting, answer = self.explorer.answer(self.asked["panes"][-1])
        return save_slice(models, setting, answer, tuple(self.asked["token"]))

    def _told(self, _, message: dict, buffers: list) -> None:
        try:
            if message.get("kind") == "check":
                self.check()
            elif message.get("kind") in ("save", "test"):
                file, test = self.save(), message["kind"] == "test"
                text = write_test(file) if test else f"saved: {file}\nagain:  dimo replay {quoted(file)}"
                self.send({"kind": "text", "text": text, "copy": test})
        except (DimoError, OSError) as error:
            self.send({"kind": "text", "text": str(error), "copy": False})

    def figure(self):
        """What is shown, as a figure."""
        return twin(self.view, self.about)

    def _repr_mimebundle_(self, **kwargs):
        made = super()._repr_mimebundle_(**kwargs)  # type: ignore[misc]
        picture = io.BytesIO()
        self.figure().savefig(picture, format="png")
        data, metadata = made if isinstance(made, tuple) else (made or {}, {})
        pane = self.view["panes"][-1]["asked"]
        data["image/png"] = base64.b64encode(picture.getvalue()).decode()
        data["text/plain"] = f"Explorer({pane['prompt']!r}, seed {pane['seed']}, t {pane['t']:g})"
        return data, metadata | {"image/png": {"alt": f"{data['text/plain']}: a map of {self.view['statistic']}"}}


@functools.cache
def _widget_class() -> type[Any]:
    import anywidget
    import traitlets

    class Explorer(_Front, anywidget.AnyWidget):
        """The front end asks by `request`; `view` is the answer. See `ExplorerView`."""

        _esm, _css = PAGE.read_text(encoding="utf-8"), STYLE.read_text(encoding="utf-8")
        about = traitlets.Dict().tag(sync=True)
        request = traitlets.Dict().tag(sync=True)
        view = traitlets.Dict().tag(sync=True)
        alignment = traitlets.Dict().tag(sync=True)

        def __init__(self, explorer: ExplorerView):
            first = explorer.first_request()
            super().__init__(about=explorer.about() | {"live": True}, request=first, view=explorer.view(first))
            self.explorer, self.asked = explorer, first
            if is_world(explorer.models[0].ursa.folder) and math.prod(explorer.grid) <= FEW_TOKENS:
                self.check()
            self.on_msg(self._told)
            self.observe(lambda change: self._ask(change["new"]), names="request")

    return Explorer
