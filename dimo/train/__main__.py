"""`python -m dimo.train config=PRESET key=value ...`: what `accelerate launch -m dimo.train` starts on every rank."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist

from dimo.errors import DimoError, reason
from dimo.output import lasting_output
from dimo.run.lifeline import end_with_launcher
from dimo.run.signals import PREEMPTED, Preempted, stopping_at_once


def main(arguments: list[str]) -> int:
    """Exit code 0; 2 for bad input, said in a sentence; 75 for a run that a signal stopped and that can go on."""
    with lasting_output():
        return _main(arguments)


def _main(arguments: list[str]) -> int:
    end_with_launcher()
    try:
        from dimo.config import load_config
        from dimo.config.flags import split_flags
        from dimo.train.trainer import Trainer

        words, overrides = split_flags(arguments, own=set())
        preset = [word.removeprefix("config=") for word in words if word.startswith("config=")]
        overrides += [word for word in words if not word.startswith("config=")]
        with stopping_at_once():
            trainer = Trainer(load_config(preset[-1] if preset else None, overrides))
        trainer.train()
    except DimoError as error:
        print(f"dimo: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"dimo: {reason(error)}", file=sys.stderr)
        return 2
    except Preempted as stopped:
        if os.environ.get("RANK", "0") == "0":  # once for all
            print(f"dimo: {stopped}", file=sys.stderr)
        _part()
        return PREEMPTED
    _part()
    return 0


def _part() -> None:
    """Leave the other processes, who all leave now; NCCL warns of those who just go."""
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
