"""What commands print at their end: what was made, and which command comes next."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from dimo.paths import quoted
from dimo.run.folder import RunFolder
from dimo.views.alarms import alarms
from dimo.worlds import checkpoint_folder, is_world, load_world

MADE = {
    "report.html": "the run as one page: open it in a browser, and click a token",
    "report.json": "every metric, with 95% intervals",
    "sheet.png": "videos of teacher and student, from the same noise",
    "clips.mp4": "the same videos, playing beside each other",
    "codes.safetensors": "the codes of all these videos",
    "notebooks": "the executed notebooks, also as pages",
    "checkpoints/final": "the student, as student.pt and as a folder",
}


MOST = 44  # characters of a first column that the others are brought in line with


def ending(folder: Path, names: list[str], following: dict[str, str]) -> str:
    """The files of `names` (keys of MADE) that exist in a folder, and commands, {words after "dimo": what they do}."""
    made = {str(folder / name): MADE[name] for name in names if (folder / name).exists()}
    return "\n".join(["made:", *_columns(made), next_commands(following)])


def next_commands(following: dict[str, str]) -> str:
    """Commands to copy, {words after "dimo": what they do}."""
    commands = {f"{program()} {words}".rstrip(): meaning for words, meaning in following.items()}
    return "\n".join(["next:", *_columns(commands, "# ")])


def finished(run: RunFolder, teacher_ckpt: str) -> str:
    """The end of a training: its last figures and alarms, the student, and how to see whether it is any good."""
    known = [row["entropy/student"] for row in run.metrics() if row.get("entropy/student") is not None]
    lines = [f"finished: step {run.status().get('step')} of {run.path}"]
    if known:
        first, last = f"{known[0]:.3f}", f"{known[-1]:.3f}"
        lines.append(f"entropy of the student, nats per token: {first} at first, {last} now (decided: near 0)")
    after = {
        f"evaluate {quoted(run.path)}": "how good it is, beside its teacher",
        sampling(run.path, teacher_ckpt): "a video of the student",
        f"report {quoted(run.path)}": "the run as one page",
    }
    return "\n".join([*lines, alarms_of(run), ending(run.path, ["checkpoints/final"], after)])


def program() -> str:
    """How this process's `dimo` is called: its path where the shell would not find it, as after `make demo`."""
    called = Path(sys.argv[0])
    if called.name != "dimo":
        return "python -m dimo" if called.name == "__main__.py" else "dimo"
    found = shutil.which("dimo")
    return "dimo" if found and os.path.samefile(found, called) else quoted(called)


def sampling(student: Path | None, teacher_ckpt: str) -> str:
    """`sample` with a prompt that the student's teacher knows; None: the student that ships."""
    teacher = checkpoint_folder(teacher_ckpt)
    prompt = load_world(teacher).prompts[0] if is_world(teacher) else "a red ball"
    return f'sample {f"--student_ckpt {quoted(student)} " if student else ""}--prompt "{prompt}"'


def sampled(file: Path) -> str:
    """How a video was made, from the JSON file beside it."""
    how = json.loads(file.read_text(encoding="utf-8"))
    network, passes = "student" if how["student_ckpt"] else "teacher", how["steps"]
    return f"{file.name} (the {network}, {passes} {'pass' if passes == 1 else 'passes'}: {how['prompt']})"


def alarms_of(run: RunFolder) -> str:
    """The alarms that rang in a training and did not stop, as a sentence each."""
    rang = [alarm for alarm in alarms(run.metrics()) if alarm.over is None]
    if not rang:
        return "alarms: none that lasted"
    return "\n".join(f"alarm {alarm.name}, since step {alarm.step}: {alarm.sentence}" for alarm in rang)


def _columns(rows: dict[str, str], mark: str = "") -> list[str]:
    """Rows of two columns; a long first one pushes its second to the right."""
    wide = max((len(first) for first in rows if len(first) <= MOST), default=0)
    return [f"  {first:{wide}}  {mark}{second}" for first, second in rows.items()]
