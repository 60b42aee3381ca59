"""The protocol of a world: a source of videos with a known distribution, so that samplers can be scored exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from dimo.errors import DimoError, similar


@dataclasses.dataclass
class Scores:
    """A world's scores of B videos. Tensors are (B,).

    Attributes:
        accuracy: share of tokens in which the video equals the nearest valid video of any prompt.
        valid: whether the video is valid for any prompt.
        adherent: whether the nearest valid video of its own prompt is at least as near as those of all other prompts.
        prompt: index in `World.prompts` of the prompt of the nearest valid video.
        free: the factors that a prompt leaves open, {name: (labels (B,) in [0, bins), bins)}. Labels are those of the
            nearest valid video and uniform in the data; coverage is measured on them. If a factor has more values than
            can be sampled, a bin may stand for many of them.
    """

    accuracy: torch.Tensor
    valid: torch.Tensor
    adherent: torch.Tensor
    prompt: torch.Tensor
    free: dict[str, tuple[torch.Tensor, int]]


class Decoder(Protocol):
    """Decodes codes to frames; saved in a checkpoint's vae/. `dimo.ursa.loading.load_vae` must know its class."""

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode codes (B, T, H, W) to frames (B, 4 (T-1) + 1, 8 H, 8 W, 3), RGB in [0, 1]."""

    def save(self, folder: Path) -> None:
        """Write config.json, with `_class_name`, and the weights."""


class World(Protocol):
    """A distribution of videos given prompts; a video has N = T x H x W tokens over K codes.

    A world is a frozen dataclass. Its fields are its sizes: numbers with defaults, each with a `help` in its metadata.
    They are stored in world.json, and `dimo world train NAME` has a flag for each, so their names must differ from
    those of `TeacherRecipe`. The valid videos are never enumerated, so they may be too many to fit in memory.

    Attributes:
        name: its key in `dimo.worlds.registry.WORLDS`.

    A world of many prompts may have a list `held_out` of some that `draw` never gives: evaluation uses these
    (`prompts_to_score`), training the others (`prompts_to_train`).
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]  # every dataclass has them
    name: ClassVar[str]

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """(T, H, W) of every video; decoded with URSA's strides, 4 (T-1) + 1 frames of 8 H x 8 W pixels."""

    @property
    def codebook_size(self) -> int:
        """K."""

    @property
    def prompts(self) -> list[str]:
        """All prompts, different from each other; words separated by spaces."""

    def codebook(self) -> torch.Tensor:
        """(K, D) float32 embeddings for the metric path, whose noise replaces codes by nearby ones first.

        Distances are squared Euclidean, hence at most 4 between unit vectors.
        """

    def draw(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a batch of data on the generator's device: prompt indices (size,) and codes (size, N), both int64."""

    def score(self, codes: torch.Tensor, prompt: torch.Tensor) -> Scores:
        """Score codes (B, N) in [0, K), on any device, against the prompts with indices `prompt` (B,), exactly.

        Called by `dimo.worlds.oracle.score`, which checks the codes and passes few videos at a time.
        """

    def decoder(self) -> Decoder | None:
        """The decoder of its codes, such as a `PaletteDecoder`; None if the codes cannot be shown as pictures."""


def size_field(default: int, help: str) -> Any:
    """A field of a world that is one of its sizes."""
    return dataclasses.field(default=default, metadata={"help": help})


def title_of(world: World) -> str:
    """A world's name and those of its sizes that are not the defaults, as in "tiles (codes=1000, palettes=4)"."""
    own = [f for f in dataclasses.fields(world) if getattr(world, f.name) != f.default]
    sizes = ", ".join(f"{f.name}={getattr(world, f.name)}" for f in own)
    return f"{world.name} ({sizes})" if sizes else world.name


def require_whole_sizes(world: World) -> None:
    """Raise unless every size is an int; a world.json may hold anything."""
    for name, value in dataclasses.asdict(world).items():
        if type(value) is not int:
            raise DimoError(f"the {world.name} world's {name} must be a whole number, got {value!r}")


def prompts_to_train(world: World) -> list[str]:
    """The world's prompts without those that it holds out."""
    held_out = set(getattr(world, "held_out", ()))
    return [prompt for prompt in world.prompts if prompt not in held_out]


def prompts_to_score(world: World) -> list[str]:
    """The prompts that a world holds out; all of them where it holds out none."""
    return list(getattr(world, "held_out", ())) or world.prompts


def prompt_index(world: World, prompts: list[str]) -> torch.Tensor:
    """Indices (B,) of prompts in `world.prompts`.

    Raises:
        DimoError: a prompt that the world does not know.
    """
    known = {prompt: i for i, prompt in enumerate(world.prompts)}
    for prompt in prompts:
        if prompt not in known:
            hint = similar(prompt, known) or f"; prompts read like {world.prompts[0]!r}"
            raise DimoError(f"the {world.name} world does not know the prompt {prompt!r}{hint}")
    return torch.tensor([known[prompt] for prompt in prompts], dtype=torch.long)


def prompt_length(world: World) -> int:
    """Length of the world's longest prompt in words, each of which is one text token."""
    return max(len(prompt.split()) for prompt in world.prompts)
