"""The house: rooms that import downwards only, files and functions of a readable size, names that nobody confuses."""

import ast
import contextlib
import importlib
import sys
import types
from pathlib import Path

import torch

from dimo.config import config_keys, default_of

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "dimo").rglob("*.py"))
FLOORS = [  # a room imports its own and lower ones
    {"errors", "files", "output", "paths"},
    {"ursa"},
    {"worlds"},
    {"data"},
    {"config"},
    {"distill"},
    {"run"},
    {"views"},
    {"train"},
    {"evaluation"},
    {"bench"},
    {"commands"},
    {"", "__main__"},  # dimo/__init__.py, which offers names of all rooms, and the command's entry
]


def module(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(file): file for file in FILES}


def room(name):
    return name.split(".")[1] if "." in name else ""


def imports(name):
    """Modules of dimo that a module imports, anywhere in it but for types."""
    found, tree = set(), ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dimo":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {full if full in MODULES else node.module for full in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "dimo"}
    return found - {name}


def floor(name):
    return next(i for i, rooms in enumerate(FLOORS) if room(name) in rooms)


def test_no_arrow_points_up():
    up = [f"{a} -> {b}" for a in MODULES for b in imports(a) if floor(b) > floor(a) and b != "dimo"]
    assert up == []


def test_no_circle():
    """Taking away modules that import none of those left ends with nothing left."""
    left = {name: imports(name) for name in MODULES}
    packages = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    for name in left:
        left[name] -= packages  # a package is there while its modules are imported
    while left:
        free = [name for name, needed in left.items() if not needed & left.keys()]
        assert free, f"these import each other: {sorted(left)}"
        for name in free:
            del left[name]


def test_sizes():
    lines = {name: len(file.read_text().splitlines()) for name, file in MODULES.items()}
    assert {name: n for name, n in lines.items() if n > 350} == {}
    share = {}
    for name, n in lines.items():
        share[room(name)] = share.get(room(name), 0) + n / sum(lines.values())
    assert {name: round(part, 3) for name, part in share.items() if part > 0.2} == {}
    long = {}
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 80:
                long[f"{name}.{node.name}"] = node.end_lineno - node.lineno + 1
    assert long == {}


def test_names():
    last = [name.split(".")[-1] for name in MODULES if MODULES[name].name != "__main__.py"]
    assert [name for name in last if name in sys.stdlib_module_names] == []
    assert [name for name in set(last) if f"{name}s" in last] == []


def test_defaults_of_functions_are_those_of_the_configuration():
    """Where a function has an argument that is named as a key of the method and gives it a default, both agree."""
    method = {key.split(".")[1]: field for key, field in config_keys().items() if key.startswith("distill.")}
    defaults = {name: default_of(field) for name, field in method.items()}
    other = {("evaluate", "max_prompt_length")}  # a world's 4, which 0 in the configuration stands for
    wrong = []
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args]
            given = [*zip(arguments[::-1], node.args.defaults[::-1]), *zip(node.args.kwonlyargs, node.args.kw_defaults)]
            for argument, default in given:
                key = argument.arg
                if key not in defaults or (node.name, key) in other or getattr(default, "value", None) is None:
                    continue
                if default.value != defaults[key]:
                    wrong.append(f"{name}.{node.name}: {key} is {default.value!r}, the key {defaults[key]!r}")
    assert wrong == []


def test_every_name_of_torch_exists():
    """Also on the lines that only a GPU goes through."""
    missing = []
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            path, inner = [], node
            while isinstance(inner, ast.Attribute):
                path, inner = [inner.attr, *path], inner.value
            if not (isinstance(inner, ast.Name) and inner.id == "torch" and path):
                continue
            found = torch
            for i, part in enumerate(path):
                with contextlib.suppress(ImportError):
                    if isinstance(found, types.ModuleType) and not hasattr(found, part):
                        importlib.import_module(".".join(["torch", *path[: i + 1]]))
                if not hasattr(found, part):
                    missing.append(f"{name}: torch.{'.'.join(path)}")
                    break
                found = getattr(found, part)
    assert missing == []
