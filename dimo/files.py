"""Files and folders that appear whole or not at all: written beside their name, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

PARTIALS = ".*.partial*"  # what a killed process leaves behind, as a pattern for glob


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
    """Yield an empty folder to fill; it takes the name `folder` at the end, in place of an older one."""
    folder = Path(folder)
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
    """Rename `beside` to `folder`; an older one steps aside first, for no rename replaces a folder with files in it."""
    remove_folder(folder)
    os.rename(beside, folder)
    sync(folder.parent)


def remove_folder(folder: Path) -> None:
    """Renamed away, then deleted, so that a process killed on the way leaves no half of it under its name."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old.partial")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        shutil.rmtree(old, ignore_errors=True)


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


def sync(path: str | Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
