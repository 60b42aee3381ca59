"""Stage 1's source: the world's own prompts, tokenised once, or a stream of captions, tokenised batch by batch."""

from __future__ import annotations

from pathlib import Path

import torch

from dimo.data.prompts import PromptStream
from dimo.distill.stages import tokenise
from dimo.errors import DimoError
from dimo.train.config import Config
from dimo.ursa import Ursa
from dimo.worlds import is_world, load_world

SHOWN = 8  # of a stream


class WorldPrompts:
    """All prompts of a world; a batch is drawn from the step's generator, so there is no position to keep."""

    def __init__(self, prompts: list[str], ursa: Ursa, max_prompt_length: int):
        self.examples, self.example_ids = prompts, tokenise(ursa.tokenize, prompts, max_prompt_length)

    def batch(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """txt_ids (size, L)."""
        rows = torch.randint(len(self.example_ids), (size,), generator=generator, device=self.example_ids.device)
        return self.example_ids[rows]

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class StreamedPrompts:
    """This rank's share of a stream; `examples` are the first prompts of it, the same on every rank."""

    def __init__(self, stream: PromptStream, ursa: Ursa, max_prompt_length: int):
        self.stream, self.ursa, self.max_prompt_length = stream, ursa, max_prompt_length
        self.examples = stream.first(SHOWN)
        self.example_ids = tokenise(ursa.tokenize, self.examples, max_prompt_length)
        self.taken = self.cut = 0  # by this rank, and how many of those are longer than max_prompt_length

    def batch(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """txt_ids (size, L); the stream has its own order, so `generator` draws nothing."""
        ids, cut = self.ursa.tokenize_and_count(self.stream.take(size), self.max_prompt_length)
        self.taken, self.cut = self.taken + size, self.cut + cut
        return ids

    def metrics(self) -> dict[str, float]:
        """Counts of the stream, and the share of the prompts that were cut to max_prompt_length, since the start."""
        counts = {f"prompts/{name}": count for name, count in self.stream.counts().items()}
        return counts | {"prompts/cut_share": self.cut / max(1, self.taken)}

    def state_dict(self) -> dict:
        return self.stream.state_dict() | {"taken": self.taken, "cut": self.cut}

    def load_state_dict(self, state: dict) -> None:
        position = dict(state)
        self.taken, self.cut = (position.pop(name, 0) for name in ("taken", "cut"))  # older checkpoints have neither
        self.stream.load_state_dict(position)


def open_prompts(config: Config, ursa: Ursa, rank: int = 0, world_size: int = 1) -> WorldPrompts | StreamedPrompts:
    """What `distill.prompt_source` names.

    Raises:
        DimoError: the world has no prompts of its own, or the files do not serve.
    """
    d = config.distill
    if d.prompt_source == "world":
        if not is_world(ursa.folder):
            raise DimoError(
                f"distill.prompt_source is world, and {ursa.folder} is no built-in world; name a file of captions"
            )
        return WorldPrompts(load_world(ursa.folder).prompts, ursa, d.max_prompt_length)
    stream = PromptStream(
        d.prompt_source, config.experiment.seed, rank, world_size, d.shuffle_buffer,
        d.score_minimums(), d.motion_value(), d.motion_share,
    )  # fmt: skip
    return StreamedPrompts(stream, ursa, d.max_prompt_length)
