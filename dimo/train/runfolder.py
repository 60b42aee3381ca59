"""The run folder, the only truth about a run: every file is whole or absent, never half."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import dimo
from dimo.errors import DimoError

# What may differ between the run that began a folder and the command that resumes it.
FREE_KEYS = {f"experiment.{k}" for k in ("log_every", "save_every", "sample_every", "keep_last", "resume", "overwrite")}
FREE_KEYS |= {"experiment.trackers", "training.num_processes", "training.engine"}
OWN = ("config.yaml", "environment.json", "status.json", "metrics.jsonl", "report.json", "report.html")
OWN_FOLDERS = ("checkpoints", "samples", "notebooks")


class RunFolder:
    """A folder `path` with config.yaml, status.json, metrics.jsonl and checkpoints/.

    Of several processes one `writes`; for the others every writing method does nothing.
    """

    def __init__(self, path: str | Path, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self.keep_last = 2

    @classmethod
    def open(cls, path: str | Path, config_yaml: str, resume: bool = True, overwrite: bool = False) -> RunFolder:
        """Create the folder, or take up the run in it when its configuration is the same.

        Raises:
            DimoError: the folder belongs to another configuration, or is used and resume is off.
        """
        run = cls(path)
        file = run.path / "config.yaml"
        if file.exists() and overwrite:
            run._clear()
        if file.exists():
            _refuse_other_config(run.path, file.read_text(), config_yaml)
            if not resume:
                raise DimoError(
                    f"{run.path} holds a run already and experiment.resume is false; "
                    "use another experiment.name, or experiment.overwrite=true to start over"
                )
        run.path.mkdir(parents=True, exist_ok=True)
        for partial in (run.path / "checkpoints").glob(".*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        run.keep_last = yaml.safe_load(config_yaml)["experiment"]["keep_last"]
        if not file.exists():
            write_text(file, config_yaml)
        return run

    def _clear(self) -> None:
        for name in OWN:
            (self.path / name).unlink(missing_ok=True)
        for name in OWN_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def write_status(self, **changes: Any) -> None:
        """Update status.json: state, step, max_steps, error."""
        if not self.writes:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        status = {"started": now, "error": None} | self.status() | changes | {"updated": now, "pid": os.getpid()}
        write_text(self.path / "status.json", json.dumps(status, indent=2) + "\n")

    def status(self) -> dict:
        file = self.path / "status.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def log(self, metrics: dict[str, float]) -> None:
        """Append one line; what is not finite becomes null and is named under `non_finite`."""
        if not self.writes:
            return
        bad = [k for k, v in metrics.items() if not math.isfinite(v)]
        row = {k: None if k in bad else v for k, v in metrics.items()} | ({"non_finite": bad} if bad else {})
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict]:
        """All complete lines; a last line torn by a kill is left out."""
        file = self.path / "metrics.jsonl"
        rows = []
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Drop what a killed run logged after the checkpoint it resumes from."""
        if not self.writes:
            return
        rows = [row for row in self.metrics() if row["step"] <= step]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def write_environment(self) -> None:
        if not self.writes:
            return
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        values = {"dimo": dimo.__version__, "python": platform.python_version(), "torch": torch.__version__}
        write_text(self.path / "environment.json", json.dumps(values | {"device": device}, indent=2) + "\n")

    def save_checkpoint(self, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict) -> Path | None:
        """checkpoints/step-<step>/ with <name>.safetensors per network and state.pt; a folder renamed into place last.

        Raises:
            DimoError: the disk refused; older checkpoints stay.
        """
        if not self.writes:
            return None
        folder = self.path / "checkpoints" / f"step-{step:08d}"
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, state_dict in tensors.items():
                whole = {k: v.detach().cpu().contiguous() for k, v in state_dict.items()}
                save_file(whole, partial / f"{name}.safetensors")
            torch.save(state, partial / "state.pt")
            for file in partial.iterdir():
                _sync(file)
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(partial, folder)
            _sync(folder.parent)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise DimoError(f"checkpoint of step {step} could not be written to {folder.parent}: {error}") from error
        for old in self._checkpoints()[: -self.keep_last]:
            shutil.rmtree(old)
        return folder

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step-????????"))

    def latest_checkpoint(self) -> Path | None:
        found = self._checkpoints()
        return found[-1] if found else None

    def load_checkpoint(self, folder: Path) -> tuple[dict, dict]:
        """(tensors by network, state); no pickle is executed.

        Raises:
            DimoError: a file is missing or damaged.
        """
        try:
            tensors = {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
            return tensors, torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:
            raise DimoError(
                f"checkpoint {folder} is damaged ({str(error).splitlines()[0]}); remove it to resume from an older one"
            ) from error


def write_text(file: Path, text: str) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refuse_other_config(path: Path, old: str, new: str) -> None:
    def flat(text):
        groups = yaml.safe_load(text) or {}
        return {f"{g}.{k}": v for g, keys in groups.items() for k, v in keys.items()}

    old_keys, new_keys = flat(old), flat(new)
    names = sorted((old_keys.keys() | new_keys.keys()) - FREE_KEYS)
    differ = [k for k in names if old_keys.get(k) != new_keys.get(k)]
    if differ:
        shown = "; ".join(f"{k} was {old_keys.get(k)!r}, is {new_keys.get(k)!r}" for k in differ[:3])
        raise DimoError(
            f"{path} belongs to a run with another configuration ({shown}); "
            "use another experiment.name, or experiment.overwrite=true to start over"
        )
