"""Slices: what networks say at one x_t, saved so that any backend, device or dtype can be asked again and compared.

A slice is a pair of files: NAME.safetensors with the codes that went in and, for some tokens, hidden states after every
layer and log-probabilities; and NAME.json with the settings, the model and where it came from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dimo.distill.stages import for_each_draw
from dimo.errors import DimoError
from dimo.files import save_file, whole_file, write_text
from dimo.run.origin import run_of
from dimo.ursa import predict
from dimo.ursa.weights import read_json
from dimo.views.explorer_data import Answer, Setting, answers_at, token_at
from dimo.views.models import Models, checkpoints_of, open_models

TOKENS = 16  # tokens of a slice: the one that was looked at, and others spread evenly
TOP = 8  # codes of each, with their log-probabilities
CODES = ("txt_ids", "uncond_ids", "x_init", "x_hat", "x_t")
# what may differ, by dtype: hidden states relative to their norm, log-probabilities in nats
LIMITS = {"torch.float32": (1e-4, 1e-3), "torch.bfloat16": (0.1, 0.3), "torch.float16": (0.03, 0.1)}


@dataclasses.dataclass
class Replay:
    """How a slice compares with the networks now.

    Attributes:
        agrees: whether every difference is within its limit.
        first: where it first differs by more, in the order of computation: prediction, place, token; "" if nowhere.
        differences: {"prediction, place": largest difference over the tokens}, in the order of computation.
        sentence: all this in words.
    """

    agrees: bool
    first: str
    differences: dict[str, float]
    sentence: str


def save_slice(models: Models, setting: Setting, answer: Answer, place: tuple[int, int, int], name: str = "") -> Path:
    """Save what an explorer shows.

    Args:
        place: the token (frame, row, column) that was looked at; it comes first in the slice.
        name: of the files; default: prompt, seed, t and token.

    Returns:
        The JSON file, in slices/ of `models.folder`.
    """
    token = token_at(models.grid, place)
    others = torch.linspace(0, math.prod(models.grid) - 1, TOKENS).long().tolist()
    tokens = list(dict.fromkeys([token, *others]))[:TOKENS]
    if not name:
        words = re.sub(r"\W+", "-", setting.prompt.lower()).strip("-")[:40]
        name = f"{words}-seed{setting.seed}-t{setting.t:g}-token{'-'.join(map(str, place))}"
    file = models.folder / "slices" / f"{name}.json"
    codes = {key: getattr(answer, key).cpu() for key in CODES}
    tensors = codes | _computed(models, answer, setting, tokens, {})
    dtype = next(models.ursa.transformer.parameters()).dtype
    about = {
        "setting": dataclasses.asdict(setting), "tokens": tokens, "token": list(place), "grid": list(models.grid),
        "dtype": str(dtype).removeprefix("torch."), "device": models.device.type, "label": models.label,
        "origin": models.origin, "model": _model(models),
        "weights": {key: _digest(network) for key, network in models.networks.items()},
    }  # fmt: skip
    with whole_file(file.with_suffix(".safetensors")) as beside:
        save_file({key: value.contiguous() for key, value in tensors.items()}, beside)
    write_text(file, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    return file


def replay(file: str | Path, models: Models | None = None, **how: Any) -> Replay:
    """Ask the networks again with the codes of a slice, and compare.

    Args:
        file: the JSON or safetensors file; or one of a training step that was skipped too often (`dimo.train.guards`),
            whose networks are asked where they are not finite.
        models: networks to ask; None: those that the slice names, in its run folder.
        how: device, dtype and backend, as in `open_models`.

    Raises:
        DimoError: the files are damaged, or belong to another model than these networks.
    """
    if Path(file).is_dir():
        raise DimoError(f"{file} is a folder; give the .json of a slice, which the explorer saves to slices/ of a run")
    alone = not Path(file).with_suffix(".json").exists() and Path(file).with_suffix(".safetensors").exists()
    if alone and "step" in (batch := _read_tensors(Path(file))):
        return _replay_of_step(Path(file), batch, models, how)
    about, tensors = read_slice(file)
    if models is None:
        models = _open(Path(file), about, how)
    if about["model"] != _model(models):
        differ = [k for k in about["model"] | _model(models) if about["model"].get(k) != _model(models).get(k)]
        shown = ", ".join(f"{k} {about['model'].get(k)} instead of {_model(models).get(k)}" for k in differ[:3])
        raise DimoError(f"{file} is a slice of another model than {models.label}: it has {shown}")
    codes = {key: tensors[key].to(models.device) for key in CODES}
    setting, tokens = Setting(**about["setting"]), about["tokens"]
    answer = Answer(**codes, t=setting.t, passes={})
    got = _computed(models, answer, setting, tokens, tensors)
    dtypes = [f"torch.{about['dtype']}", str(next(models.ursa.transformer.parameters()).dtype)]
    hidden, nats = (max(LIMITS[dtype][i] for dtype in dtypes) for i in (0, 1))
    return _compared(about, models, tensors, got, {"hidden": hidden, "log_p": nats})


def read_slice(file: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(settings, tensors) of a slice.

    Raises:
        DimoError: a file is missing or damaged, or is no slice.
    """
    file = Path(file).with_suffix(".json")
    about = read_json(file)
    missing = {"setting", "tokens", "grid", "dtype", "origin", "model", "weights"} - about.keys()
    if missing:
        raise DimoError(f"{file} is no slice of dimo: it lacks {', '.join(sorted(missing))}")
    try:
        Setting(**about["setting"])
        LIMITS[f"torch.{about['dtype']}"]
    except (TypeError, KeyError) as error:
        raise DimoError(f"{file} is damaged: {error}") from error
    data = file.with_suffix(".safetensors")
    tensors = _read_tensors(data)
    if set(CODES) - tensors.keys():
        raise DimoError(f"{data} lacks {', '.join(sorted(set(CODES) - tensors.keys()))}")
    return about, tensors


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file.with_suffix(".safetensors"))
    except (OSError, SafetensorError) as error:
        raise DimoError(
            f"{file.with_suffix('.safetensors')}, the tensors of this slice, cannot be read: {error}"
        ) from error


def write_test(file: Path) -> str:
    """Write a pytest file beside a slice that replays it; returns its text."""
    name = re.sub(r"\W+", "_", file.stem)
    text = f'''"""A slice saved by dimo's explorer: the networks still say what they said."""

from pathlib import Path

from dimo.views.slices import replay


def test_{name}():
    outcome = replay(Path(__file__).with_name("{file.name}"))
    assert outcome.agrees, outcome.sentence
'''
    write_text(file.with_name(f"test_{name}.py"), text)
    return text


@torch.no_grad()
def _computed(
    models: Models, answer: Answer, setting: Setting, tokens: list[int], like: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Passes at x_t: hidden states after each layer, and log-probabilities, of some tokens.

    Args:
        like: an earlier slice, whose codes' log-probabilities are read; empty: those of the most likely codes.
    """
    made: dict[str, torch.Tensor] = {}
    n = answer.x_t.shape[1]
    with _layers(models, [token - n - 1 for token in tokens], made):
        passes = answers_at(models, answer.txt_ids, answer.uncond_ids, answer.x_t, setting.t)
    whole = dataclasses.replace(answer, passes=passes)
    for token in tokens:
        for name in whole.names():
            z = whole.prediction(name, setting.guidance_scale, token).logits(slice(0, 1))[0] / setting.temperature
            log_p, known = z.log_softmax(-1).cpu(), like.get(f"{name}.codes")
            codes = log_p.topk(min(TOP, len(log_p))).indices if known is None else known[tokens.index(token)]
            for key, row in ((f"{name}.codes", codes), (f"{name}.log_p", log_p[codes])):
                made[key] = torch.cat([made[key], row[None]]) if key in made else row[None].clone()
    return made


@contextlib.contextmanager
def _layers(models: Models, rows: list[int], into: dict[str, torch.Tensor], whole: bool = False) -> Iterator[None]:
    """In this context, hidden states after every layer go into `into` as "NETWORK.hidden.LAYER", (tokens, D) float32.

    `whole` is for those of all samples, (B, tokens, D). A network that runs twice, the teacher, has them of its first
    pass, which is the unconditional one.
    """
    handles = []
    for name, network in models.networks.items():
        layers = getattr(getattr(network, "model", None), "layers", ())
        if name != "teacher" and network is models.networks["teacher"]:
            continue
        for i, layer in enumerate(layers):

            def keep(_, args, output, key=f"{'unconditional' if name == 'teacher' else name}.hidden.{i:02d}"):
                states = output[0] if isinstance(output, tuple) else output
                if key not in into:
                    into[key] = (states if whole else states[0])[..., rows, :].float().cpu()

            handles.append(layer.register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compared(about: dict, models: Models, want: dict, got: dict, limits: dict[str, float]) -> Replay:
    differences, first = {}, ""
    order = [key for key in got if ".hidden." in key] + [key for key in got if key.endswith(".log_p")]
    for key in order:
        if key not in want:
            continue
        kind = "hidden" if ".hidden." in key else "log_p"
        off = (got[key].double() - want[key].double()).abs()
        if kind == "hidden":
            off = off.norm(dim=-1) / want[key].double().norm(dim=-1).clamp(min=1e-12)
        else:
            off = torch.where(want[key] > math.log(1e-6), off, 0.0).amax(-1)  # what is not likely at all may differ
        off = off.nan_to_num(nan=math.inf)
        name, _, layer = key.replace(".hidden.", ", layer ").partition(".log_p")
        named = f"{name}, log-probabilities" if kind == "log_p" else name
        differences[named] = off.max().item()
        if not first and off.max() > limits[kind]:
            frames, rows, columns = about["grid"]
            at = int((off > limits[kind]).int().argmax())
            token = about["tokens"][at]
            place = token // (rows * columns), token // columns % rows, token % columns
            unit = "nats" if kind == "log_p" else "of its norm"
            first = f"{named}, token {place}: {off[at].item():.3g} {unit}, where {limits[kind]:g} may be"
    worst = {kind: max([v for k, v in differences.items() if ("layer" in k) == (kind == "hidden")], default=0.0)
             for kind in limits}  # fmt: skip
    by = f"hidden states by up to {worst['hidden']:.3g} of their norm, log-probabilities by {worst['log_p']:.3g} nats"
    changed = [key for key, digest in about["weights"].items()
               if key in models.networks and _digest(models.networks[key]) != digest]  # fmt: skip
    weights = f"; the weights of {' and '.join(changed)} are others than when it was saved" if changed else ""
    if first:
        return Replay(False, first, differences, f"the slice differs, first at {first}; {by}{weights}")
    return Replay(True, "", differences, f"the slice is reproduced: {by}{weights}")


@torch.no_grad()
def _replay_of_step(file: Path, batch: dict, models: Models | None, how: dict[str, Any]) -> Replay:
    """Where the networks are not finite on the batch of a skipped step; they are those of the newest checkpoint."""
    if models is None:
        run = run_of(file.resolve().parent.parent)
        if run is None:
            raise DimoError(f"{file} is the batch of a training step, but not in slices/ of a run folder")
        given = {key: value for key, value in how.items() if value is not None}
        models = open_models(run, None if checkpoints_of(run) else 0, **given)
    step, found = int(batch["step"]) + 1, []  # which is saved as an index, from 0
    for name, codes in (("student", "x_init"), ("teacher", "x_t"), ("auxiliary", "x_t")):
        if codes not in batch or name not in models.networks:
            continue
        x, states = batch[codes].to(models.device), dict[str, torch.Tensor]()
        ids = for_each_draw(batch["txt_ids"], batch[codes]).to(models.device)
        alone = dataclasses.replace(models, networks={"teacher": models.networks[name]})
        with _layers(alone, list(range(-x.shape[1] - 1, -1)), states, whole=True):
            entropy = predict(models.networks[name], ids, x, models.grid).entropy()
        places = {f"layer {key[-2:]}": value for key, value in states.items()} | {"the logits": entropy}
        bad = next((place for place, value in places.items() if not value.isfinite().all()), None)
        if bad is not None:
            found.append(f"{name}, {bad}")
    if found:
        return Replay(False, found[0], {}, f"on the batch of step {step} these are not finite: {'; '.join(found)} "
                      f"({models.label})")  # fmt: skip
    return Replay(True, "", {}, f"on the batch of step {step} all networks are finite ({models.label})")


def _open(file: Path, about: dict, how: dict[str, Any]) -> Models:
    origin = dict(about["origin"])
    run = run_of(file.resolve().parent.parent)
    if run is not None and "step" in origin:
        origin["source"] = run  # wherever the folder of runs is now
    if not origin:
        raise DimoError(f"{file} does not say which networks it is of; give them as models")
    if "size" in origin:
        origin["size"] = tuple(origin["size"])
    return open_models(**(origin | {key: value for key, value in how.items() if value is not None}))


def _model(models: Models) -> dict[str, Any]:
    """What tells one model from another, whatever its weights."""
    teacher = models.networks["teacher"]
    own = teacher.config.to_dict() if hasattr(teacher, "config") else {"class": type(teacher).__name__}
    kept = "class hidden_size num_hidden_layers num_attention_heads vocab_size lm_vocab_size rope_theta".split()
    sizes = {key: own[key] for key in kept if key in own}
    return sizes | {"latents_shape": list(models.grid), "networks": sorted(models.networks)}


def _digest(network) -> str:
    """A short digest of a few numbers of every weight, in bfloat16, so that it is the same in every dtype."""
    found = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()) if hasattr(network, "state_dict") else []:
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)][:64].to(torch.bfloat16).float().cpu()
        found.update(name.encode() + some.numpy().tobytes())
    return found.hexdigest()[:16]
