"""Videos as files, and several side by side as one video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dimo.errors import DimoError, reason, require_shape
from dimo.files import whole_file
from dimo.ursa.frames import eight_bits

FPS = 12  # frames per second of URSA's videos
FFMPEG = (
    "`pip install --force-reinstall imageio-ffmpeg` installs an ffmpeg with libx264, unless the environment variable "
    "IMAGEIO_FFMPEG_EXE names another one"
)
FEWEST, MOST = 160, 256  # pixels in width that a video has beside others
GAP, LINE = 8, 22  # pixels between columns, and of a line of text
DPI, LETTER = 100, 7  # pixels per inch, and of a letter of the text


def write_frames(stem: Path, frames: torch.Tensor) -> Path:
    """Write frames atomically as stem.mp4, or as stem.png if there is only one.

    Args:
        stem: path without suffix.
        frames: (F, height, width, 3), RGB in [0, 1].

    Returns:
        The written file.

    Raises:
        DimoError: ffmpeg failed; the message says what to install.
    """
    import imageio.v3 as iio  # slow, so only when needed

    require_shape("frames", frames, ("F", "height", "width", 3))
    pixels = eight_bits(frames).numpy()
    if len(pixels) == 1:
        file = stem.with_name(f"{stem.name}.png")
        with whole_file(file) as beside:
            iio.imwrite(beside, pixels[0], extension=".png")
        return file
    file = stem.with_name(f"{stem.name}.mp4")
    # macro_block_size: by default frames are resized to multiples of 16
    options = {"fps": FPS, "codec": "libx264", "quality": 9, "macro_block_size": 2}
    with whole_file(file) as beside:
        try:
            iio.imwrite(beside, pixels, plugin="FFMPEG", extension=".mp4", **options)
        except (OSError, ImportError) as error:  # imageio's for ffmpeg that is not installed
            if isinstance(error, OSError) and error.errno:
                raise
            raise DimoError(f"ffmpeg could not write {file} ({reason(error)}): {FFMPEG}") from error
        if not beside.exists():  # imageio ignores ffmpeg's exit code
            raise DimoError(f"ffmpeg did not write {file}, for the reason on stderr: {FFMPEG}")
    return file


def side_by_side(columns: dict[str, torch.Tensor], prompts: list[str]) -> torch.Tensor:
    """Videos as one video, with a row per prompt and a column per set of videos, all playing together.

    Args:
        columns: {title: frames (B, F, height, width, 3), RGB in [0, 1]}.
        prompts: the B prompts.

    Returns:
        (F, H, W, 3), RGB in [0, 1]; H and W are even, as H.264 needs.
    """
    if not columns:
        raise DimoError("columns must hold at least one set of videos")
    for name, frames in columns.items():
        require_shape(f"columns[{name!r}]", frames, (len(prompts), "F", "height", "width", 3))
    videos = [_resized(frames) for frames in columns.values()]
    _, count, height, width, _ = videos[0].shape
    row, step = height + LINE, width + GAP
    high, wide = LINE + len(prompts) * row, len(videos) * step - GAP
    titles = [(c * step, 0, title, width) for c, title in enumerate(columns)]
    titles += [(0, LINE + r * row, prompt, wide) for r, prompt in enumerate(prompts)]
    page = _text(high + high % 2, wide + wide % 2, titles).expand(count, -1, -1, -1).clone()
    for c, frames in enumerate(videos):
        for r, one in enumerate(frames):
            top = 2 * LINE + r * row
            page[:, top : top + height, c * step : c * step + width] = one
    return page


def _resized(frames: torch.Tensor) -> torch.Tensor:
    """Frames (B, F, height, width, 3), enlarged by a whole number below FEWEST pixels, made smaller above MOST."""
    width = frames.shape[3]
    if width <= MOST:
        by = max(1, FEWEST // width)
        return frames.repeat_interleave(by, 2).repeat_interleave(by, 3)
    size = (round(frames.shape[2] * MOST / width), MOST)
    flat = frames.flatten(0, 1).movedim(-1, 1)
    return F.interpolate(flat, size=size, mode="area").movedim(1, -1).unflatten(0, frames.shape[:2])


def _text(high: int, wide: int, lines: list[tuple[int, int, str, int]]) -> torch.Tensor:
    """A white page (H, W, 3) with lines of text, each (left, top, text, pixels in width)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow, so only when needed

    from dimo.views.figure import Figure
    from dimo.views.fonts import families, legible

    figure = Figure(figsize=((wide + 1) / DPI, (high + 1) / DPI), dpi=DPI)
    for left, top, text, width in lines:
        words, most = " ".join(legible(text).split()), width // LETTER
        words = words if len(words) <= most else words[: most - 3] + "..."
        # parse_math: a caption may contain dollar signs
        figure.text(left / (wide + 1), 1 - (top + LINE / 2) / (high + 1), words, fontsize=8, va="center",
                    fontfamily=families(), parse_math=False)  # fmt: skip
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[:high, :wide, :3].copy()).float() / 255


def save_clips(file: Path, columns: dict[str, torch.Tensor], prompts: list[str]) -> None:
    """Write `side_by_side` as an mp4, atomically; an older file is deleted where there is nothing that moves.

    Raises:
        DimoError: see `write_frames`.
    """
    if next(iter(columns.values())).shape[1] == 1:
        file.unlink(missing_ok=True)
        return
    write_frames(file.with_suffix(""), side_by_side(columns, prompts))
