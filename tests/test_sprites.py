"""The sprites world: its grammar, its drawing against Pillow's, its tokenizer, and an oracle that reads pictures."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dimo.commands.cli import parse
from dimo.commands.sample import Request, sample_to_folder
from dimo.config import load_config
from dimo.errors import DimoError
from dimo.evaluation.evaluate import open_comparison
from dimo.train.prompts import open_prompts
from dimo.ursa import MetricPath, load_ursa
from dimo.ursa.fsq_vae import FsqVae, fsq_vectors, patches, still_start, unpatched
from dimo.worlds import checkpoint_folder, load_world
from dimo.worlds.oracle import score
from dimo.worlds.protocol import prompt_index, prompts_to_score, prompts_to_train
from dimo.worlds.sprite_frames import MOTIONS, PICTURES, SPRITES, STRENGTHS, TEXTURES, poses, render, starts
from dimo.worlds.sprite_reader import read
from dimo.worlds.sprites import CONFIDENT, SpritesWorld
from dimo.worlds.teacher import TeacherRecipe, make_teacher


@pytest.fixture(scope="module")
def sprites():
    return SpritesWorld()


@pytest.fixture(scope="module")
def clips(sprites):
    """40 clips of held-out prompts: prompts, what was drawn, and their codes."""
    index = prompt_index(sprites, sprites.held_out[:40])
    choice = sprites.choose(40, torch.Generator().manual_seed(3), index)[1]
    return sprites.held_out[:40], choice, sprites.encode(choice)


def indices(**values):
    """What `render` needs for one clip; what is not given is 0."""
    names = ("sprite", "motion", "strength", "row", "column", "texture", "phase")
    return [torch.tensor([values.get(name, 0)]) for name in names]


def by_pillow(sprite, texture, phase, y, x, size=1.0, degrees=0.0):
    """One frame, (128, 128, 3) in [0, 1]: the sprite's corner at y, x, turned clockwise about its middle."""
    tile = Image.open(PICTURES / "textures.png").convert("RGBA").crop((16 * texture, 0, 16 * texture + 16, 16))
    frame = Image.new("RGBA", (128, 128))
    for top in range(-8 * (phase // 2), 128, 16):
        for left in range(-8 * (phase % 2), 128, 16):
            frame.paste(tile, (left, top))
    atlas = Image.open(PICTURES / "sprites.png")
    picture = atlas.crop((sprite % 8 * 40, sprite // 8 * 40, sprite % 8 * 40 + 40, sprite // 8 * 40 + 40))
    picture = picture.rotate(-degrees, Image.Resampling.BILINEAR)
    if size != 1:
        picture = picture.resize((round(40 * size),) * 2, Image.Resampling.BILINEAR)
    corner = round(x + 20 - 20 * size), round(y + 20 - 20 * size)
    layer = Image.new("RGBA", (128, 128))
    layer.paste(picture, corner)
    return np.asarray(Image.alpha_composite(frame, layer).convert("RGB")) / 255


@pytest.mark.parametrize(
    "motion, strength, start, moved",
    [
        ("moving left", 4, (3, 9), lambda f: (0, -4 * f)),
        ("moving right", 2, (0, 5), lambda f: (0, 2 * f)),
        ("moving up", 2, (7, 0), lambda f: (-2 * f, 0)),
        ("moving down", 4, (2, 11), lambda f: (4 * f, 0)),
        ("bouncing", 4, (6, 2), lambda f: (-[0, 14, 24, 30, 32, 30, 24, 14][f % 8], 0)),
        ("bouncing", 2, (4, 2), lambda f: (-[0, 7, 12, 15, 16, 15, 12, 7][f % 8], 0)),
    ],
)
def test_what_moves_is_drawn_as_pillow_draws_it(motion, strength, start, moved):
    m, s = MOTIONS.index(motion), STRENGTHS.index(strength)
    first = starts()[m, s, :, 0].tolist()
    row, column = start[0] - first[0], start[1] - first[1]
    given = indices(sprite=23, motion=m, strength=s, row=row, column=column, texture=3, phase=1)
    frames = render(*given)[0].numpy()
    for f in range(17):
        down, right = moved(f)
        want = by_pillow(23, 3, 1, 8 * start[0] + down, 8 * start[1] + right)
        assert np.abs(frames[f] - want).max() < 0.006, f


@pytest.mark.parametrize("motion, sign", [("turning left", -1), ("turning right", 1)])
def test_what_turns_is_drawn_as_pillow_draws_it(motion, sign):
    frames = render(*indices(sprite=4, motion=MOTIONS.index(motion), strength=1, row=5, column=6))[0].numpy()
    for f in (0, 5, 16):
        want = by_pillow(4, 0, 0, 40, 48, degrees=sign * 180 * f / 16)
        other = by_pillow(4, 0, 0, 40, 48, degrees=-sign * 180 * f / 16 + 20)
        assert np.abs(frames[f] - want).mean() < 0.003 < np.abs(frames[f] - other).mean()


@pytest.mark.parametrize("motion, ends", [("zooming in", (0.6, 1.4)), ("zooming out", (1.4, 0.6))])
def test_what_zooms_is_drawn_as_pillow_draws_it(motion, ends):
    frames = render(*indices(sprite=4, motion=MOTIONS.index(motion), strength=1, row=2, column=4))[0].numpy()
    for f, size in ((0, ends[0]), (8, 1.0), (16, ends[1])):
        want, other = (by_pillow(4, 0, 0, 32, 48, size=x) for x in (size, 1.2 if size == 1 else 1.0))
        assert np.abs(frames[f] - want).mean() < 0.01 < np.abs(frames[f] - other).mean()


def test_sprites_stay_in_the_picture_and_quarters_are_equally_likely():
    first, count = starts().unbind(-1)  # (motions, strengths, 2)
    assert (count % 4 == 0).all() and (count >= 4).all()
    shift, size = poses()[..., :2], poses()[..., 2:3]
    for cell in (first, first + count - 1):
        middle = 8 * cell[:, :, None] + shift + 20
        assert (middle - 20 * size >= 0).all() and (middle + 20 * size <= 128).all()


def test_prompts_are_words_and_some_are_held_out(sprites, generator):
    assert len(set(sprites.prompts)) == 64 * 9 * 2 * 8
    assert "a red car moving left over sand, motion=4.0" in sprites.prompts
    assert "an owl zooming in over water, motion=2.0" in sprites.prompts
    pattern = re.compile(rf"an? ({'|'.join(SPRITES)}) ({'|'.join(MOTIONS)}) over ({'|'.join(TEXTURES)}), motion=[24].0")
    assert all(pattern.fullmatch(prompt) for prompt in sprites.prompts)
    for prompt in (0, 4321, 9215):
        a, b, c, d = sprites.attributes(torch.tensor([prompt]))
        words = sprites.prompts[prompt]
        assert f" {list(SPRITES)[a]} {MOTIONS[b]} over {TEXTURES[d]}, motion={STRENGTHS[c]}.0" in words
        assert sprites.prompt_of(a, b, c, d) == prompt
    held_out = prompt_index(sprites, sprites.held_out)
    factors = sprites.attributes(held_out)
    assert [len(factor.unique()) for factor in factors] == [64, 9, 2, 8]
    drawn = sprites.choose(200_000, generator)[0]
    assert not torch.isin(drawn, held_out).any() and len(drawn.unique()) == 9216 - 64
    assert prompts_to_score(sprites) == sprites.held_out
    assert sorted(prompts_to_train(sprites) + sprites.held_out) == sorted(sprites.prompts)


def test_the_codebook_tells_all_codes_apart_and_neighbours_are_one_level_away(sprites):
    book = sprites.codebook()
    assert len(book) == sprites.codebook_size and torch.allclose(book.norm(dim=1), torch.ones(len(book)))
    path = MetricPath(book, 0.9, 3.0)
    assert torch.allclose(path.codebook, book, atol=1e-6)
    distance = torch.cdist(book, book).fill_diagonal_(9)
    vectors = fsq_vectors(torch.arange(len(book)), sprites.decoder().levels)
    assert distance.min() > 0.1
    near = vectors - vectors[distance.argmin(1)]
    assert ((near != 0).sum(1) == 1).float().mean() > 0.95


def test_tokens_are_patches_of_four_frames():
    frames = torch.rand(2, 9, 16, 24, 3)
    whole = still_start(frames)
    tokens = patches(whole)
    assert torch.equal(unpatched(tokens), whole)
    assert torch.equal(tokens[1, 2, 1, 2].view(4, 8, 8, 3), frames[1, 5:9, 8:16, 16:24])
    assert torch.equal(tokens[0, 0, 0, 1].view(4, 8, 8, 3), frames[0, :1, :8, 8:16].expand(4, -1, -1, -1))


def test_the_tokenizer_rounds_to_its_levels_and_every_code_can_be_met():
    vae = FsqVae((8, 5), components=4, hidden=8)
    z = torch.cartesian_prod(torch.linspace(-6, 6, 401), torch.linspace(-6, 6, 401)).requires_grad_()
    vectors = vae.quantise(z)
    every = fsq_vectors(torch.arange(40), (8, 5))
    assert torch.cdist(vectors, every).min(1).values.max() < 1e-6
    assert len(vectors.detach().round(decimals=4).unique(dim=0)) == 40
    (gradient,) = torch.autograd.grad(vectors.sum(), z)
    assert (gradient > 0).all()
    assert vae.quantise(torch.zeros(1, 2)).abs().max() < 1e-6  # the middle is a level


def test_the_tokenizer_of_a_folder_is_the_one_that_was_saved(tmp_path, clips):
    vae, codes = SpritesWorld().decoder(), clips[2][:2].view(2, 5, 16, 16)
    vae.save(tmp_path / "vae")
    again = FsqVae.load(tmp_path / "vae")
    assert torch.equal(again.decode(codes), vae.decode(codes))
    frames = vae.decode(codes)
    assert frames.shape == (2, 17, 128, 128, 3) and frames.min() >= 0 and frames.max() <= 1
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    for key, value, sentence in (
        ("levels", None, "must list the FSQ levels, got levels=None"),
        ("levels", [8, 1], "FSQ levels from 2 on"),
        ("hidden", "wide", "positive whole numbers of components and hidden"),
        ("hidden", 8, "diffusion_pytorch_model|weights|decoder"),
    ):
        (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(DimoError, match=sentence):
            FsqVae.load(tmp_path / "vae")
    with pytest.raises(DimoError, match=r"frames must be 4 .T-1. \+ 1 of 8 H x 8 W pixels, got 16 of 128x128"):
        vae.encode(frames[:, 1:])
    with pytest.raises(DimoError, match=r"codes must lie in \[0, "):
        vae.decode(codes + vae.codebook_size)


def test_the_reader_reads_held_out_clips_as_drawn(clips):
    seen = read(render(*clips[1]), 64, 8)
    assert torch.equal(torch.stack(seen.choice()), torch.stack(clips[1])) and seen.confidence.min() > 0.9


def test_the_reader_is_not_sure_of_what_is_no_clip(clips, generator):
    frames, n = render(*(part[:12] for part in clips[1])), 12
    other = frames.roll(1, 0)
    right = torch.cat([frames[:, :, :, :64], other[:, :, :, 64:]], 3)
    for bad, most in (
        (torch.cat([frames[:, :9], other[:, 9:]], 1), 0.2),  # another clip from half time on
        (right, 0.6),  # another one on the right
        (frames[:, :1].expand_as(frames), 0.6),  # a still
        (torch.rand(frames.shape, generator=generator), 0.0),
        (torch.zeros_like(frames), 0.2),
    ):
        seen = read(bad, 64, 8)
        assert (seen.confidence > most).sum() <= 2 and len(seen.sprite) == n


def test_the_oracle_says_what_the_reader_sees(sprites, clips):
    prompts, _, codes = (part[:16] for part in (clips[0], clips[1], clips[2]))
    seen = read(sprites.decoder().decode(codes.view(-1, 5, 16, 16)), 64, 8)
    scores = score(sprites, codes, prompts)
    nearest = sprites.prompt_of(seen.sprite, seen.motion, seen.strength, seen.texture)
    assert torch.equal(scores.prompt, nearest) and torch.equal(scores.valid, seen.confidence >= CONFIDENT)
    assert torch.equal(scores.adherent, nearest == prompt_index(sprites, prompts)) and scores.adherent.any()
    counts = starts()[seen.motion, seen.strength, :, 1]
    want = {"rows": seen.row * 4 // counts[:, 0], "columns": seen.column * 4 // counts[:, 1], "phases": seen.phase}
    assert {name: bins for name, (_, bins) in scores.free.items()} == dict.fromkeys(want, 4)
    assert all(torch.equal(scores.free[name][0], labels) for name, labels in want.items())
    same = (torch.stack(seen.choice()) == torch.stack([part[:16] for part in clips[1]])).all(0)
    assert same.any() and (scores.accuracy[same] == 1).all() and (scores.accuracy[~same] < 1).all()


def test_a_small_world_is_trained_sampled_and_evaluated(tmp_path, monkeypatch):
    world, folder = SpritesWorld(sprites=1, textures=1), tmp_path / "teacher"
    recipe = TeacherRecipe(layers=1, hidden=32, heads=2, batch_size=2, steps=2)
    assert "validity" in make_teacher(world, recipe, folder, videos_per_prompt=1)
    assert load_world(folder) == world and isinstance(load_ursa(folder).vae, FsqVae)
    (video,) = sample_to_folder(Request(teacher_ckpt=str(folder)), world.held_out, tmp_path / "made")
    told = json.loads(video.with_suffix(".json").read_text())
    assert video.suffix == ".mp4" and (told["frames"], told["height"], told["width"]) == (17, 128, 128)
    config = load_config("sprites", [f"distill.teacher_ckpt={folder}", "model.device=cpu"])
    assert open_prompts(config, load_ursa(folder)).examples == prompts_to_train(world)
    comparison, _ = open_comparison(config, folder / "transformer")
    assert comparison.prompts[::16] == world.held_out


def test_without_a_teacher_a_sentence_says_how_to_train_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DimoError, match="sprites ships without a teacher: train one with `dimo world train sprites -o"):
        checkpoint_folder(load_config("sprites").distill.teacher_ckpt)


def test_the_command_proposes_the_worlds_own_network(capsys):
    args = parse(["world", "train", "sprites", "-o", "x"])
    assert (args.layers, args.hidden, args.sprites, args.textures) == (6, 192, 64, 8)
    assert parse(["world", "train", "shapes", "-o", "x"]).layers == TeacherRecipe().layers


@pytest.mark.parametrize("sizes", [{"sprites": 0}, {"sprites": 65}, {"textures": 9}, {"textures": 1.0}])
def test_sizes_out_of_range_are_refused(sizes):
    with pytest.raises(DimoError, match="1 to 64 sprites and 1 to 8 textures|must be a whole number"):
        SpritesWorld(**sizes)
