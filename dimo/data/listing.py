"""List the caption files of a prompt source. In a folder, nothing that may hold captions is skipped silently."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from dimo.errors import DimoError, reason

KINDS = ("txt", "jsonl", "csv", "parquet")
PACKED = ("gz", "bgz", "bz2", "xz", "zst", "lz4", "zip", "tar", "tgz", "7z", "rar", "z")
NOTES = ("readme", "license", "licence", "notice", "copying", "changelog")  # with NOTE_ENDINGS: not captions
NOTE_ENDINGS = ("", ".md", ".rst", ".txt")
logger = logging.getLogger(__name__)


def list_files(path: str | Path) -> tuple[str, list[Path]]:
    """Resolve a prompt source to its files.

    Args:
        path: a txt, jsonl, csv or parquet file (suffix in any case), or a folder of files of one of these kinds. Hidden
            files, notes such as README.md and empty marker files such as Spark's _SUCCESS are skipped with a warning.

    Returns:
        (kind, files in natural order).

    Raises:
        DimoError: no such path, no caption files, different kinds, an empty file, or any other file in the folder.
    """
    if not str(path).strip():  # Path("") is "."
        raise DimoError("the prompt source must be a file or a folder of files, but its name is empty")
    path = Path(path)
    try:
        return _list(path)
    except OSError as error:
        raise DimoError(f"prompts cannot be read from {path}: {reason(error)}") from error


def either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _list(path: Path) -> tuple[str, list[Path]]:
    source = f"prompts come from a {either(KINDS)} file or a folder of them, but {path}"
    if not path.exists():
        raise DimoError(f"{source} {_nothing(path)}")
    if path.is_dir():
        files = _of_folder(path)
        if not files:
            raise DimoError(f"{source} contains none")
    elif _kind(path) in KINDS and path.is_file():
        files = [path]
    else:
        raise DimoError(f"{source} {'is packed: unpack it' if _is_packed(path) else 'is not one'}")
    kinds = sorted({_kind(file) for file in files})
    if len(kinds) > 1:
        raise DimoError(
            f"{path} mixes file types ({', '.join(kinds)}); give one file, or a folder with files of one type"
        )
    for file in files:
        if file.stat().st_size == 0:
            raise DimoError(f"{file} is empty (0 bytes)")
    return kinds[0], files


def _of_folder(folder: Path) -> list[Path]:
    """The caption files of a folder, in the same order on every machine."""
    files, left = [], []
    for entry in sorted(folder.iterdir(), key=_in_order):
        if entry.name.startswith(".") or _is_note(entry):
            left.append(entry.name)
        elif _kind(entry) in KINDS and entry.is_file():
            files.append(entry)
        elif entry.is_file() and entry.stat().st_size == 0:
            left.append(entry.name)
        else:
            raise DimoError(
                f"{entry} {_unread(entry)}, or move it out of {folder}: every file of a caption folder is read"
            )
    if left:
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        logger.warning("%s: not read as captions: %s%s", folder, ", ".join(left[:8]), more)
    return files


def _in_order(file: Path) -> tuple:
    """Natural sort key: Koala_36M_2 before Koala_36M_10; the name itself breaks ties such as 1 and 01."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)], file.name


def _unread(entry: Path) -> str:
    """Why an entry of a folder cannot be read as captions, and what to do about it."""
    if not entry.exists():
        return f"{_nothing(entry)}: fix the link"
    if entry.is_dir():
        return "is a subfolder: give a folder that contains only files"
    if not entry.is_file():
        return "is not a regular file: give a single file"
    if _is_packed(entry):
        return "is packed: unpack it"
    if any(ending[1:].lower() in KINDS for ending in entry.suffixes[:-1]) or entry.name.endswith("~"):
        return "looks like an unfinished download or a copy of captions: rename it with its proper suffix"
    return f"is not a {either(KINDS)} file: convert it"


def _nothing(path: Path) -> str:
    return f"is a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "does not exist"


def _is_packed(file: Path) -> bool:
    return _kind(file) in PACKED


def _is_note(file: Path) -> bool:
    return file.stem.lower() in NOTES and file.suffix.lower() in NOTE_ENDINGS or file.suffix.lower() == ".md"


def _kind(file: Path) -> str:
    return file.suffix[1:].lower()
