"""Prompts for stage 1: those of a world, tokenised once, or a stream of captions, tokenised batch by batch.

Some captions are held out: training never sees them, and a student that no oracle can score is evaluated on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from dimo.config import Config
from dimo.data.stream import PromptStream
from dimo.distill.stages import tokenise
from dimo.errors import DimoError
from dimo.files import write_text
from dimo.run.folder import FOUND
from dimo.run.origin import held_out_by, learns_from, run_config, run_of
from dimo.run.sources import captions_identity
from dimo.ursa import Ursa
from dimo.ursa.weights import read_json
from dimo.worlds import is_world, load_world
from dimo.worlds.protocol import prompts_to_train

SHOWN = 8  # number of example prompts of a stream without held-out captions
ROWS = 10_000  # held-out captions are taken from so many first rows
LOOKED_AT = 1_000_000  # of a run's captions, for what it was trained on
MOST = 5  # at most one in so many captions is held out, so that small files are mostly used for training
PREFIX = re.compile(r"(motion=[^\s,]*, )*")
log = logging.getLogger(__name__)


class WorldPrompts:
    """Prompts of a world. Batches are drawn with the step's generator, so there is no position to save."""

    about = ""
    held_out: Sequence[str] = ()

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
    """This rank's share of a caption stream without the held-out captions.

    Args:
        stream: the unsharded stream (rank 0 of 1). Held-out captions are removed before the rest is sharded, so all
            ranks share one position.
        held_out: prompts whose captions are never returned, regardless of their motion prefix and of duplicates. They
            are the `examples`; if empty, the first prompts of the stream are.
        about: a sentence on what is held out, for the log.
    """

    def __init__(
        self, stream: PromptStream, ursa: Ursa, max_prompt_length: int, rank: int = 0, world_size: int = 1,
        held_out: Sequence[str] = (), about: str = "",
    ):  # fmt: skip
        self.stream, self.ursa, self.max_prompt_length = stream, ursa, max_prompt_length
        self.rank, self.world_size = rank, world_size
        self.held_out, self.about = list(held_out), about
        self._never = {_caption(prompt) for prompt in held_out}
        self.examples = self.held_out or stream.first(SHOWN)
        self.example_ids = tokenise(ursa.tokenize, self.examples, max_prompt_length)
        kept = len(self.example_ids.unique(dim=0))
        if kept < len(set(self.examples)):
            self.about += (f"; truncated to distill.max_prompt_length={max_prompt_length} tokens, only {kept} of the "
                           f"{len(set(self.examples))} example prompts differ")  # fmt: skip
        self.taken = self.cut = 0  # prompts taken by this rank, and those of them that were truncated

    def batch(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """txt_ids (size, L), the next prompts of the stream; `generator` is not used."""
        prompts: list[str] = []
        needed = size * self.world_size
        while len(prompts) < needed:
            more = self.stream.take(needed - len(prompts))
            prompts += [prompt for prompt in more if _caption(prompt) not in self._never]
        ids, cut = self.ursa.tokenize_and_count(prompts[self.rank :: self.world_size], self.max_prompt_length)
        self.taken, self.cut = self.taken + size, self.cut + cut
        return ids

    def metrics(self) -> dict[str, float]:
        """Counts of the stream, and the share of prompts truncated to max_prompt_length, since the start of the run."""
        counts = {f"prompts/{name}": count for name, count in self.stream.counts().items()}
        return counts | {"prompts/cut_share": self.cut / max(1, self.taken)}

    def state_dict(self) -> dict:
        return self.stream.state_dict() | {"taken": self.taken, "cut": self.cut}

    def load_state_dict(self, state: dict) -> None:
        position = dict(state)
        self.taken, self.cut = (position.pop(name, 0) for name in ("taken", "cut"))  # missing in older checkpoints
        self.stream.load_state_dict(position)


def open_prompts(config: Config, ursa: Ursa, rank: int = 0, world_size: int = 1) -> WorldPrompts | StreamedPrompts:
    """Open `distill.prompt_source`, with `evaluation.held_out` captions held out.

    The held-out captions depend only on the files and the score minimums, not on seeds, buffers or ranks. A smaller
    number gives the first ones of a larger number.

    Raises:
        DimoError: prompt_source is world but the teacher is not a built-in world's, its prompts do not fit into
            max_prompt_length, or the caption files cannot be read.
    """
    d, wanted = config.distill, config.evaluation.held_out
    if d.prompt_source == "world":
        if not is_world(ursa.folder):
            mine = "; ./world is the folder of that name" if Path("world").exists() else ""
            raise DimoError(
                f"distill.prompt_source is world, but {ursa.folder} is not a built-in world; give a caption file{mine}"
            )
        world = load_world(ursa.folder)
        require_prompts_fit(ursa, world.prompts, d.max_prompt_length)
        return WorldPrompts(prompts_to_train(world), ursa, d.max_prompt_length)

    held_out, different = _held_out(config)
    return StreamedPrompts(
        _stream(config, config.experiment.seed, d.shuffle_buffer), ursa, d.max_prompt_length, rank, world_size,
        held_out, _about(wanted, len(held_out), different),
    )  # fmt: skip


def _stream(config: Config, seed: int, shuffle_buffer: int) -> PromptStream:
    d = config.distill
    return PromptStream(
        d.prompt_source, seed, 0, 1, shuffle_buffer, d.score_minimums(), d.motion_value(), d.motion_share
    )


def _held_out(config: Config) -> tuple[list[str], int]:
    """The prompts of `evaluation.held_out` captions, and among how many different captions they were found."""
    different: dict[str, str] = {}  # {caption: its first prompt}
    wanted = config.evaluation.held_out
    for prompt in _stream(config, 0, ROWS).first(ROWS) if wanted else []:
        different.setdefault(_caption(prompt), prompt)
    return list(different.values())[: min(wanted, len(different) // MOST)], len(different)


def evaluation_prompts(config: Config, ursa: Ursa, weights: str | Path) -> tuple[list[str], int | None]:
    """The prompts on which the student behind `weights` is evaluated. Logs which ones they are.

    Returns:
        (prompts, number of them that are held out). Only captions that the student's run has held out since its first
        step count; None if the captions are not those of the run, so that nothing is known about them.
    """
    run, e = run_of(weights), config.evaluation
    if run is not None and not learns_from(run, config):
        log.warning("%s was trained on other captions than %s, or with other distill.min_*: it is not known which of "
                    "these captions it was trained on", run, config.distill.prompt_source)  # fmt: skip
        return open_prompts(config, ursa).examples, None
    if run is not None and held_out_by(run) < e.held_out:
        log.warning("%s has held out %d captions throughout, not %d", run, held_out_by(run), e.held_out)
        config = dataclasses.replace(config, evaluation=dataclasses.replace(e, held_out=held_out_by(run)))
    source = open_prompts(config, ursa)
    log.warning("%s", source.about)
    return source.examples, len(source.held_out)


def trained_on(config: Config, weights: str | Path, prompts: list[str]) -> int | None:
    """How many of the prompts the student behind `weights` was trained on, and log it if there are any.

    Case, spaces and stops at the end do not count, so that a held-out caption that training has in another spelling is
    found; nor does the motion prefix. Of the run's captions the first LOOKED_AT rows are searched, without those that
    it held out. What is found is kept in the run folder's FOUND, since the search takes a quarter of a minute.

    Returns:
        None if the student is in no run folder, or its run's captions cannot be read any more.
    """
    run = run_of(weights)
    if run is None:
        return None
    own = config if learns_from(run, config) else run_config(run)
    own = dataclasses.replace(own, evaluation=dataclasses.replace(own.evaluation, held_out=held_out_by(run)))
    folded = [_folded(_caption(prompt)) for prompt in prompts]
    try:
        d = own.distill
        depends_on = captions_identity(d.prompt_source), d.score_minimums(), own.evaluation.held_out, LOOKED_AT, folded
        key, kept = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16], _kept(run / FOUND)
        if key not in kept:
            kept[key] = sorted(_search(own, set(folded)))
            with contextlib.suppress(OSError):  # the run of someone else
                write_text(run / FOUND, json.dumps(kept, indent=2) + "\n")
    except DimoError as error:
        log.warning("it cannot be said which of these captions %s was trained on: %s", run, error)
        return None
    found = sum(caption in kept[key] for caption in folded)
    if found:
        log.warning("%d of the %d captions are among those that %s was trained on, as they are or but for case, spaces "
                    "or a stop", found, len(prompts), run)  # fmt: skip
    return found


def _search(config: Config, wanted: set[str]) -> set[str]:
    """Those of some folded captions that are among the captions of `config`, without those that it holds out."""
    never = {_caption(prompt) for prompt in _held_out(config)[0]}
    rows = map(_caption, itertools.islice(_stream(config, 0, ROWS).once(), LOOKED_AT))
    return wanted & {folded for caption in rows if caption not in never and (folded := _folded(caption)) in wanted}


def _kept(file: Path) -> dict[str, list[str]]:
    """The content of FOUND; nothing if there is none, or a damaged one."""
    with contextlib.suppress(DimoError, OSError):
        return {key: found for key, found in read_json(file).items() if isinstance(found, list)}
    return {}


def require_prompts_fit(ursa: Ursa, prompts: list[str], max_prompt_length: int) -> None:
    """Raise unless all of a world's prompts fit into `max_prompt_length` tokens and have different token ids."""
    ids, cut = ursa.tokenize_and_count(prompts, max_prompt_length)
    different = len(ids.unique(dim=0))
    if cut:
        needed = max(len(one) for one in ursa.tokenizer(prompts).input_ids)
        raise DimoError(
            f"distill.max_prompt_length must be at least {needed}, the length of the world's longest prompt in tokens, "
            f"got {max_prompt_length}: {cut} of {len(prompts)} prompts would be truncated, leaving {different} "
            "different ones"
        )
    if different < len(prompts):
        raise DimoError(
            f"the tokenizer in {ursa.folder} belongs to another world: {len(prompts)} prompts of this one become only "
            f"{different} different ones"
        )


def _caption(prompt: str) -> str:
    """The caption without its motion prefix, which a prompt may have in one epoch and not in the next."""
    return PREFIX.sub("", prompt, count=1)


def _folded(caption: str) -> str:
    return " ".join(caption.casefold().split()).rstrip(" .!")


def _about(wanted: int, held_out: int, different: int) -> str:
    trained_on = "evaluation uses captions that are trained on"
    if wanted == 0:
        return f"evaluation.held_out is 0: {trained_on}"
    if held_out == 0:
        return f"too few captions to hold any out of training ({different} different ones): {trained_on}"
    few = f": at most one in {MOST}, although evaluation.held_out is {wanted}" if held_out < wanted else ""
    held = "1 caption is" if held_out == 1 else f"{held_out} captions are"
    return f"{held} held out of training for evaluation{few}"
