"""Values as they are written in files, overrides, flags and notebook parameters, read as what their key takes.

Everything is a text until its key says otherwise, and a text stays as it is written: YAML itself would make 7 of `007`,
750 of `12:30` and false of `no`. Numbers are decimal: `010` is ten, and `0x10`, `1_000` and `1,5` are refused.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from dimo.errors import DimoError, reason
from dimo.paths import user_path

WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NOTHING = ("", "null", "none", "~")  # of keys that may be null
WHOLE = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|\.?(nan|inf))", re.IGNORECASE)


def read_value(name: str, kind: str, written: Any) -> Any:
    """What is written for `name`, as `kind`: str, path, int, float, bool, any of these with `| None`, list[int]...

    A path may begin with ~ or ~user.

    Args:
        written: a text, a list of them, or whatever else a YAML file holds there.

    Raises:
        DimoError: it is not of that kind; the sentence names `name`.
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
        raise DimoError(f"{name} must be one value, got {got}: {_shown(written)}")
    if any("\ud800" <= letter <= "\udfff" for letter in written):
        raise DimoError(f"{name} must be text in UTF-8, got {written!r}")
    if kind == "str":
        return written
    if kind == "path":
        if "\0" in written:
            raise DimoError(f"{name} must be a path, got {written!r}")
        if written.strip().lower() in ("~", "null", "none"):  # YAML's words for nothing; ~ would be the home itself
            raise DimoError(f"{name} must be a path, got {written!r}; leave the key out for its default, and a folder "
                            f"of that name is ./{written.strip()}")  # fmt: skip
        return user_path(written)
    text = written.strip()
    if optional and text.lower() in NOTHING:
        return None
    if kind == "bool" and text.lower() in WORDS:
        return WORDS[text.lower()]
    if kind == "int" and WHOLE.fullmatch(text) and len(text) < 100:  # Python refuses some thousand digits
        return int(text)
    if kind == "float" and NUMBER.fullmatch(text):
        value = float(re.sub(r"\.(?=nan|inf)", "", text.lower()))
        if not math.isfinite(value):
            raise DimoError(f"{name} must be a finite number, got {value}")
        return value
    needs = {"int": "a whole number in plain digits, such as 1000", "float": "a number, such as 0.001 or 1e-3"}
    raise DimoError(f"{name}: {written!r} is not {needs.get(kind, 'true or false')}")


def unquoted(text: str) -> str:
    """What stands in quotes, where they enclose all of it, as YAML reads them; any other text as it is."""
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        return text
    try:
        node = yaml.compose(text, Loader=_Texts)
    except yaml.YAMLError:
        return text
    enclosed = isinstance(node, yaml.ScalarNode) and node.style == text[0] and node.end_mark.index == len(text)
    return node.value if enclosed else text


def read_yaml(text: str, where: str, typed: bool = False) -> Any:
    """YAML whose scalars are texts, or with `typed` what YAML 1.1 makes of them; None where there is nothing.

    Raises:
        DimoError: it is no YAML, or a key stands in it twice; the sentence begins with `where` and names the line.
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that there is not is a ValueError
        colon = getattr(error, "problem", None) == "mapping values are not allowed here"
        hint = "; a text that holds ': ' must be in quotes" if colon else ""
        raise DimoError(f"{where} is not readable YAML: {reason(error)}{hint}") from error


def write_yaml(value: Any) -> str:
    """YAML that reads back to the same, in the order of its keys."""
    return yaml.dump(value, Dumper=_Exact, sort_keys=False, allow_unicode=True)


class _Exact(yaml.SafeDumper):
    """PyYAML writes line breaks other than \\n as they are, and reads each as a space; in quotes it escapes them."""


_Exact.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if set(text) & set("\x85\u2028\u2029\ufeff") else None
    ),
)


class _Texts(yaml.SafeLoader):
    """Makes texts, lists and mappings; `<<` still merges."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}
    yaml_constructors = {
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("str", "seq", "map")
    }  # fmt: skip


def _refuse_twice(node: yaml.Node, where: str, seen: set, path: str = "") -> None:
    """YAML itself takes the last of two equal keys and says nothing."""
    if node in seen or isinstance(node, yaml.ScalarNode):  # an alias leads to a node again, and may lead in a circle
        return
    seen.add(node)
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _refuse_twice(one, where, seen, path)
        return
    first: dict[tuple, int] = {}  # {key: its line}
    for key, value in node.value:
        line, same = key.start_mark.line + 1, (key.tag, str(key.value))
        if same in first:
            raise DimoError(f"{where}, line {line}: {path}{key.value} is there twice, first in line {first[same]}")
        first[same] = line
        _refuse_twice(value, where, seen, f"{path}{key.value}.")


def _shown(written: Any) -> str:
    return written if isinstance(written, str) else "nothing" if written is None else str(written)
