"""A training in a process of its own, which a notebook starts, follows and stops while its kernel stays free."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from dimo.commands.train import refuse_early, train
from dimo.config import Config, to_yaml
from dimo.config.changes import changes_of, spell
from dimo.config.load import read_groups
from dimo.config.older import as_begun
from dimo.errors import DimoError
from dimo.run.folder import LOCK, RunFolder
from dimo.run.overview import progress_of
from dimo.run.signals import PREEMPTED, Preempted
from dimo.views.live import is_live

SERVED = "JPY_SESSION_NAME"  # which Jupyter's server gives to kernels of notebooks


class Training:
    """A training that another process does, or that is over.

    Attributes:
        run: its folder.
        pid: of the process; None if it is over.
    """

    def __init__(self, run: RunFolder, pid: int | None = None, child: subprocess.Popen | None = None, log: Any = None):
        self.run, self.pid, self._child, self._log = run, pid, child, log

    def is_running(self) -> bool:
        return self._child.poll() is None if self._child else self.run.is_held()

    def stop(self) -> None:
        """Ask it to save a checkpoint and end, and wait until it has; starting it again continues.

        Raises:
            DimoError: another process trains in this folder by now, or the process is not ours.
        """
        if self.pid is not None and self.is_running():
            where, pid, _ = _holder(self.run)
            if self._child is None and pid != self.pid:  # of the old one the number may be a stranger's by now
                raise DimoError(f"{self.run.path} is being trained by {where} by now; start it again to follow that")
            try:
                os.kill(self.pid, signal.SIGTERM)
            except ProcessLookupError:
                pass  # it has just ended
            except PermissionError:
                raise DimoError(f"process {self.pid} belongs to another user, who must stop it") from None
            while self.is_running():
                time.sleep(0.05)
        print(f"{self.run.path}: {progress_of(self.run)}")

    def wait(self) -> RunFolder:
        """Wait for its end; interrupting the cell ends the waiting alone.

        Raises:
            Preempted: it was stopped, and a checkpoint was saved.
            DimoError: it failed, or the waiting was interrupted.
        """
        try:
            while self.is_running():
                time.sleep(0.1)
        except KeyboardInterrupt:
            how = "training.stop() ends it with a checkpoint, training.wait() waits again"
            raise DimoError(f"no longer waited for: {progress_of(self.run)}; {how}") from None
        status, code = self.run.status(), self._child.returncode if self._child else 0
        if code == PREEMPTED or (not code and status.get("state") == "preempted"):
            raise Preempted(f"stopped at step {status.get('step')}; starting it again continues")
        if code or status.get("state") != "finished":
            raise DimoError(f"training failed: {self._last_words() or status.get('error') or progress_of(self.run)}")
        return self.run

    def _last_words(self) -> str:
        """What the process said last, after its end; of a killed one, which could say nothing, by what."""
        if self._log is None:
            return ""
        if self._child and self._child.returncode < 0:
            name = signal.Signals(-self._child.returncode).name
            memory = ", as a machine that is out of memory does" if name == "SIGKILL" else ""
            step = self.run.status().get("step")
            return (
                f"{name} killed its process at step {step}{memory}; starting it again goes on from the last checkpoint"
            )
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("dimo: ") if lines else ""


def start(config: Config) -> Training:
    """Train in a process of its own, which goes on if the kernel is restarted; one that does so already is returned.

    Elsewhere than in a notebook of Jupyter's server, such as under papermill, whose end would leave it behind, it
    trains here and returns when it is over.

    Raises:
        DimoError: bad input; the run is being trained with another configuration, or it failed before its first step.
    """
    if not (is_live() and SERVED in os.environ):
        return Training(train(config))
    refuse_early(config)
    run = RunFolder(config.experiment.output_dir, writes=False)
    if run.is_held():
        return _attached(run, config)
    log = tempfile.TemporaryFile()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config), encoding="utf-8")
        words = [sys.executable, "-m", "dimo", "train", "-c", str(file)]
        # a session of its own, since Jupyter interrupts the kernel's
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        training = Training(run, child.pid, child, log)
        try:
            while child.poll() is None and not run.is_held():
                time.sleep(0.05)
        except KeyboardInterrupt:
            child.kill()
            child.wait()
            raise DimoError("stopped before it began") from None
    if child.poll():
        training.wait()  # says why
    print(f"process {child.pid} trains {run.path.resolve()}; training.stop() ends it with a checkpoint")
    return training


def _attached(run: RunFolder, config: Config) -> Training:
    """The training that goes on in a folder."""
    while run.is_held() and not (run.path / "config.yaml").exists():  # it is about to be written
        time.sleep(0.05)
    where, pid, host = _holder(run)
    changes = changes_of(run.path, read_groups(run.path / "config.yaml"), to_yaml(as_begun(config)))
    if changes:
        raise DimoError(f"{run.path} is being trained by {where} with {spell(changes)}; stop it first")
    if pid is None or host != socket.gethostname() or not psutil.pid_exists(pid):
        raise DimoError(f"{run.path} is being trained by {where}, which is not on this machine; stop it there")
    print(f"{where} trains {run.path.resolve()} already; training.stop() ends it with a checkpoint")
    return Training(run, pid)


def _holder(run: RunFolder) -> tuple[str, int | None, str]:
    """Who trains in a folder: in words, the process and its machine, as far as the lock tells."""
    told = re.match(r"process (\d+) on (.*)", (run.path / LOCK).read_text(encoding="utf-8"))
    return (told[0], int(told[1]), told[2]) if told else ("another process", None, "")
