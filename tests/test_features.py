"""Fréchet distance, coverage, and figures of tokens, against closed forms and loops."""

import math

import pytest
import torch

from dimo.errors import DimoError
from dimo.evaluation import features
from dimo.evaluation.bootstrap import jackknife
from dimo.evaluation.differences import flicker, motion, of_codes, sharpness
from dimo.ursa.probability_path import MetricPath, MixturePath


def test_frechet_distance_of_gaussians_that_commute():
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    s, r = torch.tensor([1.0, 4.0, 9.0, 0.0]).double(), torch.tensor([4.0, 1.0, 9.0, 1.0]).double()
    one, other = ((rotation * v) @ rotation.T for v in (s, r))
    shift = torch.tensor([1.0, 0, 2.0, 0]).double()
    # |shift|^2 + sum (sqrt s - sqrt r)^2
    found = features.frechet_distance(torch.zeros(4).double(), one, shift, other)
    assert found.item() == pytest.approx(5.0 + 1 + 1 + 0 + 1)
    assert features.frechet_distance(shift, one, shift, one).item() == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(DimoError, match="covariance_2 must have shape"):
        features.frechet_distance(shift, one, shift, one[:3, :3])


def test_frechet_distance_of_gaussians_that_do_not_commute():
    # in two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt det M), here of M = C_1 C_2
    one = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    other = torch.tensor([[5.0, -2.0], [-2.0, 1.0]]).double()
    product = one @ other
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    zero = torch.zeros(2).double()
    found = features.frechet_distance(zero, one, zero, other).item()
    assert found == pytest.approx((one.trace() + other.trace()).item() - 2 * root)
    assert found == pytest.approx(features.frechet_distance(zero, other, zero, one).item())


def test_frechet_of_features_is_that_of_their_scaled_gaussians(generator):
    own = torch.randn(10, 3, 4, generator=generator).double() * 3 + 1
    other = torch.randn(10, 5, 4, generator=generator).double() * torch.tensor([1.0, 1.0, 100.0, 1.0])
    x, y = (z.flatten(0, 1) / other.flatten(0, 1).std(0) for z in (own, other))
    plain = features.frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    found = features.frechet(own, other)
    assert found.value == pytest.approx(plain.item())  # a rotation to 4 of 4 dimensions changes nothing
    assert found.interval[0] < found.value < found.interval[1]

    def by_hand(w):  # delete one prompt
        kept = [(own[row > 0].flatten(0, 1), other[row > 0].flatten(0, 1)) for row in w]
        scale = other.flatten(0, 1).std(0)
        four = [(a / scale, b / scale) for a, b in kept]
        one = [features.frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()) for a, b in four]
        return torch.stack(one)

    # deleted prompts keep the divisor n - 1 of all, a difference of second order
    assert found.interval == pytest.approx(jackknife(by_hand, 10).interval, rel=0.05)


def test_frechet_has_the_dimension_that_the_sample_supports(generator):
    assert [features.dimension(n, 64) for n in (4, 15, 16, 20, 1000)] == [0, 0, 8, 10, 32]
    assert features.dimension(99, 5) == 5
    wide = torch.randn(8, 2, 64, generator=generator)
    assert math.isfinite(features.frechet(wide, wide + 1).value)  # 16 videos, 64 features
    assert features.frechet(wide, wide).value == pytest.approx(0, abs=1e-9)
    assert features.frechet(wide[:7], wide[:7]) is None and features.frechet(wide * math.nan, wide) is None
    projected = features.project(wide, 8)
    assert torch.equal(projected, features.project(wide, 8)) and projected.shape == (8, 2, 8)
    with pytest.raises(DimoError, match="size must be from 1 to the 64 features, got 65"):
        features.project(wide, 65)


def test_below_the_fewest_videos_chance_alone_looks_like_a_collapse(generator):
    """How often a sampler's own second set is as far from the first as videos that all lie at its mean."""
    shares = {}
    for videos in (4, features.FEWEST - 4, features.FEWEST):
        size, as_far = videos // 2, []
        for one, other in torch.randn(400, 2, videos, size, generator=generator).double():
            scaled = [(x - other.mean(0)) / other.std(0) for x in (one, other)]
            (m, c), (own, spread) = ((x.mean(0), x.T.cov()) for x in scaled)
            chance = features.frechet_distance(m, c, own, spread)
            as_far.append(bool(chance >= features.frechet_distance(own, torch.zeros_like(c), own, spread)))
        shares[videos] = sum(as_far) / len(as_far)
    few, fewer, fewest = shares.values()
    assert few > 0.4 and fewer > 0.02 and fewest < 0.01, shares


def test_coverage_by_brute_force(generator):
    one, other = torch.randn(9, 3, generator=generator), torch.randn(25, 3, generator=generator) * 3
    for k in (1, 3, 5):
        covered = []
        for i, x in enumerate(other):
            radius = sorted((x - y).norm().item() for j, y in enumerate(other) if j != i)[k - 1]
            covered.append(any((x - y).norm().item() <= radius for y in one))
        found = features.is_covered(one, other, k)
        assert found.tolist() == covered and 0 < sum(covered) < 25
    assert features.is_covered(other, other).all()
    with pytest.raises(DimoError, match="neighbours must be from 1 to 24, one less than there are videos: 25"):
        features.is_covered(one, other, 25)


def test_coverage_of_one_distribution_by_itself_is_as_known():
    g = torch.Generator().manual_seed(0)
    shares = [features.is_covered(*torch.randn(2, 200, 4, generator=g), 3).float().mean() for _ in range(20)]
    n, k = 200, 3  # Naeem et al., eq. 10: 1 - prod (n - i) / (2n - i)
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert torch.stack(shares).mean().item() == pytest.approx(expected, abs=0.01)


def test_tokens_in_loops(generator):
    codes = torch.randint(6, (2, 3, 3, 4), generator=generator)
    book = torch.randn(6, 5, generator=generator)
    for path in (MetricPath(book, 0.9, 2.0), MixturePath(book)):
        vectors = path.codebook if isinstance(path, MetricPath) else torch.eye(6)

        def d(a, b, vectors=vectors):
            return (vectors[a] - vectors[b]).square().sum().item()

        for i, (frames, height, width) in ((i, codes.shape[1:]) for i in range(2)):
            v = codes[i]
            cells = [(y, x) for y in range(height) for x in range(width)]
            moved = [d(v[t, y, x], v[t - 1, y, x]) for t in range(1, frames) for y, x in cells]
            flashes = [min(d(v[1, y, x], v[0, y, x]), d(v[1, y, x], v[2, y, x])) for y, x in cells]
            edges = [d(v[t, y, x], v[t, y + 1, x]) for t in range(frames) for y, x in cells if y + 1 < height]
            edges += [d(v[t, y, x], v[t, y, x + 1]) for t in range(frames) for y, x in cells if x + 1 < width]
            for function, expected in ((motion, moved), (flicker, flashes), (sharpness, edges)):
                found, mean = function(codes, of_codes(path))[i].item(), sum(expected) / len(expected)
                assert found == pytest.approx(mean, rel=1e-5)
    assert motion(codes[:, :1], of_codes(path)) is None and flicker(codes[:, :2], of_codes(path)) is None
    assert sharpness(codes[:, :, :1, :1], of_codes(path)) is None
    with pytest.raises(DimoError, match=r"video must have shape \(B, T, H, W\)"):
        motion(codes[0], of_codes(path))
