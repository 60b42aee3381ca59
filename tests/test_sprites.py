"""The sprites world: its drawing against Pillow's, its tokens, its oracle and exact teacher against brute force, and a
reader that sees pictures."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dimo.commands.cli import main, parse
from dimo.commands.sample import Request, sample_to_folder
from dimo.config import load_config
from dimo.errors import DimoError
from dimo.evaluation.evaluate import open_comparison, videos_of
from dimo.evaluation.metrics import measure
from dimo.evaluation.summary import format_summary
from dimo.train.prompts import open_prompts
from dimo.ursa import MetricPath, UrsaTransformer, load_ursa, predict, sample
from dimo.ursa.loading import load_student
from dimo.ursa.patch_vae import PatchVae
from dimo.worlds import built_in_worlds, checkpoint_folder, load_world, student_of
from dimo.worlds.exact import FLOOR, ExactTeacher
from dimo.worlds.oracle import score
from dimo.worlds.protocol import prompt_index, prompt_length, prompts_to_score, prompts_to_train
from dimo.worlds.sprite_frames import MOTIONS, PICTURES, SPRITES, STRENGTHS, TEXTURES, TIMES, render, starts
from dimo.worlds.sprite_reader import agreement, read, reads_as
from dimo.worlds.sprites import FSQ, SpritesWorld
from dimo.worlds.teacher import RECIPES, TeacherRecipe, encode, train_teacher, ursa_config, write_checkpoint

KINDS = [(motion, strength) for motion in MOTIONS for strength in STRENGTHS]
STEPS = {  # cells (down, right), pixels of the emoji and quarters clockwise, of the five latent frames
    ("moving left", 4): [(0, -2 * f, 24, 0) for f in range(5)],
    ("moving right", 2): [(0, f, 24, 0) for f in range(5)],
    ("moving up", 2): [(-f, 0, 24, 0) for f in range(5)],
    ("moving down", 4): [(2 * f, 0, 24, 0) for f in range(5)],
    ("bouncing", 4): [(-h, 0, 24, 0) for h in (0, 2, 4, 2, 0)],
    ("bouncing", 2): [(-h, 0, 24, 0) for h in (0, 1, 2, 1, 0)],
    ("turning right", 4): [(0, 0, 24, q) for q in (0, 1, 2, 3, 0)],
    ("turning left", 2): [(0, 0, 24, q) for q in (0, 0, 3, 3, 2)],
    ("zooming in", 4): [(0, 0, size, 0) for size in (12, 12, 16, 24, 24)],
    ("zooming out", 2): [(0, 0, size, 0) for size in (24, 24, 16, 16, 16)],
}


@pytest.fixture(scope="module")
def sprites():
    return SpritesWorld()


@pytest.fixture(scope="module")
def clips(sprites):
    """18 clips of held-out prompts, of all motions and strengths: prompts, prompt indices, starts and phases, codes."""
    prompts = sprites.held_out[:18]
    chosen = sprites.choose(18, torch.Generator().manual_seed(3), prompt_index(sprites, prompts))
    return prompts, chosen, sprites.render(*chosen)


@pytest.fixture(scope="module")
def small():
    """Two sprites over one texture, and all of its clips by brute force: prompt indices and codes."""
    world = SpritesWorld(sprites=2, textures=1, strays=40)
    prompts, begins, phases = [], [], []
    for prompt, (kind, _) in enumerate(itertools.product(range(2 * 18), range(3))):
        rows, columns = starts().flatten(0, 1)[kind % 18, :, 1].tolist()
        for begin, phase in itertools.product(range(rows * columns), range(4)):
            prompts.append(prompt)
            begins.append(begin)
            phases.append(phase)
    prompts, begins, phases = (torch.tensor(x) for x in (prompts, begins, phases))
    parts = zip(prompts.split(4096), begins.split(4096), phases.split(4096))
    return world, prompts, torch.cat([world.render(*part).short() for part in parts])


def by_pillow(sprite, texture, time, phase, y, x, size, quarters):
    """One frame, (128, 128, 3) in [0, 1]: a card with its corner at y, x."""
    sheet = Image.open(PICTURES / "textures.png").convert("RGBA")
    tile = sheet.crop((16 * texture, 16 * time, 16 * texture + 16, 16 * time + 16))
    frame = Image.new("RGBA", (128, 128))
    for top in range(-8 * (phase // 2), 128, 16):
        for left in range(-8 * (phase % 2), 128, 16):
            frame.paste(tile, (left, top))
    corner = sprite % 8 * 52 + {24: 0, 16: 24, 12: 40}[size], sprite // 8 * 24
    emoji = Image.open(PICTURES / "sprites.png").crop((*corner, corner[0] + size, corner[1] + size))
    emoji, layer = emoji.rotate(-90 * quarters), Image.new("RGBA", (32, 32))
    layer.paste(emoji, (16 - size // 2, 16 - size // 2))
    for end in ((0, 0), (24, 0), (0, 24), (24, 24)):  # the corners of a card hold no emoji
        layer.paste((0, 0, 0, 0), (*end, end[0] + 8, end[1] + 8))
    card = Image.alpha_composite(Image.open(PICTURES / "card.png").convert("RGBA"), layer)
    frame.alpha_composite(card, (x, y))
    return np.asarray(frame.convert("RGB")) / 255


@pytest.mark.parametrize("motion, strength", STEPS)
def test_clips_are_drawn_as_pillow_draws_them(motion, strength):
    m, s = MOTIONS.index(motion), STRENGTHS.index(strength)
    (top, rows), (left, columns) = starts()[m, s].tolist()
    sprite, texture, time, phase = 20 + 4 * m, m % 8, s + 1, (m + s) % 4
    given = (sprite, m, s, rows - 1, columns // 2, texture, time, phase)
    frames = render(*(torch.tensor([value]) for value in given))[0].numpy()
    for f in range(17):
        down, right, size, quarters = STEPS[motion, strength][(f + 3) // 4]
        at = 8 * (top + rows - 1 + down), 8 * (left + columns // 2 + right)
        want = by_pillow(sprite, texture, time, phase, *at, size, quarters)
        assert np.abs(frames[f] - want).max() < 1.5 / 255, f


def test_cards_stay_in_the_picture_and_quarters_are_equally_likely():
    first, count = starts().unbind(-1)
    assert (count % 4 == 0).all() and (count >= 4).all() and (first >= 0).all()
    for (motion, strength), way in STEPS.items():
        for axis in (0, 1):
            low = first[MOTIONS.index(motion), STRENGTHS.index(strength), axis]
            high = low + count[MOTIONS.index(motion), STRENGTHS.index(strength), axis] - 1
            assert low + min(step[axis] for step in way) >= 0
            assert high + max(step[axis] for step in way) <= 12


def test_tokens_are_the_pictures_without_any_loss(sprites, clips):
    _, chosen, codes = clips
    frames, grid = render(*sprites.factors(*chosen)), codes.view(-1, 5, 16, 16)
    vae = sprites.decoder()
    assert torch.equal(vae.decode(grid), frames)
    frames, grid = frames[::6], grid[::6]
    assert torch.equal(vae.encode(frames), grid)
    noisy = (frames + 0.0019 * torch.rand(frames.shape)).clamp(0, 1)  # less than half of 1/255
    assert torch.equal(vae.encode(noisy), grid)


def test_prompts_are_words_and_some_are_held_out(sprites, generator):
    assert len(set(sprites.prompts)) == 64 * 9 * 2 * 8 * 3
    assert "a red car moving left over sand, motion=4.0" in sprites.prompts
    assert "an owl zooming in over water at dusk, motion=2.0" in sprites.prompts
    pattern = re.compile(
        rf"an? ({'|'.join(SPRITES)}) ({'|'.join(MOTIONS)}) "
        rf"over ({'|'.join(TEXTURES)})({'|'.join(TIMES)}), motion=[24].0"
    )
    assert all(pattern.fullmatch(prompt) for prompt in sprites.prompts)
    for prompt in (0, 4321, 27647):
        sprite, kind, behind = (int(x) for x in sprites.attributes(torch.tensor(prompt)))
        texture, time = TEXTURES[behind // 3], TIMES[behind % 3]
        words = f" {list(SPRITES)[sprite]} {KINDS[kind][0]} over {texture}{time}, motion={KINDS[kind][1]}.0"
        assert sprites.prompts[prompt].endswith(words)
    held_out = prompt_index(sprites, sprites.held_out)
    assert [len(factor.unique()) for factor in sprites.attributes(held_out)] == [64, 18, 24]
    drawn = sprites.choose(300_000, generator)[0]
    assert not torch.isin(drawn, held_out).any() and len(drawn.unique()) > 27_000
    assert prompts_to_score(sprites) == sprites.held_out
    assert sorted(prompts_to_train(sprites) + sprites.held_out) == sorted(sprites.prompts)


def test_neighbours_in_the_codebook_look_alike_and_all_codes_differ(sprites, generator):
    book, patches = sprites.codebook(), sprites.decoder().patches.flatten(1).float()
    assert len(book) == sprites.codebook_size == 4096 and torch.allclose(book.norm(dim=1), torch.ones(4096))
    assert torch.allclose(MetricPath(book, 0.9, 3.0).codebook, book, atol=1e-6)
    assert torch.cdist(book, book).fill_diagonal_(9).min() > 0.1
    assert len(patches.unique(dim=0)) == 4096 and 4000 < len(sprites.used_codes) < 4096
    order = torch.randperm(4096, generator=generator)
    apart = (patches - patches[order]).square().mean()
    for dimension, levels in enumerate(FSQ):
        code, step = torch.arange(4096), 8**dimension
        code = code[code // step % levels < levels - 1]
        assert (patches[code] - patches[code + step]).square().mean() < 0.6 * apart


def test_the_tokenizer_of_a_folder_is_the_one_that_was_saved(tmp_path, sprites):
    vae = sprites.decoder()
    vae.save(tmp_path)
    assert torch.equal(PatchVae.load(tmp_path).patches, vae.patches)
    frames = torch.zeros(1, 16, 128, 128, 3)
    for bad, sentence in (
        (lambda: vae.encode(frames), r"frames must be 4 .T-1. \+ 1 of 8 H x 8 W pixels, got 16 of 128x128"),
        (lambda: vae.encode(frames[..., :2]), r"frames must have shape"),
        (lambda: vae.decode(torch.full((1, 1, 1, 1), 4096)), r"codes must lie in \[0, 4096\)"),
        (lambda: PatchVae(torch.zeros(4, 8, 8, 3)), "patches must be uint8, got torch.float32"),
    ):
        with pytest.raises(DimoError, match=sentence):
            bad()


def test_the_oracle_is_brute_force(small, generator):
    world, prompts, videos = small
    assert len(videos) == 2 * 1920 * 12 and len(videos[:2304].unique(dim=0)) == 2304
    pick = torch.randint(len(videos), (8,), generator=generator)
    codes = videos[pick].long()
    asked = torch.where(torch.arange(8) % 2 == 0, prompts[pick], (prompts[pick] + 7) % 108)
    other = torch.rand(codes.shape, generator=generator) < torch.linspace(0, 0.98, 8)[:, None]
    codes[other] = videos[torch.randint(len(videos), (1,), generator=generator)].long().expand_as(codes)[other]
    got = score(world, codes, [world.prompts[i] for i in asked])
    matches = torch.stack([(videos == row.short()).view(torch.int8).sum(1, dtype=torch.int16) for row in codes]).long()
    own = matches.masked_fill(prompts != asked[:, None], -1).max(1).values
    assert torch.equal(got.accuracy, matches.max(1).values / 1280) and torch.equal(
        got.valid, matches.max(1).values == 1280
    )
    assert torch.equal(got.adherent, own == matches.max(1).values)
    assert torch.equal(got.prompt, prompts[matches.argmax(1)])
    places, phases = got.free["places"][0], got.free["phases"][0]
    assert torch.equal(phases, matches.argmax(1) % 4) and places.max() < 16


def test_places_are_equally_likely(sprites):
    kinds = torch.arange(18) * 24
    for prompt in kinds.tolist():
        count = int(starts().flatten(0, 1)[prompt // 24, :, 1].prod())
        begin = torch.arange(count)
        codes = sprites.render(torch.full((count,), prompt), begin, begin % 4)[:: max(1, count // 16)]
        assert count % 16 == 0 and len(codes) >= 16
        if prompt == 24:  # moving left at 4.0
            whole = SpritesWorld(1, 1).render(torch.full((count,), 3), begin, begin % 4)
            labels = score(SpritesWorld(1, 1), whole, [SpritesWorld(1, 1).prompts[3]] * count).free["places"][0]
            assert torch.bincount(labels, minlength=16).tolist() == [count // 16] * 16


@pytest.fixture(scope="module")
def exact(small):
    return ExactTeacher(small[0], MetricPath(small[0].codebook(), 0.9, 3.0))


@pytest.mark.parametrize("t, asked", [(0.1, 5), (0.03, None)])
def test_the_exact_teacher_is_bayes_rule_over_all_clips(small, exact, generator, t, asked):
    world, prompts, videos = small
    x_t = exact.path.sample(videos[torch.randint(len(videos), (1,), generator=generator)].long(), t, generator)
    txt_ids = encode(world, world.prompts[5:6]) * (asked is not None)  # 0 is <pad>
    got = exact.predict(txt_ids, x_t, world.latents_shape, t)
    beta, points = 3.0 * (t / (1 - t)) ** 0.9, exact.path.codebook.double()
    log_p = (-beta * torch.cdist(points, points).square()).log_softmax(0)[x_t[0]]  # log p_t(x_t | x_1), (N, K)
    clip = torch.cat([log_p.gather(1, part.T.long()).sum(0) for part in videos.split(4096)])
    number = torch.bincount(prompts)[prompts].double()  # every prompt's clips are as likely as another's
    prior = 1 / (108 * number)
    if asked is not None:
        prior = 0.4 * prior + 0.6 * (prompts == asked) / number
    weight = (clip + prior.log()).softmax(0)
    some = torch.randperm(1280, generator=generator)[:100]  # positions
    want = torch.zeros(100, 4096, dtype=torch.float64)
    want.scatter_add_(1, videos[:, some].T.long(), weight.expand(100, -1))
    want = want[:, got.codes[0, 0]].clamp(min=np.exp(FLOOR))
    assert torch.allclose(got.log_p[0, some].exp().double(), want, atol=1e-6) and (want.sum(1) - 1).abs().max() < 1e-6
    assert want.max(1).values.min() < 0.9


def test_codes_that_symmetries_of_the_codebook_map_to_each_other_share_a_normaliser(small, monkeypatch):
    """A code's four levels in another order leave its distances as they are: so is log Z."""
    monkeypatch.setattr("dimo.worlds.exact.KNOTS", 4)
    beta = torch.tensor([0.0, 0.4, 3.0, 40.0, 1000.0], dtype=torch.float64)
    path = MetricPath(small[0].codebook(), 0.9, 3.0)
    shared, alone = (ExactTeacher(small[0], path) for _ in range(2))
    got = shared._log_normaliser(beta)
    levels = torch.stack([shared.codes // 8**i % 8 for i in range(4)], 1).sort(1).values
    assert shared._normaliser.values.shape[1] == len(levels.unique(dim=0)) < len(levels)
    monkeypatch.setattr("dimo.worlds.exact._groups", lambda distance: (torch.arange(len(distance)),) * 2)
    want = alone._log_normaliser(beta)
    assert alone._normaliser.values.shape[1] == len(levels)
    assert got.std(1).max() > 0.1 and torch.allclose(got, want, rtol=1e-13, atol=1e-13)


def test_strays_show_what_another_prompt_asks_for(generator):
    world = dataclasses.replace(SpritesWorld(sprites=4, textures=2), strays=50)
    drawn, codes = world.draw(160, generator)
    scores = score(world, codes, [world.prompts[i] for i in drawn])
    assert scores.valid.all() and 0.35 < scores.adherent.float().mean() < 0.65


def said(factor, prompt):
    """What a prompt says of a factor, by its words."""
    what = prompt.split(", motion=")[0]
    (motion,) = (m for m in MOTIONS if f" {m} " in what)
    sprite, behind = what.split(f" {motion} ")
    time = next((t for t in TIMES if t and behind.endswith(t)), "")
    texture = behind.removesuffix(time).split()[1]
    said = {"sprite": sprite, "motion": motion, "strength": prompt.split("=")[1], "texture": texture, "time": time}
    return said[factor]


def test_the_reader_reads_held_out_clips_as_drawn_and_is_not_sure_of_what_is_no_clip(sprites, clips, generator):
    prompts, chosen, codes = clips
    frames = sprites.decoder().decode(codes.view(-1, 5, 16, 16))
    seen = read(frames)
    assert (
        torch.equal(torch.stack(seen.choice()), torch.stack(sprites.factors(*chosen))) and seen.confidence.min() > 0.99
    )
    assert reads_as(sprites, codes[:4], chosen[0][:4]).all() and not reads_as(sprites, codes[:4], chosen[0][4:8]).any()
    words = [[sprites.prompts[i] for i in some.tolist()] for some in (chosen[0][:4], chosen[0][4:8])]
    for name, right in agreement(sprites, codes[:4], chosen[0][4:8]).items():
        assert name == "sure" or right.tolist() == [said(name, a) == said(name, b) for a, b in zip(*words)]
    four, other = frames[:4], frames[4:8]
    for bad in (
        torch.cat([four[:, :9], other[:, 9:]], 1),  # another clip from half time on
        torch.cat([four[:, :, :, :64], other[:, :, :, 64:]], 3),  # another one on the right
        torch.rand(four.shape, generator=generator),
    ):
        assert read(bad).confidence.max() < 0.6


def test_a_small_world_is_trained_sampled_and_evaluated(tmp_path):
    world, folder = SpritesWorld(sprites=1, textures=1), tmp_path / "teacher"
    recipe = TeacherRecipe(layers=1, hidden=32, heads=2, batch_size=2, steps=2)
    write_checkpoint(folder, world, train_teacher(world, recipe, progress=False), recipe.alpha, recipe.c)
    assert load_world(folder) == world and isinstance(load_ursa(folder).vae, PatchVae)
    (video,) = sample_to_folder(Request(teacher_ckpt=str(folder), steps=2), world.held_out, tmp_path / "made")
    assert video.suffix == ".mp4"
    config = load_config("sprites", [f"distill.teacher_ckpt={folder}", "model.device=cpu"])
    assert open_prompts(config, load_ursa(folder)).examples == prompts_to_train(world)
    comparison, _ = open_comparison(config, folder / "transformer")
    assert set(comparison.prompts) == set(world.held_out)


def test_a_teacher_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, world):
    recipe, kept = TeacherRecipe(layers=1, hidden=32, heads=2, batch_size=4, steps=7), tmp_path / "half.pt"
    whole = train_teacher(world, recipe, progress=False)
    monkeypatch.setattr("dimo.worlds.teacher.KEEP_EVERY", 3)
    draws, draw = iter(range(99)), type(world).draw

    def stops(self, size, generator):
        if next(draws) == 5:
            raise KeyboardInterrupt
        return draw(self, size, generator)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(world), "draw", stops)
        train_teacher(world, recipe, progress=False, kept=kept)
    with pytest.raises(DimoError, match="holds a teacher that is half trained, with other values of lr: give those"):
        train_teacher(world, dataclasses.replace(recipe, lr=1e-3), progress=False, kept=kept)
    again = train_teacher(world, recipe, progress=False, kept=kept)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(DimoError, match="half.pt is damaged"):
        train_teacher(world, recipe, progress=False, kept=kept)


def test_teacher_and_student_are_12_megabytes_in_bf16(sprites):
    with torch.device("meta"):
        transformer = UrsaTransformer(ursa_config(sprites, RECIPES["sprites"]))
    assert 2 * 2 * sum(p.numel() for p in transformer.parameters()) < 12e6 - 100_000


def test_without_a_teacher_a_sentence_says_how_to_train_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DimoError, match="worlds/tiles is neither a folder .*`dimo world train tiles -o worlds/tiles` makes"
    ):
        checkpoint_folder(load_config("tiles").distill.teacher_ckpt)
    with pytest.raises(DimoError, match="tiles ships without a teacher: train one with `dimo world train tiles -o"):
        checkpoint_folder("tiles")


@pytest.mark.parametrize("name", built_in_worlds())
def test_a_teacher_that_ships_knows_its_world(name, generator):
    folder = checkpoint_folder(name)
    ursa, shipped = load_ursa(folder), load_world(folder)
    assert shipped.name == name
    assert sum(file.stat().st_size for part in ("transformer", "student") for file in (folder / part).glob("*")) < 12e6
    index, clean = shipped.draw(4, generator)
    txt_ids = ursa.tokenize([shipped.prompts[i] for i in index], prompt_length(shipped))
    noised = ursa.path.sample(clean, 0.5, generator)
    told = predict(ursa.transformer, txt_ids, noised, shipped.latents_shape).argmax()
    assert (told == clean).float().mean() > max(0.9, (noised == clean).float().mean())


@pytest.mark.parametrize("name", [name for name in built_in_worlds() if student_of(name)])
def test_a_student_that_ships_is_called_by_its_world(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = load_world(checkpoint_folder(name)).prompts[0]
    assert main(["sample", "--student_ckpt", name, "--prompt", prompt, "--out_dir", "out"]) == 0
    how = json.loads((tmp_path / "out/0000.json").read_text())
    assert (how["teacher_ckpt"], how["steps"], how["prompt"]) == (name, 1, prompt)
    assert Path(how["student_ckpt"]) == checkpoint_folder(name) / "student"


def test_an_evaluation_reports_what_the_reader_sees_in_the_judged_videos(sprites):
    prompts = [prompt for prompt in sprites.held_out[:4] for _ in range(3)]
    index = prompt_index(sprites, prompts)
    codes = sprites.render(*sprites.choose(12, torch.Generator().manual_seed(5), index)).view(4, 3, -1)
    codes[0, 0], codes[1, 2] = codes[2, 0], codes[2, 0]  # another prompt's, of which the second is not judged
    path = MetricPath(sprites.codebook(), 0.9, 2.0)
    about = {"prompts": prompts, "copies": 3, "grid": sprites.latents_shape, "ursa": SimpleNamespace(path=path)}
    row = {"codes": codes.flatten(0, 1), "seconds": torch.ones(1), "pixel_motion": torch.ones(8)}  # two of each judged
    measured = measure(videos_of(SimpleNamespace(**about), row, sprites))
    assert measured["read"] == 7 / 8 and measured["adherence"] == pytest.approx(10 / 12)
    low, high = measured["intervals"]["read"]
    assert low < 7 / 8 <= high <= 1
    alone = measure(videos_of(SimpleNamespace(**about), {"codes": row["codes"], "seconds": torch.ones(1)}, sprites))
    assert alone["read"] == 3 / 4 and "teacher_nll" not in alone  # no judge: the first video of each prompt
    shown = format_summary({"student_1": measured})
    assert "read" in shown.splitlines()[0] and "0.875" in shown


def test_most_clips_of_the_student_that_ships_read_as_their_prompts(sprites, generator):
    ursa = load_ursa(checkpoint_folder("sprites"))
    student, prompts = load_student(ursa, student_of("sprites")), sprites.held_out[::6]
    x_init = torch.randint(sprites.codebook_size, (len(prompts), 1280), generator=generator)
    txt_ids = ursa.tokenize(prompts, prompt_length(sprites))
    codes = sample(student, ursa.path, txt_ids, sprites.latents_shape, 1, x_init=x_init, generator=generator)
    index = prompt_index(sprites, prompts)
    right = reads_as(sprites, codes, index).float().mean()
    assert right > 0.5 and not reads_as(sprites, codes, index.roll(1)).any()


def test_the_codebook_that_ships_is_the_worlds_bit_for_bit():
    """A run knows it by a digest; in float32 it would differ from machine to machine."""
    file = checkpoint_folder("sprites") / "scheduler" / "scheduler_model.pth"
    assert torch.equal(torch.load(file, weights_only=True)["path.emb"], SpritesWorld().codebook())


def test_a_world_without_a_student_says_how_to_make_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["sample", "--student_ckpt", "tiles", "--prompt", "x"], ["evaluate", "tiles"]):
        assert main(words) == 2
        said = "the world tiles ships without a student: `dimo train -c tiles` distils one"
        assert said in capsys.readouterr().err


def test_the_command_proposes_the_worlds_own_network(capsys):
    args = parse(["world", "train", "sprites", "-o", "x"])
    assert (args.layers, args.hidden, args.sprites, args.textures, args.strays) == (6, 160, 64, 8, 15)
    assert parse(["world", "train", "shapes", "-o", "x"]).layers == TeacherRecipe().layers


@pytest.mark.parametrize("sizes", [{"sprites": 0}, {"sprites": 65}, {"textures": 9}, {"textures": 1.0}, {"strays": 91}])
def test_sizes_out_of_range_are_refused(sizes):
    with pytest.raises(
        DimoError, match="1 to 64 sprites and 1 to 8 textures|must be a whole number|strays must lie in"
    ):
        SpritesWorld(**sizes)


def test_the_page_lists_the_words_of_prompts():
    page = (Path(__file__).parents[1] / "docs" / "sprites.md").read_text()
    listed = re.search(r"^The emoji: (.*?)\.$", page, re.DOTALL | re.MULTILINE)[1]
    assert " ".join(listed.split()).split(", ") == list(SPRITES)
    assert f"one of eight textures ({', '.join(TEXTURES)})" in page
