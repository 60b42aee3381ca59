"""`dimo run`: executes the notebooks headless with papermill, into a run folder."""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from dimo.commands.ending import ending, sampling
from dimo.commands.report import write_run_report
from dimo.commands.train import refuse_early, train
from dimo.config import Config, config_keys, load_config, to_yaml
from dimo.config.flags import as_override, flags
from dimo.config.older import as_begun
from dimo.config.values import read_value, unquoted
from dimo.errors import DimoError, nearest, reason, similar
from dimo.evaluation.summary import format_summary, read_report
from dimo.files import write_text
from dimo.paths import quoted
from dimo.run.folder import RunFolder
from dimo.run.launch import children_told_to_stop, machine_of, wait_for_children
from dimo.run.progress import OneLine
from dimo.run.signals import Preempted
from dimo.views.live import HEADLESS
from dimo.worlds import DEFAULT_WORLD, SHIPPED_STUDENT, checkpoint_folder, is_world

NAMES = {
    "01_inputs": "the token splice and the logits slice",
    "02_losses": "a training step, stopped after each stage",
    "03_train": "the training",
    "04_diagnostics": "curves, samples and alarms",
    "05_evaluation": "the student beside its teacher",
}
SHARED = ("config", "overrides")  # parameters of every notebook
# scripts that nbconvert's pages would load from elsewhere; one of them cannot be left out, only replaced
FROM_ELSEWHERE = dict.fromkeys(("mathjax_url", "require_js_url", "jquery_url", "mermaid_layout_elk_js_url"), "")
NO_DIAGRAMS = "data:text/javascript,export default {initialize() {}}"
SOCKET_PATH = 100  # length in bytes that a socket's path may have on every system


def notebook_folder() -> Path:
    """notebooks/ beside the package (a source checkout), where pip put them, or in the working directory."""
    places = [Path(__file__).parents[2] / "notebooks", Path("notebooks")]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.files("dimo") or []
        places[1:1] = [
            Path(str(file.locate())).parent for file in installed if file.name == f"{next(iter(NAMES))}.ipynb"
        ]
    for folder in places:
        if any((folder / f"{name}.ipynb").exists() for name in NAMES):
            return folder.resolve()
    raise DimoError("the notebooks were found neither beside the package nor here; install dimo again")


def run_notebooks(
    config: str | None,
    overrides: list[str],
    parameters: Sequence[str] = (),
    only: Sequence[str] = (),
    start: str | None = None,
    force: bool = False,
) -> RunFolder:
    """Execute the notebooks in order into `<output_dir>/notebooks`, then write report.html.

    Signals that ask to stop are passed on to the kernel and its children; training then saves and stops.

    Args:
        config, overrides: see `load_config`.
        parameters: "name=value" words, each a parameter of a notebook or a configuration key (or its last part).
        only: names of the notebooks to execute; empty means all.
        start: name of the first notebook to execute.
        force: also execute notebooks that the run folder has already, executed with the same parameters.

    Raises:
        DimoError: before anything starts: an invalid configuration, unknown parameter or unknown notebook; later: a
            notebook failed or its kernel died.
        Preempted: a signal asked to stop; the same command continues.
    """
    _require_jupyter()
    sources = {name: notebook_folder() / f"{name}.ipynb" for name in NAMES}
    chosen = _choose(sources, only, start)
    known = {name: _own_parameters(path, name in chosen) for name, path in sources.items()}
    overrides = list(overrides)
    extra = _parse_parameters(parameters, overrides, {k: v for own in known.values() for k, v in own.items()})
    settings = as_begun(load_config(config, overrides))
    refuse_early(settings)
    c, (machine, machines) = settings.experiment, machine_of(settings)
    if machine > 0:
        return _only_train(settings, f"machine {machine} of {machines}", "03_train" in chosen, force)
    run = RunFolder.open(c.output_dir, to_yaml(settings), c.resume, c.overwrite)
    if c.overwrite or not c.resume:
        overrides += ["experiment.overwrite=false", "experiment.resume=true"]  # handled by the line above
    shared = {"config": config or "shapes", "overrides": overrides}
    print(f"{run.path}: {', '.join(chosen)}; if this is stopped, the same command goes on", flush=True)
    with children_told_to_stop() as asked:
        for name, path in chosen.items():
            own = shared | {k: v for k, v in extra.items() if k in known[name]}
            _execute(run, name, path, own, force, asked)
    write_run_report(run)
    print_summary(run, settings.distill.teacher_ckpt)
    return run


def _only_train(settings: Config, name: str, chosen: bool, force: bool) -> RunFolder:
    """The part of a machine other than the first: only training."""
    c, last = settings.experiment, settings.training.max_train_steps
    run = RunFolder(c.output_dir, writes=False)
    status = run.status()
    done = status.get("state") == "finished" and status["step"] >= last
    if not chosen or (done and not force and not c.overwrite):
        print(f"{name}: nothing to train; machine 0 runs the notebooks")
        return run
    print(f"{name}: waiting for machine 0, which runs the notebooks, to reach the training in 03_train", flush=True)
    return train(settings)


def _own_parameters(source: Path, needed: bool) -> dict[str, Any]:
    """The parameters of a notebook, as papermill describes them; {} if it is unreadable but not needed.

    Raises:
        DimoError: a needed notebook is missing or damaged, for example truncated or with merge conflict markers.
    """
    papermill, _ = _require_jupyter()
    try:
        json.loads(source.read_text(encoding="utf-8"))["cells"][0]["source"]
        return papermill.inspect_notebook(str(source))
    except (OSError, ValueError, LookupError, TypeError) as error:
        if not needed:
            return {}
        why = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else reason(error)
        raise DimoError(f"{source} is not a readable notebook ({why}); `git checkout {source}` restores it") from error


def _choose(sources: dict[str, Path], only: Sequence[str], start: str | None) -> dict[str, Path]:
    for name in [*only, *([start] if start else [])]:
        if name not in sources:
            raise DimoError(f"there is no notebook {name!r}{nearest(name, sources)}")
    chosen = {n: path for n, path in sources.items() if (not only or n in only) and (not start or n >= start)}
    if not chosen:
        raise DimoError(f"--only {', '.join(only)} and --from {start} select no notebook")
    return chosen


def _parse_parameters(parameters: Sequence[str], overrides: list[str], known: dict[str, Any]) -> dict[str, Any]:
    """Parse "name=value" words: returns notebook parameters, appends configuration keys to `overrides`.

    Args:
        known: the notebooks' parameters, as papermill describes them.
    """
    keys, short, extra = config_keys(), flags(), {}
    own = {name: ast.literal_eval(about["default"]) for name, about in known.items() if name not in SHARED}
    for parameter in parameters:
        name, equals, value = parameter.partition("=")
        if not equals:
            raise DimoError(f"a parameter must have the form name=value, got {parameter!r}")
        if name in own:
            try:
                extra[name] = read_value(name, type(own[name]).__name__, unquoted(value))
            except DimoError:
                raise DimoError(f"parameter {name} must be like its default {own[name]!r}, got {value!r}") from None
        elif name in keys or name in short:
            overrides.append(as_override(short.get(name, name), value))
        else:
            hint = similar(name, {*own, *keys, *short}) or f"; the notebooks have {', '.join(sorted(own))}"
            raise DimoError(f"{name!r} is neither a parameter of a notebook nor a configuration key{hint}")
    return extra


def _execute(run: RunFolder, name: str, source: Path, parameters: dict, force: bool, asked: list) -> None:
    papermill, _ = _require_jupyter()
    done = run.path / "notebooks" / f"{name}.ipynb"
    done.parent.mkdir(parents=True, exist_ok=True)
    if not force and is_done(done, source, parameters):
        print(f"{name}: already done, not executed again")
        return
    working = done.with_name(f".{name}.partial.ipynb")
    failed = done.with_name(f"{name}.failed.ipynb")
    print(f"{name}: {NAMES[name]} ...", flush=True)
    progress = OneLine()
    problem, others = None, psutil.Process().children(recursive=True)  # children that are not ours
    before, begin = run.status(), time.monotonic()
    try:
        with own_kernel() as kernel:
            papermill.execute_notebook(
                str(source),
                str(working),
                parameters,
                kernel_name="python3",
                kernel_manager_class=kernel,
                cwd=os.getcwd(),
                progress_bar=False,
                stderr_file=progress,
            )
    except papermill.exceptions.PapermillExecutionError as error:
        os.replace(working, failed)
        problem = f"notebook {name} failed: {error.ename}: {error.evalue} (see {failed})"
        stopped = error.ename == "Preempted"
    except RuntimeError as error:  # the kernel died or did not start
        problem = f"notebook {name} was not finished: {error}; the same command continues"
        stopped = bool(asked)
    except OSError as error:  # a full disk: papermill writes after every cell
        working.unlink(missing_ok=True)
        problem, stopped = f"notebook {name} could not be written to {done.parent}: {reason(error)}", False
    progress.clear()
    wait_for_children(others)  # children of a dead kernel may still be saving
    if problem:
        _write_ending(run, problem, stopped, before)
    failed.unlink(missing_ok=True)
    _write_html(working, done.with_suffix(".html"))  # first, since a finished notebook is not executed again
    os.replace(working, done)
    print(f"{name}: done in {tqdm.format_interval(time.monotonic() - begin)}", flush=True)


@contextlib.contextmanager
def own_kernel():
    """A kernel manager class that runs this Python interpreter, whatever kernels the user has installed as python3.

    It communicates over Unix sockets in a private folder; TCP ports would be open to all users of the machine.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import Unicode

    words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    long = len(tempfile.gettempdir()) + len("/dimo-12345678/kernel-ipc-5") > SOCKET_PATH
    with tempfile.TemporaryDirectory(prefix="dimo-", dir="/tmp" if long else None) as folder:

        class Kernel(AsyncKernelManager):
            transport = Unicode("ipc")
            connection_file = Unicode(f"{folder}/kernel.json")
            kernel_spec = KernelSpec(argv=words, display_name="Python 3", language="python", env={HEADLESS: "1"})

        yield Kernel


def _write_ending(run: RunFolder, problem: str, stopped: bool, before: dict) -> None:
    """Raise for an unfinished notebook, after recording it in status.json, which a killed kernel could not do.

    A failure in the status `before` is that of an earlier notebook and is ignored.
    """
    status = run.status()
    state = None if status == before and before.get("state") == "failed" else status.get("state")
    if stopped:
        if state not in ("finished", "preempted"):
            run.write_status(state="preempted", error=None)
        raise Preempted(f"{run.path}: stopped by a signal; the same command continues")
    if state not in ("finished", "preempted", "failed"):
        run.write_status(state="failed", error=problem)
    raise DimoError(problem)


def is_done(done: Path, source: Path, parameters: dict) -> bool:
    """Whether `done` is a readable notebook, executed with these parameters from the current cells of the source."""
    if not done.exists():
        return False

    def cells(file):
        notebook = json.loads(file.read_text(encoding="utf-8"))
        tagged = [(c["metadata"].get("tags", []), c["source"]) for c in notebook["cells"]]
        return notebook, ["".join(text) for tags, text in tagged if "injected-parameters" not in tags]

    try:
        old, old_cells = cells(done)
        executed_with = old["metadata"].get("papermill", {}).get("parameters")
    except (ValueError, LookupError, TypeError, AttributeError):  # damaged, or edited by hand
        return False
    return executed_with == parameters and old_cells == cells(source)[1]


def _write_html(notebook: Path, page: Path) -> None:
    """Convert a notebook to HTML. A failure only prints a message, since the executed notebook is worth keeping.

    The page asks no network for anything: a widget is shown by its picture, formulas are left as they are written.
    """
    _, nbconvert = _require_jupyter()
    import nbformat

    try:
        exporter = nbconvert.HTMLExporter(template_name="classic", mermaid_js_url=NO_DIAGRAMS, **FROM_ELSEWHERE)
        content = nbformat.read(notebook, as_version=4)
        content.metadata.pop("widgets", None)  # with a widget's state the exporter leaves out its picture
        text, _ = exporter.from_notebook_node(content, {"metadata": {"name": page.stem}})
    except Exception as error:  # those of nbconvert and jinja have no common base class
        page.unlink(missing_ok=True)  # it belongs to an earlier notebook
        print(
            f"dimo: {page} was not written: {reason(error)}; pip install --force-reinstall nbconvert", file=sys.stderr
        )
        return
    write_text(page, text)


def print_summary(run: RunFolder, teacher_ckpt: str) -> None:
    """Print how good the student is, beside its teacher and the student that ships; what was made; what comes next."""
    report, shipped = run.path / "report.json", SHIPPED_STUDENT / "report.json"
    if report.exists():
        print("", format_summary(read_report(report)), sep="\n")
    if report.exists() and teacher_ckpt == DEFAULT_WORLD and shipped.exists():
        best = json.loads(shipped.read_text())["student_1"]
        print(
            f"\nThe student that ships with dimo was trained for longer: validity {best['validity']:.3f}, "
            f"coverage {best['coverage']:.3f}."
        )
    after = {"evaluate": "the student that ships"} if teacher_ckpt == DEFAULT_WORLD else {}
    if (run.path / "checkpoints" / "final").exists():
        after[sampling(run.path, teacher_ckpt)] = "a video"
    if is_world(checkpoint_folder(teacher_ckpt)):
        after["train -c shapes optim.lr=5e-4 --name slow"] = "another run, with a key changed"
    elif (run.path / "checkpoints" / "final").exists():
        after[f"export {quoted(run.path)} exported"] = "the student, for URSA's own pipeline"
    made = ["report.html", "sheet.png", "clips.mp4", "notebooks", "checkpoints/final"]
    print("", ending(run.path, made, after), sep="\n")


def _require_jupyter():
    try:
        import nbconvert
        import papermill
    except ImportError as error:
        raise DimoError(
            f"{error.name} is missing; install dimo with its notebooks: pip install -e '.[notebooks]'"
        ) from error
    return papermill, nbconvert
