"""What the explorer shows, as plain data for its page: one state or two side by side, and the same as a figure."""

from __future__ import annotations

import collections
import dataclasses
import math
import threading

import matplotlib
import numpy as np
import torch
from torch.nn import functional as F

from dimo.errors import DimoError
from dimo.ursa.frames import eight_bits
from dimo.views.clean_tokens import known_clean_tokens
from dimo.views.explorer_data import STATISTICS, TITLES, Answer, Setting, ask, offered, token_at, token_maps, top_codes
from dimo.views.models import Models
from dimo.views.noise_maps import noises_of
from dimo.views.plots import NARROWEST
from dimo.views.reading import NEAR_DATA, check_slice
from dimo.worlds import is_world, load_world
from dimo.worlds.protocol import prompt_index

KEPT = 6  # answers kept: hidden states of so many (checkpoint, prompt, seed, t)
MAPS = 64  # maps kept, which are small: a click on another token computes none
PATCH, PIXELS = 8, 2**17  # pixels of a code's patch, and the most of all decoded pictures together
OVER_NOISES = [name for name, statistic in STATISTICS.items() if statistic.over_noises]
PICTURES = {"x_hat": "decoded x_hat", "x_t": "decoded x_t", "x_init": "decoded x_init"}
COLOURS = np.round(matplotlib.colormaps["cividis"](np.arange(256))[:, :3] * 255).astype(np.uint8)


class ExplorerView:
    """Answers the requests of the explorer's page.

    A request is a dict: `statistic`, `token` (frame, row, column), `picture`, and `panes`, one or two dicts with
    `model` (an index), `prompt`, `seed`, `t`, `guidance_scale`, `temperature` and `of` (a prediction's name).

    Args:
        models: what to look at, such as steps of one run; all with the same latents_shape and codebook.
    """

    def __init__(self, models: list[Models]):
        if not models:
            raise DimoError("models must hold at least one")
        sizes = {(m.grid, m.ursa.path.codebook_size) for m in models}
        if len(sizes) > 1:
            raise DimoError(f"models must have one latents_shape and codebook size, got {sorted(sizes)}")
        self.models, self.grid = models, models[0].grid
        self._answers: collections.OrderedDict[tuple, Answer] = collections.OrderedDict()
        self._maps: collections.OrderedDict[tuple, torch.Tensor] = collections.OrderedDict()
        self._pictures: dict[tuple, np.ndarray] = {}
        self._patches: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()  # a widget's callbacks and the notebook may come from two threads

    def first_request(self) -> dict:
        """What is shown first: where the teacher, guided as in training, is undecided."""
        m = self.models[0]
        pane = {"model": 0, "prompt": m.prompts[0], "seed": 0, "t": 0.2, "guidance_scale": m.guidance_scale,
                "temperature": 1.0, "of": "guided" if m.guidance_scale != 1 else "conditional"}  # fmt: skip
        return {"id": 0, "statistic": "entropy", "token": [0, 0, 0], "picture": "x_hat", "panes": [pane]}

    def about(self) -> dict:
        """What does not change: sizes, names, prompts, the colour table, and what each checkpoint offers."""
        first = self.models[0]
        return {
            "grid": list(self.grid),
            "codebook_size": first.ursa.path.codebook_size,
            "models": [m.label for m in self.models],
            "prompts": list(dict.fromkeys(p for m in self.models for p in m.prompts)),
            "any_prompt": not is_world(first.ursa.folder),
            "statistics": {name: dataclasses.asdict(s) for name, s in STATISTICS.items()},
            "noises": noises_of(self.grid, first.device),
            "offered": [offered(m) for m in self.models],
            "titles": TITLES,
            "pictures": PICTURES if first.ursa.vae is not None else {},
            "no_pictures": first.ursa.no_vae,
            "colours": COLOURS.tobytes(),
            "narrowest": NARROWEST,
        }

    def view(self, request: dict) -> dict:
        """The answer to a request: values, pictures and most likely codes of every pane.

        Raises:
            DimoError: a value out of range, or an unknown name.
        """
        with self._lock, torch.inference_mode():
            panes = [self._pane(request, pane) for pane in request["panes"]]
            codes = sorted({code for pane in panes for top in pane["top"] for code in top["codes"]})
            return {
                "id": request.get("id", 0), "statistic": request["statistic"], "token": list(request["token"]),
                "panes": panes, "patches": self.patches_of(codes),
            }  # fmt: skip

    def _pane(self, request: dict, pane: dict) -> dict:
        models, setting, answer = self.answer(pane)
        token = token_at(self.grid, tuple(request["token"]))
        values = self.map_of(pane, request["statistic"])
        made = {
            "asked": dict(pane),
            "values": values.numpy().astype("<f4").tobytes(),
            "top": [
                {
                    "of": name, "codes": top.codes[0].tolist(), "p": top.log_p[0].exp().tolist(),
                    "entropy": top.entropy.item(), "rank": int(top.rank), "p_x_hat": top.log_p_x_hat.exp().item(),
                }
                for name, top in top_codes(answer, setting, token).items()
            ],
            "x_hat": int(answer.x_hat[0, token]), "x_t": int(answer.x_t[0, token]),
            "notes": self.notes(models, setting),
        }  # fmt: skip
        if models.ursa.vae is not None:
            picture = self.picture_of(models, pane, answer, request.get("picture", "x_hat"))
            made["picture"] = {"size": list(picture.shape[:3]), "rgb": picture.tobytes()}
        return made

    def answer(self, pane: dict) -> tuple[Models, Setting, Answer]:
        """The checkpoint, setting and passes behind a pane; the passes of the last few are kept."""
        if not 0 <= pane["model"] < len(self.models):
            raise DimoError(f"model must lie in [0, {len(self.models)}), got {pane['model']}")
        models = self.models[pane["model"]]
        setting = Setting(*(pane[field.name] for field in dataclasses.fields(Setting)))
        key = (pane["model"], setting.prompt, setting.seed, setting.t)
        if key not in self._answers:
            if is_world(models.ursa.folder):
                prompt_index(load_world(models.ursa.folder), [setting.prompt])  # raises for one that it does not know
            self._answers[key] = ask(models, setting.prompt, setting.seed, setting.t)
            if len(self._answers) > KEPT:
                self._answers.popitem(last=False)
        self._answers.move_to_end(key)
        return models, setting, self._answers[key]

    def map_of(self, pane: dict, statistic: str) -> torch.Tensor:
        """A statistic of a pane's prediction for every token, see `token_maps`; the last few are kept."""
        models, setting, answer = self.answer(pane)
        turned: tuple = (pane["model"], pane["of"], setting.prompt, setting.temperature)
        if statistic not in OVER_NOISES:
            turned += (setting.seed, setting.t, setting.guidance_scale)
        key = (statistic, *turned)
        if key not in self._maps:
            made = token_maps(models, answer, setting, statistic, pane["of"])
            self._maps.update({(name, *turned): values for name, values in made.items()})
            while len(self._maps) > MAPS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(key)
        return self._maps[key]

    def notes(self, models: Models, setting: Setting) -> list[str]:
        notes = []
        if models.networks["student"] is models.networks["teacher"]:
            notes.append("Student, auxiliary and teacher are one network here: nothing has been trained yet.")
        if setting.guidance_scale != 1 and setting.t >= models.guidance_trunc:
            notes.append(f"Training does not guide at t >= {models.guidance_trunc:g}; this view does.")
        return notes

    def picture_of(self, models: Models, pane: dict, answer: Answer, name: str) -> np.ndarray:
        """One decoded frame per latent frame, (T, height, width, 3) uint8, made smaller if they are large."""
        if name not in PICTURES:
            raise DimoError(f"picture must be one of {', '.join(PICTURES)}, got {name!r}")
        key = (pane["model"], pane["prompt"], pane["seed"], pane["t"] if name == "x_t" else 0, name)
        if key not in self._pictures:
            frames = models.ursa.decode(getattr(answer, name).view(-1, *self.grid))[0].float()
            picks = torch.linspace(0, len(frames) - 1, self.grid[0]).round().long().to(frames.device)
            shown = frames[picks].movedim(-1, 1)
            factor = math.ceil(math.sqrt(shown[:, 0].numel() / PIXELS))
            shown = F.avg_pool2d(shown, factor) if factor > 1 else shown
            if len(self._pictures) > 4 * KEPT:
                self._pictures.clear()
            self._pictures[key] = eight_bits(shown.movedim(1, -1)).cpu().numpy()
        return self._pictures[key]

    def patches_of(self, codes: list[int]) -> dict | None:
        """What single codes look like: the middle of nine equal ones, (n, PATCH, PATCH, 3) uint8; None: no decoder."""
        ursa = self.models[0].ursa
        if ursa.vae is None:
            return None
        new = [code for code in codes if code not in self._patches]
        if new:
            decoded = ursa.decode(torch.tensor(new, device=ursa.path.device).view(-1, 1, 1, 1).expand(-1, 1, 3, 3))
            side = decoded.shape[2] // 3
            middle = decoded[:, 0, side : 2 * side, side : 2 * side].movedim(-1, 1).float()
            small = eight_bits(F.adaptive_avg_pool2d(middle, PATCH).movedim(1, -1)).cpu().numpy()
            self._patches.update(zip(new, small))
        return {"codes": codes, "size": PATCH, "rgb": b"".join(self._patches[code].tobytes() for code in codes)}

    def alignment(self, model: int = 0) -> dict:
        """The alignment strip, {"sentence", "found", "readings"}; without known clean tokens there are no readings."""
        models = self.models[model]
        with self._lock, torch.inference_mode():
            clean = known_clean_tokens(models.ursa, models.grid, models.folder.parent)
            if clean is None:
                unknown = (
                    "No clean tokens of this checkpoint are known, so the slice is not checked; `dimo check-alignment`"
                )
                return {"sentence": f"{unknown} samples some.", "found": None, "readings": []}
            found = check_slice(models.ursa, clean, models.max_prompt_length, dense=False)
        readings = [{"name": name, **dataclasses.asdict(reading)} for name, reading in found.readings.items()]
        sentence = f"Checked at t = {NEAR_DATA:g} by {clean.source}: {found.sentence}."
        return {"sentence": sentence, "found": found.found, "readings": readings}


def named(view: dict, about: dict, pane: dict) -> str:
    """The title of a pane's map, as the page has it."""
    statistic, asked = about["statistics"][view["statistic"]], pane["asked"]
    where = f"t {asked['t']:g}, seed {asked['seed']}"
    if statistic["over_noises"]:
        where = f"one pass over {about['noises']} noises"
    return f"{statistic['title']}, {about['titles'][asked['of']]}, {where}"


def scale_of(view: dict, about: dict) -> tuple[float, float]:
    """The common range of a view's maps, as the page has it: from the statistic's least value to the largest one.

    It is never narrower than NARROWEST, so that rounding is not shown as structure.
    """
    least = about["statistics"][view["statistic"]]["least"]
    high = max(float(np.frombuffer(pane["values"], "<f4").max()) for pane in view["panes"])
    return least, max(high, least + about["narrowest"])


def colours_of(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """RGB (..., 3) uint8 of values, as the page has them."""
    share = (values.astype(np.float64) - low) / (high - low)
    return COLOURS[np.clip(np.floor(share * 256), 0, 255).astype(int)]
