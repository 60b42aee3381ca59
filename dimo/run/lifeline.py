"""No orphans: training processes end when the process that started them ends, even by SIGKILL.

The chain is launcher (`dimo` in a terminal, or a notebook kernel) -> accelerate launch -> one worker per GPU. If the
launcher dies, accelerate is killed at once; if accelerate dies, each worker receives SIGTERM, saves and exits.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from dimo.errors import DimoError, reason
from dimo.output import lasting_output
from dimo.run.signals import PREEMPTED

GRACE_S = 300.0  # seconds to finish a step and a checkpoint
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
LAUNCHER = "DIMO_LAUNCHER"  # environment variable: pid of the accelerate process


def end_with_parent(signum: int, parent: int, grace_s: float = GRACE_S) -> None:
    """Send this process `signum` when its parent (pid `parent`) ends, and SIGKILL `grace_s` seconds later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)
    threading.Thread(target=_watch, args=(signum, parent, grace_s), daemon=True).start()


def _watch(signum: int, parent: int, grace_s: float) -> None:
    late = os.getppid() != parent  # the parent ended before prctl
    while os.getppid() == parent:
        time.sleep(0.5)
    if late or sys.platform != "linux":
        os.kill(os.getpid(), signum)
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher() -> None:
    """In a worker: receive SIGTERM when accelerate launch or torchrun ends. Without a launcher, do nothing."""
    if LAUNCHER in os.environ:
        end_with_parent(signal.SIGTERM, int(os.environ[LAUNCHER]))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM, os.getppid())


def share_work(parent: int, work: Callable[[], None]) -> int:
    """In a process that does a part of its parent's work: do it, unless the parent ends. Files must be written whole.

    Returns:
        Exit code: 0; 2 for bad input, with a sentence on stderr.
    """
    end_with_parent(signal.SIGKILL, parent)
    try:
        work()
    except (DimoError, OSError) as error:
        print(f"dimo: {error if isinstance(error, DimoError) else reason(error)}", file=sys.stderr)
        return 2
    return 0


def adopt_orphans() -> None:
    """Make orphaned descendants children of this process, so that it can wait for them (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def main(arguments: list[str]) -> int:
    """`python -m dimo.run.lifeline PARENT ...`: accelerate launch that ends with the process PARENT.

    Returns:
        The exit code of the first worker that failed; accelerate itself would return 1 and print a traceback.
    """
    end_with_parent(signal.SIGKILL, int(arguments[0]))
    os.environ[LAUNCHER] = str(os.getpid())
    # torchrun's own reports of a stop; the message below replaces them
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    from accelerate.commands.launch import main as accelerate_launch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    sys.argv = ["accelerate launch", *arguments[1:]]
    try:
        with lasting_output():  # the disk with launch.log may be full
            accelerate_launch()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != PREEMPTED:
            print(f"dimo: rank {rank} (process {failure.pid}) ended with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode % 256  # -9 becomes 247
    except subprocess.CalledProcessError as error:
        return error.returncode % 256
    except ImportError as error:  # a package that the engine needs
        print(f"dimo: accelerate cannot launch: {error}; pip install -e '.[gpu]' installs DeepSpeed", file=sys.stderr)
        return 2
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
