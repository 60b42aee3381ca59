"""Atomic writes: files and folders are written under a temporary name next to the final one, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from dimo.errors import DimoError

try:
    import fcntl

    CAN_LOCK = True
except ImportError:  # Windows
    CAN_LOCK = False

try:
    import resource

    CAN_LIMIT = True
except ImportError:  # Windows
    CAN_LIMIT = False

PARTIALS = ".*.partial*"  # glob pattern of what a killed process leaves behind
ASIDE = ".old.partial"  # suffix of a folder set aside while its replacement is renamed; restored if that fails


@contextlib.contextmanager
def whole_file(file: str | Path) -> Iterator[Path]:
    """Yield a temporary path with the same suffix; it replaces `file` on exit, or is deleted after an error.

    What is no file, as /dev/null or a pipe, is yielded itself: nothing may take its place.
    """
    file = Path(file)
    if file.exists() and not file.is_file() and not file.is_dir():
        yield file
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.stem}.{os.getpid()}.partial{file.suffix}")
    try:
        yield beside
        sync(beside)
        os.replace(beside, file)
    except OSError as error:
        if error.errno and not error.filename:  # a write to a full disk does not name the file
            error.filename = str(file)
        raise
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder; on exit it is renamed to `folder`, replacing an older one.

    Raises:
        FileExistsError: on entry, if `folder` is a file.
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


@contextlib.contextmanager
def locked(place: Path, refusal: str) -> Iterator[None]:
    """Lock a file or folder that exists; the kernel releases the lock when the process dies, even by kill -9.

    Raises:
        DimoError: another process has locked it; the message is `refusal`.
    """
    handle = os.open(place, os.O_RDONLY)
    try:
        try:
            if CAN_LOCK:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DimoError(refusal) from None
        except OSError:
            pass  # a network file system without locking
        yield
    finally:
        os.close(handle)


def require_place(path: str | Path) -> None:
    """Raise DimoError unless a file or folder of this name can be written; called before what takes long."""
    above = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if not above.is_dir():
        raise DimoError(f"{path} cannot be written: {above} is a file, not a folder")
    if not os.access(above, os.W_OK):
        raise DimoError(f"{path} cannot be written: {above} is not writable")


def replace_folder(beside: Path, folder: Path) -> None:
    """Rename `beside` to `folder`. An existing `folder` is set aside first: a rename cannot replace a non-empty folder.

    The old folder is deleted once the new one is in place, and restored if the rename fails. If the process is killed
    in between, the next call of `recover` restores it.
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
    """Restore the copy that `replace_folder` set aside if `folder` is missing; delete the copy otherwise."""
    old = _aside(folder)
    if folder.exists():
        remove(old)
    elif old.is_dir():
        os.rename(old, folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{ASIDE}")


def remove_folder(folder: Path) -> None:
    """Rename `folder`, then delete it, so that a kill halfway does not leave a partial folder under its name."""
    if folder.exists():
        removed = folder.with_name(f".{folder.name}.removed.partial")
        remove(removed)
        os.rename(folder, removed)
        remove(removed)


def remove(path: Path) -> None:
    """Delete a file, link or folder tree; what is missing or cannot be deleted is ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def clear_partials(folder: Path, but: str | None = None) -> None:
    """Clean up `folder` after a killed process: restore folders that were set aside, delete all other partial files.

    Args:
        but: glob pattern of those that another process may be writing now.
    """
    for partial in list(folder.glob(PARTIALS)):
        if but and partial.match(but):
            continue
        if partial.name.endswith(ASIDE) and partial.is_dir():
            recover(folder / partial.name[1:].removesuffix(ASIDE))
        else:
            remove(partial)


def side_by_side(function: Callable[[Any], Any], items: list, at_once: int = 4) -> list:
    """[function(item) for item in items] in `at_once` threads. One thread hashes 1.5 GB/s; a 1.7B checkpoint is 40 GB.

    The threads are daemons: unlike those of a ThreadPoolExecutor, they do not delay the exit of the process. After an
    error no further item is started, and the first error is raised once all threads have stopped.
    """
    results: list[Any] = [None] * len(items)
    errors: list[Exception] = []
    rest, lock = list(enumerate(items))[::-1], threading.Lock()

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
    """In this context every write to a file by this process fails, including writes of other threads in progress."""
    if not CAN_LIMIT:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # Python ignores SIGXFSZ, so the write fails with EFBIG
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_text(file: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with whole_file(file) as beside:
        beside.write_text(text, encoding="utf-8")


def save_torch(value: Any, file: str | Path) -> None:
    """`torch.save` with reproducible bytes: given a path, torch would store the file's name in the archive.

    Raises:
        OSError: the disk is full, or writing fails for another reason.
    """
    with open(file, "wb") as handle:  # streams each tensor, without a copy of the archive in memory
        try:
            torch.save(value, handle)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch's own message is only an offset in its archive
                raise error.__context__ from None
            raise


def save_file(tensors: dict[str, torch.Tensor], file: str | Path, metadata: dict[str, str] | None = None) -> None:
    """`safetensors.torch.save_file`, but with permissions by umask instead of readable by the owner only.

    Raises:
        OSError: the disk is full, or writing fails for another reason.
    """
    open(file, "wb").close()
    mode = os.stat(file).st_mode & 0o777
    try:
        safetensors.torch.save_file(tensors, file, metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
    with contextlib.suppress(OSError):  # a file system without permissions
        os.chmod(file, mode)


def sync(path: str | Path) -> None:
    """fsync a file's content or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
