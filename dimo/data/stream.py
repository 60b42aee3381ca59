"""Prompts from caption files of any size: streamed, sharded by rank, buffer-shuffled, resumable at any prompt."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dimo.data.listing import list_files
from dimo.data.readers import caption_column, caption_text, read_rows
from dimo.errors import DimoError

MOTION = "motion_score"
START = {"epoch": 0, "file": 0, "row": 0, "rows": 0, "no_caption": 0, "filtered": 0}  # a position


class PromptStream:
    """An endless stream of prompts; `take(n)` returns this rank's next n.

    All ranks walk through one global sequence, which does not depend on the number of ranks: each epoch visits the
    files in a new order, reads their rows in blocks of `shuffle_buffer` and shuffles each block. Of every `world_size`
    consecutive prompts, rank r takes the r-th. Ranks therefore never overlap, however few files there are, and share
    one position of a few integers; resuming means reading one block again. (The shuffle buffer of `datasets` would lose
    its content.) Every rank parses every row, which costs far less than a training step.

    Args:
        path: a txt (one prompt per line), jsonl, csv or parquet file, or a folder of such files (see `list_files`).
        seed: seed of the order and of the choice of prompts with a motion prefix.
        rank, world_size: index of this process and number of processes.
        shuffle_buffer: rows shuffled together, and the maximum held in memory.
        minimum: {score column: minimum}; rows with a lower or missing score are dropped and counted.
        motion: value of the prefix `motion=x.x, ` that URSA's captions have: a number, "score" for each row's own
            motion_score (none for rows without one), or None for no prefix.
        motion_share: fraction of the prompts that get the prefix.

    Raises:
        DimoError: invalid arguments, an unreadable file, a missing column, or an epoch without a single prompt.
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
        motion_share: float = 0.6,
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
        self._start(dict(START))

    def take(self, size: int) -> list[str]:
        """This rank's next `size` prompts. The global position advances by size * world_size."""
        if size < 1:
            raise DimoError(f"size must be at least 1, got {size}")
        return [self._next() for _ in range(size * self.world_size)][self.rank :: self.world_size]

    def first(self, size: int) -> list[str]:
        """Up to `size` upcoming prompts of the global sequence, without consuming them."""
        return self._block[self._used : self._used + size]

    def once(self) -> Iterator[str]:
        """Every prompt of the first epoch, of all ranks, without moving the position."""
        for at, prompts, _ in self._read(dict(START)):
            if at["epoch"]:
                return
            yield from prompts

    def counts(self) -> dict[str, int]:
        """Totals up to the current block: epoch, rows, rows with no_caption, rows filtered by a minimum."""
        return {name: self._after[name] for name in ("epoch", "rows", "no_caption", "filtered")}

    def state_dict(self) -> dict:
        """The position, equal on all ranks, with digests of the file names and of the current block."""
        names = [file.name for file in self.files]
        return {**self._at, "used": self._used, "files": _digest(names), "block": _digest(self._block)}

    def load_state_dict(self, state: dict) -> None:
        """Continue with the prompt that follows `state_dict()`, also with a different number of ranks.

        Rows after the current block may have been edited in the meantime.

        Raises:
            DimoError: the files have changed, so the position is meaningless.
        """
        state = dict(state)
        files, block, used = state.pop("files"), state.pop("block", None), state.pop("used")
        names: list[str] | list[tuple[str, int]] = [file.name for file in self.files]
        if block is None:  # a checkpoint of an earlier dimo
            names = [(file.name, file.stat().st_size) for file in self.files]
        if files != _digest(names):
            raise DimoError(f"{self.path} has changed since the checkpoint (other files or sizes), so the position in "
                            "it is lost; restore the files, or start a new run")  # fmt: skip
        self._start(state)
        if used > len(self._block) or block not in (None, _digest(self._block)):
            raise DimoError(f"{self.path} has changed since the checkpoint: other prompts are at the saved position; "
                            "restore the files, or start a new run")  # fmt: skip
        self._used = used

    def _start(self, position: dict) -> None:
        self._blocks = self._read(position)
        self._advance()

    def _advance(self) -> None:
        """Move to the next block that has prompts."""
        self._at, self._block, self._after = next(block for block in self._blocks if block[1])
        self._used = 0

    def _next(self) -> str:
        if self._used == len(self._block):
            self._advance()
        self._used += 1
        return self._block[self._used - 1]

    def _read(self, position: dict) -> Iterator[tuple[dict, list[str], dict]]:
        """Yield blocks from a position on, endlessly: (position before, prompts, position after)."""
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
        """Yield (file index, rows read from it, caption, row) from a position to the end of its epoch."""
        order = np.random.default_rng([self.seed, position["epoch"]]).permutation(len(self.files))
        for index in range(position["file"], len(order)):
            file, caption = self.files[order[index]], self._captions[order[index]]
            row = position["row"] if index == position["file"] else 0
            for values in read_rows(file, self.kind, [caption, *self._scores], row):
                row += 1
                yield index, row, values[caption], values

    def _shuffled(self, block: list[tuple], position: dict, after: dict) -> list[str]:
        """The shuffled prompts of a block; dropped rows are counted in `after`."""
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
            f"caption and {position['filtered']} are below {', '.join(f'{k} {v}' for k, v in self.minimum.items())}"
        )


def _digest(values: list) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _number(value: Any) -> float:
    """`value` as a float; NaN, which passes no minimum, if it is not a finite number. "1_0", 10 to Python, is none."""
    try:
        number = float("nan" if isinstance(value, str) and "_" in value else value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan
