"""`dimo export`: a run's student in a whole checkpoint folder, which URSA's own pipeline and scripts load."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

import dimo
from dimo.commands.inspect_folder import inspect_folder
from dimo.config import Config, to_flat
from dimo.config.load import read_groups
from dimo.errors import DimoError
from dimo.files import save_file, whole_folder
from dimo.run.checkpoints import MILESTONE, Checkpoints, step_of, what_is_wrong
from dimo.run.folder import RunFolder
from dimo.run.origin import run_config, run_of
from dimo.run.sources import TEACHER, require_same_sources
from dimo.train.results import student_dtype
from dimo.ursa.layout import PARTS, read_config, require_upstream_layout
from dimo.ursa.loading import plain_state
from dimo.ursa.sampler import pipeline_steps
from dimo.ursa.weights import WEIGHTS, misfit, read_json, read_weights, require_numbers, scale_logits, weight_shapes
from dimo.worlds import checkpoint_folder, is_world

log = logging.getLogger(__name__)
MARKER = "dimo_export.json"  # in an exported folder: where its student comes from
NEWEST = "newest"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


@dataclasses.dataclass(frozen=True)
class Student:
    """What is exported: full state dict, the step it was trained to (None: not known), and where it lay in the run."""

    state: dict[str, torch.Tensor]
    step: int | None
    source: str


def export(
    run: str | Path, out: str | Path, step: str | None = None, teacher_ckpt: str | None = None, overwrite: bool = False
) -> str:
    """Write the teacher's folder with the student's weights in the place of the teacher's.

    All other files are copied, not linked: nothing that is done to `out` later can reach the teacher.

    Args:
        run: the run folder.
        out: the folder to write; it appears under its name when it is complete.
        step: None for checkpoints/final; the number of a checkpoint or milestone, or "newest" of the checkpoints: the
            moving average in it, with `model.final_logit_gain` as in checkpoints/final.
        teacher_ckpt: where the teacher is now, if it has moved; its files must be those that the run was trained with.
        overwrite: replace an older export.

    Returns:
        The README of `out`, which says how upstream's pipeline is called.

    Raises:
        DimoError: no run, student or checkpoint of this step, another teacher, one that upstream cannot load, or `out`
            holds something else.
    """
    folder = run_of(run)
    if folder is None or not Path(run).is_dir() or not folder.samefile(run):
        raise DimoError(f"{run} is not a run folder of dimo")
    config = run_config(folder, [f"{TEACHER}={teacher_ckpt}"] if teacher_ckpt else [])
    teacher = _teacher(folder, config)
    out = Path(out)
    _require_place(out, teacher, folder, overwrite)
    student = _student(folder, config, teacher, step)
    _require_fit(student, folder, teacher)
    readme = readme_of(out, config, student)
    with whole_folder(out) as beside:
        for part in _parts(teacher):
            copy_part(teacher / part, beside / part)
        for name in LICENCES:
            for file in teacher.glob(name):
                shutil.copyfile(file, beside / file.name)
        shutil.copyfile(teacher / "model_index.json", beside / "model_index.json")
        save_file(student.state, beside / "transformer" / f"{WEIGHTS}.safetensors", {"format": "pt"})
        about = {
            "dimo": dimo.__version__, "run": str(folder.resolve()), "step": student.step, "from": student.source,
            "teacher": str(teacher.resolve()), "config": to_flat(config),
        }  # fmt: skip
        (beside / MARKER).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (beside / "README.md").write_text(readme, encoding="utf-8")
    return readme


def _teacher(run: Path, config: Config) -> Path:
    """The folder of the run's teacher, which upstream can load and whose files are those of the training."""
    teacher = checkpoint_folder(config.distill.teacher_ckpt)
    if is_world(teacher):
        raise DimoError(
            f"{teacher} is the teacher of a world, which URSA's pipeline cannot load: its attention heads are too "
            "small, and its VAE is dimo's own; `dimo sample` and `dimo evaluate` take a run on it as it is"
        )
    require_upstream_layout(teacher, "an export, which is for URSA's pipeline,")
    missing = inspect_folder(teacher)[1]
    if missing:
        raise DimoError(f"the teacher is not whole, and an export of it would not be: {missing[0]}")
    own = read_groups(run / "config.yaml")
    try:
        require_same_sources(run, own, own | {"distill": dataclasses.asdict(config.distill)}, [TEACHER])
    except DimoError as error:
        raise DimoError(
            f"{teacher} is not the teacher that {run} was trained with; give the folder that is, as --teacher_ckpt"
        ) from error
    return teacher


def _require_place(out: Path, teacher: Path, run: Path, overwrite: bool) -> None:
    """Raise DimoError unless `out` is free, or an older export that may be replaced."""
    where, source = out.resolve(), teacher.resolve()
    if where.is_relative_to(source) or source.is_relative_to(where) or run.resolve().is_relative_to(where):
        raise DimoError(f"{out} must be a folder apart from the teacher {teacher} and the run {run}")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / MARKER).is_file():
        raise DimoError(
            f"{out} holds files that `dimo export` did not write, so it is not replaced; give another folder"
        )
    if not overwrite:
        raise DimoError(f"{out} already holds an export; give another folder, or --overwrite to replace it")


def _student(run: Path, config: Config, teacher: Path, step: str | None) -> Student:
    checkpoints = Checkpoints(run / "checkpoints")
    steps = [step_of(folder) for folder in checkpoints.all()]
    milestones = {step_of(folder): folder for folder in sorted(checkpoints.folder.glob(MILESTONE))}
    known = f"checkpoints are of the steps {', '.join(map(str, steps))}" if steps else "it has no checkpoints"
    known += f", milestones of {', '.join(map(str, milestones))}" if milestones else ""
    if step is None:
        final = run / "checkpoints" / "final"
        if not final.is_dir():
            raise DimoError(
                f"{run} has no checkpoints/final: it has not finished; --step exports a checkpoint ({known})"
            )
        status = RunFolder(run, writes=False).status()
        trained = status.get("step") if status.get("state") == "finished" else None  # else it has trained on
        return Student(plain_state(read_weights(final / "student.pt")), trained, "checkpoints/final")
    if step == NEWEST:
        folder, damaged = checkpoints.newest()
        if folder is None:
            raise DimoError(f"{run} has no checkpoints yet")
        for passed_over, why in damaged.items():
            log.warning("%s is damaged and passed over: %s", passed_over, why)
    elif not step.isdecimal() or int(step) not in {*steps, *milestones}:
        raise DimoError(f"--step must be {NEWEST} or the step of a checkpoint of {run}, got {step!r}; {known}")
    elif int(step) not in steps:
        folder = milestones[int(step)]
        return Student(plain_state(read_weights(folder)), int(step), f"checkpoints/{folder.name}")
    else:
        folder = checkpoints.folder / f"step-{int(step):08d}"
        wrong = what_is_wrong(folder)
        if wrong:
            raise DimoError(f"{folder} is damaged: {wrong}; {known}")
    gain = config.model.final_logit_gain / config.model.logit_gain
    state = scale_logits(load_file(folder / "ema.safetensors"), gain)
    dtype = student_dtype(config.experiment.student_dtype, teacher)
    trained = step_of(folder)
    return Student(plain_state(state, dtype), trained, f"the moving average in {folder.name}")


def _require_fit(student: Student, run: Path, teacher: Path) -> None:
    """Raise DimoError unless the weights are finite and those of the teacher's architecture."""
    shapes = {key: tuple(value.shape) for key, value in student.state.items()}
    problem = misfit(weight_shapes(teacher / "transformer"), shapes)
    own = run / "checkpoints" / "final" / "student"
    if not problem and (own / "config.json").exists() and read_config(own) != read_config(teacher / "transformer"):
        problem = "its config.json has other values"
    if problem:
        raise DimoError(f"the student in {run} ({student.source}) does not belong to the teacher {teacher}: {problem}")
    for key, value in student.state.items():
        require_numbers(value, f"{key} of the student in {run}")


def _parts(teacher: Path) -> list[str]:
    """Subfolders to copy: dimo's own parts of a checkpoint, and all others that model_index.json names."""
    named = [key for key, value in read_json(teacher / "model_index.json").items() if isinstance(value, list)]
    return [part for part in dict.fromkeys([*PARTS, *named]) if (teacher / part).is_dir()]


def copy_part(source: Path, target: Path) -> None:
    """Copy the files of a folder and what links in it point to, but for hidden ones and a transformer's weights."""
    target.mkdir(parents=True)
    for entry in sorted(source.iterdir()):
        if entry.name.startswith(".") or (source.name == "transformer" and entry.name.startswith(WEIGHTS)):
            continue
        if entry.is_dir():
            copy_part(entry, target / entry.name)
        else:
            shutil.copyfile(entry, target / entry.name)


def _pipeline_steps(config: Config) -> tuple[int, str]:
    """num_inference_steps of the student in upstream's pipeline, and why."""
    passes = config.distill.student_steps
    scheduler = read_json(checkpoint_folder(config.distill.teacher_ckpt) / "scheduler" / "scheduler_config.json")
    steps = pipeline_steps(passes, scheduler.get("shift") or 1.0, moves_at_0=scheduler.get("alpha") is None)
    last = "its last step draws every token from the softmax\n  of the logits."
    why = f"the pipeline starts from uniform noise, and {last}"
    if passes == 1:
        return steps, f"{why} Its only step is its last, so this is the student's one pass."
    why += f" The student was trained for {passes} passes, each on its draft of the pass before."
    if steps > passes:
        why += "\n  On the metric path the pipeline's first step, at t = 0, moves no token, so it takes one step more."
    return steps, why


def readme_of(out: Path, config: Config, student: Student) -> str:
    """What a user of upstream's pipeline has to know about the exported student, as Markdown."""
    d, dtype = config.distill, str(next(iter(student.state.values())).dtype)
    length = "" if d.max_prompt_length == 320 else f", max_prompt_length={d.max_prompt_length}"
    trained = "" if student.step is None else f", at step {student.step:,}"
    steps, why = _pipeline_steps(config)
    size = f"num_frames={d.num_frames}, height={d.height}, width={d.width}"
    return f"""\
# {out.resolve().name}: a {"one-step" if d.student_steps == 1 else f"{d.student_steps}-step"} student in URSA's layout

Written by `dimo export` from {student.source} of a run of dimo{trained}; `{MARKER}` has the run and its configuration.
`transformer/` holds the student's weights; every other file is a copy of the teacher's.

```python
import torch
from diffnext.pipelines import URSAPipeline

pipe = URSAPipeline.from_pretrained("{out}", torch_dtype={dtype}).to(torch.device("cuda"))
frames = pipe(
    prompt="a red ball", {size},
    num_inference_steps={steps}, guidance_scale=1{length},
).frames
```

- `num_inference_steps={steps}`: {why}
  The default, 25, is for the teacher.
- `guidance_scale=1`: guidance is distilled into the student. The default, 7, would guide it a second time.
- Logit gains are in the weights of the last norm: there is no temperature to set.
- URSA's evaluation scripts take this folder as `--ckpt`, with `--num_inference_steps {steps} --guidance_scale 1`.
  They run it in float16.
- `evaluations/vbench/sample.py` must not be given `--distributed`, which saves videos under the names of other prompts
  (baaivision/URSA at 29284bb); or use `dimo sample --suite vbench`.
"""
