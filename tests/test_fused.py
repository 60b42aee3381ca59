"""Losses from hidden states and heads against float64 autograd of the same formulas, and against the readable form."""

import pytest
import torch
from torch.nn import functional as F

from dimo.distill import fused, losses
from dimo.errors import DimoError, NonFiniteError
from dimo.ursa import chunks
from dimo.ursa.answer import Answer, draw, guide_answer, most_likely

B, N, D, K = 2, 7, 16, 600


@pytest.fixture
def answers(generator):
    """student, teacher, aux, and the student at another input: it shares the head."""

    def hidden():
        return torch.randn(B, N, D, generator=generator).requires_grad_()

    def head():
        return (0.7 * torch.randn(K, D, generator=generator)).requires_grad_()

    student, teacher, aux = (Answer(hidden(), head()) for _ in range(3))
    return student, teacher, aux, Answer(hidden(), student.weight)


@pytest.fixture(params=[3 * K, 10**6], ids=["three tokens", "all"])
def chunked(request, monkeypatch):
    monkeypatch.setitem(chunks.ENTRIES, "cpu", request.param)


def exact(answer):
    """float64 leaves and their log-softmax."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (answer.hidden, answer.weight))
    return hidden, weight, (hidden @ weight.T).log_softmax(-1)


def assert_gradients(got, want, atol=3e-6):
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() < atol * b.abs().max()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_denoising(answers, chunked, generator, smoothing):
    aux, x = answers[2], torch.randint(K, (B, N), generator=generator)
    hidden, weight, log_p = exact(aux)
    want = F.cross_entropy(log_p.flatten(0, 1), x.flatten(), label_smoothing=smoothing)
    got = fused.denoising(aux, x, smoothing)
    assert got.item() == pytest.approx(want.item(), abs=1e-5)
    assert got.item() == pytest.approx(losses.denoising(aux.logits, x, smoothing).item(), abs=1e-5)
    assert_gradients(
        torch.autograd.grad(3 * got, (aux.hidden, aux.weight)), torch.autograd.grad(3 * want, (hidden, weight))
    )


@pytest.mark.parametrize("name", ["kl", "jeffreys"])
def test_divergences_to_the_teacher(answers, chunked, name):
    _, teacher, aux, _ = answers
    (hidden, weight, log_a), log_t = exact(aux), exact(teacher)[2].detach()
    want = (log_t.exp() * (log_t - log_a)).sum(-1)
    if name == "jeffreys":
        want = want + (log_a.exp() * (log_a - log_t)).sum(-1)
    got = getattr(fused, name)(teacher, aux)
    assert got.item() == pytest.approx(want.mean().item(), abs=1e-5)
    assert got.item() == pytest.approx(getattr(losses, name)(teacher.logits, aux.logits).mean().item(), abs=1e-5)
    assert_gradients(
        torch.autograd.grad(got, (aux.hidden, aux.weight)), torch.autograd.grad(want.mean(), (hidden, weight))
    )


CASES = {
    "forward": dict(beta=0.0),
    "reverse": dict(beta=1.0, w_distill=0.7),
    "time, all terms": dict(beta="t", w_distill=0.7, w_policy=0.2, w_kd=0.3, lambda_ent=0.05),
    "bonus": dict(beta=0.5, lambda_ent=0.1),
    "knowledge": dict(beta=0.5, w_kd=0.3),
    "reinforce": dict(beta=None, w_policy=1.0, lambda_ent=0.1, w_kd=0.2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_student_losses(answers, chunked, generator, case):
    student, teacher, aux, at_t = answers
    x, logp, entropy = draw(student, generator)
    advantage, t = torch.randn(B, N, generator=generator), torch.rand(B, 1, generator=generator)
    case = case | {"beta": t if case["beta"] == "t" else case["beta"]}
    w_kd, bonus, policy = (case.get(key, 0.0) for key in ("w_kd", "lambda_ent", "w_policy"))
    made = fused.student_losses(
        student, teacher, aux, x, logp, entropy, student_at_t=at_t if w_kd else None, advantage=advantage, **case
    )
    hidden, weight, log_s = exact(student)
    hidden_at_t = at_t.hidden.detach().double().requires_grad_()
    log_t, log_a = (exact(answer)[2].detach() for answer in (teacher, aux))
    token = 0.0
    if case["beta"] is not None:
        beta, ratio = torch.as_tensor(case["beta"]).double().expand(B, N).unsqueeze(-1), log_a - log_t
        reverse = (log_a.exp() * ratio).sum(-1, keepdim=True)
        g = (1 - beta) * (log_a.exp() - log_t.exp()) + beta * log_a.exp() * (ratio - reverse)
        token = (g * (hidden @ weight.T)).sum(-1).mean()
    distill = token - policy * (advantage * log_s.gather(-1, x[..., None])[..., 0]).mean()
    total = case.get("w_distill", 1.0) * distill + bonus * (log_s.exp() * log_s).sum(-1).mean()
    wanted = [hidden, weight]
    if w_kd:
        kd = (log_t.exp() * (log_t - (hidden_at_t @ weight.T).log_softmax(-1))).sum(-1).mean()
        total, wanted = total + w_kd * kd, [*wanted, hidden_at_t]
        assert made.kd.item() == pytest.approx(kd.item(), abs=1e-5)
    assert made.total.item() == pytest.approx(total.item(), abs=1e-5)
    assert made.distill.item() == pytest.approx(distill.item(), abs=1e-5)
    leaves = [student.hidden, student.weight, at_t.hidden][: len(wanted)]
    assert_gradients(torch.autograd.grad(2 * made.total, leaves), torch.autograd.grad(2 * total, wanted))


def test_hidden_states_feel_the_same_under_a_head_that_stays(answers, chunked, generator):
    student, teacher, aux, at_t = answers
    x, logp, entropy = draw(student, generator)

    def gradients(heads_learn):
        a, b = (Answer(answer.hidden, answer.weight.detach().requires_grad_(heads_learn)) for answer in (student, aux))
        later = Answer(at_t.hidden, a.weight)
        made = fused.student_losses(a, teacher, b, x, logp, entropy, beta=0.5, student_at_t=later, w_kd=0.3)
        (made.total + fused.denoising(b, x)).backward()
        leaves = (a.hidden, later.hidden, b.hidden)
        found = [h.grad for h in leaves]
        for h in leaves:
            h.grad = None
        return found, [a.weight.grad, b.weight.grad]

    (learning, head_gradients), (staying, none) = gradients(True), gradients(False)
    assert all(torch.equal(a, b) for a, b in zip(learning, staying, strict=True))
    assert none == [None, None] and all(g.abs().max() > 0 for g in head_gradients)


def test_gaps_are_the_readable_ones(answers, chunked, generator):
    _, teacher, aux, _ = answers
    x = torch.randint(K, (B, N), generator=generator)
    got, t, a = fused.gaps(teacher, aux, x), teacher.logits.detach(), aux.logits.detach()
    want = (
        losses.kl(t, a), losses.kl(a, t), losses.total_variation(t, a), losses.token_entropy(t),
        losses.token_entropy(a), losses.log_prob(t, x) - losses.log_prob(a, x),
    )  # fmt: skip
    for mine, theirs in zip(vars(got).values(), want, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_gradients_from_bfloat16_are_unbiased(generator):
    """Over many draws the mean error of each gradient lies within 4 standard errors of 0, entry by entry pooled."""
    errors = {"hidden": [], "head": []}
    for _ in range(40):
        student, teacher, aux = (
            Answer(torch.randn(1, 64, D, generator=generator).bfloat16().requires_grad_(),
                   (0.7 * torch.randn(80, D, generator=generator)).bfloat16().float().requires_grad_())
            for _ in range(3)
        )  # fmt: skip
        x, logp, entropy = draw(student, generator)
        made = fused.student_losses(student, teacher, aux, x, logp, entropy, beta=0.3, lambda_ent=0.1)
        got = torch.autograd.grad(made.total, (student.hidden, student.weight))
        hidden, weight, log_s = exact(student)
        log_t, log_a = (exact(answer)[2].detach() for answer in (teacher, aux))
        ratio = log_a - log_t
        g = 0.7 * (log_a.exp() - log_t.exp())
        g = g + 0.3 * log_a.exp() * (ratio - (log_a.exp() * ratio).sum(-1, keepdim=True))
        total = (g * (hidden @ weight.T)).sum(-1).mean() + 0.1 * (log_s.exp() * log_s).sum(-1).mean()
        for name, a, b in zip(errors, got, torch.autograd.grad(total, (hidden, weight)), strict=True):
            error = (a.double() - b) / b.abs().mean()
            assert error.abs().mean() < 0.02  # bfloat16 keeps 8 bits
            errors[name].append((error * b.sign()).mean())  # a shrinking or growing gradient would show
    for values in errors.values():
        values = torch.stack(values)
        assert values.mean().abs() < 4 * values.std() / len(values) ** 0.5


def test_the_draw_does_not_depend_on_the_chunk(answers, monkeypatch):
    def drawn():
        return draw(answers[0], torch.Generator().manual_seed(5))[0]

    whole = drawn()
    for entries in (K, 5 * K):
        monkeypatch.setitem(chunks.ENTRIES, "cpu", entries)
        assert torch.equal(drawn(), whole)


@pytest.mark.parametrize("codes", [10, 256, 600])
def test_pick_draws_from_the_softmax(codes, generator):
    z = 2 * torch.randn(codes, generator=generator)
    z[3] = -torch.inf
    u = torch.rand(200_000, generator=generator, dtype=torch.float64)
    share = torch.bincount(chunks.pick(z.expand(len(u), -1).contiguous(), u), minlength=codes) / len(u)
    p = z.softmax(-1)
    assert ((share - p).abs() < 5 * (p / len(u)).sqrt() + 1e-12).all() and share[3] == 0


def test_pick_at_the_ends():
    z = torch.full((2, 300), -torch.inf)
    z[:, 7], z[:, 290] = 0.0, 0.0
    assert chunks.pick(z, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [7, 290]


def test_guidance_on_hidden_states_is_guidance_on_logits(answers):
    cond, uncond = answers[0], answers[3]
    w = torch.tensor([3.0, 1.0]).view(2, 1, 1)
    want = uncond.logits + w * (cond.logits - uncond.logits)
    assert torch.allclose(guide_answer(cond, uncond, w).logits, want, atol=1e-4)
    assert torch.equal(most_likely(cond), cond.logits.argmax(-1))


def test_bad_input_is_refused_in_a_sentence(answers):
    student, teacher, aux, _ = answers
    x, logp, entropy = draw(student)
    with pytest.raises(DimoError, match="advantage is needed"):
        fused.student_losses(student, teacher, aux, x, logp, entropy, beta=0.5, w_policy=0.1)
    with pytest.raises(DimoError, match=r"x_hat must have shape \(2, 7\)"):
        fused.student_losses(student, teacher, aux, x[:, :3], logp, entropy, beta=0.5)
    with pytest.raises(DimoError, match="aux's hidden must have shape"):
        fused.student_losses(student, teacher, aux.chunk(2)[0], x, logp, entropy, beta=0.5)
    with pytest.raises(DimoError, match="tokens must have shape"):
        fused.denoising(aux, x[:1])
    broken = Answer(teacher.hidden * torch.nan, teacher.weight)
    with pytest.raises(NonFiniteError, match="the teacher's logits must be finite"):
        fused.student_losses(student, broken, aux, x, logp, entropy, beta=0.5)
