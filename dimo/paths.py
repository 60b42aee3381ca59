"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path

from dimo.errors import DimoError


def user_path(path: str | Path) -> str:
    """`path` as it stands ("./x" too), but for a ~ or ~user that it begins with: that becomes the user's home.

    Raises:
        DimoError: there is no such user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        name = Path(expanded).parts[0]
        raise DimoError(f"{path}: there is no user {name[1:]!r}; what is called {name} in this folder is ./{name}")
    return expanded
