"""Fingerprints of what a run learns from, teacher and captions: on resume they may have moved, but not changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from dimo.config.changes import START_OVER
from dimo.data.listing import list_files
from dimo.errors import DimoError
from dimo.ursa.weights import read_json, weight_files
from dimo.worlds import WORLD_FILE, checkpoint_folder

TEACHER, PROMPTS = "distill.teacher_ckpt", "distill.prompt_source"
SOURCES = "sources.json"  # in the run folder: {key: {file: {bytes, sha256, seen}}}
# what codes and token ids mean, by the files of a checkpoint that say so
MEANING = {
    "codebook": ("scheduler/scheduler_model.pth",),
    "vocabulary": ("tokenizer/tokenizer.json", "tokenizer/vocab.json", "tokenizer/merges.txt"),
}
BLOCK, BLOCKS = 2**20, 64  # larger caption files are hashed in 64 blocks of 1 MiB spread over the file


def read_sources(groups: dict[str, dict], known: dict[str, dict] | None = None) -> dict[str, dict]:
    """Fingerprint the teacher and the captions of a configuration.

    Args:
        groups: the configuration as groups of keys.
        known: an earlier result; files that have not been touched since are not read again.

    Returns:
        {key: {file: {bytes, sha256, seen}}}, the content of SOURCES. A missing source is left out: loading it will
        raise, unless the trainer was given it as an object.
    """
    found = {}
    for key, list_of, blocks in ((TEACHER, teacher_files, None), (PROMPTS, _prompt_files, BLOCKS)):
        before = (known or {}).get(key, {})
        with contextlib.suppress(DimoError):
            files = list_of(_named(groups, key))
            found[key] = {name: _describe(file, blocks, before.get(name, {})) for name, file in files.items()}
    return found


def _named(groups: dict[str, dict], key: str) -> str:
    group, name = key.split(".")
    return str(groups.get(group, {}).get(name, ""))


def require_same_sources(
    path: Path, old: dict[str, dict], new: dict[str, dict], keys: Sequence[str] = (TEACHER, PROMPTS)
) -> dict[str, dict]:
    """Check that a run is resumed with the teacher and captions it was begun with.

    Args:
        path: the run folder.
        old, new: groups of keys of the run's configuration and of the new one.
        keys: the sources to check.

    Returns:
        The updated content of SOURCES.

    Raises:
        DimoError: a source has changed, or its path has changed and there is no fingerprint to compare.
    """
    file = path / SOURCES
    known = _read(file) if file.exists() else {}
    found = read_sources(new, known)
    for key in keys:
        was, now, files = _named(old, key), _named(new, key), found.get(key, {})
        if key not in known or key not in found:
            if was != now and not _same_place(key, was, now):
                raise DimoError(
                    f"{path} belongs to a run with another configuration ({key} was {was!r}, is {now!r}), and "
                    f"without {SOURCES} dimo cannot tell whether both are the same; use the old path, or {START_OVER}"
                )
            continue
        names = sorted(known[key].keys() | files.keys())
        differ = [name for name in names if _content(known[key].get(name)) != _content(files.get(name))]
        if differ:
            what = "is missing" if differ[0] not in files else "is new" if differ[0] not in known[key] else "differs"
            raise DimoError(
                f"{path} was begun with another {key} ({was}) than what is in {now}: {differ[0]} {what}, the "
                f"first of {len(differ)} file(s); restore the original files, or {START_OVER}"
            )
    return known | found


def require_same_meaning(path: Path, teacher: str) -> None:
    """Check that codes and token ids mean to the student of the run `path` what they mean to a teacher.

    Networks of the same shapes can be run side by side whatever their ids mean, so nothing else would tell.

    Raises:
        DimoError: `teacher` has another codebook or vocabulary than the teacher of the run.
    """
    known = _read(path / SOURCES).get(TEACHER, {}) if (path / SOURCES).exists() else {}
    files = teacher_files(teacher)
    for what, names in MEANING.items():
        for name in names:
            if name in known and name in files and _content(known[name]) != _content(_describe(files[name], None, {})):
                raise DimoError(
                    f"the student of {path} was trained with another {what} than that of {teacher}: {name} differs, so "
                    "what it makes means nothing there; give the teacher that it was trained with"
                )


def is_other_teacher(path: Path, teacher: str) -> bool:
    """Whether the files of a teacher are known to differ from those that the run in `path` was begun with."""
    try:
        known = _read(path / SOURCES).get(TEACHER, {})
        now = {name: _describe(file, None, known.get(name, {})) for name, file in teacher_files(teacher).items()}
    except (DimoError, OSError):  # not known, or the teacher is not there, which loading it says
        return False
    return bool(known) and {name: _content(a) for name, a in known.items()} != {n: _content(a) for n, a in now.items()}


def _read(file: Path) -> dict[str, dict]:
    try:
        known = read_json(file)
        return {key: {name: dict(about) for name, about in files.items()} for key, files in known.items()}
    except (DimoError, ValueError, TypeError, AttributeError) as error:
        raise DimoError(
            f"{file} is damaged; delete it, and the run continues if the paths of teacher and captions are unchanged"
        ) from error


def teacher_files(teacher: str) -> dict[str, Path]:
    """The files of a checkpoint folder that training depends on; the VAE only decodes samples."""
    folder = checkpoint_folder(teacher)
    files = [*weight_files(folder / "transformer"), folder / "transformer" / "config.json", folder / WORLD_FILE]
    files += [folder / "scheduler" / name for name in ("scheduler_config.json", "scheduler_model.pth")]
    files += [f for f in sorted((folder / "tokenizer").glob("*")) if f.suffix in (".json", ".txt", ".model")]
    return {file.relative_to(folder).as_posix(): file for file in files if file.is_file()}


def teacher_identity(teacher: str | Path) -> str:
    """16 hex digits that tell checkpoints apart, without reading all of them."""
    return _identity(teacher_files(str(teacher)))


def captions_identity(source: str | Path) -> str:
    """16 hex digits that tell caption files or folders apart, without reading all of them."""
    return _identity(_prompt_files(str(source)))


def _identity(files: dict[str, Path]) -> str:
    """A digest of names, sizes and BLOCKS MiB of every file."""
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        size = file.stat().st_size
        digest.update(f"{name} {size} {_digest(file, size, BLOCKS)}\n".encode())
    return digest.hexdigest()[:16]


def _prompt_files(source: str) -> dict[str, Path]:
    return {} if source == "world" else {file.name: file for file in list_files(Path(source).expanduser())[1]}


def _describe(file: Path, blocks: int | None, before: dict) -> dict:
    about = file.stat()
    seen = [about.st_ino, about.st_ctime_ns]  # changes when the file is written, copied or moved
    if before.get("bytes") == about.st_size and before.get("seen") == seen:
        return before
    return {"bytes": about.st_size, "sha256": _digest(file, about.st_size, blocks), "seen": seen}


def _digest(file: Path, size: int, blocks: int | None) -> str:
    with open(file, "rb") as handle:
        if blocks is None or size <= blocks * BLOCK:
            return hashlib.file_digest(handle, "sha256").hexdigest()
        digest = hashlib.sha256()
        for i in range(blocks):
            handle.seek(i * (size - BLOCK) // (blocks - 1))
            digest.update(handle.read(BLOCK))
        return digest.hexdigest()


def _content(about: dict | None) -> tuple | None:
    return None if about is None else (about.get("bytes"), about.get("sha256"))


def _same_place(key: str, was: str, now: str) -> bool:
    if key == PROMPTS:
        return "world" not in (was, now) and os.path.realpath(Path(was).expanduser()) == os.path.realpath(
            Path(now).expanduser()
        )
    try:
        return os.path.realpath(checkpoint_folder(was)) == os.path.realpath(checkpoint_folder(now))
    except DimoError:
        return False


def to_json(sources: dict[str, dict]) -> str:
    """Content of the file SOURCES."""
    return json.dumps(sources, indent=2) + "\n"
