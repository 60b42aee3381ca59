"""The shapes world and its oracle against brute force: every valid video listed."""

import itertools
import math

import pytest
import torch

from dimo.errors import DimoError
from dimo.worlds import checkpoint_folder, is_world, load_world, video_size
from dimo.worlds.oracle import coverage, entropy, score, summarise
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
    labels = list(itertools.product(range(16), range(2), range(2)))
    want = torch.tensor(labels * (len(videos) // len(labels)))
    got = torch.stack([scores.position, scores.object_shade, scores.background_shade], 1)
    assert torch.equal(got, want)


def test_render_and_draw_make_valid_videos(world, generator):
    prompt, codes = world.draw(300, generator)
    scores = score(world, codes, [world.prompts[i] for i in prompt])
    assert scores.valid.all() and scores.adherent.all()
    assert codes.max() < world.codebook_size and len(prompt.unique()) == len(world.prompts)


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
    codes = world.render(world.attributes(prompts), index % 16, index % 2, index // 2 % 2)
    row = summarise(world, score(world, codes, prompts))
    assert row["validity"] == row["adherence"] == row["token_accuracy"] == 1.0
    assert row["coverage_detail"]["positions"] == pytest.approx(1.0, abs=0.01)
    assert row["coverage_detail"]["positions_per_prompt"] < 0.02 and row["coverage"] < 0.02


def test_coverage_is_undefined_rather_than_zero_without_valid_videos(world, generator):
    codes = torch.randint(world.codebook_size, (48, world.num_visual_tokens), generator=generator)
    row = summarise(world, score(world, codes, world.prompts))
    assert row["validity"] == 0 and row["coverage"] is None


def test_a_wrong_prompt_is_not_adherent(world, generator):
    prompt, codes = world.draw(40, generator)
    others = [world.prompts[(i + 1) % len(world.prompts)] for i in prompt]
    scores = score(world, codes, others)
    assert scores.valid.all() and not scores.adherent.any()


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
    with pytest.raises(DimoError, match="is no built-in world .it has no world.json., so nothing here can score"):
        load_world(tmp_path)


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
