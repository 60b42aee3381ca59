"""Entropies over noises against closed forms, the plan of a watched run, and a run that collapses."""

import io
import itertools
import math
import warnings
from pathlib import Path

import pytest
import torch

from dimo.config import load_config
from dimo.errors import DimoError
from dimo.train import watch
from dimo.train.prompts import WorldPrompts
from dimo.train.watch import make_reference
from dimo.ursa import predict
from dimo.ursa.loading import load_student
from dimo.ursa.prediction import Chunked, Dense
from dimo.ursa.probability_path import MetricPath, MixturePath
from dimo.views.collapse import (
    OverNoises,
    beside_teacher,
    choose_tokens,
    distinct,
    has_collapsed,
    over_noises,
    sampled_entropy,
    spread,
    student_over_noises,
)
from dimo.views.collapse_figures import collapse_curves, collapse_maps
from dimo.worlds import SHIPPED_STUDENT
from dimo.worlds.oracle import score

TINY = Path(__file__).parent / "data" / "tiny-ursa"


def measured(prob, batch=3, tokens=None):
    """`over_noises` of probabilities (n, N, K), some noises at a time."""
    tokens = torch.arange(prob.shape[1]) if tokens is None else tokens
    passes = (Dense(part.clamp(min=1e-38).log()) for part in prob.split(batch))
    return over_noises(passes, tokens, torch.Generator().manual_seed(0))


def test_a_student_that_is_deaf_to_its_noise_has_its_own_entropy_and_no_information():
    prob = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]).expand(8, 2, 3)
    found = measured(prob)
    assert found.mean_entropy.tolist() == pytest.approx([1.5 * math.log(2), 0], abs=1e-6)
    assert found.mutual_information.tolist() == pytest.approx([0, 0], abs=1e-6)


def test_a_student_that_makes_another_code_of_every_noise_has_log_n():
    prob = torch.eye(8)[torch.randperm(8)][:, None].expand(8, 2, 8)
    found = measured(prob)
    assert found.mutual_information.tolist() == pytest.approx([math.log(8)] * 2, rel=1e-6)
    assert found.mean_entropy.tolist() == pytest.approx([0, 0], abs=1e-6)
    assert sampled_entropy(found.codes[None]).flatten().tolist() == pytest.approx([math.log(8)] * 2, rel=1e-6)


def test_between_the_two_it_is_what_the_formula_says():
    """A binary symmetric channel with error e: H(mean p) = log 2 and I = log 2 - h(e); a code that is never chosen."""
    e = 0.1
    h = -e * math.log(e) - (1 - e) * math.log(1 - e)
    prob = torch.tensor([[1 - e, e, 0.0], [e, 1 - e, 0.0]]).repeat(4, 1)[:, None].expand(8, 3, 3)
    found = measured(prob, tokens=torch.tensor([2, 0]))
    assert found.entropy_of_mean.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-5)
    assert found.mutual_information.tolist() == pytest.approx([math.log(2) - h] * 2, rel=1e-5)


def test_hidden_states_in_chunks_give_what_all_logits_give(monkeypatch):
    """And no chunk of logits is larger than it may be."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(6, 9, 4, generator=g), torch.randn(50, 4, generator=g)
    monkeypatch.setitem(__import__("dimo.ursa.chunks").ursa.chunks.ENTRIES, "cpu", 7 * 50)
    sizes, inner = [], Chunked._rows
    monkeypatch.setattr(Chunked, "_rows", lambda self, rows: sizes.append(len(r := inner(self, rows))) or r)
    tokens = torch.tensor([1, 4, 8])
    found = over_noises((Chunked(part, head) for part in hidden.split(2)), tokens, g)
    p = (hidden[:, tokens] @ head.T).double().softmax(-1)
    assert torch.allclose(found.mean_entropy.double(), -(p * p.log()).sum(-1).mean(0), atol=1e-5)
    m = p.mean(0)
    assert torch.allclose(found.entropy_of_mean.double(), -(m * m.log()).sum(-1), atol=1e-5)
    assert max(sizes) <= 7 and found.codes.shape == (6, 3)


def test_samples_are_counted_and_their_spread_is_that_of_all_pairs():
    g = torch.Generator().manual_seed(0)
    codes, path = torch.randint(5, (2, 6, 4), generator=g), MetricPath(torch.randn(5, 3, generator=g), 0.9, 3)
    entropy, distance = torch.zeros(2, 4), torch.zeros(2, 4)
    for p, i in itertools.product(range(2), range(4)):
        shares = codes[p, :, i].bincount(minlength=5) / 6
        entropy[p, i] = -sum(s * s.log() for s in shares if s > 0)
        pairs = list(itertools.combinations(codes[p, :, i].tolist(), 2))
        distance[p, i] = sum((path.codebook[a] - path.codebook[b]).square().sum() for a, b in pairs) / len(pairs)
    assert torch.allclose(sampled_entropy(codes), entropy, atol=1e-6)
    assert torch.allclose(spread(codes, path), distance, atol=1e-5)
    corners = MetricPath(torch.eye(5), 0.9, 3)  # any two codes at squared distance 2, as a mixture path counts them
    assert torch.allclose(spread(codes, MixturePath(torch.empty(5, 0))), spread(codes, corners), atol=1e-5)
    same = torch.tensor([[[1, 2], [1, 2], [1, 3], [1, 2]], [[0, 0], [0, 1], [0, 2], [0, 3]]])
    assert distinct(same) == pytest.approx((2 / 4 + 4 / 4) / 2)


def test_student_and_teacher_are_compared_at_equally_many_samples():
    path, n = MetricPath(torch.eye(16), 0.9, 3), 16
    codes = torch.arange(n).view(1, n, 1).expand(1, n, 2)
    student = OverNoises(torch.full((1, 2), 3.0), torch.full((1, 2), 1.0), codes)
    found = beside_teacher(student, codes[:, :4], path)
    entropies = [found[name] for name in ("sampled_entropy", "teacher_entropy", "log_m")]
    assert entropies == pytest.approx([math.log(4)] * 3)
    assert found["spread"] == pytest.approx(2) == found["teacher_spread"] and found["least_share"] == pytest.approx(1)
    assert (found["mutual_information"], found["mean_entropy"], found["distinct"]) == (2, 1, 1)
    one_dead = torch.cat([codes, torch.zeros_like(codes)])
    two = OverNoises(torch.ones(2, 2), torch.ones(2, 2), one_dead)
    found = beside_teacher(two, codes[:, :4].expand(2, -1, -1), path)
    assert found["spread"] == pytest.approx(1) and found["least_share"] == pytest.approx(0, abs=1e-6)
    assert has_collapsed(found)
    with pytest.raises(DimoError, match="teacher must hold 2 to 16 samples"):
        beside_teacher(student, codes[:, :1], path)
    with pytest.raises(DimoError, match=r"teacher must have shape \(1, m, 2\)"):
        beside_teacher(student, codes[:, :4, :1], path)


@pytest.mark.parametrize("grid", [(3, 4, 4), (5, 32, 32), (13, 40, 64), (1, 64, 64), (300, 2, 2), (1, 1, 999)])
def test_chosen_tokens_are_a_small_video_evenly_spaced(grid):
    tokens, (t, h, w) = choose_tokens(grid)
    assert min(256, math.prod(grid)) / 2 < len(tokens) == t * h * w <= 256
    assert tokens.unique().tolist() == tokens.tolist() and 0 <= tokens[0] and tokens[-1] < math.prod(grid)
    assert t == min(grid[0], 256)
    place = torch.stack(torch.unravel_index(tokens, grid)).view(3, t, h, w)
    for axis, size in enumerate(grid):
        along = place[axis].unique()
        assert torch.equal(
            place[axis].movedim(axis, 0).flatten(1), along[:, None].expand(-1, len(tokens) // len(along))
        )
        gaps = along.diff()
        assert len(along) == 1 or gaps.max() - gaps.min() <= 1
        assert abs(along.float().mean() - (size - 1) / 2) <= 1


def test_figures_draw_what_was_measured():
    rows = [
        {"step": 10 * i, "collapse/mutual_information": 0.1 * i, "collapse/mean_entropy": 1 - 0.1 * i,
         "collapse/log_m": 1.4, "collapse/sampled_entropy": 0.6, "collapse/least_share": 0.1,
         "collapse/teacher_entropy": 1.2,
         "collapse/spread": 0.4 * i,
         "collapse/teacher_spread": 1.6,
         "collapse/distinct": 0.5, "collapse/teacher_distinct": 0.9}
        for i in (1, 2, 3)
    ]  # fmt: skip
    drawn = [[list(line.get_ydata()) for line in axis.lines] for axis in collapse_curves([{"step": 5}, *rows]).axes]
    assert drawn[0][0] == pytest.approx([0.1, 0.2, 0.3]) and drawn[0][2:] == [[1.2] * 3, [1.4, 1.4]]
    assert drawn[1] == [pytest.approx([0.25, 0.5, 0.75]), [0.1] * 3, [0.5] * 3] and drawn[2] == [[0.5] * 3, [0.9] * 3]
    none = [{name: 0.0 if name.startswith("collapse/s") else value for name, value in row.items()} for row in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # where the layout has no room
        collapse_curves(none).savefig(io.BytesIO())
    with pytest.raises(DimoError, match="at least one measurement"):
        collapse_curves([{"step": 5}])
    student = OverNoises(torch.rand(2, 6) + 1, torch.rand(2, 6), torch.randint(5, (2, 8, 6)))
    teacher = torch.randint(5, (2, 4, 6))
    figure = collapse_maps(student, teacher, (1, 2, 3))
    shown = [torch.tensor(axis.images[0].get_array().data) for axis in figure.axes if axis.images]
    want = [student.entropy_of_mean, student.mean_entropy, student.mutual_information]
    want += [sampled_entropy(student.codes[:, :4]), sampled_entropy(teacher)]
    assert len(shown) == len(want) and all(torch.equal(a, b.mean(0).view(2, 3)) for a, b in zip(shown, want))
    tops = [axis.images[0].get_clim()[1] for axis in figure.axes if axis.images]
    assert tops[2] == pytest.approx(shown[2].max().item()) and tops[2] not in tops[:2]  # I, on a scale of its own
    assert tops[0] == tops[1] == pytest.approx(max(shown[0].max(), shown[1].max()).item()) and tops[3] == tops[4]
    with pytest.raises(DimoError, match=r"teacher must have shape \(2, m, 6\)"):
        collapse_maps(student, teacher[:1], (1, 2, 3))


def test_wrong_shapes_are_refused():
    with pytest.raises(DimoError, match="tokens must lie in .0, 2., got values from 1 to 2"):
        measured(torch.ones(2, 2, 2), tokens=torch.tensor([1, 2]))
    with pytest.raises(DimoError, match="at least one batch of noises"):
        over_noises([], torch.arange(2))
    with pytest.raises(DimoError, match=r"codes must have shape \(P, n, M\)"):
        sampled_entropy(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(DimoError, match="at least two samples"):
        spread(torch.zeros(1, 1, 3, dtype=torch.long), MixturePath(torch.empty(5, 0)))
    with pytest.raises(DimoError, match="latents_shape must be .T, H, W. and most at least 1"):
        choose_tokens((3, 4, 4), 0)


def test_the_teachers_samples_are_made_by_as_many_processes_as_there_are(ursa, world, monkeypatch):
    """Also by more than there are samples; those that have none to make give an empty part."""
    prompts, config = WorldPrompts(world.prompts[:1], ursa, 4), load_config("smoke")
    monkeypatch.setattr(watch, "TEACHER_STEPS", 1)
    monkeypatch.setattr(watch, "everywhere", lambda part: parts.append(part) or [])
    parts = []
    for rank in range(3):
        make_reference(ursa, prompts, config, 1, 2, rank, 3)
    monkeypatch.setattr(watch, "everywhere", lambda _: parts)
    reference = make_reference(ursa, prompts, config, 1, 2, 0, 3)
    assert [len(part) for part in parts] == [1, 1, 0]
    assert torch.equal(reference.codes[0], torch.cat(parts))


class Deaf:
    """A network that gets the same noise every time."""

    def __init__(self, network):
        self.network = network

    def predict(self, txt_ids, visual_tokens, latents_shape, t):
        return predict(self.network, txt_ids, torch.zeros_like(visual_tokens), latents_shape, True)


def test_information_tells_the_shipped_student_from_the_same_made_deaf_to_its_noise(ursa, world):
    """Both are decided, which their entropy says of both."""
    student, config = load_student(ursa, SHIPPED_STUDENT), load_config("smoke")
    reference = make_reference(ursa, WorldPrompts(world.prompts, ursa, 4), config, 2, 8)
    assert reference.prompts == [world.prompts[0], world.prompts[-1]] and reference.codes.shape == (2, 8, 48)
    assert score(
        world, reference.codes.flatten(0, 1).long(), [p for p in reference.prompts for _ in range(8)]
    ).valid.all()
    tokens, found = choose_tokens(world.latents_shape)[0], {}
    for name, network in (("shipped", student), ("deaf", Deaf(student)), ("untrained", ursa.transformer)):
        made = student_over_noises(network, ursa.path, reference.txt_ids, world.latents_shape, tokens, 32, 16)
        found[name] = beside_teacher(made, reference.codes.long(), ursa.path)
    information = {name: one["mutual_information"] for name, one in found.items()}
    assert information["shipped"] > 1 > 0.3 > information["untrained"] and abs(information["deaf"]) < 1e-5
    assert (
        max(found[name]["mean_entropy"] for name in ("shipped", "deaf")) < 0.05 < 1 < found["untrained"]["mean_entropy"]
    )
    fallen = {name: has_collapsed(one) for name, one in found.items()}
    assert fallen == {"shipped": False, "deaf": True, "untrained": False}
    assert found["deaf"]["distinct"] < 0.2 and found["shipped"]["distinct"] > 0.5
