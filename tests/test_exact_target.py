"""The auxiliary's exact target against Bayes' rule written out, and against the mean of many sampled targets."""

import pytest
import torch

from dimo.distill import stages
from dimo.distill.exact_target import exact_denoising
from dimo.distill.stages import Step
from dimo.errors import DimoError
from dimo.ursa import Chunked, Dense, MetricPath, MixturePath
from dimo.ursa.chunks import ENTRIES
from dimo.ursa.token_losses import denoising
from dimo.worlds.fsq import LEVELS, fsq_codebook

B, N, K, D = 2, 3, 16, 8
T = torch.tensor([[0.0, 0.2, 0.5], [0.05, 0.8, 0.99]])


def metric(codes=K):
    return MetricPath(fsq_codebook(LEVELS[codes]), 0.9, 3.0)


def forward_kernel(path, t):
    """p_t(x_t | x_1) in float64, (clean, noisy), from the definitions in the paths' docstrings."""
    if isinstance(path, MixturePath):
        return t * torch.eye(K, dtype=torch.float64) + (1 - t) / K
    points = fsq_codebook(LEVELS[K]).double()
    points = points / points.norm(dim=-1, keepdim=True).clamp(min=1e-5)
    distance = (points[:, None] - points).square().sum(-1)
    return torch.softmax(-3.0 * (t / (1 - t)) ** 0.9 * distance, -1)


def networks(dense, generator):
    """Predictions of auxiliary and student with gradients to their states, and logits of both in float64."""
    if dense:
        made = [Dense(2 * torch.randn(B, N, K, generator=generator)) for _ in range(2)]
        logits = [p.states.double() for p in made]
    else:
        head = torch.randn(K, D, generator=generator)
        made = [Chunked(torch.randn(B, N, D, generator=generator), head) for _ in range(2)]
        logits = [(p.states @ head.T).double() for p in made]
    for p in made:
        p.states.requires_grad_(True)
    return made, logits


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("path", [metric(), MixturePath(torch.zeros(K, 1))], ids=["metric", "mixture"])
def test_the_target_is_bayes_rule(path, dense, generator, monkeypatch):
    (aux, student), (z_aux, z_student) = networks(dense, generator)
    x_t = torch.randint(K, (B, N), generator=generator)
    monkeypatch.setitem(ENTRIES, "cpu", 2 * K)  # two tokens at once
    got = exact_denoising(aux, student, path, x_t, T, label_smoothing=0.1)
    want, gradient = 0.0, torch.zeros(B, N, K, dtype=torch.float64)
    for b in range(B):
        for i in range(N):
            joint = z_student[b, i].softmax(-1) * forward_kernel(path, T[b, i].double())[:, x_t[b, i]]
            target = 0.9 * joint / joint.sum() + 0.1 / K
            want -= (target * z_aux[b, i].log_softmax(-1)).sum() / (B * N)
            gradient[b, i] = (z_aux[b, i].softmax(-1) - target) / (B * N)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    got.backward()
    gradient = gradient if dense else gradient @ aux.head.double()
    assert torch.allclose(aux.states.grad.double(), gradient, atol=1e-5) and student.states.grad is None


def test_it_is_the_mean_of_sampled_targets_with_less_variance(generator):
    """Draws of (x_hat, x_t) from the student and the path: both gradients have one mean, and the exact one scatters
    less. Each x_t of the draws has a target of its own, so the mean is over both draws.
    """
    draws, path = 60_000, metric()
    z_aux, z_student = (2 * torch.randn(1, 1, K, generator=generator) for _ in range(2))
    student = Dense(z_student.expand(draws, 1, K))
    x_hat = student.sample(generator)[0]
    x_t = path.sample(x_hat, 0.3, generator)
    aux = Dense(z_aux.expand(draws, 1, K).clone().requires_grad_(True))

    def gradient(loss):
        (g,) = torch.autograd.grad(loss, aux.states)
        return g[:, 0].double() * draws  # of every draw

    sampled, exact = gradient(denoising(aux, x_hat)), gradient(exact_denoising(aux, student, path, x_t, 0.3))
    error = (sampled - exact).std(0) / draws**0.5
    assert ((sampled.mean(0) - exact.mean(0)).abs() < 4.5 * error + 1e-7).all()
    assert exact.var(0).sum() < 0.5 * sampled.var(0).sum()


def test_the_normaliser_of_larger_codebooks(generator):
    path, codes = metric(1000), torch.randint(1000, (40,), generator=generator)
    t = torch.cat([torch.linspace(0, 0.99, 39), torch.tensor([0.999])])
    points = path.codebook.double()
    clean = torch.randint(1000, (40,), generator=generator)
    distance = (points[clean][:, None] - points).square().sum(-1)  # (40, K)
    beta = 3.0 * (t.double() / (1 - t.double())) ** 0.9
    want = -beta * distance[torch.arange(40), codes] - (-beta[:, None] * distance).logsumexp(-1)
    got = path.log_likelihood(codes, t)[torch.arange(40), clean]
    assert torch.allclose(got.double(), want, atol=2e-3, rtol=1e-5) and torch.allclose(
        got[:30].double(), want[:30], atol=5e-5
    )


class Spy:
    """A path that notes the times of its noise."""

    def __init__(self, path):
        self.path, self.log_likelihood, self.seen = path, path.log_likelihood, []

    def sample(self, x, t, generator):
        self.seen.append(t)
        return self.path.sample(x, t, generator)


def test_fits_take_it_at_the_time_of_their_own_noise(ursa, generator):
    """Stage 6, shared fits and others, with a time per sample and per frame: the loss is that of the call by hand."""
    grid, ids = (3, 4, 4), ursa.tokenize(["blue bar moving up", "pink square moving left"], 4)
    for t_per in ("sample", "frame"):
        step = Step(txt_ids=ids, x_init=torch.randint(10, (2, 48), generator=generator))
        stages.student_pass(step, ursa.transformer, grid, generator)
        t = stages.draw_t(2, grid, 0, 0, t_per, 1.0, 2, generator)
        stages.renoise(step, ursa.path, t, generator)
        options = dict(share_x_t=True, t_per=t_per, aux_target="exact", empty_share=0.0)
        fits = stages.auxiliary_losses(
            step, ursa.transformer, ursa.path, grid, "denoise", 3, generator=generator, **options
        )
        for x, at in zip(step.x_t.split(2), t.split(2)):
            by_hand = stages.predict(ursa.transformer, ids, x, grid, True)
            want = exact_denoising(by_hand, step.student, ursa.path, x, at)
            assert next(fits).item() == pytest.approx(want.item(), rel=1e-5)
            assert abs(want - denoising(by_hand, step.x_hat)) > 1e-4
        spy = Spy(ursa.path)
        elsewhere = stages.auxiliary_losses(
            step,
            ursa.transformer,
            spy,
            grid,
            "denoise",
            1,
            generator=generator,
            t_per=t_per,
            aux_target="exact",
            shift=9.0,
        )
        assert (
            next(elsewhere).item() > 0 and spy.seen[0].mean() < 0.35
        )  # a shift of 9 takes the mean of t from .5 to .13


def test_bad_input(generator):
    (aux, student), _ = networks(True, generator)
    x_t = torch.zeros(B, N, dtype=torch.long)
    with pytest.raises(DimoError, match=r"x_t must have shape \(2, 3\)"):
        exact_denoising(aux, student, metric(), x_t[:, :2], 0.5)
    with pytest.raises(DimoError, match="student must predict"):
        exact_denoising(aux, Dense(torch.zeros(B, N, 4)), metric(), x_t, 0.5)
    with pytest.raises(DimoError, match="t must be at most 0.999, got 0.9995"):
        exact_denoising(aux, student, metric(), x_t, 0.9995)
    with pytest.raises(DimoError, match="aux_target must be 'sampled' or 'exact', got 'soft'"):
        next(stages.auxiliary_losses(Step(txt_ids=x_t, x_t=x_t), None, metric(), (3, 1, 1), aux_target="soft"))
