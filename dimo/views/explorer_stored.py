"""The explorer's answers for a few settings, as JSON for a page that works without a kernel."""

from __future__ import annotations

import base64
import gzip
import itertools
import math
from typing import Any

import numpy as np
import torch

from dimo.run.progress import CostBar
from dimo.views.explorer_data import offered, top_codes
from dimo.views.explorer_view import PATCH, PICTURES, ExplorerView

BYTES = 6_000_000  # most of the page that stored values may take
PER_TOKEN = 432  # bytes of one state per token, where nothing is equal and nothing can be compressed
TIMES, PROMPTS, SEEDS = (0.0, 0.2, 0.5, 0.8, 0.95), 3, (0, 1)
NATS = 2048  # a log-probability is kept as a whole number of 1/2048 nats, up to 32
IN_TOPS = ("entropy", "rank")  # statistics whose maps the page takes from the most likely codes


class Arrays:
    """Arrays as parts of one run of bytes, equal ones once: what the student says is the same at every t."""

    def __init__(self) -> None:
        self.data, self.parts = bytearray(), dict[bytes, list[int]]()

    def add(self, array: np.ndarray | bytes) -> list[int]:
        """Where the array is: [its first byte, number of bytes]."""
        raw = array if isinstance(array, bytes) else array.tobytes()
        if raw not in self.parts:
            self.parts[raw] = [len(self.data), len(raw)]
            self.data += raw
        return self.parts[raw]

    def text(self) -> str:
        """All of them, compressed, in base64."""
        return base64.b64encode(gzip.compress(self.data, mtime=0)).decode()


class Tiles:
    """Pictures as tiles, equal ones once: those of one code often are, wherever it stands.

    Pictures whose sides are no multiples of PATCH have whole frames as tiles.
    """

    def __init__(self) -> None:
        self.size, self.known = (0, 0), dict[bytes, int]()

    def add(self, picture: np.ndarray) -> np.ndarray:
        """The tiles of a picture (T, height, width, 3), row by row: their indices. All pictures have one size."""
        frames, height, width, _ = picture.shape
        whole = height % PATCH or width % PATCH
        h, w = self.size = (height, width) if whole else (PATCH, PATCH)
        tiles = picture.reshape(frames, height // h, h, width // w, w, 3).swapaxes(2, 3).reshape(-1, h, w, 3)
        return np.array([self.known.setdefault(tile.tobytes(), len(self.known)) for tile in tiles], np.uint32)


def stored(explorer: ExplorerView, most: int = BYTES, progress: bool = False) -> dict[str, Any]:
    """What the page needs: `about` with the choices that there are, the first request, and a state per choice.

    Of few tokens there are several prompts, noises, times and guidances; of many, or of several checkpoints, fewer,
    until `most` bytes suffice. Numbers are in "arrays" (`Arrays`), to which all else points.
    """
    choices = _choices(explorer, most)
    about: dict[str, Any] = explorer.about()
    first = explorer.first_request()
    begin = {"prompt": 0, "seed": 0, "t": len(choices["t"]) // 3}  # guidance is the run's, which is among the choices
    pane = first["panes"][0] | {key: choices[key][at] for key, at in begin.items()}
    arrays, tiles, made, codes = Arrays(), Tiles(), {}, set[int]()
    settings = [choices[key] for key in ("prompt", "seed", "t", "guidance_scale")]
    asked = list(itertools.product(range(len(explorer.models)), *settings))
    with CostBar("report", len(asked) + 1, "settings of the explorer", progress) as bar:
        for done, (model, prompt, seed, t, guidance) in enumerate(asked):
            bar.show(done, f"t {t:g}, {prompt}")
            one = pane | {"model": model, "prompt": prompt, "seed": seed, "t": t, "guidance_scale": guidance}
            state, seen = _state(explorer, one, arrays, tiles)
            made[f"{model}|{prompt}|{seed}|{_spelt(t)}|{_spelt(guidance)}"], codes = state, codes | seen
        bar.show(len(asked), "is the logits slice read right")
        alignment = explorer.alignment()
        bar.show(len(asked) + 1, "done")
    patches = explorer.patches_of(sorted(codes))
    about |= {"choices": choices, "live": False, "prompts": choices["prompt"], "colours": arrays.add(about["colours"])}
    if patches is not None:
        about["patches"] = patches | {"rgb": arrays.add(patches["rgb"])}
    return {
        "about": about,
        "first": first | {"panes": [pane]},
        "alignment": alignment,
        "states": made,
        "tiles": {"size": tiles.size, "rgb": arrays.add(b"".join(tiles.known))},
        "arrays": arrays.text(),
    }


def _choices(explorer: ExplorerView, most: int) -> dict[str, list[Any]]:
    """{what can be chosen: its values}, so few that their states fit into `most` bytes."""
    models = explorer.models[0]
    guides = sorted({1.0, models.guidance_scale if models.guidance_scale != 1 else 3.0})
    choices: dict[str, list[Any]] = {
        "prompt": models.some_prompts(PROMPTS),
        "seed": list(SEEDS),
        "t": list(TIMES),
        "guidance_scale": guides,
        "temperature": [1.0],
    }
    states = max(1, most // (PER_TOKEN * math.prod(models.grid) * len(explorer.models)))
    for key in ("seed", "guidance_scale", "prompt", "t"):
        while len(choices[key]) > 1 and math.prod(map(len, choices.values())) > states:
            fewer = {"guidance_scale": [models.guidance_scale], "t": choices[key][1::2]}
            choices[key] = fewer.get(key, choices[key][:-1])
    return choices


def _state(explorer: ExplorerView, pane: dict, arrays: Arrays, tiles: Tiles) -> tuple[dict, set[int]]:
    """One state, and the codes whose patches it shows."""
    models, setting, answer = explorer.answer(pane)
    kind = np.uint32 if models.ursa.path.codebook_size > 2**16 else np.uint16
    maps = {}
    for statistic, names in offered(models).items():
        for name in names if statistic not in IN_TOPS else ():
            values = explorer.map_of(pane | {"of": name}, statistic).numpy().astype(np.float64)
            low, high = float(values.min()), float(values.max())
            levels = np.round((values - low) / (high - low or 1) * 65535)
            maps[f"{statistic}|{name}"] = {"low": low, "high": high, "data": arrays.add(levels.astype(np.uint16))}
    tops, seen = [], set[int]()
    for name, top in top_codes(answer, setting).items():
        seen |= set(top.codes.flatten().tolist())
        tops.append({
            "of": name, "codes": arrays.add(top.codes.numpy().astype(kind)), "p": arrays.add(_nats(top.log_p)),
            "p_x_hat": arrays.add(_nats(top.log_p_x_hat)), "entropy": arrays.add(top.entropy.numpy().astype("<f4")),
            "rank": arrays.add(top.rank.numpy().astype(np.uint32)),
        })  # fmt: skip
    pictures = {}
    if models.ursa.vae is not None:
        for name in PICTURES:
            picture = explorer.picture_of(models, pane, answer, name)
            pictures[name] = {"size": list(picture.shape[:3]), "tiles": arrays.add(tiles.add(picture))}
    state = {"maps": maps, "top": tops, "pictures": pictures, "notes": explorer.notes(models, setting)}
    own = {name: arrays.add(getattr(answer, name)[0].cpu().numpy().astype(kind)) for name in ("x_hat", "x_t")}
    return state | own, seen


def _nats(log_p: torch.Tensor) -> np.ndarray:
    return np.clip(np.round(-log_p.double().numpy() * NATS), 0, 65535).astype(np.uint16)


def _spelt(number: float) -> str:
    """As JavaScript spells it in a key."""
    return f"{number:g}"
