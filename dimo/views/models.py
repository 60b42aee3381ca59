"""What a view looks at: teacher, auxiliary and student, of any step of a run or of a checkpoint folder."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from dimo.config import Config, default_prompt_length, load_config
from dimo.data.stream import PromptStream
from dimo.errors import DimoError
from dimo.run.checkpoints import Checkpoints, step_of
from dimo.run.folder import RunFolder
from dimo.run.origin import run_config, run_of
from dimo.ursa import Ursa, load_ursa, predict
from dimo.ursa.chunks import without_compiling
from dimo.ursa.device import pick_device, pick_dtype
from dimo.ursa.layout import student_file
from dimo.ursa.loading import DTYPES, load_network
from dimo.worlds import checkpoint_folder, is_world, load_world, require_world, video_size

SHOWN = 8  # captions of a run's file that are offered as prompts
CAPTION = "a red ball rolls over green grass"  # offered for a checkpoint that no run has given captions
STUDENT = "student.safetensors"  # of a checkpoint
Grid = tuple[int, int, int]


@dataclasses.dataclass
class Models:
    """Networks to look at, and what they are asked with.

    Attributes:
        ursa: the teacher's checkpoint: path, tokenizer, decoder.
        networks: {"teacher", "auxiliary", "student": network}, those that there are. On a fresh checkpoint all three
            are the teacher, as at the start of training.
        grid: latents_shape (T, H, W).
        prompts: prompts to offer; the first is the default.
        max_prompt_length, negative_prompt, beta, guidance_scale, guidance_trunc: the run's, see `dimo config`.
        label: what this is, for a caption.
        origin: keyword arguments of `open_models` that open the same again.
        folder: run folder, or the folder that takes its place for slices.
    """

    ursa: Ursa
    networks: dict[str, Any]
    grid: Grid
    prompts: list[str]
    max_prompt_length: int
    negative_prompt: str = ""
    beta: float | str = 0.5
    guidance_scale: float = 1.0
    guidance_trunc: float = 0.9
    label: str = ""
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path = Path("runs/explorer")

    @property
    def device(self) -> torch.device:
        return self.ursa.path.device

    def some_prompts(self, count: int) -> list[str]:
        """Up to `count` of the prompts, the first and the last among them."""
        places = torch.linspace(0, len(self.prompts) - 1, min(count, len(self.prompts))).round().long()
        return [self.prompts[i] for i in places.tolist()]


def open_models(
    source: str | Path | RunFolder,
    step: int | str | None = None,
    student: str | Path | None = None,
    size: tuple[int, int, int] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    backend: str | None = None,
) -> Models:
    """Load what a view looks at.

    Args:
        source: a run folder, a checkpoint folder in URSA's layout, or a built-in world.
        step: of a run: the step of a checkpoint, "final", 0 for where training starts, or None for final, or the newest
            checkpoint of a run that is not finished. A checkpoint has the student as it is trained and its auxiliary;
            final has the moving average, and the auxiliary of the newest checkpoint.
        student: of a checkpoint folder: weights as in `load_student`. None: the networks as training starts.
        size: of a checkpoint folder: (num_frames, height, width); None: the world's, else URSA's default.
        device: auto, cpu or cuda.
        dtype: of the networks; auto: bfloat16 where the run is trained in it, and for URSA on a GPU.
        backend: native or upstream; None: the run's.

    Raises:
        DimoError: nothing is there, the run has no such checkpoint, or a part is missing or damaged.
    """
    place = source.path if isinstance(source, RunFolder) else Path(source)
    run = run_of(place) if place.is_dir() else None
    where = pick_device(device)
    if run is None:
        return _warmed(_of_checkpoint(place, step, student, size, where, dtype, backend or "native"))
    if student is not None or size is not None:
        raise DimoError(f"student and size must be left out, since {run} is a run that has its own; give step instead")
    config = run_config(run)
    folder, half = checkpoint_folder(config.distill.teacher_ckpt), config.training.mixed_precision == "bf16"
    auto = "bfloat16" if half and not is_world(folder) else "float32"
    found, aux, name = _chosen(run, step)
    ursa = _load(folder, where, pick_dtype(dtype, where, auto), backend or config.model.backend)
    networks: dict[str, Any] = {"teacher": ursa.transformer}
    if aux is not None or found is None:
        shares = config.model.aux_shared_layers > 0
        networks["auxiliary"] = ursa.transformer if aux is None else _frozen(ursa, aux, shares)
    networks["student"] = ursa.transformer if found is None else _frozen(ursa, found)
    d = config.distill
    return _warmed(Models(
        ursa, networks, ursa.latents_shape(d.num_frames, d.height, d.width), _prompts(config, folder),
        d.max_prompt_length, d.negative_prompt, d.beta(), d.guidance_scale, d.guidance_trunc,
        f"{run.name}, {name}", {"source": str(run), "step": 0 if found is None else _number(found)}, run,
    ))  # fmt: skip


def _warmed(models: Models) -> Models:
    """Make the first passes on a GPU a part of loading: in them kernels are loaded, for more than a second."""
    if models.device.type == "cuda":
        first_passes(models)
    return models


@torch.no_grad()
def first_passes(models: Models) -> None:
    """Do once what a view does first: a pass, a draw of x_hat from it, and a draw of x_t. No other draw is changed."""
    path, size = models.ursa.path, (1, math.prod(models.grid))
    g = torch.Generator(models.device).manual_seed(0)
    txt_ids = models.ursa.tokenize([""], models.max_prompt_length)
    x_init = torch.randint(path.codebook_size, size, generator=g, device=models.device)
    with without_compiling():
        x_hat = predict(models.networks["student"], txt_ids, x_init, models.grid, t=0.0).detach().sample(g)[0]
        path.sample(x_hat, 0.5, g)


def _of_checkpoint(place: Path, step, student, size, device: torch.device, dtype: str, backend: str) -> Models:
    folder = checkpoint_folder(place)
    if step not in (None, 0):
        raise DimoError(f"step must be left out, since {folder} is a checkpoint folder and no run, got {step!r}")
    ursa = _load(folder, device, pick_dtype(dtype, device, "float32" if is_world(folder) else None), backend)
    grid = ursa.latents_shape(*(size or video_size(folder)))
    networks = dict.fromkeys(("teacher", "auxiliary", "student"), ursa.transformer)
    origin: dict[str, Any] = {"source": str(place)} | ({"size": list(size)} if size else {})
    if student is not None:
        networks = {"teacher": ursa.transformer, "student": _frozen(ursa, student_file(student))}
        origin["student"] = str(student)
    prompts = [CAPTION]
    if is_world(folder):
        world = load_world(folder)
        require_world(world, grid, ursa.path.codebook_size)
        prompts = world.prompts
    label = f"{folder.name}, {'as training starts' if student is None else Path(student).name}"
    return Models(ursa, networks, grid, prompts, default_prompt_length(folder), beta=load_config().distill.beta(),
                  label=label, origin=origin)  # fmt: skip


def _load(folder: Path, device: torch.device, dtype: str, backend: str) -> Ursa:
    ursa = load_ursa(folder, device, DTYPES[dtype], backend)
    ursa.transformer.requires_grad_(False)
    return ursa


def _frozen(ursa: Ursa, weights: Path, shares_layers: bool = False):
    return load_network(ursa, weights, shares_layers).requires_grad_(False)


def checkpoints_of(run: Path) -> list[int | str]:
    """The steps of a run's checkpoints, oldest first, then "final" if it is there: values of `open_models`' step."""
    steps: list[int | str] = [step_of(folder) for folder in Checkpoints(run / "checkpoints").all()]
    return steps + (["final"] if (run / "checkpoints" / "final").is_dir() else [])


def _chosen(run: Path, step: int | str | None) -> tuple[Path | None, Path | None, str]:
    """(student's weights, auxiliary's weights, name) of a step; the weights are None where training starts."""
    there = checkpoints_of(run)
    if step == 0:
        return None, None, "as training starts"
    if not there:
        status = RunFolder(run, writes=False).status()
        at = f" (step {status.get('step', 0)} of {status.get('max_steps', '?')})" if status else ""
        raise DimoError(f"{run} has no checkpoint yet{at}; wait for one, or look at step 0, where training starts")
    if step is None:
        step = there[-1]
    if step not in there:
        raise DimoError(f"{run} has no checkpoint of step {step!r}; there are {', '.join(map(str, there))}, and 0")
    numbered = run / "checkpoints" / f"step-{step if step != 'final' else max([0, *there[:-1]]):08d}"
    aux = numbered / "aux.safetensors"
    if step == "final":
        return student_file(run / "checkpoints" / "final"), aux if aux.exists() else None, "final"
    return numbered / STUDENT, aux, f"step {step}"


def _number(weights: Path) -> int | str:
    return step_of(weights.parent) if weights.name == STUDENT else "final"


def _prompts(config: Config, folder: Path) -> list[str]:
    d = config.distill
    if is_world(folder):
        return load_world(folder).prompts
    stream = PromptStream(
        d.prompt_source, 0, 0, 1, SHOWN, d.score_minimums(), d.motion_value(), d.motion_share
    )  # fmt: skip
    return stream.first(SHOWN)
