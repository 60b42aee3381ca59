"""Rows of one caption file, read in pieces and never as a whole: txt, jsonl and csv by `datasets`, parquet by pyarrow.

Nothing is looked up, cached or copied: each file is handed straight to its builder in `datasets`, in streaming mode.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dimo.errors import DimoError, reason

KINDS = ("txt", "jsonl", "csv", "parquet")
CAPTIONS = ("caption", "prompt", "text")  # the first of these that a file has
ROWS_A_PIECE = 1000
logger = logging.getLogger(__name__)


def list_files(path: str | Path) -> tuple[str, list[Path]]:
    """(kind, files in order) of a file, or of a folder's files of one kind.

    Raises:
        DimoError: nothing there, another kind, mixed kinds, or an empty file.
    """
    if not str(path).strip():
        raise DimoError("prompts come from a file or a folder of them, and its name is empty")  # Path("") is "."
    path = Path(path)
    if path.is_dir():
        files = [f for f in path.iterdir() if f.is_file() and f.suffix[1:] in KINDS and not f.name.startswith(".")]
        # Koala_36M_2 before Koala_36M_10
        files.sort(key=lambda f: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", f.name)])
    else:
        files = [path]
    kinds = sorted({f.suffix[1:] for f in files})
    if not path.exists() or not files or kinds[0] not in KINDS:
        state = "is not one" if path.is_file() else "holds none" if path.exists() else "does not exist"
        raise DimoError(f"prompts come from a {_either(KINDS)} file or a folder of them, and {path} {state}")
    if len(kinds) > 1:
        raise DimoError(f"{path} mixes kinds of files ({', '.join(kinds)}); name one file, or a folder of one kind")
    for file in files:
        if file.stat().st_size == 0:
            raise DimoError(f"{file} is empty (0 bytes)")
    return kinds[0], files


def caption_column(file: Path, kind: str, scores: list[str]) -> str:
    """The column that holds the captions of `file`; all of `scores` must be there too.

    Raises:
        DimoError: a column is missing (those that exist are named), or the head of the file is unreadable.
    """
    with _sentences(file, kind):
        columns = _columns(file, kind)
    caption = next((c for c in CAPTIONS if c in columns), None)
    missing = ([] if caption else [_either(CAPTIONS)]) + [s for s in scores if s not in columns]
    if missing:
        raise DimoError(f"{file} has no column {missing[0]}; it has {', '.join(map(str, columns)) or 'none'}")
    return caption


def read_rows(file: Path, kind: str, columns: list[str], skip: int = 0) -> Iterator[list[dict]]:
    """Lists of rows {column: value or None} from row `skip` on, a piece at a time; a row cut in two by the end of the
    file is left out.

    Raises:
        DimoError: the file cannot be read, or a line or a text of it is broken or no UTF-8.
    """
    read = {"txt": _read_lines, "jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}[kind]
    with _sentences(file, kind):
        yield from read(file, columns, skip)


def _columns(file: Path, kind: str) -> list[str]:
    if kind == "txt":
        return ["text"]
    if kind == "parquet":
        from pyarrow.parquet import read_schema

        return read_schema(file).names
    if kind == "csv":
        with open(file, encoding="utf-8-sig", newline="") as opened:
            rows = csv.reader(opened)
            columns = next(rows, [])
            for row in itertools.islice(rows, ROWS_A_PIECE):
                if any(row[len(columns) :]):  # pandas would cut such a caption at its comma and say nothing
                    raise ValueError(f"line {rows.line_num} has {len(row)} fields under {len(columns)} column(s); "
                                     "a caption with commas must be in quotes")  # fmt: skip
            return columns
    head = itertools.chain.from_iterable(_read_jsonl(file, None, 0))
    return list(dict.fromkeys(key for row in itertools.islice(head, ROWS_A_PIECE) for key in row))


def _stream(module: str, builder: str, file: Path, skip: int, **options) -> Iterator[list[dict]]:
    import importlib

    from datasets.data_files import DataFilesDict, DataFilesList

    logging.getLogger(f"datasets.packaged_modules.{module}").setLevel(logging.CRITICAL)  # we say it ourselves
    # the path as it is, where load_dataset would take [ ] * for a pattern; the builder wants a folder for a lock file
    data_files = DataFilesDict({"train": DataFilesList([str(file.absolute())], [("",)])})
    with tempfile.TemporaryDirectory() as scratch:
        cls = getattr(importlib.import_module(f"datasets.packaged_modules.{module}.{module}"), builder)
        dataset = cls(cache_dir=scratch, data_files=data_files, **options).as_streaming_dataset(split="train")
    for table in dataset.with_format("arrow").iter(ROWS_A_PIECE):
        if skip < len(table):
            yield table.slice(skip).to_pylist()
        skip = max(0, skip - len(table))


def _read_lines(file: Path, columns: list[str], skip: int) -> Iterator[list[dict]]:
    return _stream("text", "Text", file, skip, encoding="utf-8-sig", chunksize=1 << 20)


def _read_jsonl(file: Path, columns: list[str] | None, skip: int) -> Iterator[list[dict]]:
    # line by line: the builder for JSON takes its types from the first piece and fails where a later one differs
    number, broken, seen = skip, None, False
    for lines in _read_lines(file, ["text"], skip):
        rows = []
        for line in lines:
            number += 1
            if broken and line["text"].strip():
                raise ValueError(f"line {broken} is not a JSON object")
            row = _json_object(line["text"])
            if row is None:
                broken = broken or number
            else:
                rows.append(row if columns is None else {c: row.get(c) for c in columns})
        seen = seen or any(rows)
        yield rows
    if broken and not seen and not skip:
        raise ValueError(f"line {broken} is not a JSON object")
    if broken:
        logger.warning("%s: the last line (%d) is cut off and left out", file, broken)


def _json_object(line: str) -> dict | None:
    """None for what is not an object; {} for a blank line, which is a row without caption."""
    try:
        row = json.loads(line) if line.strip() else {}
    except (json.JSONDecodeError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _read_csv(file: Path, columns: list[str], skip: int) -> Iterator[list[dict]]:
    from datasets import Features, Value

    options = {
        # as text, so that a caption `NA` or `12` stays what it is
        "features": Features({c: Value("string") for c in columns}),
        "usecols": columns,
        "index_col": False,
        "keep_default_na": False,
        "skip_blank_lines": False,
        "encoding": "utf-8-sig",
        "chunksize": 10 * ROWS_A_PIECE,
    }
    done = skip
    try:
        for rows in _stream("csv", "Csv", file, skip, **options):
            yield rows
            done += len(rows)
    except ValueError as error:
        cut = re.search(r"EOF inside string starting at row (\d+)", str(error))
        if cut is None:
            raise
        # pandas drops the whole last piece with the row that is cut; the rows before it are wanted
        whole = int(cut[1]) - 1
        logger.warning("%s: the file ends inside the quotes of row %d, which is left out", file, whole + 1)
        if whole > done:
            yield from _stream("csv", "Csv", file, done, nrows=whole, **options)


def _read_parquet(file: Path, columns: list[str], skip: int) -> Iterator[list[dict]]:
    from pyarrow.parquet import ParquetFile

    # not the builder of `datasets`: it decodes a row group at once, and pandas writes a million rows into one
    with ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as opened:
        read = 0
        for batch in opened.iter_batches(ROWS_A_PIECE, columns=columns):
            rest = batch.slice(min(max(0, skip - read), len(batch)))
            read += len(batch)
            if len(rest):
                values = [_texts(rest.column(name), name, read - len(rest)) for name in columns]
                yield [dict(zip(columns, row)) for row in zip(*values)]


def _texts(column, name: str, before: int) -> list:
    """A column's values, bytes as the text they are; `before` rows of the file come before it."""
    values = []
    for row, value in enumerate(column, before + 1):
        try:
            value = value.as_py()
            values.append(value.decode() if isinstance(value, bytes) else value)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise ValueError(f"row {row} of column {name} is not UTF-8 text, it has the byte {byte:#04x}") from error
    return values


@contextlib.contextmanager
def _sentences(file: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except DimoError:
        raise
    except UnicodeDecodeError as error:
        raise DimoError(f"{file} cannot be read as {kind}: {_not_utf8(file)}") from error
    except (OSError, ValueError, NotImplementedError, csv.Error) as error:  # ValueErrors: pandas, pyarrow, Unicode
        raise DimoError(f"{file} cannot be read as {kind}: {reason(error)}") from error


def _not_utf8(file: Path) -> str:
    """Which line is not: the decoder, which gets pieces, knows no lines."""
    with open(file, "rb") as opened:
        for number, line in enumerate(opened, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 text, it has the byte {line[error.start]:#04x}"
    return "it is not UTF-8 text"


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
