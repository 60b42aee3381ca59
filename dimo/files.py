"""Files and folders that appear whole or not at all: written beside their name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

PARTIALS = ".*.partial*"  # what a killed process leaves behind, as a pattern for glob
ASIDE = ".old.partial"  # ending of a folder that makes room for its successor, and comes back if that does not come


@contextlib.contextmanager
def whole_file(file: str | Path) -> Iterator[Path]:
    """Yield the name to write to, with the same ending; `file` is replaced at the end, and untouched after an error."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.stem}.{os.getpid()}.partial{file.suffix}")
    try:
        yield beside
        sync(beside)
        os.replace(beside, file)
    except OSError as error:
        if error.errno and not error.filename:  # a disk that is full while it writes names none
            error.filename = str(file)
        raise
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the name `folder` at the end, in place of an older one.

    Raises:
        FileExistsError: at once, where a file has the name.
    """
    folder = Path(folder)
    if folder.is_file():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
    recover(folder)
    beside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        for path in (*beside.rglob("*"), beside):
            sync(path)
        replace_folder(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def replace_folder(beside: Path, folder: Path) -> None:
    """Rename `beside` to `folder`; an older one steps aside first, for no rename replaces a folder with files in it.

    It is deleted when the new one is in place, and comes back where that fails, or at the latest by `recover` where the
    process was killed in between.
    """
    recover(folder)
    try:
        if folder.is_dir():
            os.rename(folder, _aside(folder))
        os.rename(beside, folder)
        sync(folder.parent)
    finally:
        recover(folder)


def recover(folder: Path) -> None:
    """What stepped aside for `folder` gets its name back where there is no `folder`, and is deleted where there is."""
    old = _aside(folder)
    if folder.exists():
        remove(old)
    elif old.is_dir():
        os.rename(old, folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{ASIDE}")


def remove_folder(folder: Path) -> None:
    """Renamed away, then deleted, so that a process killed on the way leaves no half of it under its name."""
    if folder.exists():
        removed = folder.with_name(f".{folder.name}.removed.partial")
        remove(removed)
        os.rename(folder, removed)
        remove(removed)


def remove(path: Path) -> None:
    """A file, a link or a whole folder, as far as it can be deleted; nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def clear_partials(folder: Path) -> None:
    """What a killed process left in `folder`: what stepped aside comes back where it is needed, all else goes."""
    for partial in list(folder.glob(PARTIALS)):
        if partial.name.endswith(ASIDE) and partial.is_dir():
            recover(folder / partial.name[1:].removesuffix(ASIDE))
        else:
            remove(partial)


def side_by_side(function: Callable[[Any], Any], items: list, at_once: int = 4) -> list:
    """[function(item) for each], several at once: one thread hashes 1.5 GB/s, and a checkpoint of 1.7B is 40 GB.

    In threads that no end of the process waits for, unlike a pool's. The first error is raised when all have stopped.
    """
    results, errors, rest, lock = [None] * len(items), [], list(enumerate(items))[::-1], threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if errors or not rest:
                    return
                index, item = rest.pop()
            try:
                results[index] = function(item)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(at_once, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@contextlib.contextmanager
def no_more_bytes() -> Iterator[None]:
    """Inside, whatever this process writes to a file fails, in threads that are writing one too."""
    if resource is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # Python ignores the signal that this sends
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_text(file: str | Path, text: str) -> None:
    """Whole or not at all."""
    with whole_file(file) as beside:
        beside.write_text(text, encoding="utf-8")


def save_torch(value: Any, file: str | Path) -> None:
    """`torch.save`, whose bytes depend on the value alone: given a name, it would write it into the archive.

    Raises:
        OSError: the disk is full, or refuses otherwise.
    """
    with open(file, "wb") as handle:  # each tensor is written from where it lies
        try:
            torch.save(value, handle)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch's own word is a position in its archive
                raise error.__context__ from None
            raise


def save_file(tensors: dict[str, torch.Tensor], file: str | Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' own, whose files their owner alone may read; here whoever may read what else this process writes."""
    open(file, "wb").close()
    mode = os.stat(file).st_mode & 0o777
    safetensors.torch.save_file(tensors, file, metadata)
    with contextlib.suppress(OSError):  # a file system without permissions
        os.chmod(file, mode)


def sync(path: str | Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
