"""Stream the rows of one caption file.

Files are opened by their literal path, so `*`, `::`, `[` or `file://` in a name are not taken for a pattern or URL.
Nothing is looked up on the network, cached or copied.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from dimo.data.foreign import refuse_container, refuse_foreign
from dimo.data.lines import read_lines, warn_once
from dimo.data.listing import either
from dimo.data.tables import csv_columns, read_csv, unlike
from dimo.errors import DimoError, reason

CAPTIONS = ("caption", "prompt", "text")  # caption columns, in order of preference
HEAD = 1000  # rows read to find the columns and to check the file
BATCH = 1000  # rows of a parquet file in memory


def caption_column(file: Path, kind: str, scores: list[str]) -> str:
    """Find the caption column of a file and check its first rows.

    Args:
        kind: txt, jsonl, csv or parquet.
        scores: further columns that must exist.

    Returns:
        The name of the caption column.

    Raises:
        DimoError: a column is missing (the existing ones are listed) or duplicated, the file does not contain captions,
            or its first rows cannot be read.
    """
    with _sentences(file, kind):
        refuse_foreign(file, kind)
        columns = _columns(file, kind)
        caption = next((c for c in CAPTIONS if c in columns), "")
        missing = ([] if caption else [either(CAPTIONS)]) + [s for s in scores if s not in columns]
        if missing:
            raise DimoError(f"{file} has no column {missing[0]}; it has {', '.join(columns) or 'none'}"
                            f"{unlike(columns, [missing[0]] if caption else CAPTIONS)}")  # fmt: skip
        for column in (caption, *scores):
            if columns.count(column) > 1:
                raise ValueError(f"{columns.count(column)} columns are named {column}; rename all but one")
    for _ in itertools.islice(read_rows(file, kind, [caption, *scores]), HEAD):
        pass
    return caption


def read_rows(file: Path, kind: str, columns: list[str], skip: int = 0) -> Iterator[dict]:
    """Yield rows as {column: value or None}. A last row truncated by the end of the file is skipped with a warning.

    Args:
        kind: txt, jsonl, csv or parquet.
        columns: the columns to read; the first is the caption column.
        skip: number of rows to skip at the beginning.

    Raises:
        DimoError: the file cannot be read, or a row is malformed, not UTF-8, or holds a list instead of one caption.
    """
    read = {"txt": _read_txt, "jsonl": _read_jsonl, "csv": read_csv, "parquet": _read_parquet}[kind]
    with _sentences(file, kind):
        yield from read(file, columns, skip)


def caption_text(value: object) -> str:
    """A caption stripped of surrounding white space, as valid Unicode; empty for a value that is not a string."""
    text = value.strip() if isinstance(value, str) else ""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _columns(file: Path, kind: str) -> list[str]:
    """Column names in the order of the file, duplicates included."""
    if kind == "txt":
        return ["text"]
    if kind == "parquet":
        return _open_parquet(file).schema_arrow.names
    if kind == "csv":
        return csv_columns(file)
    head = itertools.islice(_json_rows(file), HEAD)
    return list(dict.fromkeys(key for _, row in head for key in row))


def _read_txt(file: Path, columns: list[str], skip: int) -> Iterator[dict]:
    lines = (part for line in read_lines(file) for part in io.StringIO(line, newline=None))  # \r ends a line, too
    for number, line in enumerate(itertools.islice(lines, skip, None), skip + 1):
        refuse_container(line, "line", number)
        yield {"text": line}


def _read_jsonl(file: Path, columns: list[str], skip: int) -> Iterator[dict]:
    for number, row in itertools.islice(_json_rows(file), skip, None):
        twice = [key for key in columns if isinstance(row, _Doubled) and key in row.keys_twice]
        if twice:
            raise ValueError(f"line {number} has the key {twice[0]} twice")
        refuse_container(row.get(columns[0]), "line", number)
        yield {column: row.get(column) for column in columns}


class _Doubled(dict):
    """A JSON object with duplicate keys, each with its last value."""

    keys_twice: set[str] = set()


def _object(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        row = _Doubled(row)
        row.keys_twice = {key for key in row if keys.count(key) > 1}
    return row


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _json_rows(file: Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number, object); {} for a blank line, which counts as a row without a caption."""
    number = 0
    for number, line in enumerate(read_lines(file), 1):
        try:
            row = DECODER.decode(line) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            no_cut = not line.lstrip().startswith("{") or getattr(error, "msg", "") == "Extra data"
            if number == 1 or line.endswith("\n") or no_cut:
                raise ValueError(f"line {number} is not a JSON object") from error
            warn_once(file, f"the last line, {number}, is truncated and skipped")
            return
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        yield number, row


def _open_parquet(file: Path):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    # through an OSFile, since ParquetFile interprets some names as URLs
    return ParquetFile(pyarrow.OSFile(os.fspath(file)), buffer_size=1 << 20, pre_buffer=False)


def _read_parquet(file: Path, columns: list[str], skip: int) -> Iterator[dict]:
    with _open_parquet(file) as opened:
        read = 0
        for batch in opened.iter_batches(BATCH, columns=columns):  # bounds memory however large a row group is
            rest = batch.slice(min(max(0, skip - read), len(batch)))
            read += len(batch)
            if len(rest):
                values = [_values(rest.column(name), name, read - len(rest)) for name in columns]
                for number, row in enumerate(zip(*values), read - len(rest) + 1):
                    refuse_container(row[0], "row", number)
                    yield dict(zip(columns, row))


def _values(column, name: str, before: int) -> list:
    """Values of a column chunk, with bytes decoded as UTF-8; `before` rows of the file precede the chunk."""
    values = []
    for row, value in enumerate(column, before + 1):
        try:
            value = value.as_py()
            values.append(value.decode() if isinstance(value, bytes) else value)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ValueError(
                f"row {row} of column {name} is not UTF-8 text, it contains the byte {byte:#04x}"
            ) from error
    return values


@contextlib.contextmanager
def _sentences(file: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except DimoError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are ValueErrors, too
        raise DimoError(f"{file} cannot be read as {kind}: {reason(error)}") from error
