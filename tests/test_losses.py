"""Divergences, gradients and advantages against float64 loops and autograd."""

import math

import pytest
import torch

from dimo.distill import losses, stages
from dimo.errors import DimoError
from dimo.ursa import chunks


@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(3)
    return 3 * torch.randn(2, 3, 5, generator=g), 3 * torch.randn(2, 3, 5, generator=g)


def softmax(row):
    top = max(row)
    weight = [math.exp(v - top) for v in row]
    return [w / sum(weight) for w in weight]


def test_kl_entropy_and_log_prob_by_hand(logits):
    teacher, aux = logits
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    got_kl, got_h = losses.kl(teacher, aux), losses.token_entropy(teacher)
    got_lp, mean = losses.log_prob(teacher, tokens), 0.0
    for b in range(2):
        for n in range(3):
            p, q = softmax(teacher[b, n].tolist()), softmax(aux[b, n].tolist())
            assert got_kl[b, n].item() == pytest.approx(sum(a * math.log(a / c) for a, c in zip(p, q)), abs=1e-4)
            assert got_h[b, n].item() == pytest.approx(-sum(a * math.log(a) for a in p), abs=1e-5)
            assert got_lp[b, n].item() == pytest.approx(math.log(p[tokens[b, n]]), abs=1e-4)
            mean -= math.log(p[tokens[b, n]]) / 6
    assert losses.denoising(teacher, tokens).item() == pytest.approx(mean, abs=1e-4)


def test_the_family_of_divergences(logits):
    teacher, aux = logits
    forward, reverse = losses.kl(teacher, aux), losses.kl(aux, teacher)
    assert torch.allclose(losses.divergence(teacher, aux, 0.0), forward)
    assert torch.allclose(losses.divergence(teacher, aux, 1.0), reverse)
    assert torch.allclose(losses.jeffreys(teacher, aux), forward + reverse, atol=1e-5)
    assert [losses.beta_of(d) for d in ("forward", "jeffreys", "reverse", "0.3", 0.7)] == [0.0, 0.5, 1.0, 0.3, 0.7]


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_token_gradient_is_autograds(logits, beta):
    teacher, aux = logits
    leaf = aux.double().requires_grad_(True)
    p, q = teacher.double().softmax(-1), leaf.softmax(-1)
    value = (1 - beta) * (p * (p / q).log()).sum() + beta * (q * (q / p).log()).sum()
    (want,) = torch.autograd.grad(value, leaf)
    assert torch.allclose(losses.token_gradient(teacher, aux, beta).double(), want, atol=1e-5)


def test_extreme_logits_stay_finite():
    teacher, aux = torch.tensor([[[300.0, 0.0, -300.0]]]), torch.tensor([[[-300.0, 0.0, 300.0]]])
    for value in (losses.token_gradient(teacher, aux, 0.5), losses.jeffreys(teacher, aux), losses.token_entropy(aux)):
        assert torch.isfinite(value).all()


def test_leave_one_out_subtracts_the_others_mean():
    got = losses.leave_one_out(torch.tensor([1.0, 2.0, 6.0]))
    assert got.tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])


def test_label_smoothing_by_hand():
    logits, tokens = torch.tensor([[[1.0, 0.0, -1.0]]]), torch.tensor([[0]])
    p = softmax([1.0, 0.0, -1.0])
    target = [0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]
    want = -sum(w * math.log(q) for w, q in zip(target, p))
    assert losses.denoising(logits, tokens, 0.1).item() == pytest.approx(want, abs=1e-6)


def test_bad_input_is_refused_in_a_sentence(logits):
    teacher, aux = logits
    with pytest.raises(DimoError, match=r"logits_q must have shape \(2, 3, 5\), got \(2, 3, 4\)"):
        losses.kl(teacher, aux[..., :4])
    with pytest.raises(DimoError, match="aux must have shape"):
        losses.token_gradient(teacher, aux[:1], 0.5)
    with pytest.raises(DimoError, match=r"tokens must lie in \[0, 5\)"):
        losses.log_prob(teacher, torch.full((2, 3), 5))
    with pytest.raises(DimoError, match="divergence must be one of"):
        losses.beta_of("revers")
    with pytest.raises(DimoError, match=r"must lie in \[0, 1\]"):
        losses.beta_of(1.5)
    with pytest.raises(DimoError, match="batch of at least 2"):
        losses.leave_one_out(torch.ones(1))


@pytest.mark.parametrize("entries", [7, 3 * 7, 10**6])  # one token, three, all
def test_losses_and_their_gradients_do_not_depend_on_the_chunk(monkeypatch, entries):
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 5, 7, generator=g, dtype=torch.float32) for _ in range(2))
    x, t = torch.randint(7, (2, 5), generator=g), torch.rand(2, 5, 1, generator=g)

    def everything():
        leaf = q.clone().requires_grad_(True)
        values = [losses.kl(p, leaf), losses.total_variation(p, leaf), losses.token_entropy(leaf)]
        values += [losses.log_prob(leaf, x), losses.denoising(leaf, x, 0.1).expand(2, 5)]
        torch.stack(values).sum().backward()
        return torch.stack(values).detach(), leaf.grad, losses.token_gradient(p, q, t)

    whole = everything()
    monkeypatch.setitem(chunks.ENTRIES, "cpu", entries)
    for got, want in zip(everything(), whole):
        assert torch.allclose(got, want, atol=1e-6)
    # and against formulas that know of no chunks
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    assert torch.allclose(whole[0][1], (log_p.exp() - log_q.exp()).abs().sum(-1) / 2, atol=1e-6)
    assert torch.allclose(
        whole[0][0], torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1), atol=1e-6
    )


def test_beta_by_time_is_forward_kl_at_the_noise_and_reverse_at_the_data():
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(3, 4, 6, generator=g) for _ in range(2))
    t = torch.tensor([0.0, 0.25, 0.999])
    step = stages.Step(teacher_logits=p, aux_logits=q, student_logits=torch.zeros(3, 4, 6, requires_grad=True), t=t)
    stages.distillation_loss(step, "dimo", "time")
    (felt,) = torch.autograd.grad(step.distill, step.student_logits)
    for row, beta in enumerate(t.tolist()):
        want = losses.token_gradient(p[row : row + 1], q[row : row + 1], beta) / 12
        assert torch.allclose(felt[row], want[0], atol=1e-7)
