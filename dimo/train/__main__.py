"""`python -m dimo.train config=PRESET key=value ...`, started on every rank by `accelerate launch -m dimo.train`."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist

from dimo.errors import DimoError, enough_memory, reason
from dimo.output import lasting_output
from dimo.run.lifeline import end_with_launcher
from dimo.run.signals import PREEMPTED, Preempted, stopping_at_once


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0; 2 for bad input, with a one-sentence message; 75 if a signal stopped the run."""
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
        with stopping_at_once(), enough_memory():
            trainer = Trainer(load_config(preset[-1] if preset else None, overrides))
        trainer.train()
    except DimoError as error:
        print(f"dimo: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"dimo: {reason(error)}", file=sys.stderr)
        return 2
    except Preempted as stopped:
        if os.environ.get("RANK", "0") == "0":  # print it once
            print(f"dimo: {stopped}", file=sys.stderr)
        _leave_group()
        return PREEMPTED
    _leave_group()
    return 0


def _leave_group() -> None:
    """Destroy the process group, since all ranks exit now; NCCL warns otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
