"""Clean tokens to check a logits slice by: a world's own videos, or samples of a URSA checkpoint, kept on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dimo.errors import DimoError, reason, require_ids, require_shape
from dimo.files import save_file, whole_file
from dimo.run.progress import CostBar
from dimo.run.sources import teacher_identity
from dimo.ursa import Ursa, sample
from dimo.views.reading import Reader, clips_at_once, slice_as_written
from dimo.worlds import is_world, load_world

CLIPS, PASSES = 64, 25
ENOUGH = CLIPS * 5_120  # tokens of samples, of 64 clips at 17x256x256
ENOUGH_KNOWN = 2**15  # tokens of a world's videos: a misreading shows in every token, and a CPU takes seconds
PLACE = "clean_tokens"  # in the folder of runs
CAPTIONS = (
    "a red ball rolls over green grass", "a dog runs along the beach at sunset", "waves break on black rocks",
    "a train crosses a bridge in the snow", "a woman pours coffee into a white cup", "clouds move over a city at night",
    "a horse stands in a field of yellow flowers", "a sailing boat turns in a blue bay",
)  # fmt: skip
Grid = tuple[int, int, int]


def clips_for(num_visual_tokens: int, enough: int = ENOUGH) -> int:
    """Clips by default: 64, but of long videos only as many as have `enough` tokens, and at least 8."""
    return max(8, min(CLIPS, enough // num_visual_tokens))


@dataclasses.dataclass
class CleanTokens:
    """Clips of codes (B, N) with their prompts; `source` says where they are from."""

    codes: torch.Tensor
    prompts: list[str]
    latents_shape: Grid
    source: str


def known_clean_tokens(
    ursa: Ursa, latents_shape: Grid, runs: str | Path, clips: int | None = None
) -> CleanTokens | None:
    """Clean tokens that need no sampling: a world's videos, else what `sampled_clean_tokens` kept; None if nothing is.

    Args:
        latents_shape: (T, H, W).
        runs: the folder of runs, in which samples are kept.
        clips: number of a world's videos; None: `clips_for` `ENOUGH_KNOWN` tokens. Of samples, as many as there are.

    Raises:
        DimoError: the file of samples is damaged.
    """
    if is_world(ursa.folder):
        world = load_world(ursa.folder)
        clips = clips_for(math.prod(world.latents_shape), ENOUGH_KNOWN) if clips is None else clips
        prompt, codes = world.draw(clips, torch.Generator(ursa.path.device).manual_seed(0))
        return CleanTokens(codes, [world.prompts[i] for i in prompt], world.latents_shape, "the world's own videos")
    files = Path(runs, PLACE).glob(f"{_name(ursa, latents_shape)}-*.safetensors")
    most = max(files, key=lambda file: [int(n) for n in file.stem.rsplit("-", 1)[1].split("x")], default=None)
    return _load(most, ursa, latents_shape) if most else None


def sampled_clean_tokens(
    ursa: Ursa, latents_shape: Grid, runs: str | Path, max_prompt_length: int, clips: int | None = None,
    passes: int = PASSES, progress: bool = True,
) -> CleanTokens:  # fmt: skip
    """A URSA checkpoint's own samples, from `runs`/PLACE if they are there, else sampled and kept there.

    They are drawn without guidance through the slice as URSA's pipeline writes it, whatever function training reads
    through. The file's name has the teacher's identity and all sizes.

    Args:
        clips: None: `clips_for` these videos.

    Raises:
        DimoError: clips or passes below 1, or a damaged file.
    """
    clips = clips_for(math.prod(latents_shape)) if clips is None else clips
    for name, value in (("clips", clips), ("passes", passes)):
        if value < 1:
            raise DimoError(f"{name} must be at least 1, got {value}")
    file = Path(runs, PLACE, f"{_name(ursa, latents_shape)}-{clips}x{passes}.safetensors")
    if file.exists():
        return _load(file, ursa, latents_shape)
    prompts = [CAPTIONS[i * len(CAPTIONS) // clips] for i in range(clips)]
    txt_ids, reader = ursa.tokenize(prompts, max_prompt_length), Reader(ursa.transformer, slice_as_written)
    size, g, made = clips_at_once(math.prod(latents_shape)), torch.Generator(ursa.path.device).manual_seed(0), []
    with CostBar("clean tokens", clips, "clip", progress) as bar:
        for ids in txt_ids.split(size):
            made.append(sample(reader, ursa.path, ids, latents_shape, passes, shift=ursa.shift, generator=g).cpu())
            bar.show(sum(map(len, made)), f"{passes} passes each")
    with whole_file(file) as beside:
        save_file({"codes": torch.cat(made).int()}, beside, {"prompts": json.dumps(prompts)})
    return _load(file, ursa, latents_shape)


def _name(ursa: Ursa, latents_shape: Grid) -> str:
    return f"{teacher_identity(ursa.folder)}-{'x'.join(map(str, latents_shape))}"


def _load(file: Path, ursa: Ursa, latents_shape: Grid) -> CleanTokens:
    try:
        with safe_open(file, "pt") as opened:
            codes, prompts = opened.get_tensor("codes").long(), json.loads(opened.metadata()["prompts"])
        require_shape("codes", codes, (len(prompts), math.prod(latents_shape)))
        require_ids("codes", codes, ursa.path.codebook_size)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DimoError(f"{file} is damaged ({reason(error)}); delete it, and it is made again") from error
    return CleanTokens(codes.to(ursa.path.device), prompts, latents_shape, f"the teacher's own samples in {file}")
