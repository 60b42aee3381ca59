"""Strict CSV reading: every row must have exactly the columns of the header, and ambiguous rows are rejected.

Uses Python's csv module, which reports the number of fields of a row and the line of an open quote. pandas and pyarrow
silently truncate or pad rows and accept text after a closing quote.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dimo.data.foreign import OPENING, refuse_container
from dimo.data.lines import read_lines, warn_once

WHOLE_FIELDS = re.compile(r'(?:"(?:[^"]|"")*+",|[^",][^,]*+,|,)*+')
DRESS = " \t\"'\ufeff"  # stripped from column names for hints
BACKSLASHED = '\\"'
DOUBLE_IT = 'write a quote inside quotes as "" (in Spark: option("escape", "\\""))'


def csv_columns(file: Path) -> list[str]:
    _, header, _ = next(_rows(file), (0, [], []))
    if not header:
        raise ValueError("line 1 is blank; it must name the columns")
    return header


def unlike(columns: list[str], names: Sequence[str]) -> str:
    """A hint if one of `names` exists in another spelling or behind another delimiter; else empty."""
    for column in columns:
        if column not in names and column.strip(DRESS).lower() in names:
            return f" (rename {column!r} to {column.strip(DRESS).lower()})"
    cells = [cell.strip(DRESS).lower() for cell in re.split(r"[;\t|]", columns[0])] if len(columns) == 1 else []
    commas = " (separate the columns by commas, with their names in the first line)"  # sep= is Excel's
    return commas if set(cells) & set(names) or columns[0].startswith("sep=") else ""


def read_csv(file: Path, columns: list[str], skip: int) -> Iterator[dict]:
    """Yield {column: text} from row `skip` on, all None for a blank row. `columns[0]` is the caption column."""
    rows = _rows(file)
    _, header, _ = next(rows, (0, [], []))
    places = [(column, header.index(column)) for column in columns]
    captions, last = places[0][1], max(place for _, place in places)
    for line, row, source in itertools.islice(rows, skip, None):
        if len(row) <= last:
            yield dict.fromkeys(columns)
            continue
        caption = row[captions]
        if caption.startswith(OPENING):
            refuse_container(caption, "line", line)
            if caption.lstrip()[:1] == '"' and not _is_quoted(caption, source):
                raise ValueError(f"line {line} has white space between a comma and a quote; remove it")
        if BACKSLASHED in caption and not _is_quoted(caption, source):
            raise ValueError(f"line {line} has {BACKSLASHED} outside quotes; quote the caption, and {DOUBLE_IT}")
        yield {column: row[place] for column, place in places}


def _is_quoted(caption: str, source: list[str]) -> bool:
    return f'''"{caption.replace('"', '""')}"''' in "".join(source)


def _rows(file: Path) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield (first line number, fields, source lines) of the header and every row; a truncated last row is skipped.

    Raises:
        ValueError: a malformed row; the message gives the line.
    """
    source: list[str] = []  # lines of the current row
    reader = csv.reader(read_lines(file, source), strict=True)
    header, least, line = None, 0, 1
    while True:
        source.clear()
        try:
            row = next(reader, None)
        except csv.Error as error:
            _explain(file, str(error), "".join(source), line, reader.line_num)
            return
        if row is None:
            return
        if header is None:
            header, least = row, len(row)
            while least and not row[least - 1]:  # unnamed columns after trailing commas
                least -= 1
        elif any(row[least:]) or len(row) > least and _may_be_split(row[:least]):
            raise ValueError(f"line {line} has {len(row)} fields for {least} column(s); a caption with commas must be "
                             "in quotes")  # fmt: skip
        elif len(row) < least and any(field.strip() for field in row):
            if not source[-1].endswith("\n"):
                warn_once(file, f"the last row, line {line}, is truncated and skipped")
                return
            raise ValueError(f"line {line} has {len(row)} field(s) for {len(header)} columns; a caption of several "
                             "lines must be in quotes, and an empty field needs its comma")  # fmt: skip
        elif row[-1:] == header[-1:] and row == header and len(row) > 1:
            raise ValueError(f"line {line} repeats the header; delete it")
        yield line, row, source
        line = reader.line_num + 1


def _may_be_split(row: list[str]) -> bool:
    """Whether a row with extra empty fields may have been split at an escaped comma, or at ", " in a caption."""
    return row[-1:] and row[-1].endswith("\\") or any(field[:1].isspace() for field in row[1:])


def _explain(file: Path, error: str, text: str, line: int, last: int) -> None:
    """Raise ValueError for a row that csv cannot parse, or warn if only the end of the file truncates it.

    Args:
        error: message of the csv module.
        text: source of the row, lines `line` to `last`.
    """
    whole = WHOLE_FIELDS.match(text)
    assert whole is not None  # no field is a match too
    place = whole.end()
    opened = line + text[:place].count("\n")
    if "new-line" in error and "\n" not in text:
        raise ValueError("its lines end in a carriage return (\\r) alone; save it with line ends of \\n or \\r\\n")
    if "new-line" in error:
        raise ValueError(f"line {line} has a carriage return (\\r) inside a field; put the caption in quotes")
    if "field larger" in error:
        begins = "the quote that opens here is never closed, or begins" if text[place] == '"' else "here begins"
        raise ValueError(f"line {opened}: {begins} a field of more than "
                         f"{csv.field_size_limit():,} characters")  # fmt: skip
    if BACKSLASHED in text[place:]:
        raise ValueError(
            f"line {opened}: {BACKSLASHED}, within the quotes that open here, is not valid CSV; {DOUBLE_IT}"
        )
    if "unexpected end" not in error:
        raise ValueError(f"line {opened}: text follows the closing of the quotes that open here, in line {last}; close "
                         'them before the comma, and write a quote inside as ""')  # fmt: skip
    if opened < last or text.endswith("\n"):
        raise ValueError(f"line {opened}: the quote that opens here is still open at the end of the file, line {last}; "
                         "close it, or delete the row if the file is truncated")  # fmt: skip
    warn_once(file, f"the last row, with quotes open in line {opened}, is truncated and skipped")
