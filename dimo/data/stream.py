"""Prompts from caption files of any size: streamed, sharded by rank, shuffled in a buffer, resumable to the prompt."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dimo.data.listing import list_files
from dimo.data.readers import caption_column, caption_text, read_rows
from dimo.errors import DimoError

MOTION = "motion_score"


class PromptStream:
    """An endless stream of prompts; `take(n)` gives this rank's next n.

    There is one sequence, the same on every rank and for any number of ranks: epoch after epoch, the files in a new
    order, their rows in blocks of `shuffle_buffer`, the prompts of a block shuffled. Of every `world_size` prompts in
    a row, rank r takes the r-th. So ranks never overlap however few files there are, all ranks share one position, and
    the position is a handful of integers: to resume is to read one block again. (A shuffle buffer of `datasets` would
    lose its content.) The price is that every rank parses every row, which costs far less than a training step.

    Args:
        path: a txt (a prompt a line), jsonl, csv or parquet file, or a folder of files of one kind (see `list_files`).
        seed: of orders and of the motion prefix.
        rank, world_size: of this process.
        shuffle_buffer: rows shuffled together, and the most that are held in memory.
        minimum: {score column: least value}; rows below it, or without a score, are left out and counted.
        motion: put `motion=x.x, ` before a prompt, as URSA's captions have it: a number, "score" for the row's own
            motion_score (rows without one get none), or None for nothing.
        motion_share: share of the prompts that get it.

    Raises:
        DimoError: the path, a file or its columns do not serve, or no row of an epoch holds a prompt.
    """

    def __init__(
        self,
        path: str | Path,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 10_000,
        minimum: dict[str, float] | None = None,
        motion: float | str | None = None,
        motion_share: float = 1.0,
    ):
        if not 0 <= rank < world_size:
            raise DimoError(f"rank must lie in [0, world_size), got {rank} of {world_size}")
        if shuffle_buffer < 1:
            raise DimoError(f"shuffle_buffer must be at least 1, got {shuffle_buffer}")
        if isinstance(motion, str) and motion != "score":
            raise DimoError(f"motion must be a number, 'score' or None, got {motion!r}")
        self.path, self.seed, self.rank, self.world_size = Path(path), seed, rank, world_size
        self.shuffle_buffer, self.minimum = shuffle_buffer, minimum or {}
        self.motion, self.motion_share = motion, motion_share
        self.kind, self.files = list_files(path)
        self._scores = list(dict.fromkeys([*self.minimum, *([MOTION] if motion == "score" else [])]))
        self._captions = [caption_column(file, self.kind, self._scores) for file in self.files]
        self._start({"epoch": 0, "file": 0, "row": 0, "rows": 0, "no_caption": 0, "filtered": 0})

    def take(self, size: int) -> list[str]:
        """This rank's next `size` prompts; all ranks move on by size * world_size."""
        if size < 1:
            raise DimoError(f"size must be at least 1, got {size}")
        return [self._next() for _ in range(size * self.world_size)][self.rank :: self.world_size]

    def first(self, size: int) -> list[str]:
        """Up to `size` prompts that come next, on rank 0, without using them up."""
        return self._block[self._used : self._used + size]

    def counts(self) -> dict[str, int]:
        """Since the start, up to the block in use: epoch, rows read, rows without caption, rows under a minimum."""
        return {name: self._after[name] for name in ("epoch", "rows", "no_caption", "filtered")}

    def state_dict(self) -> dict:
        """The position, the same on every rank, with digests of the files' names and of the block it lies in."""
        names = [file.name for file in self.files]
        return {**self._at, "used": self._used, "files": _digest(names), "block": _digest(self._block)}

    def load_state_dict(self, state: dict) -> None:
        """Continue with exactly the next prompt after `state_dict()`, also with another number of ranks.

        What lies behind the block of the position may have been mended since.

        Raises:
            DimoError: the files are not those that the position was taken in.
        """
        state = dict(state)
        files, block, used = state.pop("files"), state.pop("block", None), state.pop("used")
        names = [file.name for file in self.files]
        if block is None:  # a checkpoint of an earlier dimo
            names = [(file.name, file.stat().st_size) for file in self.files]
        if files != _digest(names):
            raise DimoError(f"{self.path} has changed since the checkpoint (other files, or other sizes), so that the "
                            "position in it is lost; put the files back, or start a new run")  # fmt: skip
        self._start(state)
        if used > len(self._block) or block not in (None, _digest(self._block)):
            raise DimoError(f"{self.path} has changed since the checkpoint: other prompts stand where it was; put the "
                            "files back, or start a new run")  # fmt: skip
        self._used = used

    def _start(self, position: dict) -> None:
        self._blocks = self._read(position)
        self._advance()

    def _advance(self) -> None:
        """To the next block that has prompts."""
        self._at, self._block, self._after = next(block for block in self._blocks if block[1])
        self._used = 0

    def _next(self) -> str:
        if self._used == len(self._block):
            self._advance()
        self._used += 1
        return self._block[self._used - 1]

    def _read(self, position: dict) -> Iterator[tuple[dict, list[str], dict]]:
        """Blocks from a position on, for ever: (position before it, prompts, position after it)."""
        while True:
            kept, whole = 0, position["file"] == position["row"] == 0
            rows = self._rows(position)
            while block := list(itertools.islice(rows, self.shuffle_buffer)):
                after = {**position, "file": block[-1][0], "row": block[-1][1], "rows": position["rows"] + len(block)}
                prompts = self._shuffled(block, position, after)
                kept += len(prompts)
                yield position, prompts, after
                position = after
            if whole and not kept:
                raise DimoError(self._nothing(position))
            position = {**position, "epoch": position["epoch"] + 1, "file": 0, "row": 0}

    def _rows(self, position: dict) -> Iterator[tuple[int, int, str | None, dict]]:
        """(file, rows of it read so far, caption, row) from a position to the end of its epoch."""
        order = np.random.default_rng([self.seed, position["epoch"]]).permutation(len(self.files))
        for index in range(position["file"], len(order)):
            file, caption = self.files[order[index]], self._captions[order[index]]
            row = position["row"] if index == position["file"] else 0
            for values in read_rows(file, self.kind, [caption, *self._scores], row):
                row += 1
                yield index, row, values[caption], values

    def _shuffled(self, block: list[tuple], position: dict, after: dict) -> list[str]:
        """The prompts of a block in their order; what is left out is counted in `after`."""
        rng = np.random.default_rng([self.seed, position["epoch"], position["file"], position["row"]])
        order, draws = rng.permutation(len(block)).tolist(), rng.random(len(block)).tolist()
        prompts = []
        for i, draw in zip(order, draws):
            _, _, caption, row = block[i]
            caption = caption_text(caption)
            if not caption:
                after["no_caption"] += 1
            elif self.minimum and any(not _number(row[column]) >= least for column, least in self.minimum.items()):
                after["filtered"] += 1
            else:
                score = _number(row[MOTION]) if self.motion == "score" else self.motion
                has_score = score is not None and score == score
                prompts.append(f"motion={score:.1f}, {caption}" if draw < self.motion_share and has_score else caption)
        return prompts

    def _nothing(self, position: dict) -> str:
        if not position["filtered"]:
            return f"{self.path} holds no prompt: none of its {position['rows']} rows has a caption"
        return (
            f"{self.path} holds no prompt that passes: of {position['rows']} rows {position['no_caption']} have no "
            f"caption and {position['filtered']} fall under {', '.join(f'{k} {v}' for k, v in self.minimum.items())}"
        )


def _digest(values: list) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _number(value: object) -> float:
    """NaN, which passes no minimum, for what is no finite number, or is not written as one (1_0, of which Python makes
    10)."""
    try:
        number = float("nan" if isinstance(value, str) and "_" in value else value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan
