"""Paths as users write them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from dimo.errors import DimoError


def user_path(path: str | Path) -> str:
    """`path` with a leading ~ or ~user replaced by that user's home folder; otherwise unchanged ("./x" included).

    Raises:
        DimoError: the user does not exist.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        name = Path(expanded).parts[0]
        raise DimoError(f"{path}: there is no user {name[1:]!r}; to name {name} in this folder, write ./{name}")
    return expanded


def quoted(path: str | Path) -> str:
    """A path as one word of a command to copy, which a space would cut in two."""
    return shlex.quote(str(path))
