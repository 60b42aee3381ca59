"""Make the pictures, the tokenizer and a contact sheet of the sprites world, and measure its two judges.

What a teacher or a student has learnt: scripts/sprites_judge.py.

python scripts/sprites.py pictures    # dimo/worlds/data/sprites/*.png; needs Debian's fonts-noto-color-emoji
python scripts/sprites.py vae         # dimo/worlds/data/sprites/vae: the patches and their codes
python scripts/sprites.py gate        # how often clips are read right, as drawn and after the tokenizer
python scripts/sprites.py failures    # what oracle and reader say of clips that are not right
python scripts/sprites.py times       # how much a noised token says of the clean one, by t
python scripts/sprites.py sheet       # runs/sprites.png
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dimo.ursa import MetricPath
from dimo.ursa.patch_vae import PatchVae
from dimo.views.sheets import video_sheet
from dimo.worlds import DATA
from dimo.worlds.fsq import fsq_codebook
from dimo.worlds.oracle import score
from dimo.worlds.protocol import prompt_index
from dimo.worlds.sprite_frames import BLOCK, CARD, CELL, CELLS, SIZES, SPRITES, TEXTURES, TILE, pieces, render
from dimo.worlds.sprite_reader import read, reads_as
from dimo.worlds.sprites import FSQ, SpritesWorld
from dimo.worlds.teacher import RECIPES

FOLDER = DATA / "sprites"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian's package fonts-noto-color-emoji
FACTORS = ("sprite", "motion", "strength", "row", "column", "texture", "time", "phase")
STRIKE = 109  # the only size at which its pictures can be drawn
TINTS = {"noon": (1, 1, 1), "dawn": (1.06, 0.84, 0.80), "dusk": (0.52, 0.52, 0.78)}


def pictures(font: Path) -> None:
    """Draw every emoji at all sizes side by side, eight emoji to a row; every texture at every time; and the card."""
    drawn, width = ImageFont.truetype(str(font), STRIKE), sum(SIZES)
    atlas = Image.new("RGBA", (8 * width, math.ceil(len(SPRITES) / 8) * SIZES[0]))
    for i, character in enumerate(SPRITES.values()):
        large = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(large).text((8, 8), character, font=drawn, embedded_color=True)
        large = large.crop(large.getbbox())
        square = Image.new("RGBA", (max(large.size),) * 2)
        square.paste(large, ((square.width - large.width) // 2, (square.height - large.height) // 2))
        for size, before in zip(SIZES, (0, SIZES[0], SIZES[0] + SIZES[1])):
            at = i % 8 * width + before, i // 8 * SIZES[0]
            atlas.paste(square.resize((size, size), Image.Resampling.LANCZOS), at)
    FOLDER.mkdir(parents=True, exist_ok=True)
    atlas.save(FOLDER / "sprites.png", optimize=True)
    tiles = np.concatenate([texture(name) for name in TEXTURES], 1)
    tiles = np.concatenate([tiles * tint for tint in TINTS.values()], 0)
    Image.fromarray((tiles.clip(0, 1) * 255).round().astype(np.uint8)).save(FOLDER / "textures.png", optimize=True)
    card(8 * CARD).resize((CARD, CARD), Image.Resampling.LANCZOS).save(FOLDER / "card.png", optimize=True)


def card(size: int) -> Image.Image:
    """A white card with a thin grey edge and round corners, of the size of a cell."""
    picture, pixel = Image.new("RGBA", (size, size), (120, 125, 135, 0)), size // CARD
    ImageDraw.Draw(picture).rounded_rectangle(
        (0, 0, size - 1, size - 1), CELL * pixel, fill=(252, 252, 250, 255), outline=(120, 125, 135, 255), width=pixel
    )
    return picture


def waves(rng: np.random.Generator, count: int, lowest: float, highest: float) -> np.ndarray:
    """(TILE, TILE) smooth noise that repeats, with mean 0 and standard deviation 1: a sum of `count` plane waves."""
    y, x = np.mgrid[:TILE, :TILE] * 2 * np.pi / TILE
    total = np.zeros((TILE, TILE))
    for _ in range(count):
        size, angle = rng.uniform(lowest, highest), rng.uniform(0, 2 * np.pi)
        fy, fx = round(size * np.sin(angle)), round(size * np.cos(angle))
        total += np.cos(fy * y + fx * x + rng.uniform(0, 2 * np.pi))
    return (total - total.mean()) / total.std()


def texture(name: str) -> np.ndarray:
    """(TILE, TILE, 3) RGB in [0, 1]: a colour, and a light-and-dark pattern that repeats at its edges."""
    rng = np.random.default_rng(sorted(TEXTURES).index(name))
    y, x = np.mgrid[:TILE, :TILE]
    colour, contrast, pattern = {
        "sand": ((0.87, 0.76, 0.54), 0.04, lambda: waves(rng, 8, 1, 2.5)),
        "grass": ((0.36, 0.60, 0.26), 0.05, lambda: waves(rng, 24, 2, 4)),
        "water": ((0.20, 0.47, 0.74), 0.06, lambda: ripples(y, x, 1.6)),
        "bricks": ((0.66, 0.33, 0.25), 0.10, lambda: brick(y, x)),
        "snow": ((0.91, 0.94, 0.97), 0.03, lambda: waves(rng, 6, 1, 2)),
        "wood": ((0.55, 0.38, 0.22), 0.05, lambda: ripples(x, y, 1.2) + 0.5 * ripples(2 * x, y, 2)),
        "night": ((0.09, 0.10, 0.24), 0.03, lambda: waves(rng, 4, 1, 1.5)),
        "tiles": ((0.64, 0.66, 0.70), 0.08, lambda: np.where((y < 1) | (x < 1), 2.0, -0.02 * (x + y))),
    }[name]
    tile = np.array(colour) + contrast * pattern()[..., None]
    if name == "night":
        tile[3, 4] = tile[10, 12] = (1.0, 1.0, 0.85)
        tile[13, 5] = (0.6, 0.6, 0.7)
    return tile


def ripples(across: np.ndarray, along: np.ndarray, bend: float) -> np.ndarray:
    """Waves with bent crests."""
    return np.sin(2 * np.pi * (across + bend * np.sin(2 * np.pi * along / TILE)) / TILE)


def brick(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Two rows of bricks, shifted by half of one, the lower row lighter; so is the mortar."""
    mortar = (y % 8 == 7) | ((x + 8 * (y // 8)) % TILE == TILE - 1)
    return np.where(mortar, 2.0, np.where(y < 8, -0.3, 0.3))


def table() -> torch.Tensor:
    """(K, 8, 8, 3) uint8: every patch of every clip at the code whose FSQ neighbours look like it.

    The first principal component divides the patches into as many equal parts as the first FSQ dimension has levels,
    the second one each of these, and so on. The few codes that are left over get a mixture of two neighbours.
    """
    patches = every_patch().flatten(1)
    centred = patches.double() - patches.double().mean(0)
    basis = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, : len(FSQ)]
    scores, made = centred @ basis, torch.zeros(math.prod(FSQ), patches.shape[1], dtype=torch.uint8)
    used = torch.zeros(len(made), dtype=torch.bool)

    def place(rows: torch.Tensor, first: int, dimension: int) -> None:
        if dimension == len(FSQ):
            made[first], used[first] = patches[rows[0]], True
            return
        rows = rows[scores[rows, dimension].argsort(stable=True)]
        for level, part in enumerate(rows.tensor_split(FSQ[dimension])):
            if len(part):
                place(part, first + level * math.prod(FSQ[:dimension]), dimension + 1)

    place(torch.arange(len(patches)), 0, 0)
    book = fsq_codebook(FSQ)
    for code in (~used).nonzero()[:, 0].tolist():
        near = (book - book[code]).square().sum(1).masked_fill(~used, 9).topk(2, largest=False).indices
        made[code] = made[near].float().mean(0).byte()
    return made.view(-1, CELL, CELL, 3)


def every_patch() -> torch.Tensor:
    """(n, 8, 8, 3) uint8, all different: those of textures, of cards, and of cards' corners over textures."""
    card, corner, plain = pieces()
    end = torch.arange(BLOCK) % (BLOCK - 1) == 0
    parts = card[:, :, ~(end[:, None] & end)], corner, plain
    return torch.cat([x.reshape(-1, CELL**2 * 3) for x in parts]).unique(dim=0).view(-1, CELL, CELL, 3)


def held_out_clips(world: SpritesWorld, clips: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Prompt, start and phase of so many clips, of the held-out prompts in turn."""
    index = prompt_index(world, world.held_out)[torch.arange(clips) % len(world.held_out)]
    return world.choose(clips, torch.Generator().manual_seed(seed), index)


def gate(clips: int, seed: int) -> None:
    """Print how often the reader reads held-out clips right, as drawn and after the tokenizer."""
    world, vae = SpritesWorld(), PatchVae.load(FOLDER / "vae")
    wanted, read_as, confidence, error = [], {}, {}, []
    for part in zip(*(c.split(16) for c in held_out_clips(world, clips, seed))):
        wanted.append(torch.stack(world.factors(*part), 1))
        drawn = render(*wanted[-1].T)
        made = {"as drawn": drawn, "after the tokenizer": vae.decode(vae.encode(drawn))}
        error.append((made["after the tokenizer"] - drawn).abs().max())
        for name, frames in made.items():
            seen = read(frames)
            read_as.setdefault(name, []).append(torch.stack(seen.choice(), 1))
            confidence.setdefault(name, []).append(seen.confidence)
    print(f"{clips} clips of the {len(world.held_out)} held-out prompts, seed {seed}; shares that are read right")
    print(f"{'':20}" + "".join(f"{name:>9}" for name in (*FACTORS, "all")) + "  least sure")
    for name in read_as:
        right, sure = torch.cat(read_as[name]) == torch.cat(wanted), torch.cat(confidence[name])
        shares = [*right.float().mean(0).tolist(), right.all(1).float().mean().item()]
        print(f"{name:20}" + "".join(f"{share:9.4f}" for share in shares) + f"  {sure.min():10.3f}")
    print(f"largest error of a pixel after the tokenizer: {max(error):g}")


def failures(clips: int, seed: int) -> None:
    """Print what the oracle and the reader say of clips that are not right, and of right ones."""
    world, generator = SpritesWorld(), torch.Generator().manual_seed(seed)
    prompt, start, phase = world.choose(clips, generator)
    codes = world.render(prompt, start, phase)
    grid, noise = codes.view(-1, *world.latents_shape), torch.randint(world.codebook_size, codes.shape)
    rows = {
        "right": grid,
        "another clip from half time on": torch.cat([grid[:, :3], grid.roll(1, 0)[:, 3:]], 1),
        "another clip on the right half": torch.where(torch.arange(CELLS) < CELLS // 2, grid, grid.roll(1, 0)),
        "second latent frame repeated": grid[:, 1:2].expand_as(grid),
    }
    for share in (0.002, 0.01, 0.05, 0.2):
        random = torch.rand(codes.shape, generator=generator) < share
        rows[f"{share:.1%} of the tokens random"] = torch.where(random, noise, codes)
    print(
        f"{clips} clips, seed {seed}: shares by the oracle, and that the reader reads as their prompts with confidence"
    )
    for name, made in rows.items():
        codes = made.reshape(clips, -1)
        scores, seen = score(world, codes, [world.prompts[i] for i in prompt]), reads_as(world, codes, prompt)
        shares = [x.float().mean().item() for x in (scores.valid, scores.adherent, scores.accuracy, seen)]
        named = zip(("valid", "adherent", "tokens", "read"), shares)
        print(f"{name:32}" + "".join(f"  {what} {share:.3f}" for what, share in named))


def times() -> None:
    """Print by t the mutual information of a noised token and the clean one, of which all used codes are as likely."""
    world, recipe = SpritesWorld(), RECIPES["sprites"]
    path, codes = MetricPath(world.codebook(), recipe.alpha, recipe.c), world.used_codes[::16]
    print("t, nats of a token, of the 60 tokens of an emoji and of all 1,280, were they independent")
    for t in (0.04, 0.1, 0.16, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        p = path.prob(codes[None], t)[0]
        nats = (p * (p / p.mean(0)).clamp(min=1e-30).log()).sum(-1).mean().item()
        print(f"{t:4} {nats:7.4f} {60 * nats:7.2f} {1280 * nats:8.1f}")


def sheet(file: Path, clips: int, seed: int) -> None:
    """Five frames of clips of held-out prompts, each under its prompt."""
    world = SpritesWorld()
    prompt, start, phase = (x[::5] for x in held_out_clips(world, clips * 5, seed))
    frames = world.decoder().decode(world.render(prompt, start, phase).view(-1, *world.latents_shape))
    file.parent.mkdir(parents=True, exist_ok=True)
    video_sheet({"": frames}, [world.prompts[i] for i in prompt.tolist()], shown=5).savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("pictures").add_argument("--font", type=Path, default=FONT)
    actions.add_parser("vae")
    actions.add_parser("times")
    for name, clips in {"gate": 256, "failures": 32, "sheet": 9}.items():
        one = actions.add_parser(name)
        one.add_argument("--clips", type=int, default=clips)
        one.add_argument("--seed", type=int, default=1)
    one.add_argument("--out", type=Path, default=Path("runs/sprites.png"))
    args = parser.parse_args()
    if args.action == "pictures":
        pictures(args.font)
    elif args.action == "vae":
        PatchVae(table()).save(FOLDER / "vae")
    elif args.action == "times":
        times()
    elif args.action == "sheet":
        sheet(args.out, args.clips, args.seed)
    else:
        {"gate": gate, "failures": failures}[args.action](args.clips, args.seed)


if __name__ == "__main__":
    main()
