"""`python scripts/picture.py`: the README's pictures, in docs/images.

one-pass.gif shows the teacher's 25 passes beside the one pass of the student that ships, from the same noise, on the
built-in world; explorer.png the explorer on it, as chromium draws it.

`python scripts/picture.py sprites` makes sprites.gif of teacher, guided, and student of the world of pictures; a folder
in place of sprites, and `--student RUN`, show others.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from dimo.errors import DimoError
from dimo.ursa import load_ursa, sample
from dimo.ursa.loading import load_student
from dimo.ursa.sampler import Trajectory
from dimo.views.explorer import HERE, PAGE, STYLE
from dimo.views.explorer_stored import stored
from dimo.views.explorer_view import ExplorerView
from dimo.views.models import open_models
from dimo.worlds import SHIPPED_STUDENT, checkpoint_folder, load_world, student_of, video_size
from dimo.worlds.protocol import prompt_length

PROMPTS = ["blue bar moving up", "green square moving right", "pink corner moving left", "orange square moving down"]
PROMPTS += ["pink bar moving left", "blue corner moving up", "orange bar moving right", "green corner moving down"]
STEPS, HELD = 25, 18  # passes of the teacher, pictures after its last pass
GAP, TOP = 8, 40  # pixels
COLOURS = 128  # of a GIF
BACKGROUND, TEXT, DONE = "#ffffff", "#222222", "#0072B2"
WINDOW = 1300, 776  # pixels
IMAGES = Path("docs/images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--student", type=Path)
    args = parser.parse_args()
    if args.folder:
        try:
            folder = checkpoint_folder(args.folder)
            world = load_world(folder)
        except DimoError as error:
            parser.error(str(error))
        if world.name != "sprites":
            parser.error(f"{args.folder} is a teacher of {world.name}, but one of sprites is needed")
        prompts = world.held_out[3::17]
        student = args.student or student_of(args.folder)
        passes(folder, student, prompts, IMAGES / "sprites.gif", Look(cell=128, columns=2), guidance=2.0)
    else:
        passes(checkpoint_folder("shapes"), SHIPPED_STUDENT, PROMPTS, IMAGES / "one-pass.gif", Look(cell=88, columns=4))
        explorer()


def explorer() -> None:
    view = ExplorerView([open_models("shapes", student=SHIPPED_STUDENT, device="cpu")])
    data = json.dumps(stored(view, 500_000)).replace("<", "\\u003c")
    script = PAGE.read_text() + (HERE / "explorer_stored.js").read_text()
    style = "body { margin: 12px; font: 15px DejaVu Sans, sans-serif; }" + STYLE.read_text()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "explorer.html"
        page.write_text(
            f"<!doctype html><meta charset='utf-8'><style>{style}</style><div id='explorer'></div>"
            f"<script type='application/json' id='stored'>{data}</script><script type='module'>{script}</script>"
        )
        shot = Path(folder) / "shot.png"
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=3000"]
        size = f"--window-size={WINDOW[0]},{WINDOW[1]}"
        subprocess.run(
            ["chromium", *words, size, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True
        )
        Image.open(shot).quantize(256).save(IMAGES / "explorer.png", optimize=True)


@dataclasses.dataclass(frozen=True)
class Look:
    """Width of a video in pixels, and videos side by side."""

    cell: int
    columns: int


def passes(
    folder: Path, weights: Path | None, prompts: list[str], out: Path, look: Look, guidance: float = 1.0
) -> None:
    """Write a GIF of the teacher's passes and, beside them, what the student makes of the same noise."""
    ursa = load_ursa(folder)
    grid, length = ursa.latents_shape(*video_size(folder)), prompt_length(load_world(folder))
    txt_ids, empty = ursa.tokenize(prompts, length), ursa.tokenize([""], length)
    generator = torch.Generator().manual_seed(3)
    x_init = torch.randint(ursa.path.codebook_size, (len(prompts), math.prod(grid)), generator=generator)
    way, how = Trajectory(), {"x_init": x_init, "generator": generator}
    guide = {"guidance_scale": guidance, "uncond_ids": empty.expand_as(txt_ids)}
    last = sample(ursa.transformer, ursa.path, txt_ids, grid, STEPS, trajectory=way, **how, **guide)

    def frames(codes: torch.Tensor) -> torch.Tensor:
        return (ursa.decode(codes.view(-1, *grid)) * 255).round().byte()

    student = load_student(ursa, weights) if weights else None
    made = frames(sample(student, ursa.path, txt_ids, grid, 1, **how)) if student else None
    shown = [frames(x) for x in [*way.x_t, last]]
    pictures = [picture(shown[min(i, STEPS)], made, i, look) for i in range(STEPS + HELD + 1)]
    # one palette for all, of the first and the last: of its own, a picture of much sand has no red
    both = Image.fromarray(np.concatenate([pictures[0], pictures[-1]]))
    palette = both.quantize(COLOURS, Image.Quantize.MAXCOVERAGE)
    pictures = [one.quantize(palette=palette, dither=Image.Dither.NONE) for one in pictures]
    pictures[0].save(out, save_all=True, append_images=pictures[1:], duration=160, loop=0, optimize=True)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


def picture(teacher: torch.Tensor, student: torch.Tensor | None, index: int, look: Look) -> Image.Image:
    """One picture: all videos at frame `index` modulo their length, the teacher's after so many passes."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 16)
    cell, columns = look.cell, look.columns
    side = columns * (cell + GAP) - GAP
    rows = len(teacher) // columns
    parts = [(teacher, f"teacher: pass {min(index, STEPS)} of {STEPS}")]
    parts += [(student, "student: 1 pass")] if student is not None else []
    image = Image.new("RGB", (len(parts) * (side + 4 * GAP) - 3 * GAP, TOP + rows * (cell + GAP)), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for part, (videos, head) in enumerate(parts):
        left = part * (side + 4 * GAP) + GAP // 2
        draw.text((left, 10), head, font=font, fill=DONE if part or index >= STEPS else TEXT)
        for k, video in enumerate(videos):
            one = Image.fromarray(video[index % len(video)].numpy()).resize((cell, cell), Image.Resampling.NEAREST)
            image.paste(one, (left + k % columns * (cell + GAP), TOP + k // columns * (cell + GAP)))
    return image


if __name__ == "__main__":
    main()
