"""`python scripts/picture.py`: the README's pictures, in docs/images.

one-pass.gif shows the teacher's 25 passes beside the one pass of the student that ships, from the same noise, on the
built-in world; explorer.png the explorer on it, as chromium draws it.
"""

import json
import subprocess
import tempfile
from pathlib import Path

import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from dimo.ursa import load_ursa, sample
from dimo.ursa.loading import load_student
from dimo.ursa.sampler import Trajectory
from dimo.views.explorer import HERE, PAGE, STYLE
from dimo.views.explorer_stored import stored
from dimo.views.explorer_view import ExplorerView
from dimo.views.models import open_models
from dimo.worlds import SHIPPED_STUDENT, checkpoint_folder

PROMPTS = ["blue bar moving up", "green square moving right", "pink corner moving left", "orange square moving down"]
PROMPTS += ["pink bar moving left", "blue corner moving up", "orange bar moving right", "green corner moving down"]
STEPS, HELD = 25, 18  # passes of the teacher, pictures after its last pass
CELL, GAP, COLUMNS, TOP = 88, 8, 4, 40  # pixels
BACKGROUND, TEXT, DONE = "#ffffff", "#222222", "#0072B2"
WINDOW = 1300, 740  # pixels
IMAGES = Path("docs/images")


def main() -> None:
    one_pass()
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
        Image.open(shot).quantize(128).save(IMAGES / "explorer.png", optimize=True)


def one_pass() -> None:
    ursa = load_ursa(checkpoint_folder("shapes"))
    student = load_student(ursa, SHIPPED_STUDENT)
    txt_ids = ursa.tokenize(PROMPTS, 4)
    grid = ursa.latents_shape(9, 32, 32)
    generator = torch.Generator().manual_seed(3)
    x_init = torch.randint(ursa.path.codebook_size, (len(PROMPTS), 48), generator=generator)
    way = Trajectory()
    last = sample(ursa.transformer, ursa.path, txt_ids, grid, STEPS, x_init=x_init, generator=generator, trajectory=way)
    one = sample(student, ursa.path, txt_ids, grid, 1, x_init=x_init, generator=generator)

    def frames(codes: torch.Tensor) -> torch.Tensor:
        return (ursa.decode(codes.view(-1, *grid)) * 255).round().byte()

    passes, made = [frames(x) for x in [*way.x_t, last]], frames(one)
    pictures = [picture(passes[min(i, STEPS)], made, i) for i in range(STEPS + HELD + 1)]
    out = IMAGES / "one-pass.gif"
    pictures[0].save(out, save_all=True, append_images=pictures[1:], duration=160, loop=0, optimize=True)
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


def picture(teacher: torch.Tensor, student: torch.Tensor, index: int) -> Image.Image:
    """One picture: all videos at frame `index` modulo their length, the teacher's after so many passes."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 16)
    side = COLUMNS * (CELL + GAP) - GAP
    rows = len(teacher) // COLUMNS
    image = Image.new("RGB", (2 * side + 5 * GAP, TOP + rows * (CELL + GAP)), BACKGROUND)
    draw = ImageDraw.Draw(image)
    heads = (f"teacher: pass {min(index, STEPS)} of {STEPS}", "student: 1 pass")
    for part, (videos, head) in enumerate(zip((teacher, student), heads)):
        left = part * (side + 4 * GAP) + GAP // 2
        draw.text((left, 10), head, font=font, fill=DONE if part or index >= STEPS else TEXT)
        for k, video in enumerate(videos):
            cell = Image.fromarray(video[index % len(video)].numpy()).resize((CELL, CELL), Image.Resampling.NEAREST)
            image.paste(cell, (left + k % COLUMNS * (CELL + GAP), TOP + k // COLUMNS * (CELL + GAP)))
    return image.quantize(64)


if __name__ == "__main__":
    main()
