"""The losses and their gradients, of logits and of hidden states, against float64 autograd of the same formulas."""

import pytest
import torch
from torch.nn import functional as F

from dimo.distill import losses
from dimo.errors import DimoError, NonFiniteError
from dimo.ursa import Chunked, Dense, Sparse, chunks
from dimo.ursa.token_losses import denoising

B, N, D, K = 2, 7, 16, 600


def predictions(kind, g):
    """student, teacher, aux, and the student at another input: it shares the head."""

    def states():
        if kind is Dense:
            return (3 * torch.randn(B, N, K, generator=g)).requires_grad_()
        return torch.randn(B, N, D, generator=g).requires_grad_()

    def head():
        return None if kind is Dense else (0.7 * torch.randn(K, D, generator=g)).requires_grad_()

    student, teacher, aux = (kind(states(), head()) for _ in range(3))
    return student, teacher, aux, kind(states(), student.head)


@pytest.fixture(params=[Dense, Chunked], ids=["dense", "chunked"])
def four(request, generator):
    return predictions(request.param, generator)


@pytest.fixture(params=[3 * K, 10**6], ids=["three tokens", "all"])
def entries(request, monkeypatch):
    monkeypatch.setitem(chunks.ENTRIES, "cpu", request.param)


def leaves_of(prediction):
    return [leaf for leaf in (prediction.states, prediction.head) if leaf is not None]


def exact(prediction):
    """float64 leaves and their log-softmax."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves_of(prediction)]
    return leaves, (leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].T).log_softmax(-1)


def assert_gradients(got, want, atol=3e-6):
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() < atol * b.abs().max()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_denoising(four, entries, generator, smoothing):
    aux, x = four[2], torch.randint(K, (B, N), generator=generator)
    leaves, log_p = exact(aux)
    want = F.cross_entropy(log_p.flatten(0, 1), x.flatten(), label_smoothing=smoothing)
    got = denoising(aux, x, smoothing)
    assert got.item() == pytest.approx(want.item(), abs=1e-5)
    assert_gradients(torch.autograd.grad(3 * got, leaves_of(aux)), torch.autograd.grad(3 * want, leaves))


@pytest.mark.parametrize("name", ["kl", "jeffreys"])
def test_divergences_to_the_teacher(four, entries, name):
    _, teacher, aux, _ = four
    (leaves, log_a), log_t = exact(aux), exact(teacher)[1].detach()
    want = (log_t.exp() * (log_t - log_a)).sum(-1)
    if name == "jeffreys":
        want = want + (log_a.exp() * (log_a - log_t)).sum(-1)
    got = getattr(losses, name)(teacher, aux)
    assert got.item() == pytest.approx(want.mean().item(), rel=1e-5)
    assert_gradients(torch.autograd.grad(got, leaves_of(aux)), torch.autograd.grad(want.mean(), leaves))


CASES = {
    "forward": dict(beta=0.0),
    "reverse": dict(beta=1.0, w_distill=0.7),
    "time, all terms": dict(beta="t", w_distill=0.7, w_policy=0.2, w_kd=0.3, lambda_ent=0.05),
    "bonus": dict(beta=0.5, lambda_ent=0.1),
    "knowledge": dict(beta=0.5, w_kd=0.3),
    "knowledge alone": dict(beta=0.5, w_distill=0.0, w_kd=0.3),
    "reinforce": dict(beta=None, w_policy=1.0, lambda_ent=0.1, w_kd=0.2),
}


def student_loss_in_float64(four, x, advantage, case):
    """(total, distill, kd or None, leaves): stages 7 to 9 written out."""
    student, teacher, aux, at_t = four
    leaves, log_s = exact(student)
    states_at_t = at_t.states.detach().double().requires_grad_()
    log_t, log_a = (exact(prediction)[1].detach() for prediction in (teacher, aux))
    z, token, kd = leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].T, torch.zeros(()), None
    if case["beta"] is not None:
        beta, ratio = torch.as_tensor(case["beta"]).double().expand(B, N).unsqueeze(-1), log_a - log_t
        reverse = (log_a.exp() * ratio).sum(-1, keepdim=True)
        g = (1 - beta) * (log_a.exp() - log_t.exp()) + beta * log_a.exp() * (ratio - reverse)
        token = (g * z).sum(-1).mean()
    distill = token - case.get("w_policy", 0.0) * (advantage * log_s.gather(-1, x[..., None])[..., 0]).mean()
    total = case.get("w_distill", 1.0) * distill + case.get("lambda_ent", 0.0) * (log_s.exp() * log_s).sum(-1).mean()
    if case.get("w_kd"):
        z_at_t = states_at_t if len(leaves) == 1 else states_at_t @ leaves[1].T
        kd = (log_t.exp() * (log_t - z_at_t.log_softmax(-1))).sum(-1).mean()
        total, leaves = total + case["w_kd"] * kd, [*leaves, states_at_t]
    return total, distill, kd, leaves


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_student_loss(four, entries, generator, case):
    student, teacher, aux, at_t = four
    x, logp, entropy = student.sample(generator)
    advantage, t = torch.randn(B, N, generator=generator), torch.rand(B, 1, generator=generator)
    case = case | {"beta": t if case["beta"] == "t" else case["beta"]}
    with_kd = bool(case.get("w_kd"))
    made = losses.student_loss(
        student, teacher, aux, x, logp, entropy, student_at_t=at_t if with_kd else None, advantage=advantage, **case
    )
    total, distill, kd, leaves = student_loss_in_float64(four, x, advantage, case)
    assert made.total.item() == pytest.approx(total.item(), rel=1e-5, abs=1e-5)
    assert made.distill.item() == pytest.approx(distill.item(), rel=1e-5, abs=1e-5)
    if with_kd:
        assert made.kd.item() == pytest.approx(kd.item(), rel=1e-5)
    got = [*leaves_of(student), *([at_t.states] if with_kd else [])]
    want = torch.autograd.grad(2 * total, leaves, allow_unused=True)
    want = [torch.zeros_like(leaf) if w is None else w for leaf, w in zip(leaves, want)]
    for a, b in zip(torch.autograd.grad(2 * made.total, got), want, strict=True):
        assert (a.double() - b).abs().max() <= 3e-6 * b.abs().max()


def test_a_second_backward_pass_gives_the_same_gradient(four, generator):
    student, teacher, aux, _ = four
    x, logp, entropy = student.sample(generator)
    total = losses.student_loss(student, teacher, aux, x, logp, entropy, beta=0.5, lambda_ent=0.1).total
    total = total + denoising(student, x)
    first = torch.autograd.grad(total, leaves_of(student), retain_graph=True)
    second = torch.autograd.grad(2 * total, leaves_of(student))
    for a, b in zip(first, second, strict=True):
        assert a.abs().max() > 0 and torch.allclose(2 * a, b)


def test_hidden_states_feel_the_same_under_a_frozen_head(entries, generator):
    student, teacher, aux, at_t = predictions(Chunked, generator)
    x, logp, entropy = student.sample(generator)

    def gradients(heads_learn):
        a, b = (Chunked(p.states, p.head.detach().requires_grad_(heads_learn)) for p in (student, aux))
        later = Chunked(at_t.states, a.head)
        made = losses.student_loss(a, teacher, b, x, logp, entropy, beta=0.5, student_at_t=later, w_kd=0.3)
        (made.total + denoising(b, x)).backward()
        leaves = (a.states, later.states, b.states)
        found = [h.grad for h in leaves]
        for h in leaves:
            h.grad = None
        return found, [a.head.grad, b.head.grad]

    (learning, head_gradients), (frozen, none) = gradients(True), gradients(False)
    assert all(torch.equal(a, b) for a, b in zip(learning, frozen, strict=True))
    assert none == [None, None] and all(g.abs().max() > 0 for g in head_gradients)


def test_gaps_are_those_of_the_formulas(four, entries, generator):
    _, teacher, aux, _ = four
    x = torch.randint(K, (B, N), generator=generator)
    log_t, log_a = exact(teacher)[1], exact(aux)[1]
    p_t, p_a = log_t.exp(), log_a.exp()
    want = (
        (p_t * (log_t - log_a)).sum(-1), (p_a * (log_a - log_t)).sum(-1), 0.5 * (p_t - p_a).abs().sum(-1),
        -(p_t * log_t).sum(-1), -(p_a * log_a).sum(-1), (log_t - log_a).gather(-1, x[..., None])[..., 0],
    )  # fmt: skip
    for mine, theirs in zip(vars(losses.gaps(teacher, aux, x)).values(), want, strict=True):
        assert torch.allclose(mine.double(), theirs, rtol=1e-4, atol=1e-5)


def test_an_exact_sparse_teacher_serves_as_the_same_dense_one(entries, generator):
    student, _, aux, at_t = predictions(Chunked, generator)
    x, logp, entropy = student.sample(generator)
    codes = torch.stack([torch.randperm(K, generator=generator)[:4] for _ in range(B * N)]).view(B, N, 4)
    sparse = Sparse(codes, torch.rand(B, N, 4, generator=generator).log(), -14.0, K)
    found = []
    for teacher in (sparse, Dense(sparse.logits())):
        made = losses.student_loss(student, teacher, aux, x, logp, entropy, beta=0.5, student_at_t=at_t, w_kd=0.2)
        found.append((made.total, *torch.autograd.grad(made.total, (*leaves_of(student), at_t.states))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_extreme_logits_stay_finite():
    teacher, aux = Dense(torch.tensor([[[300.0, 0.0, -300.0]]])), Dense(torch.tensor([[[-300.0, 0.0, 300.0]]]))
    found = losses.gaps(teacher, aux, torch.zeros(1, 1, dtype=torch.long))
    assert all(torch.isfinite(value).all() for value in vars(found).values())
    assert torch.isfinite(losses.jeffreys(teacher, aux))


def test_gradients_from_bfloat16_are_unbiased(generator):
    """Over many draws the mean error of each gradient lies within 4 standard errors of 0, entry by entry pooled."""
    errors = {"hidden": [], "head": []}
    for _ in range(40):
        student, teacher, aux = (
            Chunked(torch.randn(1, 64, D, generator=generator).bfloat16().requires_grad_(),
                    (0.7 * torch.randn(80, D, generator=generator)).bfloat16().float().requires_grad_())
            for _ in range(3)
        )  # fmt: skip
        x, logp, entropy = student.sample(generator)
        made = losses.student_loss(student, teacher, aux, x, logp, entropy, beta=0.3, lambda_ent=0.1)
        got = torch.autograd.grad(made.total, leaves_of(student))
        leaves, log_s = exact(student)
        log_t, log_a = (exact(prediction)[1].detach() for prediction in (teacher, aux))
        ratio = log_a - log_t
        g = 0.7 * (log_a.exp() - log_t.exp())
        g = g + 0.3 * log_a.exp() * (ratio - (log_a.exp() * ratio).sum(-1, keepdim=True))
        total = (g * (leaves[0] @ leaves[1].T)).sum(-1).mean() + 0.1 * (log_s.exp() * log_s).sum(-1).mean()
        for name, a, b in zip(errors, got, torch.autograd.grad(total, leaves), strict=True):
            error = (a.double() - b) / b.abs().mean()
            assert error.abs().mean() < 0.02  # bfloat16 keeps 8 bits
            errors[name].append((error * b.sign()).mean())  # a shrinking or growing gradient would show
    for values in errors.values():
        values = torch.stack(values)
        assert values.mean().abs() < 4 * values.std() / len(values) ** 0.5


def test_leave_one_out_subtracts_the_others_mean():
    got = losses.leave_one_out(torch.tensor([1.0, 2.0, 6.0]))
    assert got.tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])
    with pytest.raises(DimoError, match="batch of at least 2"):
        losses.leave_one_out(torch.ones(1))


def test_bad_input_is_refused_in_a_sentence(four):
    student, teacher, aux, _ = four
    x, logp, entropy = student.sample()
    with pytest.raises(DimoError, match="advantage is needed"):
        losses.student_loss(student, teacher, aux, x, logp, entropy, beta=0.5, w_policy=0.1)
    with pytest.raises(DimoError, match=r"x_hat must have shape \(2, 7\)"):
        losses.student_loss(student, teacher, aux, x[:, :3], logp, entropy, beta=0.5)
    with pytest.raises(DimoError, match=r"aux must predict \(B, N, K\) = \(2, 7, 600\), got \(1, 7, 600\)"):
        losses.student_loss(student, teacher, aux.chunk(2)[0], x, logp, entropy, beta=0.5)
    with pytest.raises(DimoError, match="tokens must have shape"):
        denoising(aux, x[:1])
    with pytest.raises(DimoError, match=r"tokens must lie in \[0, 600\)"):
        denoising(aux, x + K)
    broken = teacher.with_states(teacher.states * torch.nan)
    with pytest.raises(NonFiniteError, match="the teacher's logits must be finite"):
        losses.student_loss(student, broken, aux, x, logp, entropy, beta=0.5)
