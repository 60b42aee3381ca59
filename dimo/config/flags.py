"""Command-line flags as short names of configuration keys: `--batch_size 2` is `distill.batch_size_per_gpu=2`."""

from __future__ import annotations

from collections import Counter

from dimo.config import config_keys, default_of
from dimo.errors import DimoError, nearest

# flags with their own name; every other key is available under its last part, if that is unique
RENAMED = {
    "prompt_file": "distill.prompt_source",
    "batch_size": "distill.batch_size_per_gpu",
    "num_steps": "training.max_train_steps",
    "out_dir": "experiment.output_dir",
}


def flags() -> dict[str, str]:
    """{flag without dashes: configuration key}."""
    last = [(key.split(".")[1], key) for key in config_keys()]
    count = Counter(name for name, _ in last)
    return {name: key for name, key in last if count[name] == 1 and name not in RENAMED} | RENAMED


def split_flags(arguments: list[str], own: set[str]) -> tuple[list[str], list[str]]:
    """Separate configuration flags from other arguments.

    Args:
        arguments: command-line arguments; both `--name value` and `--name=value` are understood.
        own: the command's own options, such as "--config", which are passed through.

    Returns:
        (the other arguments, the configuration flags as "key=value" overrides).

    Raises:
        DimoError: an unknown flag (the message suggests the closest), or a flag without a value.
    """
    known, others, overrides = flags(), [], []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or name in own or name == "--":
            others.append(argument)
            continue
        if name[2:] not in known:
            several = [f"{key}=..." for key in config_keys() if key.split(".")[1] == name[2:]]
            hint = f"; write {' or '.join(several)}" if several else nearest(name, own | {f"--{f}" for f in known})
            raise DimoError(f"unknown flag {name}{hint}")
        if not equals:
            value = next(rest, "--")  # nothing left is no value, as another flag is none
            if value.startswith("--"):
                raise DimoError(f"{name} needs a value; it stands for {known[name[2:]]}")
        overrides.append(as_override(known[name[2:]], value))
    return others, overrides


def as_override(key: str, value: str) -> str:
    """The override "key=value"; brackets are added to a list without them: --teacher_steps 1,25."""
    bare = isinstance(default_of(config_keys()[key]), list) and not value.lstrip().startswith("[")
    return f"{key}=[{value}]" if bare else f"{key}={value}"


def describe() -> str:
    """A table of all keys with default and help text."""
    rows = [(k, str(default_of(f)), f.metadata["help"]) for k, f in config_keys().items()]
    wide = [max(len(r[i]) for r in rows) for i in (0, 1)]
    return "\n".join(f"{k:{wide[0]}}  {v:{wide[1]}}  {h}" for k, v, h in rows)
