"""Real processes for tests: what `accelerate launch` starts for the GPUs of one machine, on the CPU over gloo."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PRESETS = Path(__file__).parents[1] / "dimo" / "train" / "presets" / "accelerate"
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


def launch(folder, *command, engine="ddp", processes=2, preset=False):
    """Run a script or `-m module` in so many processes, in `folder`; returns the CompletedProcess.

    With `preset` through `accelerate launch` and the engine's YAML, else, faster, through what that would start.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if preset:
        words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(PRESETS / f"{engine}.yaml")]
        words += ["--num_processes", str(processes), "--main_process_port", "0"]
    else:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        env |= ENGINES[engine]
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
    return subprocess.run([*words, *command], capture_output=True, text=True, cwd=folder, env=env, timeout=300)


def run_script(folder, text, *arguments, **more):
    """`launch` of a script given as text; it must end well. Returns what it printed."""
    (folder / "script.py").write_text(text)
    done = launch(folder, str(folder / "script.py"), *arguments, **more)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
