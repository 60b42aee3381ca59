"""Real processes for tests: what `accelerate launch` starts for the GPUs of one machine, on the CPU over gloo."""

import importlib
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from dimo.run.signals import STOPPING

PRESETS = Path(__file__).parents[1] / "dimo" / "config" / "presets" / "accelerate"
ENGINES = {  # what the launcher makes of the presets
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "deepspeed_zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}

WITH_ZERO2 = [
    "ddp",
    "fsdp2",
    pytest.param(
        "deepspeed_zero2",
        marks=pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed"),
    ),
]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(folder, *command, engine="ddp", processes=2):
    """Run a script or `-m module` in `folder` by `accelerate launch` with the engine's YAML; the CompletedProcess."""
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(PRESETS / f"{engine}.yaml")]
    words += ["--num_processes", str(processes), "--main_process_port", "0"]
    env = os.environ | ENVIRONMENT
    return subprocess.run([*words, *command], capture_output=True, text=True, cwd=folder, env=env, timeout=300)


def as_in_a_terminal():
    """For `preexec_fn`: what is ignored under nohup or CI is not, in a process that is to be stopped by a signal."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)


def import_all():
    """What a run imports at once or later, each a second or two."""
    for name in ("dimo.train.trainer", "dimo.views.sheets", "torch._dynamo", "transformers.models.auto"):
        importlib.import_module(name)


class Ranks:
    """What `launch` would start, sooner: forked from a process that has imported everything, and trained nothing."""

    def __init__(self):
        words = [sys.executable, __file__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen(words, env=os.environ | ENVIRONMENT, **pipes)

    def launch(self, folder, *command, engine="ddp", processes=2):
        """The CompletedProcess of a script or `-m module` in `folder`: the exit code is of the first rank that failed,
        whose output comes last, since the others' may only say that it is gone.

        They meet in a store that is here, as torchrun's workers do in its own: no port has to be free a moment later.
        """
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        env = ENGINES[engine] | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        env |= {"WORLD_SIZE": str(processes), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        print(json.dumps([str(folder), list(map(str, command)), env]), file=self.server.stdin, flush=True)
        code, first = map(int, self.server.stdout.readline().split())
        ranks = sorted(range(processes), key=lambda rank: rank == first)
        said = ["".join(Path(folder, f"rank{rank}.{name}").read_text() for rank in ranks) for name in NAMES]
        return subprocess.CompletedProcess(command, code, *said)

    def run_script(self, folder, text, *arguments, **more):
        """`launch` of a script given as text; it must end well. Returns what it printed."""
        (folder / "script.py").write_text(text)
        done = self.launch(folder, folder / "script.py", *arguments, **more)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def end(self):
        self.server.kill()  # it has nothing to lose, and unloading what it imported takes seconds
        self.server.wait()


NAMES = ("stdout", "stderr")


def _fork(rank, folder, command, env):
    process = os.fork()
    if process:
        return process
    for number, name in enumerate(NAMES, 1):
        os.dup2(os.open(f"{folder}/rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    os.environ |= env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    module, sys.argv = command[0] == "-m", command[command[0] == "-m" :]
    (runpy.run_module if module else runpy.run_path)(sys.argv[0], run_name="__main__")
    sys.exit()


def _serve():
    """A line of JSON asks for a launch; the answer is its exit code and the rank that failed first, or 0 and -1.

    When a rank has failed, the others have 10 s.
    """
    for line in sys.stdin:
        folder, command, env = json.loads(line)
        ranks = {_fork(rank, folder, command, env): rank for rank in range(int(env["WORLD_SIZE"]))}
        code, first, until = 0, -1, time.monotonic() + 300
        while ranks:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process:
                rank, failed = ranks.pop(process), os.waitstatus_to_exitcode(status)
                if failed and not code:
                    code, first, until = failed, rank, time.monotonic() + 10
            elif time.monotonic() > until:
                for process in ranks:
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.02)
        print(code, first, flush=True)


if __name__ == "__main__":
    import_all()
    _serve()
