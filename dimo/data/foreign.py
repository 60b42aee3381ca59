"""What bears the name of a caption file, or stands in the place of a caption, and is something else."""

from __future__ import annotations

import ast
import json
import re
import warnings
from pathlib import Path

HEAD = 4096  # bytes
OPENING = ("[", "(", "{", " ", "\t", "\r", "\n", "array(", "b'", 'b"')  # begin a list's text, or that of bytes
ARRAY = re.compile(r"array\((\[.*\])(, dtype=.*)?\)", re.DOTALL)  # as NumPy spells one
# what the first bytes are of; none of them begins a text
MAGIC = {
    b"\xff\xfe": "UTF-16 text (save it as UTF-8)",
    b"\xfe\xff": "UTF-16 text (save it as UTF-8)",
    b"\x1f\x8b": "packed by gzip (unpack it)",
    b"BZh91AY": "packed by bzip2 (unpack it)",
    b"\xfd7zXZ": "packed by xz (unpack it)",
    b"\x28\xb5\x2f\xfd": "packed by zstd (unpack it)",
    b"PK\x03\x04": "a zip archive or a spreadsheet (unpack it, or save it as CSV)",
    b"7z\xbc\xaf": "a 7z archive (unpack it)",
    b"PAR1": "parquet (end its name in .parquet)",
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
    """By the first bytes of a file.

    Raises:
        ValueError: what it is instead of captions.
    """
    with open(file, "rb") as opened:
        head = opened.read(HEAD)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, what in {**POINTERS, **MAGIC}.items():
        if text.startswith(start) and not (kind == "parquet" and start == b"PAR1"):
            raise ValueError(f"it is {what}")
    if PAGE.match(text):
        raise ValueError("it is a web page, perhaps a server's error in place of the file: download it again")
    if len(head) < HEAD and REFUSAL.fullmatch(text.decode("utf-8", "replace").strip()):
        raise ValueError(f"it holds {text.decode().strip()!r} alone, a server's error in place of the file: download "
                         "it again")  # fmt: skip
    line = 1 + head[: len(head) - len(text)].count(b"\n")
    first = text.split(b"\n", 1)[0].strip()
    if kind == "jsonl" and first.startswith(b"["):
        raise ValueError(f"line {line} is not a JSON object, it begins an array; write one object a line")
    if kind == "txt" and JSON.match(text):
        raise ValueError("it is JSON: write one object a line, and end its name in .jsonl")
    cells = [cell.strip(b" \"'").decode("utf-8", "replace") for cell in re.split(rb"[,;\t]", first)]
    names = ("caption",) if b" " in first else ("caption", "prompt", "text")  # a prompt may read "a sign, text"
    column = next((name for name in names if name in cells), None)
    if kind == "txt" and column and len(cells) > 1:
        raise ValueError(f"it is a table with the column {column}: end its name in .csv")


def refuse_container(caption: object, where: str, number: int) -> None:
    """A list, or a text that spells one: several captions, not one; or a text that spells bytes.

    Raises:
        ValueError: it names `where` and `number`, such as line 7.
    """
    value = caption
    if isinstance(caption, str):
        if not caption.startswith(OPENING):
            return
        value = _spelled(caption.strip())
    if isinstance(value, list | tuple | set | dict | bytes) and value:
        shown = repr(caption) if len(repr(caption)) <= 60 else f"{repr(caption)[:60]}..."
        what = "decode it" if isinstance(value, bytes) else "write a row for each caption"
        raise ValueError(f"the caption of {where} {number} is {_kind(value)}, not a text: {shown}; {what}")


def _kind(value: object) -> str:
    return "bytes" if isinstance(value, bytes) else f"a {type(value).__name__}"


def _spelled(text: str) -> object:
    """The Python or JSON value that a text in brackets, or after b, spells; None for plain text."""
    array = ARRAY.fullmatch(text)
    text = array[1] if array else text
    if text[:1] + text[-1:] not in ("[]", "()", "{}", "b'", 'b"'):
        return None
    for parse in (ast.literal_eval, json.loads):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns of a backslash in a text
                return parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None
