"""`dimo sample`: generates videos with a teacher or a student, each with a JSON file that records how it was made."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import subprocess
import time
from pathlib import Path

import torch

import dimo
from dimo.config import default_prompt_length
from dimo.config.schema import Distill
from dimo.data.listing import list_files
from dimo.data.readers import caption_column, caption_text, read_rows
from dimo.errors import DimoError, reason
from dimo.files import require_place, save_file, whole_file, write_text
from dimo.run.origin import run_config, run_of
from dimo.run.progress import CostBar
from dimo.run.sources import require_same_meaning
from dimo.ursa import Ursa, UrsaTransformer, load_ursa, sample
from dimo.ursa.attention import use_for_sampling
from dimo.ursa.device import pick_device, pick_dtype
from dimo.ursa.loading import DTYPES, load_student
from dimo.ursa.sampler import (
    MOST_PASSES,
    require_passes,
    student_times,
    timesteps,
    warn_if_guided_again,
    warn_if_other_passes,
)
from dimo.views.clips import FFMPEG, write_frames
from dimo.worlds import DEFAULT_WORLD, checkpoint_folder, is_world, load_world, require_world, video_size, world_of
from dimo.worlds.protocol import prompt_index

log = logging.getLogger(__name__)


def _flag(default, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Request:
    """The settings of `dimo sample`; each field is a flag, and an entry of the JSON file beside each video."""

    teacher_ckpt: str | None = _flag(
        None, f"a checkpoint folder in URSA's layout, or a built-in world; default: the run's, else {DEFAULT_WORLD}"
    )
    student_ckpt: str | None = _flag(
        None, "student.pt, its folder, a run folder, or a world whose student ships; default: sample with the teacher"
    )
    num_frames: int | None = _flag(None, "4 (T-1) + 1; default: the run's or world's, 1 for image models, else 17")
    height: int | None = _flag(None, "in pixels; default: the run's or world's, 64 tokens for image models, else 256")
    width: int | None = _flag(None, "in pixels; default: the run's or world's, 64 tokens for image models, else 256")
    steps: int | None = _flag(
        None,
        f"number of sampling steps, at most {MOST_PASSES}; default: the student's own, else 1, or as a suite is "
        "published for a teacher",
    )
    guidance_scale: float | None = _flag(
        None,
        "classifier-free guidance, which doubles the cost; default: 1 (off), or as a suite is published for a teacher",
    )
    guidance_trunc: float = _flag(0.9, "guidance is off where t >= this")
    negative_prompt: str | None = _flag(
        None, "negative prompt of guidance; default: empty, or as a suite is published for a teacher"
    )
    max_prompt_length: int | None = _flag(
        None, "text tokens, longer prompts are truncated; default: the run's, or a world's longest prompt, else 320"
    )
    seed: int = _flag(0, "seed of all random draws, the same for each prompt")
    device: str = _flag("auto", "auto, cpu or cuda")
    dtype: str = _flag("auto", "float32, bfloat16 or float16; auto: bfloat16 on a GPU, float32 on a CPU")
    backend: str = _flag("native", "native or upstream (diffnext's transformer)")


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A loaded teacher or student, and the settings to sample it with.

    Attributes:
        request: all settings, none of them None but `student_ckpt`.
        network: what is sampled.
        grid: latents_shape (T, H, W).
        uncond_ids: (1, L) ids of the negative prompt.
        max_prompt_length: L.
    """

    request: Request
    ursa: Ursa
    network: UrsaTransformer
    grid: tuple[int, int, int]
    uncond_ids: torch.Tensor
    max_prompt_length: int

    def codes(self, prompt: str, seed: int) -> torch.Tensor:
        """The codes (1, T, H, W) that a prompt gives; all random draws follow from `seed`."""
        r, generator = self.request, torch.Generator(self.ursa.path.device).manual_seed(seed)
        ids = self.ursa.tokenize([prompt], self.max_prompt_length)
        steps, path, shift = r.steps or 1, self.ursa.path, self.ursa.shift
        times = student_times(path, steps, shift) if r.student_ckpt else timesteps(steps, shift)
        codes = sample(
            self.network, path, ids, self.grid, times,
            guidance_scale=r.guidance_scale, guidance_trunc=r.guidance_trunc, uncond_ids=self.uncond_ids,
            generator=generator,
        )  # fmt: skip
        return codes.view(-1, *self.grid)


def open_sampler(
    request: Request, prompts: list[str], size: tuple[int, int, int] | None = None, weights: bool = True
) -> Sampler:
    """Load what `request` names, and fill in the settings that it leaves open.

    Args:
        request: settings; those left at None are taken from the student's run, if it is in a run folder.
        prompts: prompts to be sampled; those that a world does not know are refused.
        size: (num_frames, height, width) of a teacher's videos, in place of its checkpoint's own. A world has only one.
        weights: False leaves the network without weights, where other processes sample.

    Raises:
        DimoError: invalid settings, checkpoints or prompts, or no way to write videos.
    """
    r = dataclasses.replace(request)
    trained = _trained(r)
    r.steps = r.steps if r.steps is not None else trained.student_steps if trained else 1
    r.guidance_scale = 1.0 if r.guidance_scale is None else r.guidance_scale
    r.negative_prompt = r.negative_prompt or ""
    if not r.guidance_scale >= 1:
        raise DimoError(f"guidance_scale must be at least 1 (1 is none), got {r.guidance_scale}")
    require_passes("steps", r.steps)
    if not 0 <= r.seed < 2**63:
        raise DimoError(f"seed must lie in [0, 2**63), got {r.seed}")
    if r.max_prompt_length is not None and r.max_prompt_length < 0:
        raise DimoError(f"max_prompt_length must not be negative, got {r.max_prompt_length}")
    r.teacher_ckpt = teacher_of(r)
    folder, device = checkpoint_folder(r.teacher_ckpt), pick_device(r.device)
    r.device, r.dtype = device.type, pick_dtype(r.dtype, device)
    run = run_of(r.student_ckpt) if r.student_ckpt else None
    if run:
        require_same_meaning(run, r.teacher_ckpt)
    if trained:
        size = trained.num_frames, trained.height, trained.width
    elif size is None or is_world(folder):
        size = video_size(folder)
    given = zip((r.num_frames, r.height, r.width), size)
    r.num_frames, r.height, r.width = (default if own is None else own for own, default in given)
    length = trained.max_prompt_length if trained else default_prompt_length(folder)
    r.max_prompt_length = length = r.max_prompt_length or length

    ursa = load_ursa(folder, device, DTYPES[r.dtype], r.backend, weights)
    grid = ursa.latents_shape(r.num_frames, r.height, r.width)
    if is_world(folder):
        world = load_world(folder)
        require_world(world, grid, ursa.path.codebook_size)
        prompt_index(world, prompts)  # raises for a prompt that the world does not know
    if weights and r.backend == "native":
        use_for_sampling(ursa.transformer, math.prod(grid))
    network = load_student(ursa, r.student_ckpt) if weights and r.student_ckpt else ursa.transformer
    network.requires_grad_(False)
    uncond_ids = ursa.tokenize([r.negative_prompt], length)
    if trained or (r.student_ckpt and world_of(r.student_ckpt)):  # of a lone student.pt it is not known
        warn_if_other_passes(r.steps, trained.student_steps if trained else 1)
    if r.student_ckpt:
        warn_if_guided_again(r.guidance_scale, r.guidance_trunc)
    if r.guidance_scale > 1:
        _cut_to(ursa, r.negative_prompt, length)
    if ursa.vae is not None:
        _require_writer(video=grid[0] > 1)
    return Sampler(r, ursa, network, grid, uncond_ids, length)


def teacher_of(request: Request) -> str:
    """`teacher_ckpt` of a request; if it is left open that of its student, or the default world's."""
    trained, ships = _trained(request), request.student_ckpt and world_of(request.student_ckpt)
    return request.teacher_ckpt or (trained.teacher_ckpt if trained else ships or DEFAULT_WORLD)


def _trained(request: Request) -> Distill | None:
    """The settings that the student was trained with, if it is in a run folder."""
    run = run_of(request.student_ckpt) if request.student_ckpt else None
    return run_config(run).distill if run else None


def sample_to_folder(request: Request, prompts: list[str], out: str | Path) -> list[Path]:
    """Write one video per prompt into `out`: 0000.mp4 (.png for one frame) and 0000.json.

    If the checkpoint's VAE cannot be run, 0000.safetensors with the codes (T, H, W) is written instead. Every prompt
    uses the noise of `request.seed`, so each video can be reproduced by itself.

    Args:
        request: settings, see `open_sampler`.
        prompts: at least one.
        out: output folder.

    Returns:
        The video files (or files of codes), in the order of the prompts.

    Raises:
        DimoError: before anything is made: no prompts, no folder to write to, or see `open_sampler`.
    """
    if not prompts:
        raise DimoError("prompts must not be empty; give --prompt or --prompt_file")
    require_place(Path(out) / "0000")
    sampler = open_sampler(request, prompts)
    if sampler.ursa.vae is None:
        log.warning("codes will be written instead of frames: %s", sampler.ursa.no_vae)
    written = []
    passes = len(prompts) * (sampler.request.steps or 1)
    with CostBar("sample", len(prompts), "videos", shown=passes > 1) as bar:
        for i, prompt in enumerate(prompts):
            bar.show(i, prompt)
            written.append(_sample_one(sampler, prompt, Path(out) / f"{i:04d}"))
        bar.show(len(prompts), "done")
    return written


def _sample_one(sampler: Sampler, prompt: str, stem: Path) -> Path:
    ursa, r = sampler.ursa, sampler.request
    kept, start = _cut_to(ursa, prompt, sampler.max_prompt_length), time.perf_counter()
    codes = sampler.codes(prompt, r.seed)
    made = {"prompt_cut_to": kept, "seconds_sampling": time.perf_counter() - start}
    if ursa.vae is None:
        file = _write_codes(stem, codes)
        made["no_frames"] = ursa.no_vae
    else:
        frames = ursa.decode(codes)[0].cpu()
        file = _write_frames_or_codes(stem, frames, codes)
        made["frames"] = len(frames)
    how = {"file": file.name, "prompt": prompt, **dataclasses.asdict(r), **made}
    how |= {"dimo": dimo.__version__, "torch": torch.__version__}
    write_text(file.with_suffix(".json"), json.dumps(how, indent=2, ensure_ascii=False) + "\n")
    return file


def _require_writer(video: bool) -> None:
    """Raise unless frames can be written, a video by ffmpeg with H.264; called before anything is sampled."""
    needed = ("imageio", "imageio_ffmpeg") if video else ("imageio",)
    if any(importlib.util.find_spec(name) is None for name in needed):
        raise DimoError("imageio, which writes videos, is missing: pip install imageio imageio-ffmpeg")
    if not video:
        return
    import imageio_ffmpeg

    try:
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
        told = subprocess.run([ffmpeg, "-hide_banner", "-encoders"], capture_output=True, stdin=subprocess.DEVNULL)
    except (RuntimeError, OSError) as error:
        problem = f"ffmpeg, which writes videos, cannot be run here ({reason(error)})"
        raise DimoError(f"{problem}: {FFMPEG}; nothing was sampled yet") from error
    if b"libx264" not in told.stdout:
        problem = f"writing videos needs ffmpeg's encoder libx264, but {ffmpeg} lacks it"
        raise DimoError(f"{problem}: {FFMPEG}; nothing was sampled yet")


def _write_frames_or_codes(stem: Path, frames: torch.Tensor, codes: torch.Tensor) -> Path:
    try:
        return write_frames(stem, frames)
    except DimoError as error:
        raise DimoError(f"{error}; the video's codes were saved to {_write_codes(stem, codes)}") from error


def _write_codes(stem: Path, codes: torch.Tensor) -> Path:
    """Write the first of codes (B, T, H, W) to stem.safetensors."""
    file = stem.with_name(f"{stem.name}.safetensors")
    with whole_file(file) as beside:
        save_file({"codes": codes[0].cpu()}, beside)
    return file


def read_prompts(path: str | Path) -> list[str]:
    """All prompts of a txt, jsonl, csv or parquet file, or of a folder of such files, in order.

    Raises:
        DimoError: the path or a file cannot be read, a column is missing, or there are no prompts.
    """
    kind, files = list_files(path)
    prompts: list[str] = []
    for file in files:
        caption = caption_column(file, kind, [])
        prompts += filter(None, (caption_text(row[caption]) for row in read_rows(file, kind, [caption])))
    if not prompts:
        raise DimoError(f"prompt_file {path} holds no prompt")
    return prompts


def _cut_to(ursa: Ursa, prompt: str, max_prompt_length: int) -> str | None:
    """The truncated text of a prompt longer than max_prompt_length tokens, after a warning; None if it fits."""
    length = len(ursa.tokenizer(prompt).input_ids)
    if length <= max_prompt_length:
        return None
    kept = ursa.tokenizer.decode(ursa.tokenize([prompt], max_prompt_length)[0], skip_special_tokens=True)
    log.warning("the prompt %r has %d tokens, but max_prompt_length is %d: it is truncated to %r", prompt, length,
                max_prompt_length, kept)  # fmt: skip
    return kept
