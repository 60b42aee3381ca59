"""The house: rooms that import downwards only, files and functions of a readable size, names that nobody confuses."""

import ast
import sys
from pathlib import Path

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
