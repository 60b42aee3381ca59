"""The nine stages: what each reads and writes, against computations written out here."""

import copy
import dataclasses
import types

import pytest
import torch

from dimo.distill import stages
from dimo.distill.schedules import Baseline, XInit
from dimo.distill.stages import Step
from dimo.errors import DimoError
from dimo.ursa import Dense, MetricPath, visual_logits
from dimo.ursa.probability_path import T_MAX

GRID = (3, 4, 4)


@pytest.fixture
def step(ursa, generator):
    ids = ursa.tokenize(["blue bar moving up", "pink square moving left", "green corner moving down"], 4)
    made = Step(txt_ids=ids)
    stages.draw_x_init(made, XInit(ursa.path.codebook_size, 0.0, 0.2), 48, generator)
    stages.student_pass(made, ursa.transformer, GRID, generator)
    stages.renoise(made, ursa.path, torch.tensor([0.2, 0.5, 0.95]), generator)
    return made


def test_student_pass_is_one_pass_at_x_init(step, ursa):
    z = visual_logits(ursa.transformer, step.txt_ids, step.x_init, GRID)
    p = z.softmax(-1)
    assert torch.equal(step.student.logits(), z)
    assert torch.allclose(step.logp, p.gather(-1, step.x_hat[..., None])[..., 0].log(), atol=1e-5)
    assert torch.allclose(step.entropy, -(p * p.log()).sum(-1), atol=1e-5)
    spread = (z[0] - z[0].mean(-1, keepdim=True)).square().sum(-1).div(z.shape[-1] - 1).sqrt().mean()
    chunked = Step(txt_ids=step.txt_ids, x_init=step.x_init, dense=False)
    stages.student_pass(chunked, ursa.transformer, GRID)
    assert step.logits_std.item() == pytest.approx(spread.item(), rel=1e-5) == chunked.logits_std.item()


def test_x_hat_is_drawn_from_the_students_softmax(ursa, generator):
    ids = ursa.tokenize(["blue bar moving up"], 4).expand(400, -1)
    same = Step(txt_ids=ids, x_init=torch.randint(10, (1, 48), generator=generator).expand(400, -1))
    with torch.no_grad():
        stages.student_pass(same, ursa.transformer, GRID, generator)
    p, x = same.student.logits()[0].softmax(-1), same.x_hat
    share = torch.nn.functional.one_hot(x, ursa.path.codebook_size).float().mean(0)
    assert ((share - p).abs() < 5 * (p / 400).sqrt() + 0.01).all()


def test_one_t_per_sample_or_per_latent_frame(generator):
    assert stages.draw_t(5, GRID, 0, 0, "sample", 1.0, 1, generator).shape == (5,)
    leaning = stages.draw_t(100_000, GRID, 0, 0, "sample", 1.5, 1, generator)
    assert leaning.mean().item() == pytest.approx(1 / 2.5, abs=5e-3)  # E[u^p] = 1 / (p + 1)
    t = stages.draw_t(5, GRID, 0, 0, "frame", 1.0, 1, generator).view(5, 3, 16)
    assert (t == t[..., :1]).all() and (t[:, 0, 0] != t[:, 1, 0]).all()
    several = stages.draw_t(6, GRID, 0, 0, "frame", 1.0, 4, generator).view(4, 6, 3, 16)
    parts = (several[..., 0] / T_MAX * 4).long().sort(0).values
    assert (several == several[..., :1]).all() and (parts == torch.arange(4).view(4, 1, 1)).all()
    with pytest.raises(DimoError, match="t_per must be one of sample, frame, mixed, got 'token'"):
        stages.draw_t(5, GRID, 0, 0, "token", 1.0, 1, generator)


def test_guidance_is_off_above_guidance_trunc(step, ursa):
    empty = ursa.tokenize([""], 4)
    stages.teacher_pass(step, ursa.transformer, GRID, 3.0, 0.9, empty)
    c = visual_logits(ursa.transformer, step.txt_ids, step.x_t, GRID)
    u = visual_logits(ursa.transformer, empty.expand(3, -1), step.x_t, GRID)
    z = step.teacher.logits()
    assert torch.allclose(z[:2], (u + 3 * (c - u))[:2], atol=1e-4) and torch.allclose(z[2], c[2], atol=1e-4)
    with pytest.raises(DimoError, match="uncond_ids, the ids"):
        stages.teacher_pass(step, ursa.transformer, GRID, 3.0)


def test_the_auxiliary_learns_the_students_samples(step, ursa, generator):
    """Fitted to one batch of x_hat, its denoising loss falls below the teacher's, which has never seen them."""
    aux = copy.deepcopy(ursa.transformer).requires_grad_(True)
    optimizer = torch.optim.Adam(aux.parameters(), lr=2e-3)
    for loss in stages.auxiliary_losses(step, aux, ursa.path, GRID, "denoise", 60, generator=generator):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(step.aux_losses) == 60
    assert sum(step.aux_losses[-10:]) < 0.6 * sum(step.aux_losses[:10])


@pytest.mark.parametrize("t_per", ["sample", "frame"])
def test_the_auxiliary_is_fitted_at_the_kind_of_noise_it_is_asked_at(step, ursa, generator, t_per):
    times = []
    path = types.SimpleNamespace(sample=lambda x, t, g: times.append(t) or x)
    next(stages.auxiliary_losses(step, ursa.transformer, path, GRID, generator=generator, t_per=t_per))
    asked = stages.draw_t(len(step.x_hat), GRID, 0, 0, t_per, 1.0, 1, generator)
    assert times[0].shape == asked.shape


def test_what_the_student_feels_is_the_token_gradient(step, ursa, generator):
    logits = step.student.logits().detach().requires_grad_(True)
    teacher, aux = (2 * torch.randn(logits.shape, generator=generator) for _ in range(2))
    made = dataclasses.replace(step, student=Dense(logits), teacher=Dense(teacher), aux=Dense(aux))
    stages.distillation_signal(made, "dimo", 0.5, None)
    stages.total_loss(made)
    (felt,) = torch.autograd.grad(made.loss, logits)
    leaf = aux.double().requires_grad_(True)
    p, q = teacher.double().softmax(-1), leaf.softmax(-1)
    both = 0.5 * (p * (p / q).log()).sum(-1).mean() + 0.5 * (q * (q / p).log()).sum(-1).mean()
    (want,) = torch.autograd.grad(both, leaf)
    assert torch.allclose(felt.double(), want, atol=1e-8)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("estimator", "w_reinforce"), [("dimo", 0.0), ("dimo", 0.3), ("reinforce", 0.0)])
def test_draws_of_t_are_averaged(ursa, generator, dense, estimator, w_reinforce):
    """Gradient and reward of three draws at once are the means of what each draw gives by itself."""
    ids = ursa.tokenize(["blue bar moving up", "pink square moving left"], 4)
    teacher, student, aux = (copy.deepcopy(ursa.transformer) for _ in range(3))
    with torch.no_grad():
        for network in (student, aux):
            for p in network.parameters():
                p += 0.02 * torch.randn(p.shape, generator=generator)
    x_init = torch.randint(10, (2, 48), generator=generator)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.2])
    student.requires_grad_(True)

    def sampled():
        step = Step(txt_ids=ids, x_init=x_init, dense=dense)
        stages.student_pass(step, student, GRID, torch.Generator().manual_seed(3))
        return step

    drawn = sampled()
    stages.renoise(drawn, ursa.path, t, generator)
    assert drawn.x_t.shape == (6, 48)

    def passed(rows):
        step = sampled()
        assert torch.equal(step.x_hat, drawn.x_hat)
        step.t, step.x_t = t[rows], drawn.x_t[rows]
        stages.teacher_pass(step, teacher, GRID)
        stages.auxiliary_pass(step, aux, GRID)
        stages.distillation_signal(step, estimator, "time", None, w_reinforce)
        stages.total_loss(step)
        step.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        student.zero_grad()
        return gradients, step.reward

    together, reward = passed(slice(None))
    each = [passed(slice(i, i + 2)) for i in (0, 2, 4)]
    want = torch.stack([gradient for gradient, _ in each]).mean(0)
    assert want.norm() > 1e-4 and (together - want).norm() < 1e-4 * want.norm()
    assert torch.allclose(reward, torch.stack([r for _, r in each]).mean(0), rtol=1e-5)


def test_fits_at_x_t_are_the_answers_to_its_draws(ursa, generator):
    """The auxiliary's answer to a draw is from before the update that the draw leads to; then fits are elsewhere."""
    ids = ursa.tokenize(["blue bar moving up", "pink square moving left"], 4)
    for dense in (True, False):
        step = Step(txt_ids=ids, x_hat=torch.randint(10, (2, 48), generator=generator), dense=dense)
        stages.renoise(step, ursa.path, torch.tensor([0.1, 0.4, 0.6, 0.8]), generator)
        aux, want = copy.deepcopy(ursa.transformer).requires_grad_(True), []
        aux.lm_head.requires_grad_(False)
        fits = stages.auxiliary_losses(step, aux, ursa.path, GRID, "denoise", 3, generator=generator, share_x_t=True)
        for draw in (*step.x_t.split(2), None):
            before = None if draw is None else visual_logits(aux, ids, draw, GRID).detach()
            loss = next(fits)
            if draw is not None:
                want.append(before)
                cross_entropy = torch.nn.functional.cross_entropy(before.flatten(0, 1), step.x_hat.flatten())
                assert loss.item() == pytest.approx(cross_entropy.item(), rel=1e-4)
            loss.backward()
            with torch.no_grad():
                for p in aux.parameters():
                    if p.grad is not None:
                        p -= 0.1 * p.grad
                        p.grad = None
        assert torch.allclose(step.aux.logits(), torch.cat(want), atol=1e-4)
    with pytest.raises(DimoError, match="aux_steps must be at least 2"):
        next(stages.auxiliary_losses(step, aux, ursa.path, GRID, "denoise", 1, share_x_t=True))
    with pytest.raises(DimoError, match=r"the rows of t must be a multiple of those of x_hat \(2\), got 3"):
        stages.renoise(step, ursa.path, torch.tensor([0.1, 0.4, 0.6]), generator)


@pytest.mark.parametrize("baseline", ["leave_one_out", "ema"])
def test_reinforce_is_the_exact_policy_gradient_on_average(baseline):
    """One token, three codes, a known reward per code: the mean over draws is d/dz sum_x p(x) r(x)."""
    torch.manual_seed(0)
    draws, z = 100_000, torch.tensor([0.3, -0.2, 0.8])
    x_hat = torch.multinomial(z.softmax(-1), draws, replacement=True)[:, None]
    # a teacher-to-auxiliary gap of its own for each code makes the reward depend on x_hat
    gap = torch.tensor([0.0, 1.0, 2.0])[x_hat]
    teacher = torch.zeros(draws, 1, 3)
    aux = torch.cat([gap[..., None], torch.zeros(draws, 1, 2)], -1)
    logits = z.expand(draws, 1, 3).clone().requires_grad_(True)
    made = Step(student=Dense(logits), x_hat=x_hat, x_t=x_hat, teacher=Dense(teacher), aux=Dense(aux))
    made.logp, made.entropy = made.student.log_prob(x_hat), made.student.entropy()
    stages.distillation_signal(made, "reinforce", 0.5, Baseline() if baseline == "ema" else None)
    stages.total_loss(made)
    (got,) = torch.autograd.grad(made.loss, logits)

    def jeffreys(g):
        p, q = torch.full((3,), 1 / 3), torch.tensor([g, 0.0, 0.0]).softmax(-1)
        return (p * (p / q).log()).sum() + (q * (q / p).log()).sum()

    reward = -torch.stack([jeffreys(g) for g in (0.0, 1.0, 2.0)])
    leaf = z.clone().requires_grad_(True)
    (want,) = torch.autograd.grad(-(leaf.softmax(-1) * reward).sum(), leaf)
    assert torch.allclose(got.sum((0, 1)), want, atol=4e-3)


def test_literal_is_a_fixed_point_and_dimo_is_none(step, ursa, generator):
    """All three networks equal: literal's terms vanish; after one fit of the auxiliary, Di[M]O's gradient does not."""
    stages.teacher_pass(step, ursa.transformer, GRID)
    loss, again = stages.auxiliary_losses(step, ursa.transformer, ursa.path, GRID, "match_teacher", 2)
    assert torch.equal(loss, again)  # every update is at all of x_t
    stages.auxiliary_pass(step, ursa.transformer, GRID)
    stages.distil_knowledge(step, ursa.transformer, GRID)
    stages.distillation_signal(step, "reinforce", 0.5, Baseline())
    stages.total_loss(step)
    assert max(loss.abs(), step.kd.abs(), step.reward.abs().max()) < 1e-6
    aux = copy.deepcopy(ursa.transformer).requires_grad_(True)
    next(stages.auxiliary_losses(step, aux, ursa.path, GRID, generator=generator)).backward()
    with torch.no_grad():
        for p in aux.parameters():
            p -= 0.05 * p.grad
    stages.auxiliary_pass(step, aux, GRID)
    step.gaps = None
    stages.distillation_signal(step, "dimo", 0.5, None)
    stages.total_loss(step)
    assert step.reward.abs().min() > 1e-4


def test_total_loss_is_the_weighted_sum(step, ursa, generator):
    stages.teacher_pass(step, ursa.transformer, GRID)
    shape = step.student.states.shape
    step.aux, step.student_at_t = (Dense(torch.randn(shape, generator=generator)) for _ in range(2))
    stages.distillation_signal(step, "dimo", 0.5, None)
    stages.total_loss(step, 0.5, 0.1, 0.2)
    want = 0.5 * step.distill.item() + 0.1 * step.kd.item() - 0.2 * step.entropy.mean().item()
    assert step.loss.item() == pytest.approx(want, abs=1e-6) and min(abs(step.distill), step.kd, step.entropy.min()) > 0


def test_nan_is_named_where_it_appears(step, ursa, generator):
    broken, whole, good = copy.deepcopy(ursa.transformer), dataclasses.replace(step), step.student.detach()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(DimoError, match="the teacher's logits must be finite"):
        stages.teacher_pass(step, broken, GRID)
    with pytest.raises(DimoError, match="the student's logits must be finite"):
        stages.student_pass(step, broken, GRID)
    with pytest.raises(DimoError, match="the auxiliary's logits must be finite"):
        stages.auxiliary_pass(step, broken, GRID)
    for name, who in (("teacher", "the teacher's logits"), ("aux", "the auxiliary's logits")):
        healthy = dataclasses.replace(whole, beta=0.5, teacher=good, aux=good)
        broken_one = dataclasses.replace(healthy, **{name: Dense(good.states * torch.nan)})
        stages.total_loss(healthy)
        with pytest.raises(DimoError, match=f"{who} must be finite"):
            stages.total_loss(broken_one)
    with pytest.raises(DimoError, match="the student's loss must be finite"):
        stages.total_loss(healthy, lambda_ent=float("nan"))


def test_unknown_choices_are_refused(step, ursa):
    with pytest.raises(DimoError, match="aux_objective must be"):
        next(stages.auxiliary_losses(step, ursa.transformer, ursa.path, GRID, "copy"))
    with pytest.raises(DimoError, match="estimator must be one of dimo, reinforce, got 'soft'"):
        stages.distillation_signal(step, "soft", 0.5, None)
    with pytest.raises(DimoError, match="prompts must not be empty"):
        stages.tokenise(ursa.tokenize, [], 4)


def test_prompts_become_left_padded_ids(ursa):
    ids = stages.tokenise(ursa.tokenize, ["blue bar", ""], 4)
    pad = ursa.tokenizer.pad_token_id
    assert ids[0, :2].tolist() == [pad, pad] and pad not in ids[0, 2:].tolist() and ids[1].tolist() == [pad] * 4


def test_a_path_without_metric_serves_too(step, ursa, generator):
    path = MetricPath(torch.eye(ursa.path.codebook_size), 1.0, 1.0)
    stages.renoise(step, path, torch.tensor([0.0, 0.5, 0.999]), generator)
    assert (step.x_t[2] == step.x_hat[2]).float().mean() > 0.9 > (step.x_t[0] == step.x_hat[0]).float().mean()


def test_beta_by_time_is_forward_kl_at_the_noise_and_reverse_at_the_data(generator):
    teacher, aux, student = (torch.randn(3, 4, 6, generator=generator) for _ in range(3))
    student.requires_grad_(True)
    x, t = torch.randint(6, (3, 4), generator=generator), torch.tensor([0.0, 0.25, 0.999])
    step = Step(student=Dense(student), teacher=Dense(teacher), aux=Dense(aux), x_hat=x, x_t=x, t=t)
    step.logp, step.entropy = step.student.log_prob(x), step.student.entropy()
    stages.distillation_signal(step, "dimo", "time", None)
    stages.total_loss(step)
    (felt,) = torch.autograd.grad(step.loss, student)
    for row, beta in enumerate(t.tolist()):
        leaf = aux[row].double().requires_grad_(True)
        p, q = teacher[row].double().softmax(-1), leaf.softmax(-1)
        value = (1 - beta) * (p * (p / q).log()).sum() + beta * (q * (q / p).log()).sum()
        (want,) = torch.autograd.grad(value / 12, leaf)
        assert torch.allclose(felt[row].double(), want, atol=1e-7)
