"""The probability paths against sums written out, and their draws against their probabilities."""

import math

import pytest
import torch

from dimo.errors import DimoError
from dimo.ursa import Dense, MetricPath, MixturePath, categorical, chunks
from dimo.ursa import probability_path as path_module

CODEBOOK = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.2]])
ALPHA, C = 0.9, 2.0


def naive_prob(one: int, t: float) -> list[float]:
    rows = [[v / math.hypot(*row) for v in row] for row in CODEBOOK.tolist()]
    beta = C * (t / (1 - t)) ** ALPHA
    weight = [math.exp(-beta * sum((a - b) ** 2 for a, b in zip(rows[one], row))) for row in rows]
    return [w / sum(weight) for w in weight]


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_metric_prob_is_the_equation(t):
    path = MetricPath(CODEBOOK, ALPHA, C)
    got = path.prob(torch.arange(4), t)
    assert torch.allclose(got, torch.tensor([naive_prob(i, t) for i in range(4)]), atol=1e-6)


def test_metric_velocity_is_the_derivative_of_prob_along_the_path():
    """d/dt p_t(x) = inflow - outflow, with rates u_t(x, z) from z to x: the Kolmogorov forward equation."""
    path, t, h = MetricPath(CODEBOOK, ALPHA, C), 0.4, 1e-3
    for one in range(4):
        x_1 = torch.tensor([one])
        rates = torch.stack([path.velocity(x_1, torch.tensor([z]), t)[0] for z in range(4)])
        rates.fill_diagonal_(0)
        p = path.prob(x_1, t)[0]
        flow = p @ rates - p * rates.sum(1)
        slope = (path.prob(x_1, t + h) - path.prob(x_1, t - h))[0] / (2 * h)
        assert torch.allclose(flow, slope, atol=2e-3)


def test_mixture_prob_is_the_equation():
    got = MixturePath(CODEBOOK).prob(torch.tensor([2]), 0.3)
    assert torch.allclose(got, torch.tensor([[0.175, 0.175, 0.475, 0.175]]))


@pytest.mark.parametrize("path", [MetricPath(CODEBOOK, ALPHA, C), MixturePath(CODEBOOK)], ids=["metric", "mixture"])
def test_sample_draws_by_prob_with_a_time_per_token(path, generator, monkeypatch):
    monkeypatch.setitem(chunks.ENTRIES, "cpu", 4 * 1000)  # several chunks
    x_1 = torch.tensor([1, 3]).repeat(40_000, 1)
    t = torch.tensor([0.2, 0.7]).repeat(40_000, 1)
    x_t = path.sample(x_1, t, generator)
    for column in range(2):
        share = torch.bincount(x_t[:, column], minlength=4) / len(x_t)
        assert torch.allclose(share, path.prob(x_1[:1], t[:1])[0, column], atol=0.012)


def test_jump_follows_the_rates(generator):
    path, t, dt = MetricPath(CODEBOOK, ALPHA, C), 0.5, 0.1
    x_1, x_t = torch.full((60_000,), 1), torch.full((60_000,), 3)
    rate = path.velocity(x_1[:1], x_t[:1], t)[0]
    rate[3] = 0
    want = (1 - math.exp(-dt * rate.sum())) * rate / rate.sum()
    want[3] = math.exp(-dt * rate.sum())
    share = torch.bincount(path.jump(x_1, x_t, t, dt, generator), minlength=4) / len(x_1)
    assert torch.allclose(share, want, atol=0.01)


@pytest.mark.parametrize("path", [MetricPath(CODEBOOK, ALPHA, C), MixturePath(CODEBOOK)])
def test_a_seed_gives_the_same_draws_in_chunks_of_any_size(path, monkeypatch):
    x_1, x_t = torch.randint(4, (2, 3, 50), generator=torch.Generator().manual_seed(1))
    logits, made = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(2)), []
    for tokens in (1000, 13, 1):  # on a GPU the memory that is free decides
        monkeypatch.setitem(chunks.ENTRIES, "cpu", 4 * tokens)
        g = torch.Generator().manual_seed(0)
        made.append([path.jump(x_1, x_t, 0.3, 0.4, g), path.sample(x_1, 0.3, g), Dense(logits).sample(g)[0]])
    assert all(torch.equal(*pair) for one in made[1:] for pair in zip(one, made[0]))
    assert not torch.equal(made[0][0], x_t)


def test_many_codes_take_the_same_values_as_the_table(monkeypatch):
    table = MetricPath(CODEBOOK, ALPHA, C)
    monkeypatch.setattr(path_module, "FEW_CODES", 0)
    direct = MetricPath(CODEBOOK, ALPHA, C)
    assert torch.allclose(table.prob(torch.arange(4), 0.5), direct.prob(torch.arange(4), 0.5), atol=1e-6)


def test_blockwise_draws_are_those_of_the_sum_over_all_codes(generator):
    """What a GPU compiles, against the inverse of the cumulative sum in float64; u next to a boundary may round."""
    codebook = torch.nn.functional.normalize(torch.randn(4 * 256, 5, generator=generator), dim=-1)
    x_1, u = torch.randint(1024, (4000,), generator=generator), torch.rand(4000, generator=generator).double()
    beta = 10 ** (torch.rand(4000, generator=generator) * 4 - 1)  # from nearly uniform to nearly x_1
    got = path_module._draw_blockwise(codebook[x_1], codebook, beta, u)
    distance = (codebook[x_1].double()[:, None] - codebook.double()).square().sum(-1)
    cumulative = (-beta.double()[:, None] * distance).softmax(-1).cumsum(-1)
    below = torch.nn.functional.pad(cumulative, (1, 0))
    assert (below.gather(1, got[:, None])[:, 0] < u + 1e-5).all()
    assert (cumulative.gather(1, got[:, None])[:, 0] > u - 1e-5).all()


def test_categorical_takes_unnormalised_rows(generator):
    share = (
        torch.bincount(categorical(torch.tensor([2.0, 0.0, 6.0]).repeat(40_000, 1), generator), minlength=3) / 40_000
    )
    assert torch.allclose(share, torch.tensor([0.25, 0.0, 0.75]), atol=0.01)


def test_bad_input_is_refused_in_a_sentence():
    path = MetricPath(CODEBOOK, ALPHA, C)
    with pytest.raises(DimoError, match=r"x_1 must lie in \[0, 4\), got values from 0 to 4"):
        path.sample(torch.tensor([0, 4]), 0.5)
    with pytest.raises(DimoError, match="x_1 must hold integer ids"):
        path.prob(torch.tensor([0.5]), 0.5)
    for t in (1.0, -0.1, float("nan")):
        with pytest.raises(DimoError, match=r"t must lie in \[0, 1\)"):
            path.sample(torch.tensor([0]), t)
    with pytest.raises(DimoError, match="t must be a number or have shape"):
        path.sample(torch.tensor([[0, 1]]), torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(DimoError, match="x_t must have shape"):
        path.velocity(torch.tensor([0]), torch.tensor([0, 1]), 0.5)
    with pytest.raises(DimoError, match="alpha and c must be positive"):
        MetricPath(CODEBOOK, 0.0, 1.0)
    with pytest.raises(DimoError, match="codebook must have shape"):
        MetricPath(torch.zeros(3), 1.0, 1.0)


def test_autocast_does_not_touch_the_distances(monkeypatch, generator):
    """Where networks run in bf16; at t near 1 a rounded distance would move most tokens."""
    monkeypatch.setattr(path_module, "FEW_CODES", 0)
    path = MetricPath(torch.randn(300, 8, generator=generator), 0.9, 3.0)
    x = torch.randint(300, (2, 50), generator=generator)
    want = path.sample(x, 0.99, torch.Generator().manual_seed(1)), path.prob(x, 0.99)
    with torch.autocast("cpu", torch.bfloat16):
        got = path.sample(x, 0.99, torch.Generator().manual_seed(1)), path.prob(x, 0.99)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
