"""The teacher as a judge: against plain logits, and on students that were made to fail."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from dimo.errors import DimoError
from dimo.evaluation import judging
from dimo.evaluation.metrics import JUDGED, measure
from dimo.evaluation.videos import Videos
from dimo.ursa import load_ursa, sample, visual_logits
from dimo.ursa.loading import load_student
from dimo.worlds import SHIPPED_STUDENT
from dimo.worlds.oracle import score

TINY = Path(__file__).parent / "data" / "tiny-ursa"
GRID = (2, 4, 8)
PROMPTS = ["a red ball", "a dog that jumps over the wall", "rain"]
TIMES = (0.2, 0.5, 0.9)


@pytest.fixture
def videos(tiny):
    """(codes (3, 64), prompt ids (3, k = 3, 9), empty prompt (1, 9))."""
    g = torch.Generator().manual_seed(3)
    codes = torch.randint(tiny.path.codebook_size, (3, math.prod(GRID)), generator=g)
    return codes, tiny.tokenize(PROMPTS, 9)[judging.choices(3)], tiny.tokenize([""], 9)


def noise(seed):
    return torch.Generator().manual_seed(seed)


def test_choices_begin_with_the_own_prompt():
    assert judging.choices(1).tolist() == [[0]]
    assert sorted(judging.choices(2).tolist()) == [[0, 1], [1, 0]]
    found = judging.choices(40)
    assert found.shape == (40, 8) and found[:, 0].tolist() == list(range(40))
    assert all(len(set(row)) == 8 and 0 <= min(row) and max(row) < 40 for row in found.tolist())
    assert torch.equal(found, judging.choices(40)) and len(found[:, 1:].unique()) == 40
    with pytest.raises(DimoError, match="prompts and most must be at least 1, got 0 and 8"):
        judging.choices(0)


def test_the_judge_is_what_plain_logits_say(tiny, videos):
    codes, prompt_ids, empty = videos
    got = judging.judge(tiny, codes, prompt_ids, empty, GRID, noise(7), 3.0, 0.9, times=TIMES)
    g, network = noise(7), tiny.transformer

    def log_prob(logits):
        return logits.double().log_softmax(-1).gather(-1, codes[..., None])[..., 0]

    choice = []  # at the two times that are not after RETRIEVAL_UNTIL
    for i, t in enumerate(TIMES):
        x_t = tiny.path.sample(codes, t, g)
        cond = visual_logits(network, prompt_ids[:, 0], x_t, GRID)
        uncond = visual_logits(network, empty.expand(3, -1), x_t, GRID)
        guided = uncond + 3 * (cond - uncond) if t < 0.9 else cond
        for name, logits in (("nll", cond), ("nll_guided", guided)):
            assert torch.allclose(got[name][:, i].double(), -log_prob(logits).mean(1), atol=1e-4)
        for name, logits in (("recovered", cond), ("recovered_uncond", uncond)):
            assert torch.allclose(got[name][:, i].double(), log_prob(logits).exp().mean(1), rtol=1e-3, atol=0)
        if t < 0.9:
            each = [log_prob(visual_logits(network, prompt_ids[:, j], x_t, GRID)).exp().mean(1) for j in range(3)]
            choice.append(torch.stack(each, 1))
    assert torch.allclose(got["choice_recovered"].double(), (choice[0] + choice[1]) / 2, rtol=1e-3, atol=0)
    assert got["features"].shape == (3, tiny.transformer.config.hidden_size)
    # the head is linear: features give the mean of the unconditional logits at the last time
    head = tiny.transformer.lm_head.weight[-tiny.path.codebook_size :]
    assert torch.allclose(got["features"] @ head.T, uncond.mean(1), atol=1e-4)
    assert "nll_guided" not in judging.judge(tiny, codes, prompt_ids, empty, GRID, noise(7), times=TIMES)
    with pytest.raises(DimoError, match=r"txt_ids must have shape \(3, k, L\)"):
        judging.judge(tiny, codes, prompt_ids[:, 0], empty, GRID, noise(7))


def test_an_indifferent_teacher_says_log_k(videos):
    other = load_ursa(TINY)
    torch.nn.init.zeros_(other.transformer.lm_head.weight)
    got = judging.judge(other, *videos, GRID, noise(0))
    assert torch.allclose(got["nll"], torch.tensor(math.log(240.0))) and got["nll"].shape == (3, 5)
    row = measure(Videos(videos[0].view(3, *GRID), PROMPTS, 1, 1.0, path=other.path, judged=got))
    assert row["prompt_gain"] == 0 and row["retrieval"] == pytest.approx(1 / 3)  # all three are equally good
    assert row["teacher_nll"] == pytest.approx(math.log(240)) and row["frechet"] is None
    assert row["recovered"] == pytest.approx(1 / 240)


def test_the_noise_is_the_same_whatever_the_codes(tiny, videos):
    codes, prompt_ids, empty = videos
    seen = []
    hook = tiny.transformer.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    try:
        # at t = 0 p_t is uniform, and x_t noise alone
        for some, seed in ((codes, 7), (codes.flip(1), 7), (codes, 8)):
            judging.judge(tiny, some, prompt_ids[:, :1], empty, GRID, noise(seed), times=(0.0,))
    finally:
        hook.remove()
    first, second, other_seed = seen[:2], seen[2:4], seen[4:]
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and not torch.equal(first[0], other_seed[0])


@pytest.fixture(scope="module")
def ranked(world, ursa):
    """{student: its metrics}: the shipped one, and what was made of its videos; the teacher twice."""
    prompts, copies = world.prompts[::3], 3
    ids = ursa.tokenize([p for p in prompts for _ in range(copies)], 4)
    own, empty = torch.arange(len(prompts)).repeat_interleave(copies), ursa.tokenize([""], 4)
    choice_ids = ursa.tokenize(prompts, 4)[judging.choices(len(prompts))][own]

    def draw(network, steps, seed):
        return sample(network, ursa.path, ids, world.latents_shape, steps, generator=noise(seed))

    good, g = draw(load_student(ursa, SHIPPED_STUDENT), 1, 1), noise(0)
    grid, by_prompt = good.view(-1, *world.latents_shape), good.view(len(prompts), copies, -1)
    made = {
        "teacher": draw(ursa.transformer, 8, 1),
        "again": draw(ursa.transformer, 8, 2),
        "good": good,
        "collapsed": by_prompt[:, :1].expand_as(by_prompt),
        "one_look": by_prompt[:1, :1].expand_as(by_prompt),
        "ignores": by_prompt.roll(5, 0),
        "static": grid[:, :1].expand_as(grid),
        "late": grid[:, [0, *range(grid.shape[1] - 1)]],  # by a frame
        "noisy": torch.where(
            torch.rand(good.shape, generator=g) < 0.1, torch.randint(10, good.shape, generator=g), good
        ),
    }
    videos = {}
    for name, codes in made.items():
        codes = codes.reshape(len(ids), -1)
        judged = judging.judge(ursa, codes, choice_ids, empty, world.latents_shape, noise(9))
        asked = [p for p in prompts for _ in range(copies)]
        videos[name] = Videos(
            codes.view(-1, *world.latents_shape), asked, copies, 1.0, score(world, codes, asked), ursa.path, judged
        )

    references = {name: videos["again" if name == "teacher" else "teacher"] for name in videos}
    return {name: measure(dataclasses.replace(videos[name], reference=references[name])) for name in videos}


def off(metric, value):
    """How far from the best possible value."""
    best = {"higher": math.inf, "lower": 0.0, "nearer to 0": 0.0, "nearer to 1": 1.0}[JUDGED[metric].better]
    return -value if best == math.inf else abs(value - best)


@pytest.mark.parametrize(
    ("failed", "metric", "surely"),
    [
        ("noisy", "teacher_nll", True),
        ("noisy", "nll_difference", True),
        ("noisy", "recovered", True),
        ("noisy", "frechet", False),
        ("noisy", "flicker", True),
        ("noisy", "sharpness", True),
        ("collapsed", "spread_ratio", True),
        ("collapsed", "feature_coverage", True),
        ("one_look", "feature_coverage", True),
        ("one_look", "frechet", True),
        ("ignores", "prompt_gain", True),
        ("ignores", "retrieval", True),
        ("static", "motion", True),
        ("static", "frechet", False),
        ("late", "teacher_nll", True),
        ("late", "nll_difference", True),
        ("late", "recovered", True),
        ("late", "prompt_gain", True),
        ("late", "motion", False),
    ],
)
def test_what_was_made_to_fail_ranks_below_the_shipped_student(ranked, failed, metric, surely):
    good, bad = ranked["good"], ranked[failed]
    assert off(metric, bad[metric]) > off(metric, good[metric])
    if surely:  # with intervals apart, at 48 videos
        worst = max(off(metric, value) for value in good["intervals"][metric])
        assert all(off(metric, value) > worst for value in bad["intervals"][metric])


def test_what_fails_in_one_way_may_be_fine_in_another(ranked):
    """Why no single figure suffices."""
    assert ranked["collapsed"]["teacher_nll"] == pytest.approx(ranked["good"]["teacher_nll"], abs=0.05)
    for unmoved in ("retrieval", "prompt_gain"):  # wrong tokens are not a wrong prompt
        assert ranked["noisy"][unmoved] == pytest.approx(ranked["good"][unmoved], abs=0.03)
    assert ranked["ignores"]["frechet"] == pytest.approx(ranked["good"]["frechet"], rel=0.2)
    for unseen in ("ignores", "late", "static"):
        assert ranked[unseen]["feature_coverage"] == ranked["good"]["feature_coverage"]
    assert ranked["late"]["spread"] == ranked["good"]["spread"]
    assert ranked["again"]["nll_difference"] == pytest.approx(0, abs=0.05)
    assert ranked["again"]["frechet"] == pytest.approx(ranked["teacher"]["frechet"], rel=0.2) and (
        ranked["again"]["frechet"] > 0
    )
