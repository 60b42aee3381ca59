"""Real processes for tests: what `accelerate launch` starts for the GPUs of one machine, on the CPU over gloo."""

import importlib.util
import os
import subprocess
import time
from pathlib import Path

import pytest
from forks import ENVIRONMENT, python
from torch.distributed import TCPStore

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

# `dimo` of several processes: networks are read by its children alone
BY_CHILDREN = """
import os, sys
from dimo.__main__ import main
from dimo.ursa import loading
read, parent = loading.read_weights, os.getpid()
def read_weights(*given, **named):
    assert os.getpid() != parent, "the networks belong to the children"
    return read(*given, **named)
loading.read_weights = read_weights
sys.exit(main())
"""


def launch(folder, *command, engine="ddp", processes=2):
    """Run a script or `-m module` in `folder` by `accelerate launch` with the engine's YAML; the CompletedProcess."""
    words = ["-m", "accelerate.commands.launch", "--config_file", str(PRESETS / f"{engine}.yaml")]
    words += ["--num_processes", str(processes), "--main_process_port", "0"]
    env = os.environ | ENVIRONMENT
    return python.run([*words, *command], capture_output=True, text=True, cwd=folder, env=env, timeout=300)


def launch_forked(folder, *command, engine="ddp", processes=2):
    """The ranks that `launch` would start, without accelerate and torchrun. The CompletedProcess of a script or
    `-m module` in `folder`: the exit code is of the first rank that failed, whose output comes last, since the others'
    may only say that it is gone.

    They meet in a store that is here, as torchrun's workers do in its own: no port has to be free a moment later. When
    a rank has failed, the others have 10 s.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | ENVIRONMENT | ENGINES[engine] | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    env |= {"WORLD_SIZE": str(processes), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = []
    for rank in range(processes):
        with open(f"{folder}/rank{rank}.stdout", "w") as out, open(f"{folder}/rank{rank}.stderr", "w") as err:
            own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(python.start(command, cwd=folder, env=own, stdin=subprocess.DEVNULL, stdout=out, stderr=err))
    failed, until = [], time.monotonic() + 300
    while any(process.poll() is None for process in ranks):
        if not failed and (failed := [rank for rank, process in enumerate(ranks) if process.returncode]):
            until = time.monotonic() + 10
        if time.monotonic() > until:
            for process in ranks:
                process.kill()
        time.sleep(0.02)
    failed += [rank for rank, process in enumerate(ranks) if process.returncode]
    order = sorted(range(processes), key=lambda rank: rank in failed[:1])
    said = ["".join(Path(folder, f"rank{rank}.{name}").read_text() for rank in order) for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(command, ranks[failed[0]].returncode if failed else 0, *said)


def run_script(folder, text, *arguments, **more):
    """`launch_forked` of a script given as text; it must end well. Returns what it printed."""
    (folder / "script.py").write_text(text)
    done = launch_forked(folder, folder / "script.py", *arguments, **more)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
