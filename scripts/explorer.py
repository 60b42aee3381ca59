"""How long the explorer takes, and what it holds: `python scripts/explorer.py FOLDER [--size 17 256 256]`.

FOLDER is a checkpoint in URSA's layout. The weights are loaded, which takes in a first pass on a GPU, and everything
else is cold: nothing is compiled or kept. Auxiliary and student are made by moving the teacher's weights a little, so
that each needs passes of its own, as in a run. It prints seconds from the call to what the browser gets, and where they
went; then those of a click, of another t, and of each map; the memory beside that of full logits; and the most rows
that a tensor with a column for every code had, which are all tokens if full logits were ever held.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dimo.ursa import MetricPath
from dimo.ursa.prediction import Prediction
from dimo.views import explorer, explorer_data, explorer_view
from dimo.views import models as opening
from dimo.views.explorer_data import offered
from dimo.views.explorer_stored import stored
from dimo.views.figure import Figure
from dimo.views.models import Models, open_models

CLICKS = 20
PARTS = [
    (explorer, "_widget_class", "importing anywidget"), (explorer_view, "ask", "passes and draws"),
    (explorer_data, "predict", "of it, a pass"), (Prediction, "sample", "of it, x_hat"),
    (MetricPath, "sample", "of it, x_t"), (explorer_view, "token_maps", "a map"),
    (explorer_view, "top_codes", "the codes of a token"), (explorer_view.ExplorerView, "picture_of", "decoded frames"),
    (explorer_view.ExplorerView, "patches_of", "patches of codes"), (explorer, "twin", "figure that stands in"),
    (Figure, "savefig", "that figure as PNG"),
]  # fmt: skip


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(place: Any, name: str, into: list[float]) -> None:
    """Replace a function by one that notes the seconds that it takes."""
    inner = getattr(place, name)

    @functools.wraps(inner)
    def outer(*args, **named):
        begin = time.perf_counter()
        made = inner(*args, **named)
        settle()
        into.append(time.perf_counter() - begin)
        return made

    setattr(place, name, outer)


@torch.no_grad()
def models_of(folder: str, size: tuple[int, int, int]) -> Models:
    begin, warming = time.perf_counter(), []
    timed(opening, "first_passes", warming)
    models = open_models(folder, size=size)
    settle()
    print(f"loading: {time.perf_counter() - begin:.2f} s, of it the first passes {sum(warming):.2f} s")
    teacher, models.guidance_scale = models.networks["teacher"], 3.0
    for i, name in enumerate(("auxiliary", "student")):
        other, g = copy.deepcopy(teacher), torch.Generator(models.device).manual_seed(i)
        for w in other.parameters():
            if w.dim() == 2:
                noise = torch.randn(w.shape, generator=g, device=w.device, dtype=w.dtype)
                w.add_(noise, alpha=0.1 * w.std().item())
        models.networks[name] = other
    settle()
    return models


class Largest(TorchDispatchMode):
    """The most rows of a tensor with a column for every code, but for the head itself."""

    def __init__(self, codes: int, hidden: int):
        super().__init__()
        self.codes, self.hidden, self.rows = codes, hidden, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, torch.Tensor) and x.shape[-1:] == (self.codes,) and x.shape[0] != self.hidden:
                self.rows = max(self.rows, x.numel() // self.codes)
        return made


def asked(widget: Any, **changes: Any) -> float:
    """Seconds until the widget has answered a request, as the page makes it."""
    request = copy.deepcopy(widget.asked) | {"id": widget.view["id"] + 1}
    for name, value in changes.items():
        place = request if name in ("statistic", "token") else request["panes"][0]
        place[name] = value
    begin = time.perf_counter()
    widget.request = request
    settle()
    if "error" in widget.view:
        print("refused:", widget.view["error"])
    return time.perf_counter() - begin


def first_pixel(models: Models) -> Any:
    spent: dict[str, list[float]] = {said: [] for _, _, said in PARTS}
    for place, name, said in PARTS:
        timed(place, name, spent[said])
    begin = time.perf_counter()
    widget = explorer.explore(models)
    there = time.perf_counter() - begin
    widget._repr_mimebundle_()
    print(f"to what the browser gets: {time.perf_counter() - begin:.2f} s, {there:.2f} s of it without the figure")
    for said, seconds in spent.items():
        if seconds:
            print(f"  {said:24} {len(seconds)} x, {sum(seconds):.3f} s in all, the first {seconds[0]:.3f} s")
    return widget


def moves(models: Models, widget: Any) -> None:
    g = torch.Generator().manual_seed(0)
    places = [[int(torch.randint(n, (), generator=g)) for n in models.grid] for _ in range(CLICKS)]
    clicks = sorted(asked(widget, token=place) for place in places)
    print(f"a click: median of {CLICKS} {clicks[CLICKS // 2]:.4f} s, longest {clicks[-1]:.4f} s")
    turned = {"t": 0.5, "guidance_scale": 2.0, "temperature": 0.8, "seed": 1}
    print("; ".join(f"another {name} {asked(widget, **{name: value}):.3f} s" for name, value in turned.items()))
    for statistic, of in offered(models).items():
        seconds = (f"{name} {asked(widget, statistic=statistic, of=name):.3f}" for name in of)
        print(f"  map of {statistic:16} {', '.join(seconds)} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--size", type=int, nargs=3, default=[17, 256, 256], metavar=("FRAMES", "HEIGHT", "WIDTH"))
    args = parser.parse_args()
    models = models_of(args.folder, tuple(args.size))
    teacher, n, codes = models.networks["teacher"], math.prod(models.grid), models.ursa.path.codebook_size
    print(f"{n:,} tokens x {codes:,} codes, {next(teacher.parameters()).dtype}, {models.device}")
    on_gpu = models.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
    widget = first_pixel(models)
    moves(models, widget)
    if on_gpu:
        more = (torch.cuda.max_memory_allocated() - weights) / 2**30
        whole = 4 * n * codes / 2**30
        print(f"at most {more:.2f} GiB beside the weights; one network's full logits would be {whole:.2f} GiB")
    view = explorer_view.ExplorerView([models])
    with Largest(codes, teacher.config.hidden_size) as seen:
        for statistic in ("kl_to_teacher", "gradient", "information"):
            first = view.first_request()
            pane = first["panes"][0] | {"of": offered(models)[statistic][-1]}
            view.view(first | {"statistic": statistic, "panes": [pane]})
    print(f"most rows of a tensor with a column for every code: {seen.rows:,}, of {n:,} tokens")
    if n < 10_000:
        begin = time.perf_counter()
        print(f"a report's {len(stored(view)['states'])} states: {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
