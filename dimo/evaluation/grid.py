"""Grid files: arms (sets of keys) x worlds x seeds, of which `dimo.evaluation.ablate` trains and scores every student.

    base: {preset: tiles, keys: {distill.guidance_scale: 3}}
    worlds:
      tiles-48: {train: {world: tiles, frames: 3, codes: 1000, steps: 4000}, keys: {...}, rate_scale: 1}
      shapes: {teacher: shapes}
    arms:
      plain: {}
      curriculum: {distill.t_curriculum_steps: 20%}
      literal: {preset: literal}
    rates: [5e-4, 1e-3]
    tuning_seeds: [100]
    seeds: [0, 1, 2]

A world is a `teacher`, as in distill.teacher_ckpt, or is made by `train`, fields of the world and of `TeacherRecipe`.
`rates` are values of optim.lr, times the world's `rate_scale`; aux_lr and muon_lr keep their ratio to it. `N%` of a key
that counts steps is that share of the arm's training.max_train_steps, and of that key itself the share of the base's,
for an arm with other batches: all arms of a world must see as many samples or, with `equal: passes`, make as many
passes of the networks (`dimo.train.passes.passes_of`). `preset` in an arm stands for its keys.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

from dimo.config import PRESETS, Config, config_keys, load_config
from dimo.config.load import read_groups, shipped_grids
from dimo.config.schema import kind_of
from dimo.config.values import read_value, read_yaml, yaml_text
from dimo.errors import DimoError, nearest
from dimo.paths import user_path
from dimo.train.passes import passes_of
from dimo.worlds import checkpoint_folder, is_world, size_of, video_size
from dimo.worlds.protocol import World
from dimo.worlds.registry import WORLDS
from dimo.worlds.teacher import RECIPES, TeacherRecipe

PARTS = {"about", "base", "worlds", "equal", "arms", "rates", "tuning_seeds", "seeds"}
EQUAL = ("samples", "passes")  # what all arms of a world have alike
STEPS = "training.max_train_steps"
TEACHER_STEPS = 25  # at which teachers are scored, once for each world and guidance


@dataclasses.dataclass(frozen=True)
class Place:
    """A world of a grid: the teacher it has, or the world and the recipe that its teacher is made by."""

    name: str
    words: tuple[str, ...] = ()
    rate_scale: float = 1.0
    teacher: str | None = None
    world: World | None = None
    recipe: TeacherRecipe | None = None

    def folder(self, out: Path) -> str:
        """distill.teacher_ckpt, in the output folder of the grid if it is made there."""
        return self.teacher or str(out / f"world-{_slug(self.name)}")

    def size(self) -> list[str]:
        """The keys of the world's video size."""
        made = self.world and size_of(self.world.latents_shape)
        numbers = made or video_size(checkpoint_folder(str(self.teacher)))
        return [f"distill.{key}={n}" for key, n in zip(("num_frames", "height", "width"), numbers)]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid file with what the command changes of it; keys are `key=value` words."""

    name: str
    preset: str | None
    words: tuple[str, ...]
    places: dict[str, Place]
    arms: dict[str, tuple[str, ...]]
    rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    overrides: tuple[str, ...] = ()  # the command's, which come after those of worlds
    equal: str = "samples"  # or passes

    def words_of(self, place: Place, arm: str, out: Path) -> list[str]:
        """The overrides of all runs of an arm on a world, with shares of steps as numbers."""
        common = [
            *place.size(),
            f"distill.teacher_ckpt={place.folder(out)}",
            *self.words,
            *place.words,
            *self.overrides,
        ]
        words = [*common, *self.arms[arm]]
        words = _counted(words, self._steps(common), [STEPS])
        return _counted(words, self._steps(words), list(config_keys()))

    def run(self, place: Place, arm: str, rate: float | None, seed: int, out: Path) -> tuple[Path, list[str]]:
        """(folder, overrides) of one run; without a rate, the configuration's own."""
        words = self.words_of(place, arm, out)
        if rate is not None:
            o, rate = self._load(words).optim, rate * place.rate_scale
            rates = {"lr": rate, "aux_lr": rate * o.aux_lr / o.lr, "muon_lr": rate * o.muon_lr / o.lr}
            words += [f"optim.{name}={value}" for name, value in rates.items()]
        folder = out / f"{_slug(place.name)}-{_slug(arm)}-lr{rate if rate else 'own':.6}-seed{seed}"
        own = [f"experiment.seed={seed}", f"experiment.output_dir={folder}", f"experiment.name={self.name}"]
        return folder, ["evaluation.teacher_steps=[1]", "evaluation.judged_videos=0", *words, *own]

    def _steps(self, words: list[str]) -> int:
        return self._load([word for word in words if not _is_share(word)]).training.max_train_steps

    def _load(self, words: list[str]) -> Config:
        return load_config(self.preset, words)

    def require_sense(self, out: Path) -> None:
        """Raise DimoError for what is wrong with an arm on a world, before anything is made."""
        self._steps([*self.words, *self.overrides])
        for place in self.places.values():
            if place.teacher and not is_world(checkpoint_folder(place.teacher)):
                raise DimoError(f"a grid needs worlds, whose oracles score the videos, but {place.teacher} is none")
            spent: dict[str, int] = {}
            for arm in self.arms:
                try:
                    config = self._load(self.words_of(place, arm, out))
                except DimoError as error:
                    raise DimoError(f"arm {arm!r} on {place.name}: {error}") from error
                if self.rates and any(word.startswith("optim.lr=") for word in self.arms[arm]):
                    raise DimoError(f"arm {arm!r} sets optim.lr, which is what the grid's rates set")
                spent[arm] = self._spent(config)
                one, first = next(iter(spent.items()))
                step = spent[arm] / config.training.max_train_steps
                if abs(spent[arm] - first) > (step if self.equal == "passes" else 0):  # steps are whole
                    raise DimoError(
                        f"arms of this grid must have equally many {self.equal}, but on {place.name} {one!r} has "
                        f"{first:,} and {arm!r} {spent[arm]:,}; give {STEPS} of one of them as a share, such as 200%"
                    )

    def _spent(self, config: Config) -> int:
        """How many samples a run sees, or what it costs in forward passes of a video."""
        t = config.training
        samples = t.max_train_steps * t.gradient_accumulation_steps * config.distill.batch_size_per_gpu
        return samples if self.equal == "samples" else samples * sum(passes_of(config).values())


def read_grid(
    name: str,
    preset: str | None = None,
    overrides: list[str] | tuple[str, ...] = (),
    arms: list[str] | None = None,
    rates: list[float] | None = None,
    seeds: int | None = None,
    worlds: list[str] | None = None,
) -> Grid:
    """A grid that ships, by its name, or a YAML file, with what the command changes.

    Args:
        preset: replaces the base's.
        overrides: keys of all runs, which replace those of base and worlds; an arm's replace them.
        arms, rates: only these arms; these rates of optim.lr.
        seeds: report seeds 0 to seeds - 1.
        worlds: only these.

    Raises:
        DimoError: no such file; an unknown word, key, world or arm; two arms that are the same; numbers out of range.
    """
    known = shipped_grids()
    file = known.get(name, Path(user_path(name)))
    if not file.is_file():
        raise DimoError(f"{name} is neither a grid that ships nor an existing YAML file{nearest(name, known)}")
    if seeds is not None and seeds < 1:
        raise DimoError(f"--seeds must be at least 1, got {seeds}")
    content = _group(file, "the file", read_yaml(yaml_text(file), str(file)), PARTS)
    base = _group(file, "base", content.get("base", {}), {"preset", "keys"})
    places = {n: _place(file, n, given) for n, given in _group(file, "worlds", content.get("worlds")).items()}
    found = {n: _words(file, f"arm {n}", given) for n, given in _group(file, "arms", content.get("arms")).items()}
    for kind, asked, there in (("arm", arms, set(found)), ("world", worlds, set(places))):
        for one in asked or ():
            if one not in there:
                raise DimoError(f"{file} has no {kind} {one!r}{nearest(one, there)}")
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        if sorted(a) == sorted(b) or _slug(one) == _slug(other):
            raise DimoError(f"{file}: the arms {one!r} and {other!r} are the same")
    listed = content.get("rates") or []
    grid = Grid(
        file.stem, preset or base.get("preset"), _words(file, "base", base.get("keys", {})),
        {n: place for n, place in places.items() if not worlds or n in worlds},
        {n: words for n, words in found.items() if not arms or n in arms},
        tuple(rates or read_value("rates", "list[float]", listed)),
        tuple(read_value("tuning_seeds", "list[int]", content.get("tuning_seeds") or ["100"])),
        tuple(range(seeds) if seeds else read_value("seeds", "list[int]", content.get("seeds") or ["0", "1", "2"])),
        tuple(overrides),
        content.get("equal", "samples"),
    )  # fmt: skip
    if grid.equal not in EQUAL:
        raise DimoError(f"{file}: equal must be one of {', '.join(EQUAL)}, got {grid.equal!r}")
    if any(not rate > 0 for rate in grid.rates) or min(grid.seeds + grid.tuning_seeds) < 0:
        raise DimoError(f"rates must be positive and seeds not negative, got {grid.rates} and {grid.seeds}")
    for listed_seeds in (grid.seeds, grid.tuning_seeds):
        if len(set(listed_seeds)) < len(listed_seeds):
            raise DimoError(f"{file}: each seed must be listed once, got {listed_seeds}")
    both = set(grid.seeds) & set(grid.tuning_seeds)
    if both:
        raise DimoError(f"{file}: seed {min(both)} is reported and would also choose the rate")
    return grid


def _place(file: Path, name: str, given: Any) -> Place:
    given = _group(file, f"world {name}", given, {"teacher", "train", "keys", "rate_scale"})
    if ("teacher" in given) == ("train" in given):
        raise DimoError(f"{file}: world {name} must have either a teacher or what to train one with")
    words = _words(file, f"world {name}", given.get("keys", {}))
    scale = read_value(f"rate_scale of {name}", "float", given.get("rate_scale", "1"))
    if not scale > 0:
        raise DimoError(f"{file}: rate_scale of {name} must be positive, got {scale}")
    if "teacher" in given:
        return Place(name, words, scale, teacher=read_value(f"teacher of {name}", "path", given["teacher"]))
    made = dict(_group(file, f"train of {name}", given["train"]))
    kind = made.pop("world", None)
    if kind not in WORLDS:
        raise DimoError(f"{file}: there is no world {kind!r}{nearest(str(kind), WORLDS)}")
    sizes, recipe = ({f.name: f for f in dataclasses.fields(c)} for c in (WORLDS[kind], TeacherRecipe))
    fields = sizes | {n: f for n, f in recipe.items() if n != "device"}  # the device is that of the runs
    values = {}
    for key, value in made.items():
        if key not in fields:
            raise DimoError(f"{file}: train of {name} has no {key!r}{nearest(key, fields)}")
        values[key] = read_value(f"{key} of {name}", str(fields[key].type), value)
    world = WORLDS[kind](**{n: v for n, v in values.items() if n in sizes})
    changes = {n: v for n, v in values.items() if n in recipe}
    return Place(
        name, words, scale, world=world, recipe=dataclasses.replace(RECIPES.get(kind, TeacherRecipe()), **changes)
    )


def _group(file: Path, what: str, given: Any, known: set[str] | None = None) -> dict[str, Any]:
    """`given` if it is a group with no unknown word in it, and none that is empty where any word may come."""
    if not isinstance(given, dict) or (known is None and not given):
        raise DimoError(f"{file}: {what} must be a group of names, got {given or 'nothing'}")
    for name in given:
        if known is not None and name not in known:
            raise DimoError(f"{file}: {what} has no {name!r}{nearest(name, known)}")
    return given


def _words(file: Path, what: str, given: Any) -> tuple[str, ...]:
    """{key: value} as overrides; `preset` stands for the keys of a preset, but those of its group experiment."""
    if not isinstance(given, dict):
        raise DimoError(f"{file}: {what} must be keys and values, got {given or 'nothing'}")
    words: list[str] = []
    for key, value in given.items():
        if key == "preset":
            presets = {p.stem: p for p in PRESETS.glob("*.yaml")}
            if value not in presets:
                raise DimoError(f"{file}: {what}: there is no preset {value!r}{nearest(str(value), presets)}")
            groups = read_groups(presets[value])
            words += [f"{g}.{k}={v}" for g, keys in groups.items() if g != "experiment" for k, v in keys.items()]
            continue
        if key not in config_keys():
            raise DimoError(f"{file}: {what}: unknown key {key!r}{nearest(key, config_keys())}")
        words.append(f"{key}={'[' + ','.join(value) + ']' if isinstance(value, list) else value}")
    return tuple(words)


def _is_share(word: str) -> bool:
    key, _, value = word.partition("=")
    field = config_keys().get(key)
    return value.endswith("%") and field is not None and kind_of(field) == "int"


def _counted(words: list[str], steps: int, keys: list[str]) -> list[str]:
    """`words` with shares of `steps` as numbers, in those of `keys`."""
    counted = []
    for word in words:
        key, _, value = word.partition("=")
        share = read_value(key, "float", value[:-1]) if _is_share(word) and key in keys else None
        counted.append(word if share is None else f"{key}={round(steps * share / 100)}")
    return counted


def _slug(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)
