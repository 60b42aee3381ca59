"""Training in processes of its own: `accelerate launch -m dimo.train` as a child that is followed, stopped and reaped.

accelerate launch on every machine, also where there are no GPUs: with a configuration of type MULTI_GPU it starts its
workers through torchrun, and they meet over gloo. Its own --cpu wants mpirun for more than one process.
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

import psutil
import torch

from dimo.config import PRESETS, Config, device_of, to_yaml
from dimo.config.older import as_begun
from dimo.config.values import read_yaml
from dimo.errors import DimoError, nearest
from dimo.output import lasting_output
from dimo.paths import user_path
from dimo.run.folder import RunFolder, write_text
from dimo.run.lifeline import GRACE_S, adopt_orphans
from dimo.run.signals import PREEMPTED, handling


def needs_launch(config: Config) -> bool:
    """Several processes, or an engine that only accelerate launch sets up."""
    return config.training.num_processes > 1 or config.training.engine != "ddp"


def launch(config: Config, grace_s: float = GRACE_S) -> int:
    """Train in `training.num_processes` processes under `training.engine`; wait for them; leave none behind.

    What they print goes to `launch_file` and to stderr. Signals that ask to stop are passed on as SIGTERM: they finish
    the step and save. After `grace_s` seconds, or at a second Ctrl-C, they are killed. Where the engine's file
    names several machines, each calls this, and starts its own share.

    Returns:
        0; 75 when they stopped because they were asked to; 1 for everything else, where status.json says `failed`.

    Raises:
        DimoError: before anything starts: no such engine, more processes than GPUs, or what `RunFolder.open` refuses.
    """
    config = as_begun(config)
    command, c = launch_command(config), config.experiment
    machine, _ = machine_of(config)
    if machine == 0:
        run = RunFolder.open(c.output_dir, to_yaml(config), c.resume, c.overwrite)
        if run.status():
            run.write_status(error=None, last_lines=None)  # what an earlier launch died of is not this one's news
    else:  # which is cleared or refused on machine 0
        run = RunFolder(c.output_dir)
    opened = dataclasses.replace(config, experiment=dataclasses.replace(c, resume=True, overwrite=False))
    write_text(launch_file(config, "yaml"), to_yaml(opened))
    asked: list[int] = []
    stopping = handling(lambda number, _: asked.append(number))
    with lasting_output(), open(launch_file(config, "log"), "ab") as log, stopping:
        follow, begin = _Follower(launch_file(config, "log")), log.tell()
        threads = {"OMP_NUM_THREADS": "1"} | os.environ  # torchrun's own default, about which it would print a banner
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=threads
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
    if machine > 0:  # the status is machine 0's
        told = asked and child.returncode % 256 in (256 - signal.SIGTERM, 128 + signal.SIGTERM)
        return 0 if child.returncode == 0 else PREEMPTED if told or child.returncode == PREEMPTED else 1
    return _exit_code(run, child.returncode, family, bool(asked), begin)


def launch_command(config: Config) -> list[str]:
    """The child's words. It is `lifeline` that runs accelerate, so that it cannot outlive this process."""
    t, file, given = config.training, engine_file(config.training.engine), engine_settings(config.training.engine)
    device, (_, machines) = device_of(config), machine_of(config)
    own = str(file) == t.engine and t.num_processes == 1  # a person's file knows its own number
    processes = given.get("num_processes", 1) if own else t.num_processes
    if device.type == "cuda" and processes > machines * torch.cuda.device_count():
        raise DimoError(
            f"training.num_processes is {processes}, and {machines} machine(s) with {torch.cuda.device_count()} GPU(s) "
            "each are there; one process a GPU"
        )
    if engine_kind(t.engine) == "deepspeed_zero2" and importlib.util.find_spec("deepspeed") is None:
        raise DimoError("training.engine is deepspeed_zero2, and DeepSpeed is missing: pip install -e '.[gpu]'")
    if processes % machines:
        raise DimoError(f"{file} is for {machines} machines, which do not share {processes} process(es) evenly")
    if machines > 1 and not given.get("main_process_ip"):
        raise DimoError(f"{file} is for {machines} machines and needs main_process_ip, the address of machine 0")
    words = ["--config_file", str(file), "--num_processes", str(processes)]
    words += ["--mixed_precision", "no"]  # the trainer sees to it itself
    if machines == 1 and "main_process_port" not in given:
        words += ["--main_process_port", "0"]  # any free one, so that two runs share a machine
    resolved = launch_file(config, "yaml")
    return [
        sys.executable, "-m", "dimo.run.lifeline", str(os.getpid()), *words, "-m", "dimo.train", f"config={resolved}",
    ]  # fmt: skip


def launch_file(config: Config, ending: str) -> Path:
    """launch.yaml, launch.log in the run folder; launch-machine-1.log on the second machine."""
    machine, _ = machine_of(config)
    return Path(config.experiment.output_dir) / f"launch{f'-machine-{machine}' if machine else ''}.{ending}"


def machine_of(config: Config) -> tuple[int, int]:
    """(which machine this is, of how many) by the engine's file. On machine 0 is rank 0, which writes the folder."""
    given = engine_settings(config.training.engine)
    return given.get("machine_rank") or 0, given.get("num_machines") or 1


def engine_file(engine: str) -> Path:
    """The accelerate YAML of a preset's name, or a person's own."""
    presets = {file.stem: file for file in (PRESETS / "accelerate").glob("*.yaml")}
    file = presets.get(engine, Path(user_path(engine)))
    if not file.is_file():
        raise DimoError(
            f"training.engine {engine!r} is neither a preset nor an existing YAML file{nearest(engine, presets)}"
        )
    return file


def engine_settings(engine: str) -> dict:
    """What that file says.

    Raises:
        DimoError: no such file, not a mapping in YAML, or one with a key twice or a number that is none.
    """
    file = engine_file(engine)
    must = f"training.engine {engine!r} must be a YAML file of accelerate's `key: value` lines"
    try:
        given = read_yaml(file.read_text(encoding="utf-8"), str(file), typed=True)
    except (DimoError, UnicodeDecodeError) as error:
        raise DimoError(f"{must}: {error}") from error
    if not isinstance(given, dict):  # None of an empty file
        raise DimoError(must)
    for key in ("num_processes", "num_machines", "machine_rank"):
        value = given.get(key)
        if value is not None and (type(value) is not int or value < 0):
            raise DimoError(f"training.engine {file}: {key} must be a whole number, got {value!r}")
    return given


def engine_kind(engine: str) -> str:
    """ddp, fsdp2 or deepspeed_zero2: what a preset, or a person's own file, asks for."""
    asked = engine_settings(engine).get("distributed_type", "")
    return {"FSDP": "fsdp2", "DEEPSPEED": "deepspeed_zero2"}.get(asked, "ddp")


class _Follower:
    """Copies to stderr what has been added to a file since the last call."""

    def __init__(self, path: Path):
        self.file = open(path, "rb")
        self.file.seek(0, os.SEEK_END)
        self.decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def __call__(self) -> None:
        text = self.decode(self.file.read())
        if text:
            sys.stderr.write(text)
            sys.stderr.flush()


class _Family:
    """The accelerate process and the workers it started, each in a session of its own, so that no group reaches all."""

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
        """The workers, not accelerate: it would give them 30 s and then kill."""
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
    """`code` is one worker's; what they wrote last into status.json is the truth about the run, and where they could
    write nothing this does. Their part of launch.log starts at byte `begin`."""
    if code == 0:
        return code
    status = run.status()
    ours, nobodys = status.get("pid") in family.workers, status.get("pid") in (None, os.getpid())
    early = asked and not ours and not family.killed  # before the first step: nothing to save
    if code == PREEMPTED or early or (ours and status["state"] == "preempted"):
        if nobodys and status.get("state") not in (None, "finished"):
            run.write_status(state="preempted")
        return PREEMPTED
    if nobodys or (ours and status["state"] != "failed"):  # killed, or failed too early to say so
        lines = (run.path / "launch.log").read_bytes()[begin:].decode(errors="replace").splitlines()
        said = [line for line in lines if line.startswith("dimo: ") and "ended with exit code" not in line]
        reason = "a process was killed" if ours or not said else said[-1].removeprefix("dimo: ")
        reason = f"killed {GRACE_S:.0f} s after it was asked to stop" if family.killed else reason
        run.write_status(state="failed", error=reason, last_lines=lines[-20:])
    return 1


@contextlib.contextmanager
def children_told_to_stop():
    """Signals that ask to stop go on, as SIGTERM, to this process's children; at a second Ctrl-C all below are killed.

    Yields a list that is empty until the first. Orphans of the children are adopted meanwhile and later.
    """
    adopt_orphans()
    asked: list[int] = []

    def pass_on(number, _):
        asked.append(number)
        _send(psutil.Process().children(recursive=_hurry(asked)), kill=_hurry(asked))

    with handling(pass_on):
        yield asked


def wait_for_children(others: list[psutil.Process], grace_s: float = GRACE_S) -> None:
    """Return when no process that descends from this one is left, but for `others`; after `grace_s` they are killed."""
    ours = [process for process in psutil.Process().children(recursive=True) if process not in others]
    _, late = psutil.wait_procs(ours, grace_s)
    _send(late, kill=True)
    psutil.wait_procs(late, 10)


def _hurry(asked: list[int]) -> bool:
    """A person pressed Ctrl-C twice. Other second signals are a scheduler's or Jupyter's way to make sure."""
    return asked.count(signal.SIGINT) > 1


def _send(processes: list[psutil.Process], kill: bool = False) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill() if kill else process.terminate()
