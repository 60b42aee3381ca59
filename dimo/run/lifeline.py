"""No orphans: a training process ends when the process that started it ends, even if that one was killed by -9.

The chain is launcher (a terminal's `dimo`, or a notebook's kernel) -> accelerate launch -> one worker per GPU. When the
launcher dies, accelerate is killed at once; when accelerate dies, each worker gets SIGTERM, saves and leaves.
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

from dimo.output import lasting_output
from dimo.run.signals import PREEMPTED

GRACE_S = 300.0  # for a step and a checkpoint to end
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
LAUNCHER = "DIMO_LAUNCHER"  # pid of the accelerate process, for its workers


def end_with_parent(signum: int, parent: int, grace_s: float = GRACE_S) -> None:
    """From now on this process gets `signum` when its parent, process `parent`, ends, and SIGKILL `grace_s` later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)
    threading.Thread(target=_watch, args=(signum, parent, grace_s), daemon=True).start()


def _watch(signum: int, parent: int, grace_s: float) -> None:
    late = os.getppid() != parent  # it ended before this process could ask to be told
    while os.getppid() == parent:
        time.sleep(0.5)
    if late or sys.platform != "linux":
        os.kill(os.getpid(), signum)
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher() -> None:
    """For a worker: SIGTERM when accelerate launch or torchrun is gone. A process started by hand is left alone."""
    if LAUNCHER in os.environ:
        end_with_parent(signal.SIGTERM, int(os.environ[LAUNCHER]))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM, os.getppid())


def adopt_orphans() -> None:
    """Processes whose parent dies become this one's children, so that it can wait for them (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def main(arguments: list[str]) -> int:
    """`python -m dimo.run.lifeline PARENT ...` is accelerate launch for as long as process PARENT lives.

    Its exit code is that of the first worker that failed, where accelerate itself says 1 and prints its own traceback.
    """
    end_with_parent(signal.SIGKILL, int(arguments[0]))
    os.environ[LAUNCHER] = str(os.getpid())
    # what torchrun logs of a stop, with times and host names, is told below in a sentence, or not worth one
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    from accelerate.commands.launch import main as accelerate_launch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    sys.argv = ["accelerate launch", *arguments[1:]]
    try:
        with lasting_output():  # launch.log lies on a disk that may be full
            accelerate_launch()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != PREEMPTED:
            print(f"dimo: rank {rank} (process {failure.pid}) ended with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode % 256  # -9 becomes 247
    except subprocess.CalledProcessError as error:
        return error.returncode % 256
    except ImportError as error:  # of what the engine needs
        print(f"dimo: accelerate cannot launch, {error}; pip install -e '.[gpu]' brings DeepSpeed", file=sys.stderr)
        return 2
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
