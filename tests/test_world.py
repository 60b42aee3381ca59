"""The shapes world and its oracle against brute force: every valid video listed. And what every world must do."""

import itertools
import math

import pytest
import torch

from dimo.errors import DimoError
from dimo.evaluation.metrics import measure
from dimo.evaluation.scored import coverage_detail, estimate_coverage, least_coverage
from dimo.evaluation.videos import Videos
from dimo.worlds import checkpoint_folder, is_world, load_world, video_size
from dimo.worlds.oracle import TOKENS, coverage, entropy, score
from dimo.worlds.protocol import Scores, prompt_index, prompt_length, prompts_to_train
from dimo.worlds.registry import WORLDS
from dimo.worlds.shapes import COLOURS, DIRECTIONS, SHAPES, ShapesWorld


def draw_by_hand(world, colour, shape, direction, y0, x0, o, b):
    """A valid video, cell by cell."""
    video = torch.full(world.latents_shape, b)
    dy, dx = DIRECTIONS[direction]
    code = world.background_shades + list(COLOURS).index(colour) * world.object_shades + o
    for f, (y, x) in itertools.product(range(world.frames), SHAPES[shape]):
        video[f, (y0 + y + f * dy) % world.height, (x0 + x + f * dx) % world.width] = code
    return video.flatten()


@pytest.fixture(scope="module")
def everything():
    """All valid videos of a small world, prompt by prompt."""
    world = ShapesWorld(2, 4, 4, object_shades=2, background_shades=2)
    videos, prompts = [], []
    for c, s, d in itertools.product(COLOURS, SHAPES, DIRECTIONS):
        for y, x, o, b in itertools.product(range(4), range(4), range(2), range(2)):
            videos.append(draw_by_hand(world, c, s, d, y, x, o, b))
            prompts.append(f"{c} {s} moving {d}")
    return world, torch.stack(videos), prompts


def test_every_valid_video_is_valid_and_adherent(everything):
    world, videos, prompts = everything
    scores = score(world, videos, prompts)
    assert scores.valid.all() and scores.adherent.all() and (scores.accuracy == 1).all()
    assert len(videos.unique(dim=0)) == len(videos)


def test_nearest_video_adherence_and_accuracy_are_brute_forces(everything, generator):
    world, videos, prompts = everything
    pick = torch.randint(len(videos), (60,), generator=generator)
    noisy = videos[pick].clone()
    change = torch.rand(noisy.shape, generator=generator) < torch.linspace(0, 1, 60)[:, None]
    noisy[change] = torch.randint(world.codebook_size, (int(change.sum()),), generator=generator)
    asked = [prompts[i] for i in torch.randint(len(videos), (60,), generator=generator).tolist()]
    asked[:30] = [prompts[i] for i in pick[:30].tolist()]
    got = score(world, noisy, asked)
    matches = (noisy[:, None] == videos[None]).sum(-1)
    assert torch.equal(got.accuracy, matches.max(1).values / world.num_visual_tokens)
    assert torch.equal(got.valid, (matches == world.num_visual_tokens).any(1))
    own = torch.tensor([[p == a for p in prompts] for a in asked])
    want = matches.masked_fill(~own, -1).max(1).values == matches.max(1).values
    assert torch.equal(got.adherent, want)


def test_positions_and_shades_are_those_that_were_drawn(everything):
    world, videos, prompts = everything
    scores = score(world, videos, prompts)
    labels = list(itertools.product(range(16), range(4)))  # two shades of the object times two of the background
    want = torch.tensor(labels * (len(videos) // len(labels)))
    (position, positions), (shade, shades) = scores.free["positions"], scores.free["shades"]
    assert torch.equal(torch.stack([position, shade], 1), want) and (positions, shades) == (16, 4)
    assert scores.prompt.tolist() == [world.prompts.index(p) for p in prompts]


SIZES = {"sprites": {"sprites": 1, "textures": 1, "strays": 0}}  # of worlds with very many prompts, or with strays


@pytest.mark.parametrize("name", WORLDS)
def test_every_world_knows_its_own_videos(name, generator):
    world = WORLDS[name](**SIZES.get(name, {}))
    n, prompts = math.prod(world.latents_shape), world.prompts
    drawn, codes = world.draw(20 * len(prompts), generator)
    assert world.name == name and len(set(prompts)) == len(prompts)
    assert sorted(prompts[i] for i in drawn.unique()) == sorted(prompts_to_train(world))
    drawn, codes = drawn[:200], codes[:200]
    assert codes.shape == (len(drawn), n) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < world.codebook_size
    scores = score(world, codes, [prompts[i] for i in drawn])
    assert scores.valid.all() and scores.adherent.all() and (scores.accuracy == 1).all()
    assert torch.equal(scores.prompt, drawn)
    for labels, bins in scores.free.values():
        assert labels.shape == drawn.shape and labels.min() >= 0 and labels.max() < bins
    others = score(world, codes, [prompts[(i + 1) % len(prompts)] for i in drawn])
    assert others.valid.all() and not others.adherent.any()
    assert world.codebook().shape[0] == world.codebook_size and world.codebook().dtype == torch.float32
    decoder = world.decoder()
    if decoder is not None:
        t, h, w = world.latents_shape
        frames = decoder.decode(codes[:2].view(-1, t, h, w))
        assert frames.shape == (2, 4 * t - 3, 8 * h, 8 * w, 3) and frames.min() >= 0 and frames.max() <= 1


def test_scores_do_not_depend_on_how_many_videos_are_scored_at_once(world, generator, monkeypatch):
    drawn, codes = world.draw(7, generator)
    codes[::2, 5] = 0
    prompts = [world.prompts[i] for i in drawn]
    whole = score(world, codes, prompts)
    for tokens in (1, 2 * 48 + 47):
        monkeypatch.setattr("dimo.worlds.oracle.TOKENS", tokens)
        parts = score(world, codes, prompts)
        for name in ("accuracy", "valid", "adherent", "prompt"):
            assert torch.equal(getattr(parts, name), getattr(whole, name))
        assert all(torch.equal(parts.free[name][0], whole.free[name][0]) for name in whole.free)
    assert TOKENS >= 48


def test_entropy_is_unbiased_where_the_plug_in_is_not(generator):
    p = torch.full((16,), 1 / 16)
    got, plug_in = [], []
    for _ in range(400):
        counts = torch.bincount(torch.multinomial(p, 50, replacement=True, generator=generator), minlength=16)
        got.append(entropy(counts))
        q = counts[counts > 0] / 50
        plug_in.append(-(q * q.log()).sum().item())
    assert abs(sum(got) / 400 - math.log(16)) < 0.02
    assert math.log(16) - sum(plug_in) / 400 > 0.12


def test_coverage_in_closed_form():
    everything = torch.arange(8).repeat(500)
    assert coverage(everything, 8) == pytest.approx(1.0, abs=1e-3)
    assert coverage(everything % 4, 8) == pytest.approx(math.log(4) / math.log(8), abs=1e-3)
    assert coverage(torch.zeros(100, dtype=torch.long), 8) == pytest.approx(0.0, abs=1e-3)
    assert coverage(torch.arange(7), 8) is None


def test_collapse_within_prompts_shows_per_prompt_and_not_pooled():
    """Every prompt makes one video of its own place and shades: pooled all places appear, per prompt only one."""
    world = ShapesWorld(2, 4, 4, 2, 2)
    prompts = [p for p in world.prompts for _ in range(32)]
    index = torch.arange(48).repeat_interleave(32)
    codes = world.render(world.attributes(index), index % 16, index % 2, index // 2 % 2)
    scores = score(world, codes, prompts)
    detail = coverage_detail(scores)
    assert scores.valid.all() and scores.adherent.all()
    assert list(detail) == ["positions", "positions_per_prompt", "shades", "shades_per_prompt"]
    assert detail["positions"] == pytest.approx(1.0, abs=0.01)
    assert detail["positions_per_prompt"] < 0.02 and least_coverage(detail) == min(detail.values())


def made_up_scores(prompts, generator):
    """Of 24 videos of each prompt, some of them not good; places are lost by single prompts, shades by all of them."""
    index = torch.arange(prompts).repeat_interleave(24)
    places = torch.randint(8, index.shape, generator=generator) // (1 + index % 3)
    shades = torch.randint(4, index.shape, generator=generator).clamp(max=2)
    valid, adherent = (torch.rand(index.shape, generator=generator) < 0.8 for _ in range(2))
    accuracy = torch.rand(index.shape, generator=generator) / 5 + 0.8
    return Scores(accuracy, valid, adherent, index, {"places": (places, 8), "shades": (shades, 4)})


def without(scores, prompt):
    kept = scores.prompt != prompt
    free = {name: (labels[kept], bins) for name, (labels, bins) in scores.free.items()}
    return Scores(*(x[kept] for x in (scores.accuracy, scores.valid, scores.adherent, scores.prompt)), free)


@pytest.mark.parametrize("near", [False, True])
def test_the_interval_of_coverage_leaves_out_one_prompt_after_the_other(near, generator):
    scores = made_up_scores(6, generator)
    again = [least_coverage(coverage_detail(without(scores, prompt), near)) for prompt in range(6)]
    mean = sum(again) / 6
    half = 2.571 * math.sqrt(5 / 6 * sum((x - mean) ** 2 for x in again))  # Student's t with 5 degrees of freedom
    found = estimate_coverage(scores, near)
    assert found.value == least_coverage(coverage_detail(scores, near)) < 0.8 and half > 0.01
    assert found.interval == pytest.approx((max(0, found.value - half), min(1, found.value + half)))
    name, codes = "coverage_near" if near else "coverage", torch.zeros(6 * 24, 1, 2, 2, dtype=torch.long)
    row = measure(Videos(codes, [""] * len(codes), copies=24, seconds=1.0, scores=scores))
    assert (row[name], row["intervals"][name]) == (found.value, list(found.interval))


def test_an_interval_of_coverage_ends_at_1_and_needs_every_prompt_left_out_to_be_defined(generator):
    scores = made_up_scores(4, generator)
    scores.valid[:], scores.adherent[:] = True, True
    places = torch.arange(96) % 8
    places[:24] = 0  # one prompt of four has lost all but one
    scores.free = {"places": (places, 8)}
    assert estimate_coverage(scores).interval[1] == 1.0
    scores.valid[48:] = False  # of four prompts two are defined, of the three without the first one only one is
    assert estimate_coverage(scores).value > 0 and estimate_coverage(scores).interval is None


def test_coverage_is_undefined_rather_than_zero_without_valid_videos(world, generator):
    codes = torch.randint(world.codebook_size, (48, world.num_visual_tokens), generator=generator)
    scores = score(world, codes, world.prompts)
    assert not scores.valid.any() and least_coverage(coverage_detail(scores)) is estimate_coverage(scores) is None
    scores.free = {}
    assert least_coverage(coverage_detail(scores)) is None  # of a world whose prompts leave nothing free


def test_the_codebook_is_a_metric_with_meaning(world):
    e = world.codebook()
    d = (e[:, None] - e[None]).square().sum(-1)
    family = torch.tensor(
        [-1] * world.background_shades + [i // world.object_shades for i in range(4 * world.object_shades)]
    )
    same = (family[:, None] == family[None]) & ~torch.eye(len(e), dtype=torch.bool)
    assert d[same].max() < d[family[:, None] != family[None]].max()
    assert torch.allclose(e.norm(dim=1), torch.ones(len(e)))


def test_palette_has_a_distinct_colour_per_code_and_ursas_strides(world, ursa):
    assert world.palette().min() >= 0 and world.palette().max() <= 1
    assert len(world.palette().unique(dim=0)) == world.codebook_size
    codes = torch.arange(48).view(1, 3, 4, 4) % world.codebook_size
    frames = ursa.vae.decode(codes)
    assert frames.shape == (1, 9, 32, 32, 3)
    for f, y, x in ((0, 0, 0), (1, 9, 31), (4, 31, 8), (5, 0, 0), (8, 16, 17)):
        cell = codes[0, 0 if f == 0 else 1 + (f - 1) // 4, y // 8, x // 8]
        assert torch.equal(frames[0, f, y, x], world.palette()[cell])


def test_a_folder_says_whether_it_is_a_world(world, tmp_path):
    folder = checkpoint_folder("shapes")
    assert is_world(folder) and is_world(str(folder)) and load_world(str(folder)) == world
    assert not is_world(tmp_path) and not is_world(tmp_path / "missing") and video_size(str(tmp_path)) == (17, 256, 256)
    with pytest.raises(DimoError, match="is not a world's checkpoint .it has no world.json., so no oracle can score"):
        load_world(tmp_path)
    for text, sentence in (
        ('{"world": "shaps"}', "names the world 'shaps', which is not registered; did you mean 'shapes'"),
        ('{"world": ["shapes"]}', "is not registered"),
        ('{"world": "shapes", "cells": 4}', "is damaged: .*cells"),
    ):
        (tmp_path / "world.json").write_text(text)
        with pytest.raises(DimoError, match=sentence):
            load_world(tmp_path)
    (tmp_path / "world.json").write_text('{"frames": 5}')  # written before there was a second world
    assert load_world(tmp_path) == ShapesWorld(frames=5) and video_size(tmp_path) == (17, 32, 32)


def test_prompts_have_an_index_and_a_length(world):
    assert prompt_index(world, world.prompts).tolist() == list(range(48)) and prompt_length(world) == 4


def test_bad_input_is_refused_in_a_sentence(world):
    good = torch.zeros(1, 48, dtype=torch.long)
    with pytest.raises(
        DimoError, match="does not know the prompt 'blue bar movin up'; did you mean 'blue bar moving up'"
    ):
        score(world, good, ["blue bar movin up"])
    with pytest.raises(DimoError, match=r"codes must have shape \(B, 48\)"):
        score(world, good[:, :-1], ["blue bar moving up"])
    with pytest.raises(DimoError, match=r"codes must lie in \[0, 10\)"):
        score(world, good - 1, ["blue bar moving up"])
    with pytest.raises(DimoError, match="one prompt per video"):
        score(world, good, [])
    with pytest.raises(DimoError, match="at least 2 frames of 4x4"):
        ShapesWorld(1, 4, 4)
    with pytest.raises(DimoError, match="must be at least 1"):
        ShapesWorld(object_shades=0)
    with pytest.raises(DimoError, match="at least one draw"):
        entropy(torch.zeros(3))
