"""The run folder, the only record of a run. Every file in it is written atomically."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import math
import os
import platform
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch

import dimo
from dimo.config import config_keys
from dimo.config.changes import START_OVER, changes_of, spell, without_later_keys
from dimo.config.load import groups_in, read_groups
from dimo.errors import DimoError
from dimo.files import PARTIALS, clear_partials, write_text
from dimo.run.checkpoints import MILESTONE, STEP
from dimo.run.rows import RowReader
from dimo.run.sources import SOURCES, read_sources, require_same_sources, to_json
from dimo.ursa.weights import read_json

try:
    import fcntl

    CAN_LOCK = True
except ImportError:  # Windows
    CAN_LOCK = False

TEACHER_SAMPLES = "teacher_samples.safetensors"
FOUND = "trained_on.json"  # {what was asked: which captions of an evaluation the run was trained on}
OWN = (
    "config.yaml", SOURCES, "environment.json", "status.json", "metrics.jsonl", "events.jsonl", "train.log",
    "report.json", "report.html", "sheet.png", "clips.mp4", "curves.png", "codes.safetensors",
    TEACHER_SAMPLES, FOUND,
)  # fmt: skip
OWN_INSIDE = {  # glob patterns, since users may keep other files in these folders
    "checkpoints": (STEP, MILESTONE, "final", PARTIALS),
    "samples": (f"{STEP}.png", PARTIALS),
    "notebooks": ("0?_*.ipynb", "0?_*.html", PARTIALS),
    "evaluation_jobs": ("about.json", "config.yaml", "process-*.log", "*-?????.safetensors", PARTIALS),
}
OTHER_MACHINES = ".launch-machine-*"  # glob pattern of what other machines write here, which start at the same time
LOCK = ".lock"
RESERVE, RESERVE_BYTES = ".reserve", 2**16  # freed to record the failure of a run whose disk is full
# events that `cut_at` keeps
HISTORY = ("resumed", "damaged_checkpoint", "config_changed", "processes_changed")
LAST_LINES = 20  # lines of train.log copied into the status of a failed run


class RunFolder:
    """A folder with config.yaml, status.json, metrics.jsonl, events.jsonl, train.log and checkpoints/.

    Args:
        path: the folder.
        writes: whether this process writes to it (rank 0); otherwise all writing methods do nothing.
    """

    def __init__(self, path: str | Path, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self._lock: TextIO | None = None

    @classmethod
    def open(
        cls, path: str | Path, config_yaml: str, resume: bool = True, overwrite: bool = False, hold: bool = False
    ) -> RunFolder:
        """Create a run folder, or open an existing one whose configuration differs at most in FREE_KEYS.

        Args:
            config_yaml: the configuration.
            resume: continue an existing run.
            overwrite: delete an existing run first.
            hold: lock the folder until `close`, or until the process ends in whatever way.

        Raises:
            DimoError: another process holds the folder, its run has another configuration, it is not a run folder, or
                it contains a run and `resume` is false.
        """
        run = cls(path)
        run._require_own()
        run._acquire()
        try:
            file = run.path / "config.yaml"
            if file.exists() and overwrite:
                run._clear()
            new = groups_in(config_yaml, file)
            if file.exists():
                old = read_groups(file)
                changes = changes_of(run.path, old, config_yaml)
                if not resume:
                    raise DimoError(f"{run.path} already contains a run and experiment.resume is false; {START_OVER}")
                sources = require_same_sources(run.path, old, new)
                if changes:
                    shown = {key: [was, now] for key, was, now in changes}
                    run.event({"step": run.status().get("step", 0), "event": "config_changed", "changes": shown})
                    run.say("configuration: " + spell(changes))
                config_yaml, kept = without_later_keys(old, config_yaml)
                if kept and hold:
                    run.say(f"{run.path} predates some keys and continues with the old behaviour: {kept}", aloud=True)
            else:
                sources = read_sources(new)
            run._write_once("config.yaml", config_yaml)
            run._write_once(SOURCES, to_json(sources))
            for folder in ("", "samples", "checkpoints/final"):
                clear_partials(run.path / folder, but=OTHER_MACHINES)
            if hold:
                run._keep_reserve()
        except BaseException:
            run.close()
            raise
        if not hold:
            run.close()
        return run

    def _write_once(self, name: str, text: str) -> None:
        file = self.path / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_text(file, text)

    def _acquire(self) -> None:
        """Lock the folder. The kernel releases the lock when the process dies, even by SIGKILL."""
        if not CAN_LOCK:
            raise DimoError("training runs on Linux and macOS only; on Windows, use WSL")
        self.path.mkdir(parents=True, exist_ok=True)
        lock = open(self.path / LOCK, "a+", encoding="utf-8")
        for attempt in range(5):  # `dimo runs` holds the lock for an instant
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == 4:
                    lock.seek(0)
                    holder = lock.read().strip() or "another process"
                    lock.close()
                    raise DimoError(
                        f"{self.path} is being trained by {holder}; wait, stop it, or use another experiment.name"
                    ) from None
                time.sleep(0.05)
            except OSError as error:  # a network file system without locks
                print(
                    f"dimo: {self.path} cannot be locked ({error.strerror}); start only one run in it", file=sys.stderr
                )
                break
        self._lock = lock
        try:
            os.truncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as error:
            self.close()
            raise self._refusal(LOCK, error) from error

    def close(self) -> None:
        """Release the folder for other processes."""
        if self._lock is not None:
            self.free_reserve()
            self._lock.close()
            self._lock = None

    def _keep_reserve(self) -> None:
        try:
            (self.path / RESERVE).write_bytes(os.urandom(RESERVE_BYTES))  # incompressible
        except OSError as error:
            raise self._refusal(RESERVE, error) from error

    def free_reserve(self) -> None:
        """Free RESERVE_BYTES on the disk for the last status of a failing run."""
        with contextlib.suppress(OSError):
            (self.path / RESERVE).unlink()

    def is_held(self) -> bool:
        """Whether a live process is training in this folder."""
        if not CAN_LOCK:
            return False
        try:
            with open(self.path / LOCK, encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:  # held, or unknown; then trust the status
            return True
        return False

    def is_dimos(self) -> bool:
        """Whether dimo wrote config.yaml or status.json; the other of the two may be damaged."""
        with contextlib.suppress(DimoError, OSError):
            groups = {key.split(".")[0] for key in config_keys()}
            if {"experiment", "distill", "optim"} <= read_groups(self.path / "config.yaml").keys() <= groups:
                return True
        with contextlib.suppress(DimoError, OSError):
            return {"state", "pid", "host"} <= self.status().keys()
        return False

    def _require_own(self) -> None:
        """Raise DimoError if config.yaml or status.json exists but belongs to something else than a run of dimo."""
        there = any((self.path / name).exists() for name in ("config.yaml", "status.json"))
        if not there or self.is_dimos():
            return
        raise DimoError(
            f"{self.path} is not a run folder of dimo: its config.yaml or status.json belongs to something else; "
            "use another experiment.name or experiment.output_dir"
        )

    def _clear(self) -> None:
        """Delete what dimo wrote, and nothing else."""
        for name in OWN:
            (self.path / name).unlink(missing_ok=True)
        for name, patterns in OWN_INSIDE.items():
            for old in [old for pattern in patterns for old in (self.path / name).glob(pattern)]:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
            with contextlib.suppress(OSError):  # not empty: keep the user's files
                (self.path / name).rmdir()

    def write_status(self, **changes: Any) -> None:
        """Update status.json: state (starting, running, finished, failed, preempted), step, max_steps, error."""
        if not self.writes:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        own = {"updated": now, "pid": os.getpid(), "host": socket.gethostname()}
        status = {"started": now, "error": None} | self.status() | changes | own
        try:
            write_text(self.path / "status.json", json.dumps(status, indent=2) + "\n")
        except OSError as error:
            raise self._refusal("status.json", error) from error

    def status(self) -> dict:
        """Content of status.json; empty if it does not exist.

        Raises:
            DimoError: it is damaged.
        """
        file = self.path / "status.json"
        if not file.exists():
            return {}
        try:
            return read_json(file)
        except DimoError as error:
            raise DimoError(f"{error}; delete it, the run continues without it") from error

    def log(self, metrics: dict[str, float]) -> None:
        """Append a line to metrics.jsonl; non-finite values become null and their names are listed in `non_finite`."""
        bad = [k for k, v in metrics.items() if not math.isfinite(v)]
        row = {k: None if k in bad else v for k, v in metrics.items()} | ({"non_finite": bad} if bad else {})
        self._append("metrics.jsonl", json.dumps(row))

    def metrics(self) -> list[dict]:
        """All lines of metrics.jsonl, without a last one truncated by a kill."""
        return self._rows("metrics.jsonl")

    def event(self, event: dict) -> None:
        """Append {"step", "event", ...} to events.jsonl with a timestamp."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._append("events.jsonl", json.dumps(event | {"time": now}))

    def events(self) -> list[dict]:
        """All complete lines of events.jsonl."""
        return self._rows("events.jsonl")

    def say(self, text: str, aloud: bool = False) -> None:
        """Append text to train.log with timestamps; with `aloud`, also print it to stderr."""
        now = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        self._append("train.log", "\n".join(f"{now} {line}" for line in text.splitlines()))
        if aloud and self.writes:
            print(f"dimo: {text}", file=sys.stderr)

    def last_lines(self) -> list[str]:
        """The last LAST_LINES lines of train.log."""
        file = self.path / "train.log"
        return file.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if file.exists() else []

    def cut_at(self, step: int) -> None:
        """Drop metrics and events after `step`, the checkpoint that a killed run resumes from."""
        if not self.writes:
            return
        for name in ("metrics.jsonl", "events.jsonl"):
            rows = [row for row in self._rows(name) if row["step"] <= step or row.get("event") in HISTORY]
            if (self.path / name).exists():
                write_text(self.path / name, "".join(json.dumps(row) + "\n" for row in rows))

    def write_environment(self) -> None:
        """Write environment.json: versions and device."""
        if not self.writes:
            return
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        values = {"dimo": dimo.__version__, "python": platform.python_version(), "torch": torch.__version__}
        write_text(self.path / "environment.json", json.dumps(values | {"device": device}, indent=2) + "\n")

    def _rows(self, name: str) -> list[dict]:
        return RowReader(self.path / name).read()[0]

    def _append(self, name: str, line: str) -> None:
        if not self.writes:
            return
        data = f"{line}\n".encode()
        try:
            with open(self.path / name, "ab", buffering=0) as file:
                size = file.tell()
                if file.write(data) < len(data):  # disk full: remove the partial line
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._refusal(name, error) from error

    def _refusal(self, name: str, error: OSError) -> DimoError:
        return DimoError(f"{self.path / name} could not be written: {error.strerror}; existing checkpoints are kept")
