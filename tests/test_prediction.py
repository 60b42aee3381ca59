"""What a prediction says, in each of its kinds, against float64 formulas written out here."""

import copy
import math

import pytest
import torch

from dimo.errors import DimoError
from dimo.ursa import Chunked, Dense, Sparse, chunks, predict, visual_logits

B, N, D, K, S = 2, 7, 16, 600, 5
GRID = (3, 4, 4)


@pytest.fixture(params=[3 * K, 10**6], ids=["three tokens at once", "all"])
def entries(request, monkeypatch):
    monkeypatch.setitem(chunks.ENTRIES, "cpu", request.param)


def chunked(g):
    return Chunked(torch.randn(B, N, D, generator=g), 0.7 * torch.randn(K, D, generator=g))


def dense(g):
    return Dense(3 * torch.randn(B, N, K, generator=g))


def sparse(g):
    codes = torch.stack([torch.randperm(K, generator=g)[:S] for _ in range(B * N)]).view(B, N, S)
    return Sparse(codes, torch.rand(B, N, S, generator=g).log(), -12.0, K)


def exact(prediction):
    """(B, N, K) float64 log-probabilities, from what the kind holds and not from what it says."""
    if isinstance(prediction, Chunked):
        return (prediction.states.double() @ prediction.head.double().T).log_softmax(-1)
    if isinstance(prediction, Dense):
        return prediction.states.double().log_softmax(-1)
    log_p = torch.full((B, N, K), prediction.floor, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            for code, value in zip(prediction.codes[b, n], prediction.log_p[b, n]):
                log_p[b, n, code] = value.double()
    return log_p.log_softmax(-1)


@pytest.mark.parametrize("make", [dense, chunked, sparse])
def test_what_a_prediction_says(make, generator, entries):
    prediction, x = make(generator), torch.randint(K, (B, N), generator=generator)
    log_p = exact(prediction)
    p = log_p.exp()
    assert prediction.shape == (B, N) and prediction.codebook_size == K
    assert torch.allclose(prediction.logits().double().log_softmax(-1), log_p, atol=1e-5)
    some = prediction.logits(slice(5, 9)).double().log_softmax(-1)
    assert torch.allclose(some, log_p.flatten(0, 1)[5:9], atol=1e-5)
    assert torch.allclose(prediction.log_prob(x).double(), log_p.gather(-1, x[..., None])[..., 0], atol=1e-4)
    assert torch.allclose(prediction.entropy().double(), -(p * log_p).sum(-1), atol=1e-4)
    assert torch.equal(prediction.argmax(), log_p.argmax(-1))
    drawn, logp, entropy = prediction.sample(generator)
    assert torch.allclose(logp.double(), log_p.gather(-1, drawn[..., None])[..., 0], atol=1e-4)
    assert torch.allclose(entropy, prediction.entropy(), atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("other", [dense, chunked, sparse])
def test_divergence_between_any_two_kinds(other, beta, generator, entries):
    a, b = chunked(generator), other(generator)
    log_p, log_q = exact(a), exact(b)
    forward, reverse = (log_p.exp() * (log_p - log_q)).sum(-1), (log_q.exp() * (log_q - log_p)).sum(-1)
    assert torch.allclose(a.divergence(b, beta).double(), (1 - beta) * forward + beta * reverse, rtol=1e-4)
    assert torch.allclose(b.divergence(a, 1 - beta).double(), (1 - beta) * forward + beta * reverse, rtol=1e-4)


@pytest.mark.parametrize("make", [dense, chunked, sparse])
def test_samples_follow_the_distribution(make, generator):
    """At one token, drawn many times: shares within 5 standard errors, code by code."""
    prediction, draws = make(generator), 20_000
    p = exact(prediction)[0, 0].exp()
    if isinstance(prediction, Sparse):
        many = Sparse(*(x[:1, :1].expand(draws, 1, S) for x in (prediction.codes, prediction.log_p)), -12.0, K)
    else:
        many = prediction.with_states(prediction.states[:1, :1].expand(draws, 1, -1))
    share = torch.bincount(many.sample(generator)[0].flatten(), minlength=K) / draws
    assert ((share - p).abs() < 5 * (p / draws).sqrt() + 1e-4).all()


def test_the_draw_does_not_depend_on_the_chunk(generator, monkeypatch):
    prediction = chunked(generator)

    def drawn():
        return prediction.sample(torch.Generator().manual_seed(5))[0]

    whole = drawn()
    for entries in (K, 5 * K):
        monkeypatch.setitem(chunks.ENTRIES, "cpu", entries)
        assert torch.equal(drawn(), whole)


@pytest.mark.parametrize("codes", [10, 256, 600])
def test_pick_draws_from_the_softmax(codes, generator):
    z = 2 * torch.randn(codes, generator=generator)
    z[3] = -torch.inf
    u = torch.rand(20_000, generator=generator, dtype=torch.float64)
    share = torch.bincount(chunks.pick(z.expand(len(u), -1).contiguous(), u), minlength=codes) / len(u)
    p = z.softmax(-1)
    assert ((share - p).abs() < 5 * (p / len(u)).sqrt() + 1e-12).all() and share[3] == 0


@pytest.mark.parametrize("codes", [200, 300])
def test_pick_at_the_ends(codes):
    z = torch.full((2, codes), -torch.inf)
    z[:, 7], z[:, codes - 10] = 0.0, 0.0
    assert chunks.pick(z, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [7, codes - 10]


@pytest.mark.parametrize("make", [dense, chunked])
def test_guidance_is_on_logits(make, generator):
    cond = make(generator)
    uncond = cond.with_states(torch.randn(cond.states.shape, generator=generator))
    w = torch.tensor([3.0, 1.0]).view(2, 1, 1)
    c, u = cond.logits(), uncond.logits()
    assert torch.allclose(cond.guided(uncond, w).logits(), u + w * (c - u), atol=1e-4)


@pytest.mark.parametrize("make", [dense, chunked])
def test_parts_and_repetitions_of_a_batch(make, generator):
    prediction = make(generator)
    first, second = prediction.chunk(2)
    assert torch.equal(torch.cat([first.logits(), second.logits()]), prediction.logits())
    assert torch.equal(prediction.repeat(3).logits(), prediction.logits().repeat(3, 1, 1))


def test_a_pass_gives_the_same_in_both_kinds(ursa, generator):
    ids = ursa.tokenize(["blue bar moving up", "pink square moving left"], 4)
    x = torch.randint(10, (2, 48), generator=generator)
    want = visual_logits(ursa.transformer, ids, x, GRID)
    for is_dense in (True, False):
        got = predict(ursa.transformer, ids, x, GRID, is_dense)
        assert torch.allclose(got.logits(), want, atol=1e-5) and isinstance(got, Dense if is_dense else Chunked)


def test_a_copy_stays_when_the_head_learns(generator):
    prediction = chunked(generator)
    kept, before = prediction.detach(copy=True), copy.deepcopy(prediction.logits())
    prediction.head.zero_()
    assert torch.equal(kept.logits(), before) and prediction.logits().abs().max() == 0


def test_a_repr_shows_shapes_and_makes_no_logits(generator, monkeypatch):
    for make in (dense, chunked, sparse):
        prediction = make(generator)
        monkeypatch.setattr(type(prediction), "_rows", lambda *_: pytest.fail("logits were made"))
        assert repr(prediction) == f"{type(prediction).__name__}(2 x 7 tokens, 600 codes, cpu)"


def test_bad_input_is_refused_in_a_sentence(generator):
    prediction = chunked(generator)
    with pytest.raises(DimoError, match=r"x must have shape \(2, 7\)"):
        prediction.log_prob(torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(DimoError, match=r"x must lie in \[0, 600\)"):
        prediction.log_prob(torch.full((2, 7), K))
    with pytest.raises(DimoError, match=r"other must predict \(B, N, K\) = \(2, 7, 600\), got \(1, 7, 600\)"):
        prediction.divergence(prediction.chunk(2)[0], 0.5)
    with pytest.raises(DimoError, match=r"hidden must have shape \(B, N, 16\)"):
        Chunked(torch.zeros(2, 7, 8), prediction.head)
    with pytest.raises(DimoError, match=r"logits must have shape \(B, N, K\)"):
        Dense(torch.zeros(7, 8))
    with pytest.raises(DimoError, match="uncond's states must have shape"):
        prediction.guided(prediction.chunk(2)[0], 3.0)
    for floor in (0.0, -math.inf):
        with pytest.raises(DimoError, match="floor must be a finite log-probability below 0"):
            Sparse(torch.zeros(1, 1, 1, dtype=torch.long), torch.zeros(1, 1, 1), floor, K)
