"""checkpoints/: complete or absent, written beside the training, believed only when every byte is the one written."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dimo.errors import DimoError, reason
from dimo.files import (
    clear_partials,
    no_more_bytes,
    remove_folder,
    replace_folder,
    save_file,
    save_torch,
    side_by_side,
    sync,
)
from dimo.run.ranks import everywhere, raise_everywhere

MANIFEST, OPTIMIZER = "manifest.json", "optimizer-"
AT_ONCE = 4  # files that are written
STEP = "step-" + "[0-9]" * 8  # a step's name as a pattern: a copy beside it, step-360-copy, is somebody's


class Checkpoints:
    """The step-<step>/ folders of a run:

        <network>.safetensors, optimizer-<network>.pt, state.pt   by rank 0
        rank-<rank>.pt                                            by every rank
        manifest.json    {file: {bytes, sha256}}, written when all the others are on the disk

    `save` copies to host memory and returns while a thread writes; `finish` waits for it and renames the folder into
    place. Both are collective, and an error of one rank is raised on all; threads never communicate.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2, rank: int = 0):
        self.folder, self.keep_last, self.rank = Path(folder), keep_last, rank
        self._damaged: set[Path] = set()
        self._on_host = HostCopies()
        self._writing: _Writing | None = None

    def save(self, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict, rank_state: dict) -> None:
        """Begin to write; `tensors` and `state` count on rank 0 alone.

        Raises:
            DimoError: the disk refused this checkpoint or the one before it; what was whole stays.
        """
        self.finish()
        partial, error = self._partial(step), None
        if self.rank == 0:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            except OSError as refused:
                error = self._refusal(step, refused)
        raise_everywhere(error)
        # copies: the next step changes these tensors while they are being written
        whole = {"tensors": tensors, "state": state} if self.rank == 0 else None
        whole, rank_state = self._on_host([whole, rank_state])
        self._writing = _Writing(step, partial, whole, rank_state, self.rank)
        self._writing.start()

    def written(self) -> bool:
        """This rank's files lie there, or could not be written: `finish` would not wait for this rank."""
        return self._writing is not None and not self._writing.is_alive()

    def finish(self) -> Path | None:
        """Wait for the checkpoint being written, put it in its place, and remove the oldest.

        Raises:
            DimoError: a rank could not write; older checkpoints stay.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        writing.join()
        folder = self.folder / f"step-{writing.step:08d}"
        try:
            raise_everywhere(self._refusal(writing.step, writing.error) if writing.error else None)
            entries = {name: entry for files in everywhere(writing.entries) for name, entry in files.items()}
            error = None
            if self.rank == 0:
                try:
                    self._complete(writing.partial, folder, entries)
                except OSError as refused:
                    error = self._refusal(writing.step, refused)
            raise_everywhere(error)
        finally:
            if self.rank == 0:
                shutil.rmtree(writing.partial, ignore_errors=True)
        return folder

    def _complete(self, partial: Path, folder: Path, entries: dict) -> None:
        (partial / MANIFEST).write_text(json.dumps(entries, indent=2) + "\n")
        sync(partial / MANIFEST)
        sync(partial)
        replace_folder(partial, folder)
        self._damaged.discard(folder)
        whole = [f for f in self.all() if f not in self._damaged]  # the one just written is
        for old in self.all():
            if old < whole[-self.keep_last :][0]:
                remove_folder(old)

    def newest(self) -> tuple[Path | None, dict[Path, str]]:
        """(the newest whole checkpoint, {newer one: what is wrong with it}); every byte is read.

        Raises:
            DimoError: there are checkpoints, and none is whole.
        """
        damaged = {}
        for folder in reversed(self.all()):
            wrong = what_is_wrong(folder)
            if wrong is None:
                self._damaged.update(damaged)
                return folder, damaged
            damaged[folder] = wrong
        if damaged:
            named = "; ".join(f"{folder.name}: {wrong}" for folder, wrong in damaged.items())
            raise DimoError(
                f"no checkpoint in {self.folder} is whole ({named}); put one back, or remove all to begin at step 0"
            )
        return None, damaged

    def load(self, folder: Path) -> tuple[dict, dict, dict]:
        """(tensors by network, state, this rank's own state); no pickle is executed.

        On more ranks than wrote it, the rank states are dealt out again from the first.

        Raises:
            DimoError: a file does not load.
        """
        try:
            tensors = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            optimizers = {file.stem.removeprefix(OPTIMIZER): file for file in folder.glob(f"{OPTIMIZER}*.pt")}
            if optimizers:  # else an older dimo's, who kept them in state.pt
                loaded = {name: torch.load(f, map_location="cpu", weights_only=True) for name, f in optimizers.items()}
                state["optimizers"] = loaded
            ranks = sorted(folder.glob("rank-*.pt"))
            own = torch.load(ranks[self.rank % len(ranks)], map_location="cpu", weights_only=True)
        except Exception as error:
            raise DimoError(f"checkpoint {folder} does not load: {reason(error)}") from error
        return tensors, state, own

    def all(self) -> list[Path]:
        """Every step's folder, oldest first, whole or not."""
        return sorted(self.folder.glob(STEP))

    def remove_partials(self) -> None:
        """What a killed process was writing or removing; a checkpoint that had made room for another comes back.

        Raises:
            DimoError: `folder` is a file, or a link that leads nowhere: what it held is not gone, but not here.
        """
        if self.folder.is_symlink() and not self.folder.exists():
            raise DimoError(
                f"{self.folder} leads to {os.readlink(self.folder)}, which is not there; bring that back (a disk that "
                "is not mounted?), or remove the link to begin at step 0"
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise DimoError(f"{self.folder} is a file, a folder is needed")
        clear_partials(self.folder)

    def _partial(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.partial"

    def _refusal(self, step: int, error: Exception) -> DimoError:
        last = self.all()[-1:]
        stays = f"{last[0].name} stays, and the same command continues from it" if last else "there is no older one"
        return DimoError(f"checkpoint of step {step} could not be written to {self.folder}: {reason(error)}; {stays}")


class _Writing(threading.Thread):
    """One rank's files of one checkpoint. Ends with `entries` of the manifest, or with `error`."""

    def __init__(self, step: int, partial: Path, whole: dict | None, rank_state: dict, rank: int):
        super().__init__(name=f"checkpoint-{step}", daemon=True)  # a second Ctrl-C does not wait for it
        self.step, self.partial, self.whole, self.rank_state, self.rank = step, partial, whole, rank_state, rank
        self.entries: dict[str, dict] = {}
        self.error: Exception | None = None
        self._saving = threading.Semaphore(AT_ONCE)
        atexit.register(self._leave)

    def run(self) -> None:
        try:
            self.entries = dict(side_by_side(self._write, self._files(), AT_ONCE))
        except Exception as error:  # safetensors has its own for a full disk
            self.error = error
        self.whole = self.rank_state = None
        atexit.unregister(self._leave)

    def _leave(self) -> None:
        """At the end of a process that has not waited: one whose thread is inside PyTorch's or safetensors' code then
        is aborted, and its exit code is lost. So all come out, by an error, and none goes in again."""
        with no_more_bytes():
            for _ in range(AT_ONCE):
                self._saving.acquire()

    def _files(self) -> list[tuple[str, Callable, Any]]:
        """(name, function that writes, value); the largest first."""
        files = [(f"rank-{self.rank:05d}.pt", save_torch, self.rank_state)]
        if not self.whole:
            return files
        state = dict(self.whole["state"])
        optimizers = state.pop("optimizers", {})
        return [
            *((f"{OPTIMIZER}{name}.pt", save_torch, value) for name, value in optimizers.items()),
            *((f"{name}.safetensors", save_file, value) for name, value in self.whole["tensors"].items()),
            ("state.pt", save_torch, state),
            *files,
        ]

    def _write(self, what: tuple[str, Callable, Any]) -> tuple[str, dict]:
        name, write, value = what
        file = self.partial / name
        with self._saving:
            write(value, file)
        sync(file)
        return name, describe(file)


def describe(file: Path) -> dict:
    """A file's line in the manifest, from its bytes on the disk."""
    with open(file, "rb") as handle:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def what_is_wrong(folder: Path) -> str | None:
    """None for a checkpoint that is whole, else the first thing that is not."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is not readable"
    for name in ("state.pt", "rank-00000.pt"):
        if name not in expected:
            return f"{MANIFEST} does not name {name}"
    found = side_by_side(lambda name: _differs(folder / name, *expected[name]), list(expected))
    return next((wrong for wrong in found if wrong), None)


def _differs(file: Path, size: int, sha256: str) -> str | None:
    """In what a file is not the one that was written."""
    try:
        if file.stat().st_size != size:
            return f"{file.name} has {file.stat().st_size} bytes, not {size}"
        if describe(file)["sha256"] != sha256:
            return f"{file.name} has another checksum than when it was written"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} is not readable ({error.strerror})"
    return None


class HostCopies:
    """Copies of trees of dicts, lists and tensors, the tensors in host memory that the next copy uses again.

    Fresh memory costs more than the copy: the system hands it out page by page, and a GPU writes at full speed only
    into pages that are pinned, which takes longer still. A copy is good until the next call.
    """

    def __init__(self):
        self._kept: dict[tuple, torch.Tensor] = {}

    def __call__(self, tree: Any) -> Any:
        used: dict[tuple, torch.Tensor] = {}
        copy = self._copy(tree, (), used)
        self._kept = used  # what the tree no longer holds is let go
        if any(memory.is_pinned() for memory in used.values()):
            torch.cuda.synchronize()  # copies into pinned memory do not wait by themselves
        return copy

    def _copy(self, value: Any, at: tuple, used: dict) -> Any:
        if isinstance(value, torch.Tensor):
            memory = self._kept.get(at)
            if memory is None or memory.shape != value.shape or memory.dtype != value.dtype:
                memory = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            used[at] = memory
            return memory.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            return {key: self._copy(each, (*at, key), used) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(each, (*at, index), used) for index, each in enumerate(value))
        return value
