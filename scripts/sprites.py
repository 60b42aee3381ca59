"""Make what the sprites world ships with, and measure it.

python scripts/sprites.py pictures    # dimo/worlds/data/sprites/*.png; needs Debian's fonts-noto-color-emoji
python scripts/sprites.py vae         # dimo/worlds/data/sprites/vae, in minutes on a CPU
python scripts/sprites.py gate        # how often clips are read right, as drawn and after the tokenizer
python scripts/sprites.py failures    # the oracle's scores of clips that are not right
python scripts/sprites.py sheet       # runs/sprites.png
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from dimo.ursa.fsq_vae import FsqVae, neighbourhoods, patches, still_start
from dimo.views.sheets import save_sheet
from dimo.worlds import DATA
from dimo.worlds.fsq import LEVELS
from dimo.worlds.oracle import score
from dimo.worlds.protocol import prompt_index
from dimo.worlds.sprite_frames import CELL, FRAMES, SIDE, SPRITES, TEXTURES, TILE, poses, render, starts
from dimo.worlds.sprite_reader import read
from dimo.worlds.sprites import CONFIDENT, SpritesWorld

FOLDER = DATA / "sprites"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian's package fonts-noto-color-emoji
LR = 3e-3
FACTORS = ("sprite", "motion", "strength", "row", "column", "texture", "phase")
STRIKE = 109  # the only size at which its pictures can be drawn


def pictures(font: Path) -> None:
    """Draw every emoji into a square of SIDE pixels, eight to a row, and every texture as a tile that repeats."""
    drawn = ImageFont.truetype(str(font), STRIKE)
    atlas = Image.new("RGBA", (8 * SIDE, math.ceil(len(SPRITES) / 8) * SIDE))
    for i, character in enumerate(SPRITES.values()):
        large = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(large).text((8, 8), character, font=drawn, embedded_color=True)
        large = large.crop(large.getbbox())
        square = Image.new("RGBA", (max(large.size),) * 2)
        square.paste(large, ((square.width - large.width) // 2, (square.height - large.height) // 2))
        atlas.paste(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (i % 8 * SIDE, i // 8 * SIDE))
    FOLDER.mkdir(parents=True, exist_ok=True)
    atlas.save(FOLDER / "sprites.png", optimize=True)
    tiles = np.concatenate([texture(name) for name in TEXTURES], 1)
    Image.fromarray((tiles.clip(0, 1) * 255).round().astype(np.uint8)).save(FOLDER / "textures.png", optimize=True)


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


def windows(world: SpritesWorld, size: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens of clips around their sprites, (size, 5, 10, 10, PIXELS), all -1 where they are outside of the picture."""
    choice = world.choose(size, generator)[1]
    _, motion, strength, row, column, _, _ = choice
    tokens = patches(still_start(render(*choice)))
    at = torch.randint(FRAMES, (size,), generator=generator, device=tokens.device)
    cell = starts().to(tokens.device)[motion, strength, :, 0] + torch.stack([row, column], 1)
    moved = (poses().to(tokens.device)[motion, strength, at, :2] / CELL).round().long()
    jitter = torch.randint(-1, 2, cell.shape, generator=generator, device=tokens.device)
    corner = (cell + moved + jitter - 1).clamp(0, 8)
    wide = F.pad(tokens, (0, 0, 1, 1, 1, 1), value=-1.0)
    return torch.stack([one[:, y : y + 10, x : x + 10] for one, (y, x) in zip(wide, corner.tolist())])


def principal_components(vae: FsqVae, tokens: torch.Tensor) -> None:
    """Set the tokenizer's transform from tokens (n, PIXELS)."""
    vae.mean.copy_(tokens.mean(0))
    variance, basis = torch.linalg.eigh((tokens - vae.mean).T @ (tokens - vae.mean) / len(tokens))
    order = variance.argsort(descending=True)[: vae.components]
    kept = variance[order].sum() / variance.sum()
    print(f"{vae.components} of {len(variance)} components keep {kept:.4f} of the variance", flush=True)
    vae.basis.copy_(basis.T[order])
    vae.spread.copy_(variance[order].sqrt())


def train_vae(out: Path, minutes: float, device: str, codes: int, hidden: int, batch: int, clips: int) -> None:
    """Train the tokenizer on clips of all prompts but the held-out ones.

    The loss is the squared error of each component, divided by its standard deviation: fine detail counts for more than
    it would in pixels.
    """
    generator = torch.Generator(device).manual_seed(0)
    torch.manual_seed(0)
    start, step, losses = time.perf_counter(), 0, []
    world, vae = SpritesWorld(), FsqVae(LEVELS[codes], hidden=hidden).to(device)
    with torch.no_grad():
        vae.encoder[-1].weight *= 5  # so that most codes are used from the start
    optimizer = torch.optim.AdamW([*vae.encoder.parameters(), *vae.decoder.parameters()], lr=LR, betas=(0.9, 0.98))
    shown = torch.cat([windows(world, 16, generator) for _ in range(6)]).flatten(0, 3)
    principal_components(vae, shown[shown[:, 0] >= 0])
    weight = vae.spread / vae.spread.mean()

    def fresh() -> torch.Tensor:
        tokens = windows(world, 16, generator)
        inside = (tokens[..., :1] >= 0).float()
        return torch.cat([(tokens - vae.mean) @ vae.basis.T / vae.spread, inside], -1).bfloat16()

    buffer = torch.cat([fresh() for _ in range(clips // 16)])
    while (passed := (time.perf_counter() - start) / 60 / minutes) < 1:
        if step % 16 == 15:
            oldest = step // 16 * 16 % clips
            buffer[oldest : oldest + 16] = fresh()
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 100) * (1 - passed)
        tokens = buffer[torch.randint(len(buffer), (batch,), generator=generator, device=device)]
        tokens, inside = tokens[..., :-1], tokens[..., -1:].float()
        with torch.autocast(device, torch.bfloat16):
            seen = vae.features(vae.quantise(vae.encoder(tokens).float()), inside)[:, :, 1:-1, 1:-1]
            drawn = vae.decoder(neighbourhoods(seen)).float()
        error = (drawn - tokens[:, :, 1:-1, 1:-1]).square() * inside[:, :, 1:-1, 1:-1]
        loss = (error * weight).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {passed:.0%}: loss {sum(losses[-100:]) / 100:.4f}", flush=True)
        if step % 500 == 0:
            vae.save(out)
    vae.save(out)


def held_out_clips(world: SpritesWorld, clips: int, seed: int) -> tuple[torch.Tensor, ...]:
    """What `render` needs for so many clips, of the held-out prompts in turn."""
    index = prompt_index(world, world.held_out)[torch.arange(clips) % len(world.held_out)]
    return world.choose(clips, torch.Generator().manual_seed(seed), index)[1]


def gate(clips: int, seed: int, vae: FsqVae) -> None:
    """Print how often the reader reads held-out clips right, as drawn and after the tokenizer."""
    world = SpritesWorld()
    choice, read_as, confidence, error = held_out_clips(world, clips, seed), {}, {}, []
    for part in zip(*(c.split(16) for c in choice)):
        drawn = render(*part)
        made = {"as drawn": drawn, "after the tokenizer": vae.decode(vae.encode(drawn))}
        error.append((made["after the tokenizer"] - drawn).square().mean((1, 2, 3, 4)))
        for name, frames in made.items():
            seen = read(frames, world.sprites, world.textures)
            read_as.setdefault(name, []).append(torch.stack(seen.choice(), 1))
            confidence.setdefault(name, []).append(seen.confidence)
    print(f"{clips} clips of the {len(world.held_out)} held-out prompts, seed {seed}; shares that are read right")
    print(f"{'':20}" + "".join(f"{name:>9}" for name in (*FACTORS, "all", "sure")) + "  least sure")
    for name in read_as:
        right, sure = torch.cat(read_as[name]) == torch.stack(choice, 1), torch.cat(confidence[name])
        shares = [*right.float().mean(0).tolist(), right.all(1).float().mean().item()]
        shares.append((sure >= CONFIDENT).float().mean().item())
        print(f"{name:20}" + "".join(f"{share:9.4f}" for share in shares) + f"  {sure.min():10.3f}")
    print(f"PSNR of the tokenizer: {-10 * torch.cat(error).mean().log10():.1f} dB")


def failures(clips: int, seed: int, vae: FsqVae) -> None:
    """Print the oracle's scores of clips that are not right, and of right ones."""
    world = SpritesWorld()
    generator = torch.Generator().manual_seed(seed)
    prompt, choice = world.choose(clips, generator)
    codes = world.encode(choice)
    grid = codes.view(-1, *world.latents_shape)
    other, still = grid.roll(1, 0), grid[:, 1:2]
    noise = torch.randint(world.codebook_size, codes.shape, generator=generator)
    left = torch.arange(16) < 8
    rows = {
        "right": grid,
        "another clip from half time on": torch.cat([grid[:, :3], other[:, 3:]], 1),
        "another clip on the right half": torch.where(left, grid, other),
        "second latent frame repeated": still.expand_as(grid),
        "latent frames backwards": grid.flip(1),
    }
    for share in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        rows[f"{share:.0%} of the tokens random"] = torch.where(
            torch.rand(codes.shape, generator=generator) < share, noise, codes
        )
    prompts = [world.prompts[i] for i in prompt.tolist()]
    print(f"{clips} clips, seed {seed}: shares")
    for name, made in rows.items():
        scores = score(world, made.flatten(1), prompts)
        valid, adherent = (x.float().mean().item() for x in (scores.valid, scores.adherent))
        print(f"{name:32} valid {valid:.3f}  adherent {adherent:.3f}  tokens {scores.accuracy.mean():.3f}")


def sheet(file: Path, clips: int, seed: int, vae: FsqVae) -> None:
    """Clips of held-out prompts as drawn and after the tokenizer, as a contact sheet."""
    world = SpritesWorld()
    choice = held_out_clips(world, clips * 7, seed)
    drawn = render(*(c[::7] for c in choice))
    save_sheet(file, {"as drawn": drawn, "after the tokenizer": vae.decode(vae.encode(drawn))},
               [world.held_out[i * 7 % len(world.held_out)] for i in range(clips)])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("pictures").add_argument("--font", type=Path, default=FONT)
    train = actions.add_parser("vae")
    train.add_argument("--out", type=Path, default=FOLDER / "vae")
    train.add_argument("--device", default="cpu")
    for name, default in {"minutes": 12.0, "codes": 1000, "hidden": 256, "batch": 24, "clips": 768}.items():
        train.add_argument(f"--{name}", type=type(default), default=default)
    for name, clips in {"gate": 1024, "failures": 96, "sheet": 9}.items():
        one = actions.add_parser(name)
        one.add_argument("--clips", type=int, default=clips)
        one.add_argument("--seed", type=int, default=1)
        one.add_argument("--vae", type=Path, default=FOLDER / "vae")
    one.add_argument("--out", type=Path, default=Path("runs/sprites.png"))
    args = parser.parse_args()
    if args.action in ("gate", "failures"):
        {"gate": gate, "failures": failures}[args.action](args.clips, args.seed, FsqVae.load(args.vae))
    elif args.action == "sheet":
        sheet(args.out, args.clips, args.seed, FsqVae.load(args.vae))
    elif args.action == "vae":
        train_vae(args.out, args.minutes, args.device, args.codes, args.hidden, args.batch, args.clips)
    elif args.action == "pictures":
        pictures(args.font)


if __name__ == "__main__":
    main()
