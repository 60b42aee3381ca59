"""Checkpoints: written atomically in the background, and loaded only if every checksum matches."""

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
AT_ONCE = 4  # files written concurrently
# glob patterns; a user's copy such as step-360-copy does not match
STEP, MILESTONE = (f"{name}-" + "[0-9]" * 8 for name in ("step", "milestone"))


def step_of(file: Path) -> int:
    """The step in the name of a checkpoint folder, milestone or sample sheet that matches STEP or MILESTONE."""
    return int(file.stem.rpartition("-")[2])


class Checkpoints:
    """The checkpoint folders step-<step>/ of a run:

        <network>.safetensors, optimizer-<network>.pt, state.pt   written by rank 0
        rank-<rank>.pt                                            written by every rank
        manifest.json    {file: {bytes, sha256}}, written last, when all other files are on disk

    `save` copies to host memory and returns while a thread writes; `finish` waits for the thread and renames the folder
    into place. Both are collective and raise an error of one rank on all ranks; the threads never communicate.

    Args:
        folder: the run's checkpoints/ folder.
        keep_last: number of intact checkpoints to keep.
        rank: rank of this process.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2, rank: int = 0):
        self.folder, self.keep_last, self.rank = Path(folder), keep_last, rank
        self._damaged: set[Path] = set()
        self._on_host = HostCopies()
        self._writing: _Writing | None = None

    def save(self, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict, rank_state: dict) -> None:
        """Start writing a checkpoint, after finishing the previous one. Collective.

        Args:
            tensors: {network: full state dict}; used on rank 0 only.
            state: state shared by all ranks, such as optimizer states; used on rank 0 only.
            rank_state: this rank's own state, such as the memory of x_hat; no generators: draws follow from the step.

        Raises:
            DimoError: this checkpoint or the previous one could not be written; older checkpoints are kept.
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
        # the next step modifies these tensors while the thread writes the copies
        whole = {"tensors": tensors, "state": state} if self.rank == 0 else None
        whole, rank_state = self._on_host([whole, rank_state])
        self._writing = _Writing(step, partial, whole, rank_state, self.rank)
        self._writing.start()

    def written(self) -> bool:
        """Whether this rank's writing thread is done, successfully or not, so that `finish` need not wait for it."""
        return self._writing is not None and not self._writing.is_alive()

    def finish(self) -> Path | None:
        """Wait for the checkpoint being written, rename it into place, and delete the oldest. Collective.

        Returns:
            Its folder, or None if none was being written.

        Raises:
            DimoError: a rank could not write its files; older checkpoints are kept.
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
        whole = [f for f in self.all() if f not in self._damaged]  # includes the one just written
        for old in self.all():
            if old < whole[-self.keep_last :][0]:
                remove_folder(old)

    def newest(self) -> tuple[Path | None, dict[Path, str]]:
        """Find the newest intact checkpoint, verifying all checksums.

        Returns:
            (its folder, or None if there are no checkpoints; {newer damaged checkpoint: what is wrong with it}).

        Raises:
            DimoError: there are checkpoints, but all are damaged.
        """
        damaged: dict[Path, str] = {}
        for folder in reversed(self.all()):
            wrong = what_is_wrong(folder)
            if wrong is None:
                self._damaged.update(damaged)
                return folder, damaged
            damaged[folder] = wrong
        if damaged:
            named = "; ".join(f"{folder.name}: {wrong}" for folder, wrong in damaged.items())
            raise DimoError(
                f"no checkpoint in {self.folder} is intact ({named}); restore one, or delete all to start at step 0"
            )
        return None, damaged

    def load(self, folder: Path) -> tuple[dict, dict, dict]:
        """Load a checkpoint without executing pickled code.

        Returns:
            (tensors, state, rank_state) as given to `save`. With more ranks than wrote the checkpoint, the rank states
            are reused cyclically.

        Raises:
            DimoError: a file cannot be loaded.
        """
        try:
            tensors = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            optimizers = {file.stem.removeprefix(OPTIMIZER): file for file in folder.glob(f"{OPTIMIZER}*.pt")}
            if optimizers:  # older versions of dimo kept them in state.pt
                loaded = {name: torch.load(f, map_location="cpu", weights_only=True) for name, f in optimizers.items()}
                state["optimizers"] = loaded
            ranks = sorted(folder.glob("rank-*.pt"))
            own = torch.load(ranks[self.rank % len(ranks)], map_location="cpu", weights_only=True)
        except Exception as error:
            raise DimoError(f"checkpoint {folder} cannot be loaded: {reason(error)}") from error
        return tensors, state, own

    def all(self) -> list[Path]:
        """All checkpoint folders, oldest first, damaged ones included."""
        return sorted(self.folder.glob(STEP))

    def remove_partials(self) -> None:
        """Clean up after a killed process; a checkpoint that was set aside for its replacement is restored.

        Raises:
            DimoError: the checkpoints folder is a file, or a broken link, so its checkpoints are elsewhere.
        """
        if self.folder.is_symlink() and not self.folder.exists():
            raise DimoError(
                f"{self.folder} is a link to {os.readlink(self.folder)}, which does not exist; restore it (is a disk "
                "not mounted?), or delete the link to start at step 0"
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise DimoError(f"{self.folder} is a file, but a folder is needed")
        clear_partials(self.folder)

    def _partial(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.partial"

    def _refusal(self, step: int, error: Exception) -> DimoError:
        last = self.all()[-1:]
        stays = f"{last[0].name} is kept, and the same command continues from it" if last else "there is no older one"
        return DimoError(f"checkpoint of step {step} could not be written to {self.folder}: {reason(error)}; {stays}")


class _Writing(threading.Thread):
    """Thread that writes one rank's files of a checkpoint; sets `entries` for the manifest, or `error`."""

    def __init__(self, step: int, partial: Path, whole: dict | None, rank_state: dict, rank: int):
        super().__init__(name=f"checkpoint-{step}", daemon=True)  # a second Ctrl-C must not wait for it
        self.step, self.partial, self.whole, self.rank = step, partial, whole, rank
        self.rank_state: dict | None = rank_state
        self.entries: dict[str, dict] = {}
        self.error: Exception | None = None
        self._saving = threading.Semaphore(AT_ONCE)
        atexit.register(self._leave)

    def run(self) -> None:
        try:
            self.entries = dict(side_by_side(self._write, self._files(), AT_ONCE))
        except Exception as error:  # safetensors raises its own type for a full disk
            self.error = error
        self.whole = self.rank_state = None
        atexit.unregister(self._leave)

    def _leave(self) -> None:
        """At interpreter exit, abort the writes in progress and prevent new ones: a thread still inside PyTorch's or
        safetensors' native code would crash the process and lose its exit code."""
        with no_more_bytes():
            for _ in range(AT_ONCE):
                self._saving.acquire()

    def _files(self) -> list[tuple[str, Callable, Any]]:
        """[(file name, writing function, value)], the largest first."""
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
    """The manifest entry of a file, {bytes, sha256}."""
    with open(file, "rb") as handle:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def what_is_wrong(folder: Path) -> str | None:
    """None for an intact checkpoint, else the first problem found."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is not readable"
    for name in ("state.pt", "rank-00000.pt"):
        if name not in expected:
            return f"{MANIFEST} does not list {name}"
    found = side_by_side(lambda name: _differs(folder / name, *expected[name]), list(expected))
    return next((wrong for wrong in found if wrong), None)


def _differs(file: Path, size: int, sha256: str) -> str | None:
    """How a file differs from its manifest entry; None if it does not."""
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
    """Copies trees of dicts, lists and tensors to host memory, reusing the buffers of the previous call.

    Allocating costs more than copying: fresh memory is mapped page by page, and fast copies from a GPU need pinned
    pages, which are slower still to allocate. A copy is therefore valid only until the next call.
    """

    def __init__(self):
        self._kept: dict[tuple, torch.Tensor] = {}

    def __call__(self, tree: Any) -> Any:
        used: dict[tuple, torch.Tensor] = {}
        copy = self._copy(tree, (), used)
        self._kept = used  # releases buffers that are no longer used
        if any(memory.is_pinned() for memory in used.values()):
            torch.cuda.synchronize()  # non-blocking copies into pinned memory
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
