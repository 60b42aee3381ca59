"""Detect files and values that are not captions: archives, web pages, Git LFS pointers, lists in place of text."""

from __future__ import annotations

import ast
import json
import re
import warnings
from pathlib import Path

HEAD = 4096  # bytes
# first characters of text that may spell a list or bytes
OPENING = ("[", "(", "{", " ", "\t", "\r", "\n", "array(", "b'", 'b"')
ARRAY = re.compile(r"array\((\[.*\])(, dtype=.*)?\)", re.DOTALL)  # repr of a NumPy array
# magic numbers of file formats; no plain text begins with one of them
MAGIC = {
    b"\xff\xfe": "UTF-16 text (save it as UTF-8)",
    b"\xfe\xff": "UTF-16 text (save it as UTF-8)",
    b"\x1f\x8b": "gzip-compressed (unpack it)",
    b"BZh91AY": "bzip2-compressed (unpack it)",
    b"\xfd7zXZ": "xz-compressed (unpack it)",
    b"\x28\xb5\x2f\xfd": "zstd-compressed (unpack it)",
    b"PK\x03\x04": "a zip archive or a spreadsheet (unpack it, or save it as CSV)",
    b"7z\xbc\xaf": "a 7z archive (unpack it)",
    b"PAR1": "parquet (rename it to .parquet)",
    b"ARROW1": "an Arrow file (convert it)",
    b"SQLite format 3": "a database",
    b"%PDF-": "a PDF",
    b"{\\rtf": "RTF (save it as plain text)",
}
POINTERS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the file itself: run git lfs pull",
    b"version https://hawser.github.com/spec/": "a Git LFS pointer, not the file itself: run git lfs pull",
    b"/annex/objects/": "a git-annex pointer, not the file itself: run git annex get",
}
PAGE = re.compile(rb"<(!doctype|!--|\?xml|html|head|body|script|error)\b", re.IGNORECASE)
JSON = re.compile(rb"""\[?\s*\{\s*["']\w[^\n]*["']\s*:|\[\s*\n\s*["']|\[\s*["'][^\n]*["'],\s*\n""")
REFUSAL = re.compile(
    r"(error )?[45]\d\d:? (not found|forbidden|unauthorized|bad request|too many requests|internal server error|"
    r"bad gateway|service unavailable|gateway timeout)|(repository |entry )?not found|access denied|"
    r"invalid username or password\.?",
    re.IGNORECASE,
)


def refuse_foreign(file: Path, kind: str) -> None:
    """Reject a file whose first bytes show that it is not a caption file of this kind.

    Args:
        kind: txt, jsonl, csv or parquet.

    Raises:
        ValueError: says what the file is.
    """
    with open(file, "rb") as opened:
        head = opened.read(HEAD)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, what in {**POINTERS, **MAGIC}.items():
        if text.startswith(start) and not (kind == "parquet" and start == b"PAR1"):
            raise ValueError(f"it is {what}")
    if PAGE.match(text):
        raise ValueError("it is a web page, perhaps a server's error page: download it again")
    if len(head) < HEAD and REFUSAL.fullmatch(text.decode("utf-8", "replace").strip()):
        raise ValueError(f"it contains only {text.decode().strip()!r}, a server's error message: download it "
                         "again")  # fmt: skip
    line = 1 + head[: len(head) - len(text)].count(b"\n")
    first = text.split(b"\n", 1)[0].strip()
    if kind == "jsonl" and first.startswith(b"["):
        raise ValueError(f"line {line} is not a JSON object but begins an array; write one object per line")
    if kind == "txt" and JSON.match(text):
        raise ValueError("it is JSON: write one object per line and rename it to .jsonl")
    cells = [cell.strip(b" \"'").decode("utf-8", "replace") for cell in re.split(rb"[,;\t]", first)]
    names = ("caption",) if b" " in first else ("caption", "prompt", "text")  # a prompt may read "a sign, text"
    column = next((name for name in names if name in cells), None)
    if kind == "txt" and column and len(cells) > 1:
        raise ValueError(f"it is a table with the column {column}: rename it to .csv")


def refuse_container(caption: object, where: str, number: int) -> None:
    """Reject a caption that is a list or bytes, or text that spells one, such as "['a dog', 'a cat']".

    Args:
        caption: the value in the caption column.
        where, number: its place for the error message, such as "line", 7.

    Raises:
        ValueError: says what the caption is and where.
    """
    value = caption
    if isinstance(caption, str):
        if not caption.startswith(OPENING):
            return
        value = _spelled(caption.strip())
    if isinstance(value, list | tuple | set | dict | bytes) and value:
        shown = repr(caption) if len(repr(caption)) <= 60 else f"{repr(caption)[:60]}..."
        what = "decode it" if isinstance(value, bytes) else "write one row per caption"
        raise ValueError(f"the caption of {where} {number} is {_kind(value)}, not text: {shown}; {what}")


def _kind(value: object) -> str:
    return "bytes" if isinstance(value, bytes) else f"a {type(value).__name__}"


def _spelled(text: str) -> object:
    """The Python or JSON list, tuple, dict or bytes that `text` spells; None for plain text."""
    array = ARRAY.fullmatch(text)
    text = array[1] if array else text
    if text[:1] + text[-1:] not in ("[]", "()", "{}", "b'", 'b"'):
        return None
    for parse in (ast.literal_eval, json.loads):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escape sequences
                return parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None
