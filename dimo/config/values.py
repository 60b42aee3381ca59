"""Parse values from files, overrides, flags and notebook parameters according to the type of their key.

Every scalar is read as a string and converted by its key's type, since YAML 1.1 would turn `007` into 7, `12:30` into
750 and `no` into false. Numbers are decimal: `010` is ten, and `0x10`, `1_000` and `1,5` are rejected.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from dimo.errors import DimoError, reason
from dimo.paths import user_path

WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NOTHING = ("", "null", "none", "~")  # spellings of None, for keys whose type allows it
WHOLE = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|\.?(nan|inf))", re.IGNORECASE)


def read_value(name: str, kind: str, written: Any) -> Any:
    """Convert a value as written to the type of its key.

    Args:
        name: the key, for error messages.
        kind: str, path (may begin with ~ or ~user), int, float, bool, one of these with `| None`, or list[...].
        written: a string, a list of strings, or whatever else the YAML file has there.

    Raises:
        DimoError: `written` is not of that type.
    """
    if kind.startswith("list["):
        if isinstance(written, str) and written.lstrip().startswith("["):
            written = read_yaml(written, f"{name}: {written!r}")
        if not isinstance(written, list):
            raise DimoError(f"{name} must be a list, such as [{_shown(written)}], got {_shown(written)!r}")
        return [read_value(name, kind[5:-1], one) for one in written]
    kind, _, optional = kind.partition(" | ")
    if not isinstance(written, str):
        got = "a list" if isinstance(written, list) else "a group of keys"
        raise DimoError(f"{name} must be a single value, got {got}: {_shown(written)}")
    if any("\ud800" <= letter <= "\udfff" for letter in written):
        raise DimoError(f"{name} must be UTF-8 text, got {written!r}")
    if kind == "str":
        return written
    if kind == "path":
        if "\0" in written:
            raise DimoError(f"{name} must be a path, got {written!r}")
        if written.strip().lower() in ("~", "null", "none"):  # null in YAML; ~ would be the home folder
            raise DimoError(f"{name} must be a path, got {written!r}; leave the key out for its default, or write "
                            f"./{written.strip()} for a folder of that name")  # fmt: skip
        return user_path(written)
    text = written.strip()
    if optional and text.lower() in NOTHING:
        return None
    if kind == "bool" and text.lower() in WORDS:
        return WORDS[text.lower()]
    if kind == "int" and WHOLE.fullmatch(text) and len(text) < 100:  # int() raises beyond 4,300 digits
        return int(text)
    if kind == "float" and NUMBER.fullmatch(text):
        value = float(re.sub(r"\.(?=nan|inf)", "", text.lower()))
        if not math.isfinite(value):
            raise DimoError(f"{name} must be a finite number, got {value}")
        return value
    needs = {"int": "a whole number in plain digits, such as 1000", "float": "a number, such as 0.001 or 1e-3"}
    raise DimoError(f"{name}: {written!r} is not {needs.get(kind, 'true or false')}")


def unquoted(text: str) -> str:
    """`text` without the quotes that enclose all of it, with YAML's escapes; any other text unchanged."""
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        return text
    try:
        node = yaml.compose(text, Loader=_Texts)
    except yaml.YAMLError:
        return text
    enclosed = isinstance(node, yaml.ScalarNode) and node.style == text[0] and node.end_mark.index == len(text)
    return node.value if enclosed else text


def read_yaml(text: str, where: str, typed: bool = False) -> Any:
    """Parse YAML, with all scalars as strings unless `typed`; None if the document is empty.

    Raises:
        DimoError: invalid YAML or a duplicate key; the message begins with `where` and gives the line.
    """
    try:
        loader = (yaml.SafeLoader if typed else _Texts)(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_twice(node, where, set())
        return loader.construct_document(node)
    except DimoError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        colon = getattr(error, "problem", None) == "mapping values are not allowed here"
        hint = "; quote text that contains ': '" if colon else ""
        raise DimoError(f"{where} is not valid YAML: {reason(error)}{hint}") from error


def yaml_text(file: Path) -> str:
    """The text of a YAML file, which must be UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DimoError(f"{file} is not valid YAML: {reason(error)}") from error


def write_yaml(value: Any) -> str:
    """`value` as YAML that reads back equal, in the order of its keys."""
    return yaml.dump(value, Dumper=_Exact, sort_keys=False, allow_unicode=True)


class _Exact(yaml.SafeDumper):
    """Double-quotes text with line breaks other than \\n: unquoted, PyYAML would read each of them back as a space."""


_Exact.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if set(text) & set("\x85\u2028\u2029\ufeff") else None
    ),
)


class _Texts(yaml.SafeLoader):
    """A loader that produces only strings, lists and dicts; merge keys (`<<`) still work."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}
    yaml_constructors = {
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("str", "seq", "map")
    }  # fmt: skip


def _refuse_twice(node: yaml.Node, where: str, seen: set, path: str = "") -> None:
    """Raise DimoError for a duplicate key, of which YAML would silently keep the last."""
    if node in seen or isinstance(node, yaml.ScalarNode):  # aliases revisit nodes and may form a cycle
        return
    seen.add(node)
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _refuse_twice(one, where, seen, path)
        return
    first: dict[tuple, int] = {}  # {key: line}
    for key, value in node.value:
        line, same = key.start_mark.line + 1, (key.tag, str(key.value))
        if same in first:
            raise DimoError(f"{where}, line {line}: {path}{key.value} is set twice, first in line {first[same]}")
        first[same] = line
        _refuse_twice(value, where, seen, f"{path}{key.value}.")


def _shown(written: Any) -> str:
    return written if isinstance(written, str) else "nothing" if written is None else str(written)
