"""Multi-process training: run `accelerate launch -m dimo.train` as a child process, relay its output, stop and reap it.

accelerate is used without GPUs as well: with distributed_type MULTI_GPU it starts workers through torchrun, which then
communicate over gloo, whereas its --cpu mode needs mpirun for more than one process.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import psutil
import torch

from dimo.config import PRESETS, Config, device_of, to_yaml
from dimo.config.older import as_begun
from dimo.config.values import read_yaml
from dimo.errors import DimoError, nearest
from dimo.files import write_text
from dimo.output import lasting_output
from dimo.paths import user_path
from dimo.run.cold_start import COMMAND_BEGAN, command_began
from dimo.run.folder import RunFolder
from dimo.run.lifeline import GRACE_S, adopt_orphans
from dimo.run.progress import OneLine
from dimo.run.signals import PREEMPTED, handling


def needs_launch(config: Config) -> bool:
    """Whether training needs several processes, or an engine that only accelerate launch sets up."""
    return config.training.num_processes > 1 or config.training.engine != "ddp"


def launch(config: Config, grace_s: float = GRACE_S) -> int:
    """Train in `training.num_processes` processes under `training.engine` and wait until all have ended.

    The output of the workers goes to `launch_file` and stderr. Signals that ask to stop are passed on as SIGTERM, upon
    which the workers finish the step and save. If the engine's file specifies several machines, each of them calls this
    function and starts its own share of the processes.

    Args:
        grace_s: seconds after which workers asked to stop are killed; a second Ctrl-C kills them at once.

    Returns:
        Exit code: 0; 75 if stopped by a signal; 1 otherwise, with state `failed` in status.json.

    Raises:
        DimoError: before anything starts: unknown engine, more processes than GPUs, or `RunFolder.open` fails.
    """
    config = as_begun(config)
    command, c = launch_command(config), config.experiment
    machine, _ = machine_of(config)
    if machine == 0:
        run = RunFolder.open(c.output_dir, to_yaml(config), c.resume, c.overwrite)
        if run.status():
            run.write_status(error=None, last_lines=None)  # errors of an earlier launch
    else:  # machine 0 checks and clears the folder
        run = RunFolder(c.output_dir)
    opened = dataclasses.replace(config, experiment=dataclasses.replace(c, resume=True, overwrite=False))
    write_text(launch_file(config, "yaml"), to_yaml(opened))
    asked: list[int] = []
    stopping = handling(lambda number, _: asked.append(number))
    file = launch_file(config, "log")
    with lasting_output(), open(file, "ab") as log, open(file, "rb") as said, stopping:
        follow, begin = _Follower(said), log.tell()
        # torchrun's default number of threads, set here to avoid its banner
        variables = {"OMP_NUM_THREADS": "1", **os.environ, COMMAND_BEGAN: str(command_began())}
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=variables
        )
        family = _Family(child)
        deadline = None
        while family.alive():
            if asked and deadline is None:
                family.terminate_workers()
                deadline = time.monotonic() + grace_s
            if deadline is not None and (_hurry(asked) or time.monotonic() > deadline):
                family.kill()
            time.sleep(0.1)
            follow()
        follow()
        follow.shown.clear()
    if machine > 0:  # machine 0 writes the status
        told = asked and child.returncode % 256 in (256 - signal.SIGTERM, 128 + signal.SIGTERM)
        return 0 if child.returncode == 0 else PREEMPTED if told or child.returncode == PREEMPTED else 1
    return _exit_code(run, child.returncode, family, bool(asked), begin)


def launch_command(config: Config) -> list[str]:
    """Command of the child: accelerate launch, through `dimo.run.lifeline` so that it cannot outlive this process."""
    t, file, given = config.training, engine_file(config.training.engine), engine_settings(config.training.engine)
    device, (_, machines) = device_of(config), machine_of(config)
    own = str(file) == t.engine and t.num_processes == 1  # a user's file may set the number of processes
    processes = given.get("num_processes", 1) if own else t.num_processes
    if device.type == "cuda" and processes > machines * torch.cuda.device_count():
        raise DimoError(
            f"training.num_processes is {processes}, but there are {machines} machine(s) with "
            f"{torch.cuda.device_count()} GPU(s) each; use one process per GPU"
        )
    if engine_kind(t.engine) == "deepspeed_zero2" and importlib.util.find_spec("deepspeed") is None:
        raise DimoError("training.engine is deepspeed_zero2, but DeepSpeed is not installed: pip install -e '.[gpu]'")
    if processes % machines:
        raise DimoError(f"{file} is for {machines} machines, which cannot share {processes} process(es) evenly")
    if machines > 1 and not given.get("main_process_ip"):
        raise DimoError(f"{file} is for {machines} machines and needs main_process_ip, the address of machine 0")
    words = ["--config_file", str(file), "--num_processes", str(processes)]
    words += ["--mixed_precision", "no"]  # the trainer handles mixed precision itself
    words += ["--log_dir", os.devnull]  # else torchrun leaves a folder in /tmp; the output goes to `launch_file`
    if machines == 1 and "main_process_port" not in given:
        words += ["--main_process_port", "0"]  # any free port, so that two runs can share a machine
    resolved = launch_file(config, "yaml")
    return [
        sys.executable, "-m", "dimo.run.lifeline", str(os.getpid()), *words, "-m", "dimo.train", f"config={resolved}",
    ]  # fmt: skip


def launch_file(config: Config, ending: str) -> Path:
    """Path of launch.yaml or launch.log in the run folder; of launch-machine-1.log on the second machine."""
    machine, _ = machine_of(config)
    return Path(config.experiment.output_dir) / f"launch{f'-machine-{machine}' if machine else ''}.{ending}"


def machine_of(config: Config) -> tuple[int, int]:
    """(index of this machine, number of machines) from the engine's file. Rank 0, which writes, is on machine 0."""
    given = engine_settings(config.training.engine)
    return given.get("machine_rank") or 0, given.get("num_machines") or 1


def engine_file(engine: str) -> Path:
    """Path of the accelerate YAML: that of an engine preset, or the user's own file."""
    presets = {file.stem: file for file in (PRESETS / "accelerate").glob("*.yaml")}
    file = presets.get(engine, Path(user_path(engine)))
    if not file.is_file():
        raise DimoError(
            f"training.engine {engine!r} is neither a preset nor an existing YAML file{nearest(engine, presets)}"
        )
    return file


def engine_settings(engine: str) -> dict:
    """Content of the engine's accelerate YAML.

    Raises:
        DimoError: no such file, not a YAML mapping, a duplicate key, or an invalid number.
    """
    file = engine_file(engine)
    must = f"training.engine {engine!r} must be a YAML file of accelerate's `key: value` lines"
    try:
        given = read_yaml(file.read_text(encoding="utf-8"), str(file), typed=True)
    except (DimoError, UnicodeDecodeError) as error:
        raise DimoError(f"{must}: {error}") from error
    if not isinstance(given, dict):  # an empty file gives None
        raise DimoError(must)
    for key in ("num_processes", "num_machines", "machine_rank"):
        value = given.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise DimoError(f"training.engine {file}: {key} must be a whole number, got {value!r}")
    return given


def engine_kind(engine: str) -> str:
    """Kind of an engine, which may be the user's own file: ddp, fsdp2 or deepspeed_zero2."""
    asked = engine_settings(engine).get("distributed_type", "")
    return {"FSDP": "fsdp2", "DEEPSPEED": "deepspeed_zero2"}.get(asked, "ddp")


class _Follower:
    """Copies to stderr what was appended to a file since the last call."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.file.seek(0, os.SEEK_END)
        self.decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self.shown = OneLine()

    def __call__(self) -> None:
        text = self.decode(self.file.read())
        if text:
            self.shown.write(text)
            self.shown.flush()


class _Family:
    """The accelerate process and its workers, tracked by pid: their sessions differ, so no process group has all."""

    def __init__(self, child: subprocess.Popen):
        self.child, self.head = child, psutil.Process(child.pid)
        self.workers: dict[int, psutil.Process] = {}
        self.killed = False

    def alive(self) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.workers |= {process.pid: process for process in self.head.children()}
        running = self.child.poll() is None
        return running or any(_runs(process) for process in self.workers.values())

    def terminate_workers(self) -> None:
        """Send SIGTERM to the workers but not to accelerate, which would kill them after 30 s."""
        _send(list(self.workers.values()) or [self.head])

    def kill(self) -> None:
        self.killed = True
        everyone = [self.head, *self.workers.values()]
        for process in list(everyone):
            with contextlib.suppress(psutil.NoSuchProcess):
                everyone += process.children(recursive=True)
        _send(everyone, kill=True)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _exit_code(run: RunFolder, code: int, family: _Family, asked: bool, begin: int) -> int:
    """Exit code of `launch`. The workers' last status.json counts; if they could not write one, this function does.

    Args:
        code: exit code of the child, which is that of one worker.
        asked: whether a stop was requested.
        begin: byte offset in launch.log where this launch begins.
    """
    if code == 0:
        return code
    status = run.status()
    ours, nobodys = status.get("pid") in family.workers, status.get("pid") in (None, os.getpid())
    early = asked and not ours and not family.killed  # stopped before the first step, with nothing to save
    if code == PREEMPTED or early or (ours and status["state"] == "preempted"):
        if nobodys and status.get("state") not in (None, "finished"):
            run.write_status(state="preempted")
        return PREEMPTED
    if nobodys or (ours and status["state"] != "failed"):  # killed, or failed too early to say so
        lines = (run.path / "launch.log").read_bytes()[begin:].decode(errors="replace").splitlines()
        said = [line for line in lines if line.startswith("dimo: ") and "ended with exit code" not in line]
        reason = "a process was killed" if ours or not said else said[-1].removeprefix("dimo: ")
        reason = f"killed, still running {GRACE_S:.0f} s after the request to stop" if family.killed else reason
        run.write_status(state="failed", error=reason, last_lines=lines[-20:])
    return 1


@contextlib.contextmanager
def children_told_to_stop():
    """In this context, signals that ask to stop are passed to the child processes as SIGTERM.

    A second Ctrl-C kills all descendants. Yields the list of signals received so far. Orphaned descendants become
    children of this process, also after the context.
    """
    adopt_orphans()
    asked: list[int] = []

    def pass_on(number, _):
        asked.append(number)
        _send(psutil.Process().children(recursive=_hurry(asked)), kill=_hurry(asked))

    with handling(pass_on):
        yield asked


def wait_for_children(others: list[psutil.Process], grace_s: float = GRACE_S) -> None:
    """Wait until no descendant of this process except `others` is left; after `grace_s` seconds, kill them."""
    ours = [process for process in psutil.Process().children(recursive=True) if process not in others]
    _, late = psutil.wait_procs(ours, grace_s)
    _send(late, kill=True)
    psutil.wait_procs(late, 10)


def _hurry(asked: list[int]) -> bool:
    """Whether the user pressed Ctrl-C twice. Schedulers and Jupyter may repeat other signals without meaning a kill."""
    return asked.count(signal.SIGINT) > 1


def _send(processes: list[psutil.Process], kill: bool = False) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill() if kill else process.terminate()
