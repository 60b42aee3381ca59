"""Intervals over prompts, against resampling by hand, exact percentiles and the normal distribution."""

import itertools
import math

import pytest
import torch

from dimo.errors import DimoError
from dimo.evaluation import bootstrap


def test_weights_say_how_often_a_prompt_is_drawn():
    w = bootstrap.weights(5, 400)
    assert w.shape == (400, 5) and torch.allclose(w.sum(1), torch.ones(400).double())
    assert torch.equal(w * 5, (w * 5).round()) and torch.equal(w, bootstrap.weights(5, 400))
    assert (w.mean(0) - 0.2).abs().max() < 0.03 and len(w.unique(dim=0)) > 50
    with pytest.raises(DimoError, match="prompts and resamples must be at least 1, got 0 and 1000"):
        bootstrap.weights(0)


def test_percentiles_are_those_of_all_resamples_of_three_prompts():
    values = torch.tensor([0.0, 1.0, 5.0])
    means = sorted(sum(drawn) / 3 for drawn in itertools.product(values.tolist(), repeat=3))  # 27, equally likely
    found = bootstrap.mean(values, resamples=20_000)
    assert found.value == pytest.approx(2.0)
    # of 27 equal masses the 2.5th percentile is the first, the 97.5th the last
    assert found.interval == pytest.approx((means[0], means[-1]))
    middle = bootstrap.mean(torch.tensor([0.0] * 50 + [1.0] * 50), resamples=20_000)
    assert middle.interval == pytest.approx((0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.011)  # binomial, steps of .01


def test_a_ratio_is_resampled_in_pairs():
    own, other = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2.0, 4.0, 12.0])
    assert bootstrap.ratio(own, other).interval == pytest.approx((0.5, 0.5))  # all of it cancels
    found = bootstrap.ratio(own, torch.tensor([6.0, 2.0, 1.0]))
    drawn = [(own[list(i)].sum() / other.flip(0)[list(i)].sum()).item() for i in itertools.product(range(3), repeat=3)]
    assert found.value == 1.0 and found.interval[0] < 1 < found.interval[1]
    assert min(drawn) > 0 and bootstrap.ratio(own, torch.zeros(3)) is None


def test_one_prompt_has_no_interval():
    assert bootstrap.mean(torch.tensor([3.0])) == bootstrap.Estimate(3.0)
    assert bootstrap.mean(torch.tensor([math.nan, 1.0])) is None


def test_the_jackknife_of_a_mean_is_its_t_interval():
    values = torch.tensor([3.0, 5.0, 4.0, 9.0], dtype=torch.float64)
    found = bootstrap.jackknife(lambda w: w @ values, 4)
    half = 3.182 * values.std().item() / 2  # Student's t with 3 degrees of freedom
    assert found.value == 5.25 and found.interval == pytest.approx((5.25 - half, 5.25 + half))
    assert bootstrap.jackknife(lambda w: w @ (values - 5), 4).interval[0] == 0.0
