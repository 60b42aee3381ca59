"""The explorer's answers for a few settings, as JSON for a page that works without a kernel."""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
from typing import Any

import numpy as np
import torch

from dimo.views.explorer_data import offered, top_codes
from dimo.views.explorer_view import PICTURES, ExplorerView

BYTES = 6_000_000  # most of the page that stored values may take
PER_TOKEN = 432  # bytes of one state per token, in base64
TIMES, PROMPTS, SEEDS = (0.0, 0.2, 0.5, 0.8, 0.95), 3, (0, 1)
NATS = 2048  # a log-probability is kept as a whole number of 1/2048 nats, up to 32


def stored(explorer: ExplorerView, most: int = BYTES) -> dict[str, Any]:
    """What the page needs: `about` with the choices that there are, the first request, and a state per choice.

    Of few tokens there are several prompts, noises, times and guidances; of many, or of several checkpoints, fewer,
    until `most` bytes suffice.
    """
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
            choices[key] = choices[key][:-1] if key != "t" else choices[key][1::2]
    about: dict[str, Any] = explorer.about()
    first = explorer.first_request()
    pane = first["panes"][0] | {key: values[len(values) // 3 if key == "t" else 0] for key, values in choices.items()}
    made, codes, pool = {}, set[int](), dict[str, dict]()
    settings = [choices[key] for key in ("prompt", "seed", "t", "guidance_scale")]
    for model, prompt, seed, t, guidance in itertools.product(range(len(explorer.models)), *settings):
        one = pane | {"model": model, "prompt": prompt, "seed": seed, "t": t, "guidance_scale": guidance}
        state, seen = _state(explorer, one, pool)
        made[f"{model}|{prompt}|{seed}|{_spelt(t)}|{_spelt(guidance)}"], codes = state, codes | seen
    patches = explorer.patches_of(sorted(codes))
    about |= {"choices": choices, "live": False, "colours": _text(np.frombuffer(about["colours"], np.uint8))}
    if patches is not None:
        about["patches"] = patches | {"rgb": _text(np.frombuffer(patches["rgb"], np.uint8))}
    return {
        "about": about,
        "first": first | {"panes": [pane]},
        "alignment": explorer.alignment(),
        "states": made,
        "pool": pool,
    }


def _state(explorer: ExplorerView, pane: dict, pool: dict) -> tuple[dict, set[int]]:
    """One state, and the codes whose patches it shows; its pictures go into `pool`."""
    models, setting, answer = explorer.answer(pane)
    kind = np.uint32 if models.ursa.path.codebook_size > 2**16 else np.uint16
    maps = {}
    for statistic, names in offered(models).items():
        for name in names:
            values = explorer.map_of(pane | {"of": name}, statistic).numpy().astype(np.float64)
            low, high = float(values.min()), float(values.max())
            levels = np.round((values - low) / (high - low or 1) * 65535)
            maps[f"{statistic}|{name}"] = {"low": low, "high": high, "data": _text(levels.astype(np.uint16))}
    tops, seen = [], set[int]()
    for name, top in top_codes(answer, setting).items():
        seen |= set(top.codes.flatten().tolist())
        tops.append({
            "of": name, "codes": _text(top.codes.numpy().astype(kind)), "p": _text(_nats(top.log_p)),
            "p_x_hat": _text(_nats(top.log_p_x_hat)), "entropy": _text(top.entropy.numpy().astype("<f4")),
            "rank": _text(top.rank.numpy().astype(np.uint32)),
        })  # fmt: skip
    pictures = {}
    if models.ursa.vae is not None:
        for name in PICTURES:
            picture = explorer.picture_of(models, pane, answer, name)
            key = hashlib.sha256(picture.tobytes()).hexdigest()[:16]  # most states share one
            pool[key] = {"size": list(picture.shape[:3]), "rgb": _text(picture)}
            pictures[name] = key
    state = {"maps": maps, "top": tops, "pictures": pictures, "notes": explorer.notes(models, setting)}
    return state | {name: _text(getattr(answer, name)[0].cpu().numpy().astype(kind)) for name in ("x_hat", "x_t")}, seen


def _nats(log_p: torch.Tensor) -> np.ndarray:
    return np.clip(np.round(-log_p.double().numpy() * NATS), 0, 65535).astype(np.uint16)


def _text(data: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(data).tobytes()).decode()


def _spelt(number: float) -> str:
    """As JavaScript spells it in a key."""
    return f"{number:g}"
