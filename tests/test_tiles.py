"""The tiles world and its exact teacher against brute force: every video drawn token by token, Bayes' rule over all."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dimo.commands.cli import parse
from dimo.config import load_config
from dimo.distill import stages
from dimo.distill.stages import Step
from dimo.errors import DimoError, trusted_values
from dimo.train.prompts import WorldPrompts
from dimo.train.watch import make_reference
from dimo.ursa import MetricPath, MixturePath, Sparse, load_ursa, predict, predict_guided, sample, visual_logits
from dimo.ursa.chunks import ENTRIES
from dimo.ursa.transformer import UrsaTransformer
from dimo.worlds import denoising, load_world
from dimo.worlds.exact import FLOOR, ExactTeacher
from dimo.worlds.fsq import LEVELS, fsq_codebook
from dimo.worlds.oracle import score
from dimo.worlds.shapes import ShapesWorld
from dimo.worlds.teacher import TeacherRecipe, encode, make_teacher, train_teacher, ursa_config, write_checkpoint
from dimo.worlds.tiles import SIZES, TilesWorld

GRID, N = (2, 4, 4), 32
STEPS = {"right": (0, 1), "down": (1, 0)}


@pytest.fixture(scope="module")
def tiny():
    return TilesWorld(*GRID, codes=16, palettes=2, shades=2)


def by_hand(world, prompt, palette, place, object_phase, background_phase, stray=False):
    """A valid video, token by token; as a stray, with the other subject's object."""
    subject, texture, _, direction = prompt.split()
    used, (dy, dx), video = world.used_codes.tolist(), STEPS[direction], []
    h, w = world.height // 4, world.width // 4
    for f, y, x in itertools.product(range(world.frames), range(world.height), range(world.width)):
        top, left = place // 4 + f * dy, place % 4 + f * dx
        inside = (y // h - top) % 4 < 2 and (x // w - left) % 4 < 2
        along = x + y if texture == "checks" else x
        shade = (along + (object_phase if inside else background_phase)) % world.shades
        whose = ["meadow", "harbour"].index(subject) ^ (stray and inside)
        hue = 2 * world.palettes * whose + 2 * palette + inside
        video.append(used[hue * world.shades + shade])
    return video


@pytest.fixture(scope="module")
def everything(tiny):
    """All 8 x 128 videos, prompt by prompt."""
    free = list(itertools.product(range(2), range(16), range(2), range(2)))
    return torch.tensor([[by_hand(tiny, prompt, *one) for one in free] for prompt in tiny.prompts])


@pytest.fixture(scope="module")
def straying():
    """The same world, with 40% strays."""
    return TilesWorld(*GRID, codes=16, palettes=2, shades=2, strays=40)


@pytest.fixture(scope="module")
def strays(tiny):
    free = list(itertools.product(range(2), range(16), range(2), range(2)))
    return torch.tensor([by_hand(tiny, prompt, *one, stray=True) for prompt in tiny.prompts for one in free])


@pytest.fixture(scope="module")
def path(tiny):
    return MetricPath(tiny.codebook(), 0.9, 3.0)


@pytest.fixture(scope="module")
def teacher(tiny, path):
    return ExactTeacher(tiny, path)


@pytest.mark.parametrize("codes", LEVELS)
def test_the_codebook_is_every_combination_of_levels(codes):
    levels = LEVELS[codes]
    rows = itertools.product(*[[(i - n // 2) / (n // 2) for i in range(n)] for n in levels[::-1]])
    assert torch.equal(fsq_codebook(levels), torch.tensor([row[::-1] for row in rows])) and len(levels) >= 4


def test_ursas_codebook_ends_where_its_own_does():
    book = fsq_codebook((8, 8, 8, 5, 5, 5))
    assert book.shape == (64_000, 6) and book[1].tolist() == [-0.75, -1, -1, -1, -1, -1]
    assert book[-1].tolist() == [0.75, 0.75, 0.75, 1, 1, 1]


@pytest.mark.parametrize("codes, palettes, shades", [(16, 2, 2), (256, 4, 4), (64_000, 4, 8)])
def test_shades_of_a_hue_are_near_and_hues_far(codes, palettes, shades):
    world = TilesWorld(codes=codes, palettes=palettes, shades=shades)
    points = torch.nn.functional.normalize(world.codebook(), dim=-1)[world.used_codes].view(4 * palettes, shades, -1)
    levels = world.used_codes.view(-1, shades)
    assert (levels.diff(dim=1) == 1).all() and (levels // LEVELS[codes][0]).diff(dim=1).eq(0).all()
    neighbours = points.diff(dim=1).square().sum(-1)
    middle = torch.pdist(points[:, shades // 2]).square()
    everything = torch.pdist(points.flatten(0, 1)).square()
    assert everything.min() > 1e-3 and neighbours.mean() < middle.mean() / 2


def test_the_used_codes_stay_what_they_were():
    used = TilesWorld(codes=64_000).used_codes.view(8, 2)
    assert used[:, 0].tolist() == [3, 48051, 2043, 11387, 21963, 32475, 42163, 46371]


def test_drawn_videos_are_those_drawn_by_hand(tiny, everything, generator):
    prompt, codes = tiny.draw(4000, generator)
    flat = everything.flatten(0, 1).tolist()
    known = {tuple(video): i for i, video in enumerate(flat)}
    index = torch.tensor([known[tuple(video)] for video in codes.tolist()])  # all are valid
    assert len(known) == 8 * 128 and torch.equal(index // 128, prompt)
    counts = torch.bincount(index, minlength=1024).float()
    assert (counts > 0).float().mean() > 0.95 and ((counts - 4000 / 1024) ** 2 / (4000 / 1024)).sum() < 1024 + 250


def test_every_video_is_valid_and_its_labels_are_what_was_chosen(tiny, everything):
    videos = everything.flatten(0, 1)
    scores = score(tiny, videos, [p for p in tiny.prompts for _ in range(128)])
    assert scores.valid.all() and scores.adherent.all() and (scores.accuracy == 1).all()
    want = torch.tensor(list(itertools.product(range(2), range(16), range(2), range(2)))).repeat(8, 1)
    assert torch.equal(torch.stack([labels for labels, _ in scores.free.values()], 1), want)
    assert {name: bins for name, (_, bins) in scores.free.items()} == {
        "palettes": 2, "places": 16, "object_phases": 2, "background_phases": 2
    }  # fmt: skip
    assert torch.equal(scores.prompt, torch.arange(8).repeat_interleave(128))


def test_the_nearest_video_is_brute_forces(tiny, everything, generator):
    prompt, codes = tiny.draw(60, generator)
    change = torch.rand(codes.shape, generator=generator) < torch.linspace(0, 1, 60)[:, None]
    codes = torch.where(change, torch.randint(16, codes.shape, generator=generator), codes)
    prompt[::3] = torch.randint(8, (20,), generator=generator)
    got = score(tiny, codes, [tiny.prompts[i] for i in prompt])
    matches = (codes[:, None, None] == everything).sum(-1)  # (60, 8, 128)
    best = matches.flatten(1).amax(1)
    assert torch.equal(got.accuracy, best / N) and torch.equal(got.valid, best == N)
    assert torch.equal(got.adherent, matches[torch.arange(60), prompt].amax(1) == best)


@pytest.mark.parametrize("size", [{"shades": 3}, {"height": 8, "width": 4}, {"codes": 1000, "palettes": 3}])
def test_totals_of_other_shapes(size, generator):
    world = TilesWorld(**({"frames": 2, "codes": 256} | size))
    values = torch.rand((2, world.num_visual_tokens, len(world.used_codes)), generator=generator).double()
    slot = {code: i for i, code in enumerate(world.used_codes.tolist())}
    totals = world.totals(values)
    assert totals.shape == (2, 8, world.palettes * 16 * world.shades**2)
    free = list(itertools.product(range(world.palettes), range(16), range(world.shades), range(world.shades)))
    for p, m in itertools.product((0, 3, 6), (0, len(free) // 2 + 1, len(free) - 1)):
        video = torch.tensor([slot[code] for code in by_hand(world, world.prompts[p], *free[m])])
        want = values.gather(2, video.expand(2, -1)[..., None]).sum((1, 2))
        assert torch.allclose(totals[:, p, m], want, atol=1e-12)


def bayes(everything, x_t, t, prompt, alpha=0.9, c=3.0, strays=None, share=0.0):
    """p(x_1^i = k | x_t) of one sample, (N, 16) float64: the weight of every video, one by one."""
    levels = itertools.product((-1.0, 0.0), repeat=4)
    book = torch.tensor([row[::-1] for row in levels], dtype=torch.float64)
    book = book / book.norm(dim=-1, keepdim=True).clamp(min=1e-5)
    distance = (book[:, None] - book).square().sum(-1)  # (clean, noisy)
    beta = c * (t / (1 - t)) ** alpha  # (N,)
    noise = torch.softmax(-beta[:, None, None] * distance, -1)  # (N, clean, noisy)
    likelihood = noise[torch.arange(N), :, x_t]  # (N, clean)
    videos = everything.flatten(0, 1) if prompt is None else everything[prompt]
    prior = torch.full((len(videos),), (1 - share) / len(videos))
    if strays is not None:
        prior = torch.cat([prior, torch.full((len(strays),), share / len(strays))])
        videos = torch.cat([videos, strays])
    weights = torch.stack([likelihood[torch.arange(N), video].log().sum() for video in videos])
    weights = (weights + prior.log()).softmax(0)
    marginal = torch.zeros(N, 16, dtype=torch.float64)
    for weight, video in zip(weights, videos):
        marginal[torch.arange(N), video] += weight
    return marginal


def times(kind, batch, generator):
    if kind == "number":
        return 0.3
    if kind == "sample":
        return torch.tensor([0.0, 0.1, 0.3, 0.6])[:batch]
    return (torch.rand((batch, 2), generator=generator) * 0.9).repeat_interleave(16, 1)


@pytest.mark.parametrize("kind", ["number", "sample", "frame"])
def test_the_posterior_is_bayes_rule(tiny, everything, path, teacher, kind, generator):
    prompt, codes = tiny.draw(4, generator)
    t = times(kind, 4, generator)
    x_t = path.sample(codes, t, generator)
    txt_ids = encode(tiny, [tiny.prompts[i] for i in prompt])
    txt_ids[3] = 0  # the empty prompt
    txt_ids = torch.cat([torch.zeros(4, 2, dtype=torch.long), txt_ids], 1)  # longer, padded on the left
    got = teacher.predict(txt_ids, x_t, GRID, t).logits().double()
    per_token = torch.as_tensor(t).double().view(-1, 1) if kind == "sample" else torch.as_tensor(t).double()
    for b, at in enumerate(per_token.expand(4, N)):
        want = bayes(everything, x_t[b], at, None if b == 3 else int(prompt[b]))
        assert torch.allclose(got[b].exp(), want, atol=1e-6) and torch.allclose(want.sum(-1), torch.ones(()).double())
        high = want > 1e-8
        assert torch.allclose(got[b][high], want[high].log(), atol=1e-4)
        assert (got[b][want < 1e-12] == FLOOR).all()


def test_strays_are_drawn_and_counted_at_their_rate(straying, everything, strays, generator):
    """The object has the other subject's hue, and the prompt says nothing of them."""
    prompt, codes = straying.draw(4000, generator)
    known = {tuple(video): i for i, video in enumerate(torch.cat([everything.flatten(0, 1), strays]).tolist())}
    index = torch.tensor([known[tuple(video)] for video in codes.tolist()])
    stray = index >= 1024
    assert len(known) == 2048 and stray.float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert torch.equal(index[~stray] // 128, prompt[~stray])
    both = torch.bincount((index[stray] - 1024) // 128 * 8 + prompt[stray], minlength=64).float()
    assert both.min() > 5 and ((both - both.mean()) ** 2 / both.mean()).sum() < 64 + 50
    scores = score(straying, codes, [straying.prompts[i] for i in prompt])
    assert torch.equal(scores.valid, ~stray)


def test_the_posterior_counts_strays(straying, everything, strays, path, generator):
    teacher = ExactTeacher(straying, path)
    prompt, codes = straying.draw(3, generator)
    t = torch.tensor([0.02, 0.1, 0.3])
    x_t, txt_ids = path.sample(codes, t, generator), encode(straying, [straying.prompts[i] for i in prompt])
    txt_ids[2] = 0
    got = teacher.predict(txt_ids, x_t, GRID, t).logits().double().exp()
    for b in range(3):
        at = t[b].double().expand(N)
        want = bayes(everything, x_t[b], at, None if b == 2 else int(prompt[b]), strays=strays, share=0.4)
        assert torch.allclose(got[b], want, atol=1e-6)


def test_guidance_takes_strays_away(straying, path, generator):
    """At t = 0 the other subject's hues have a fifth of every token; guided three times, a few percent."""
    teacher, ids = ExactTeacher(straying, path), encode(straying, straying.prompts[:1])
    x_t = torch.randint(16, (1, N), generator=generator)
    both = predict(teacher, torch.cat([ids, torch.zeros_like(ids)]), x_t.repeat(2, 1), GRID, t=0.0)
    cond, uncond = both.chunk(2)
    own = set(straying.used_codes[: len(straying.used_codes) // 2].tolist())  # the first subject's
    foreign = [i for i, code in enumerate(straying.used_codes.tolist()) if code not in own]
    shares = [p.log_p.exp()[0, :, foreign].sum(-1).mean().item() for p in (cond, cond.guided(uncond, 3.0))]
    # half of the strays have the other subject's background (3/4 of the tokens), half its object (1/4)
    assert shares[0] == pytest.approx(0.2, abs=1e-3) and shares[1] < 0.05


def test_nothing_is_read_back_while_training(straying, path, generator):
    """Else no CUDA graph could hold the step; the checks of values are left out where values are trusted."""
    read = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), more=None):
            if function.overloadpacket.__name__ in (
                "_local_scalar_dense",
                "nonzero",
                "_unique2",
                "equal",
                "is_nonzero",
            ):
                read.append(function)
            return function(*arguments, **(more or {}))

    teacher = ExactTeacher(straying, path)
    prompt, codes = straying.draw(4, generator)
    ids = encode(straying, [straying.prompts[i] for i in prompt])
    for t in (torch.rand(4, generator=generator), times("frame", 4, generator)):
        with Reads():
            plain = teacher.predict(ids, codes, GRID, t)
            assert read  # it does look, when nobody trusts
            read.clear()
            with trusted_values():
                w = torch.full((4, 1, 1), 3.0)
                got = predict_guided(teacher, ids, torch.zeros_like(ids), codes, GRID, w, t=t)
                assert not read
        assert torch.equal(plain.codes, got.codes)


def test_the_normaliser_of_many_codes_is_that_of_the_sum():
    """Where the exact teacher interpolates it, against the sum over all codes."""
    world = TilesWorld.of_size(48, codes=4096, palettes=4)
    teacher = ExactTeacher(world, MetricPath(world.codebook(), 0.9, 3.0))
    t = torch.cat([torch.linspace(0, 0.998, 60, dtype=torch.float64), torch.tensor([0.76, 0.77, 0.775])])
    beta = 3 * (t / (1 - t)) ** 0.9
    points = torch.nn.functional.normalize(world.codebook(), dim=-1).double()
    square = (points[:, None] - points[world.used_codes]).square().sum(-1)  # (K, C)
    want = torch.stack([(-b * square).exp().sum(0).log() for b in beta])
    got = teacher._log_normaliser(beta)
    assert got.dtype == torch.float64 and (got - want).abs().max() < 1e-6


def test_no_probability_is_negative_by_rounding(tiny, path, teacher, generator):
    x_t, t = torch.randint(16, (600, N), generator=generator), torch.rand(600, generator=generator) * 0.999
    got = teacher.predict(torch.zeros(600, 4, dtype=torch.long), x_t, GRID, t)  # of all prompts
    assert got.log_p.isfinite().all() and got.log_p.min() >= FLOOR and got.log_p.max() < 1e-6
    assert torch.allclose(got.log_p.double().exp().sum(-1), torch.ones(600, N).double(), atol=1e-6)


def test_the_posterior_does_not_depend_on_how_many_samples_go_at_once(tiny, path, teacher, generator, monkeypatch):
    prompt, codes = tiny.draw(3, generator)
    t = times("frame", 3, generator)
    txt_ids, x_t = encode(tiny, [tiny.prompts[i] for i in prompt]), path.sample(codes, t, generator)
    whole = teacher.predict(txt_ids, x_t, GRID, t)
    monkeypatch.setattr("dimo.worlds.exact.tokens_at_once", lambda *_: 1)
    monkeypatch.setitem(ENTRIES, "cpu", 1)
    assert torch.allclose(teacher.predict(txt_ids, x_t, GRID, t).log_p, whole.log_p, atol=1e-5)


def test_guided_in_stage_5_and_off_above_guidance_trunc(tiny, everything, path, teacher, generator):
    """Against u + w (c - u) on logits of all codes, w = 3 below t = .1; t per sample, and per frame."""
    prompt, codes = tiny.draw(2, generator)
    for t in (torch.tensor([0.05, 0.15]), torch.tensor([[0.05] * 16 + [0.15] * 16, [0.02] * 32])):
        step = Step(txt_ids=encode(tiny, [tiny.prompts[i] for i in prompt]), x_t=path.sample(codes, t, generator), t=t)
        stages.teacher_pass(step, teacher, GRID, 3.0, 0.1, torch.zeros(1, 4, dtype=torch.long))
        got = step.teacher.logits().softmax(-1).double()
        for b, at in enumerate(t.view(2, -1).expand(2, N).double()):
            logits = [bayes(everything, step.x_t[b], at, p).clamp(min=1e-30).log() for p in (int(prompt[b]), None)]
            w = torch.where(at < 0.1, 3.0, 1.0)[:, None]
            want = (logits[1] + w * (logits[0] - logits[1])).softmax(-1)
            assert torch.allclose(got[b], want, atol=1e-5)
        plain = teacher.predict(step.txt_ids, step.x_t, GRID, t).logits()[0, 0].exp().double()
        assert (got[0, 0] - plain).abs().max() > 0.01


def test_the_prior_at_t_0_and_the_video_near_1(tiny, everything, path, teacher, generator):
    x_t = torch.randint(16, (1, N), generator=generator)
    for ids, videos in ((encode(tiny, tiny.prompts[5:6]), everything[5]), (torch.zeros(1, 4).long(), everything)):
        shares = torch.nn.functional.one_hot(videos.flatten(0, -2), 16).float().mean(0)
        assert torch.allclose(teacher.predict(ids, x_t, GRID, 0.0).logits()[0].exp(), shares, atol=1e-6)
    prompt, codes = tiny.draw(8, generator)
    ids = encode(tiny, [tiny.prompts[i] for i in prompt])
    near = teacher.predict(ids, path.sample(codes, 0.998, generator), GRID, 0.998)
    assert torch.equal(near.argmax(), codes) and near.log_prob(codes).min() > -1e-5


def test_larger_videos_are_valid_and_recognised(generator):
    world = TilesWorld.of_size(1280, codes=1000, palettes=4, shades=4)
    prompt, codes = world.draw(12, generator)
    prompts = [world.prompts[i] for i in prompt]
    assert score(world, codes, prompts).valid.all()
    teacher = ExactTeacher(world, MetricPath(world.codebook(), 0.9, 3.0))
    prediction = teacher.predict(encode(world, prompts), teacher.path.sample(codes, 0.5, generator), (5, 16, 16), 0.5)
    assert isinstance(prediction, Sparse) and torch.equal(prediction.argmax(), codes)


def test_sampled_in_many_passes_its_videos_are_valid_and_every_mode_is_met(tiny, path, teacher, generator):
    prompts = tiny.prompts * 4
    scores = score(tiny, sample(teacher, path, encode(tiny, prompts), GRID, 40, generator=generator), prompts)
    assert scores.valid.float().mean() > 0.9 and scores.adherent.float().mean() > 0.9
    assert all(len(labels.unique()) >= bins * 0.7 for labels, bins in scores.free.values())


def test_an_exact_teacher_is_what_its_students_are_watched_beside(tiny, tmp_path):
    """The network that they start from has learnt nothing here, and makes no valid video."""
    recipe = TeacherRecipe(layers=1, hidden=16, heads=1, c=3.0)
    ursa = load_ursa(write_checkpoint(tmp_path, tiny, UrsaTransformer(ursa_config(tiny, recipe)), 0.9, 3.0))
    prompts = WorldPrompts(tiny.prompts, ursa, 4)
    valid = {}
    for kind in ("exact", "network"):
        words = [f"distill.teacher={kind}", f"distill.teacher_ckpt={tmp_path}", "distill.num_frames=5"]
        reference = make_reference(ursa, prompts, load_config("tiles", words), 8, 4)
        asked = [prompt for prompt in reference.prompts for _ in range(4)]
        valid[kind] = score(tiny, reference.codes.flatten(0, 1).long(), asked).valid.float().mean()
    assert valid["exact"] > 0.8 and valid["network"] == 0


def test_a_network_may_predict_by_itself_and_a_transformer_reads_no_t(ursa, generator):
    class Constant:
        def predict(self, txt_ids, visual_tokens, latents_shape, t):
            self.seen = txt_ids, visual_tokens, latents_shape, t
            return "a prediction"

    network, ids, x = Constant(), torch.zeros(1, 4).long(), torch.randint(10, (1, 48), generator=generator)
    assert predict(network, ids, x, (3, 4, 4), True, 0.5) == "a prediction" and network.seen == (ids, x, (3, 4, 4), 0.5)
    logits = predict(ursa.transformer, ids, x, (3, 4, 4), True, 0.5).logits()
    assert torch.equal(logits, visual_logits(ursa.transformer, ids, x, (3, 4, 4)))


def test_the_command_trains_its_teacher(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr("dimo.worlds.teacher.videos_at_once", lambda tokens, device: 7)
    count = lambda *a, **k: (made.append(len(a[2]) * a[4]), sample(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr("dimo.worlds.teacher.sample", count)
    flags = "--frames 2 --codes 16 --layers 1 --hidden 32 --heads 2 --batch_size 4 --steps 2"
    args = parse(["world", "train", "tiles", "-o", str(tmp_path / "t"), *flags.split()])
    world = TilesWorld(**{name: getattr(args, name) for name in ("frames", "height", "width", "codes")})
    recipe = TeacherRecipe(layers=args.layers, hidden=args.hidden, heads=args.heads, steps=args.steps, batch_size=4)
    assert "validity" in make_teacher(world, recipe, args.out, videos_per_prompt=1)
    guided = sum(made[-len(made) // 5 :])  # the last of five samplers, whose passes are two each
    assert max(made) == 7 * 25 and f" {sum(made) + guided}/{sum(made) + guided} " in capsys.readouterr().err
    assert load_world(tmp_path / "t") == TilesWorld(frames=2, codes=16)
    book = load_ursa(tmp_path / "t").path.codebook
    assert torch.equal(book, torch.nn.functional.normalize(fsq_codebook((2, 2, 2, 2)), dim=-1, eps=1e-5))


def test_a_teacher_of_a_large_codebook_is_trained_on_the_same_loss(monkeypatch, generator):
    """A few tokens at a time, without keeping logits: as in one piece. One t per latent frame, if asked."""
    world = TilesWorld(frames=2, codes=256)
    model = UrsaTransformer(ursa_config(world, TeacherRecipe(layers=1, hidden=32, heads=2)))
    prompt, x_1 = world.draw(3, generator)
    ids, x_t = encode(world, [world.prompts[i] for i in prompt]), torch.randint(256, x_1.shape, generator=generator)

    def loss_and_gradients():
        loss = denoising.denoising_loss(model, ids, x_t, x_1, world.latents_shape)
        return loss, torch.autograd.grad(loss, list(model.parameters()))

    whole, want = loss_and_gradients()
    monkeypatch.setattr(denoising, "FEW_CODES", 1)
    monkeypatch.setitem(ENTRIES, "cpu", 10 * 256)
    pieces, got = loss_and_gradients()
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want))
    times, inner = [], MetricPath.sample
    monkeypatch.setattr(MetricPath, "sample", lambda self, x, t, g: times.append(t) or inner(self, x, t, g))
    train_teacher(world, TeacherRecipe(layers=1, hidden=32, heads=2, batch_size=5, steps=1, t_per="frame"), False)
    frames = times[0].view(5, 2, 16)
    assert (frames == frames[..., :1]).all() and (frames[:, 0, 0] != frames[:, 1, 0]).all()


def test_sizes_are_those_they_are_called_by():
    for tokens, shape in SIZES.items():
        world = TilesWorld.of_size(tokens)
        assert world.num_visual_tokens == tokens and world.latents_shape == shape


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        ({"frames": 1}, "at least 2 frames, and a height and a width that are multiples of 4, got 1x4x4"),
        ({"width": 6}, "multiples of 4, got 3x4x6"),
        ({"height": 0}, "multiples of 4, got 3x0x4"),
        ({"codes": 100}, "codes must be one of 16, 256, 1000, 4096, 8000, 15360, 64000, got 100"),
        ({"codes": 16, "shades": 3}, "16 codes allow 2 to 2 shades, .* got shades=3"),
        ({"palettes": 1}, "there must be 2 palettes or more; got shades=2 and palettes=1"),
        ({"codes": 16, "palettes": 3}, "16 codes have fewer hues than the 12 of 3 palettes a subject"),
        ({"codes": 64_000, "palettes": 8, "shades": 8}, "make 8192 videos per prompt .* more than the 4096"),
        ({"strays": 91}, r"strays must lie in \[0, 90\], in percent, got 91"),
        ({"shades": 2.0}, "shades must be a whole number, got 2.0"),
    ],
)
def test_worlds_that_cannot_be(sizes, sentence):
    with pytest.raises(DimoError, match=sentence):
        TilesWorld(**sizes)


def test_unknown_sizes():
    with pytest.raises(DimoError, match="num_visual_tokens must be one of 48, 208, 320, 1280, 5120, 33280, got 100"):
        TilesWorld.of_size(100)


def test_predictions_that_cannot_be(tiny, path, teacher):
    ids, x = encode(tiny, tiny.prompts[:1]), torch.zeros(1, N, dtype=torch.long)
    wrong = ids.clone()
    wrong[0, -1] = 1
    for call, sentence in (
        (lambda: predict(teacher, ids, x, GRID), "the exact teacher must be given t"),
        (lambda: teacher.predict(ids, x, GRID, 1.0), r"t must lie in \[0, 1\)"),
        (lambda: teacher.predict(ids, x, GRID, torch.zeros(2)), r"t must be a number or have shape \(1,\)"),
        (lambda: teacher.predict(ids, x, (3, 4, 4), 0.5), r"latents_shape must be the world's \(2, 4, 4\)"),
        (
            lambda: teacher.predict(ids, x, GRID, torch.rand(1, N)),
            "t must be the same for all tokens of a latent frame",
        ),
        (lambda: teacher.predict(ids, x[:, :-1], GRID, 0.5), r"visual_tokens must have shape \(1, 32\)"),
        (lambda: teacher.predict(ids, x + 16, GRID, 0.5), r"visual_tokens must lie in \[0, 16\)"),
        (lambda: teacher.predict(wrong, x, GRID, 0.5), "prompts of the tiles world, or empty; row 0 is neither"),
        (lambda: teacher.predict(ids[:, 1:], x, GRID, 0.5), "txt_ids must have at least 4 ids"),
        (lambda: ExactTeacher(tiny, MixturePath(path.codebook)), "path must be a MetricPath, got MixturePath"),
        (lambda: ExactTeacher(ShapesWorld(), path), "tiles and sprites have an exact teacher, got 'shapes'"),
        (lambda: ExactTeacher(TilesWorld(), path), "path has 16 codes, the world 256"),
        (lambda: tiny.totals(torch.zeros(1, N, 3)), r"values must have shape \(B, 32, 16\)"),
    ):
        with pytest.raises(DimoError, match=sentence):
            call()


def test_guidance_of_predictions_that_know_other_codes():
    one, other = (Sparse(torch.tensor([[codes]]), torch.zeros(1, 1, 2), -9.0, 4) for codes in ([0, 1], [0, 2]))
    with pytest.raises(DimoError, match="guidance needs two predictions with the same codes"):
        one.guided(other, 3.0)
