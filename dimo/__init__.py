"""dimo: distil URSA, a discrete video diffusion model, into a generator that needs one pass.

What a script or notebook needs most is here. A name is imported when it is first used, so that `import dimo` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
_WHERE = {
    "Trainer": "dimo.train.trainer",
    "evaluate": "dimo.evaluation.evaluate",
    "load_config": "dimo.config",
    "load_ursa": "dimo.ursa",
    "load_world": "dimo.worlds",
    "sample": "dimo.ursa",
}
__all__ = ["Trainer", "__version__", "evaluate", "load_config", "load_ursa", "load_world", "sample"]

if TYPE_CHECKING:
    from dimo.config import load_config
    from dimo.evaluation.evaluate import evaluate
    from dimo.train.trainer import Trainer
    from dimo.ursa import load_ursa, sample
    from dimo.worlds import load_world


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'dimo' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
