"""Weights that are held as products use them, and AdamW on their float32 masters, against torch's own way."""

import copy

import pytest
import torch
from processes import run_script

from dimo.config import Optim, load_config
from dimo.errors import NonFiniteError
from dimo.train.learner import Learner
from dimo.train.masters import MasterAdamW, copies_of, learning_of
from dimo.train.optimizers import make_optimizers, set_lr_factor
from dimo.train.trainer import Trainer
from dimo.ursa import UrsaConfig, UrsaTransformer, recompute
from dimo.ursa.inputs import rope_positions

BF16 = ["model.device=cpu", "distill.batch_size_per_gpu=2", "optim.optimizer=adamw", "training.mixed_precision=bf16"]
BF16 += ["distill.aux_steps=1", "optim.warmup_steps=1", "distill.t_draws=1"]


def small(seed=0):
    torch.manual_seed(seed)
    return UrsaTransformer(UrsaConfig(64, 128, 4, 2, 2, 10.0, 25, 15, 10, 2, 16))


def copy_of(model, p):
    held, rows = copies_of(model)[p]
    return held.detach()[rows]


def assert_copies(model):
    assert len(copies_of(model)) == 7 * len(model.model.layers)
    assert all(torch.equal(copy_of(model, p), p.bfloat16()) for p in copies_of(model))


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_masters_take_torchs_steps_and_copies_follow(beta1):
    model, reference = small(), small()
    start = copy.deepcopy(model)
    model.hold(torch.bfloat16)
    optim = Optim(optimizer="adamw", weight_decay=0.1, beta1=beta1)
    (mine,), (torchs,) = (make_optimizers(net, 1e-2, 0, optim) for net in (model, reference))
    assert isinstance(mine, MasterAdamW) and len(mine.param_groups) == 5  # embeddings, two layers, norm, head
    for factor in (0.5, 1.0, 0.25):
        set_lr_factor([mine, torchs], factor)
        for leaf in learning_of(model):
            leaf.grad = torch.randn_like(leaf)
        for p, q in zip(model.parameters(), reference.parameters()):
            held, rows = copies_of(model).get(p, (p, slice(None)))
            q.grad = 0.1 * held.grad[rows].float()
        mine.step(scale=torch.tensor(0.1))
        torchs.step()
    for p, q, before in zip(model.parameters(), reference.parameters(), start.parameters()):
        moved = (q - before).norm()
        assert moved > 1e-3 and (p - q).norm() < 1e-5 * moved
    assert_copies(model)
    held = [set(mine.state[p]) for p in model.parameters()]
    assert held == [{"step", "exp_avg_sq", "exp_avg"} if beta1 else {"step", "exp_avg_sq"}] * len(held)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_change_nothing(bad):
    model = small().hold(torch.bfloat16)
    (optimizer,) = make_optimizers(model, 1e-2, 0, Optim(optimizer="adamw", beta1=0.9))
    learner = Learner(model, [optimizer], 1.0)

    def learn(value):
        for leaf in learner.learning:
            leaf.grad = torch.full_like(leaf, value)
        learner.update(learner.gradient_norm(), "student")

    learn(0.1)
    kept = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    with pytest.raises(NonFiniteError, match="student's gradient"):
        learn(bad)
    assert_copies(model)
    now = [model.state_dict(), optimizer.state_dict()["state"]]
    flat, before = (torch.utils._pytree.tree_leaves(state) for state in (now, kept))
    assert all(torch.equal(a, b) for a, b in zip(flat, before, strict=True))
    learn(0.1)
    assert not any(torch.equal(p, kept[0][name]) for name, p in model.named_parameters())


def outcome(model, ids):
    """Logits and gradients, the weights' own or their copies'."""
    logits = model(ids, rope_positions(3, (2, 2, 2)))
    logits.float().square().sum().backward()
    copies = copies_of(model)
    pairs = (copies.get(p, (p, slice(None))) for p in model.parameters())
    return [logits.detach(), *(held.grad[rows] for held, rows in pairs)]


def test_held_weights_give_what_the_parameters_give(generator):
    model, ids = small(), torch.randint(25, (2, 12), generator=generator)
    want = outcome(copy.deepcopy(model), ids)
    for a, b in zip(outcome(copy.deepcopy(model).hold(torch.float32), ids), want):
        assert torch.equal(a, b)
    frozen = copy.deepcopy(model).requires_grad_(False).hold(torch.float32)
    assert torch.equal(frozen(ids, rope_positions(3, (2, 2, 2))), want[0]) and not copies_of(frozen)
    part = frozen.model.layers[0].mlp
    assert part.up_proj.weight.untyped_storage().data_ptr() == part.held[0].untyped_storage().data_ptr()
    part.up_proj.weight.mul_(2)  # a view, so that no pass goes on with what was
    assert not torch.equal(frozen(ids, rope_positions(3, (2, 2, 2))), want[0])


def test_what_is_held_is_never_an_older_weight(generator):
    model, other = small(0).hold(torch.bfloat16), small(1)
    model.load_state_dict(other.state_dict())
    assert_copies(model)
    assert not copies_of(copy.deepcopy(model)) and not copies_of(model.double())
    frozen = small(0).requires_grad_(False).hold(torch.float32).requires_grad_(True)
    frozen(torch.randint(25, (2, 12), generator=generator), rope_positions(3, (2, 2, 2))).sum().backward()
    assert all(p.grad is not None for p in frozen.parameters())


def test_layers_and_updates_of_two_networks_share_their_graphs(monkeypatch, generator, graphs_made):
    graphs, compiling = graphs_made
    compiled = compiling(recompute.run_layer)
    updates = {}

    def on_device(function, _):
        return updates.setdefault(function, compiling(function))

    monkeypatch.setattr(recompute, "compiled_run", lambda: compiled)
    monkeypatch.setattr("dimo.train.masters.on_device", on_device)
    for seed in (0, 1):
        model, ids = small(seed), torch.randint(25, (2, 12), generator=generator)
        for part in (model.model.embed_tokens, model.model.norm, model.lm_head):
            part.requires_grad_(False)
        plain = copy.deepcopy(model).hold(torch.float32)
        model.run_with(compile=True).hold(torch.float32)
        for net in (plain, model):
            net(ids, rope_positions(3, (2, 2, 2))).square().sum().backward()
        for a, b in zip(learning_of(model), learning_of(plain), strict=True):
            assert torch.allclose(a.grad, b.grad, atol=2e-5, rtol=1e-4)
        before = [p.clone() for p in learning_of(model)]
        (optimizer,) = make_optimizers(model, 1e-2, 0, Optim(optimizer="adamw"))
        for _ in range(2):  # the rate is no constant of the graph
            optimizer.step(scale=torch.tensor(0.5))
            set_lr_factor([optimizer], 0.5)
        assert all(not torch.equal(a, b) for a, b in zip(learning_of(model), before))
        assert all(torch.equal(copy_of(model, p), p) for p in copies_of(model))
    assert len(graphs) == 3  # a first layer, whose input has no gradient; any other; an update


def test_a_step_through_copies_is_that_of_autocast(tmp_path, monkeypatch):
    """Without copies weights and gradients are cast in every pass, and torch's AdamW and clipping make the update."""
    words = [*BF16, f"experiment.output_dir={tmp_path}", "optim.max_grad_norm=1e-2", "optim.beta1=0.9"]
    copies, casts = (Trainer(load_config("smoke", [*words, f"optim.optimizer={o}"])) for o in ("adamw", "muon"))
    assert copies_of(copies.networks.student) and not copies_of(casts.networks.student)
    config = Optim(optimizer="adamw", beta1=0.9)
    for learner, lr in ((casts.student, copies.config.optim.lr), (casts.aux, copies.config.optim.aux_lr)):
        learner.optimizers = make_optimizers(learner.model, lr, 0, config)
    start = [p.clone() for p in copies.networks.student.parameters()]
    one, other = (trainer.step(0) for trainer in (copies, casts))
    assert torch.equal(one[0].x_hat, other[0].x_hat)
    assert float(one[1]["grad_norm/student"]) == pytest.approx(float(other[1]["grad_norm/student"]), rel=1e-3)
    for name in ("student", "aux", "ema"):
        pairs = zip(getattr(copies.networks, name).parameters(), getattr(casts.networks, name).parameters(), start)
        for a, b, before in pairs:
            assert (a - b).norm() <= 0.02 * (b - before).norm(), name
    assert sum((p - q).norm() > 0 for p, q in zip(copies.networks.student.parameters(), start)) > 30


def test_checkpoints_pass_between_both_kinds_of_adamw(tmp_path):
    words = [*BF16, f"experiment.output_dir={tmp_path}"]
    copies, plain = (Trainer(load_config("smoke", [*words, f"training.mixed_precision={p}"])) for p in ("bf16", "no"))
    for source, target in ((copies, plain), (plain, copies)):
        source.step(0)
        tensors, state = source.state()
        tensors = {name: {key: w.clone() for key, w in weights.items()} for name, weights in tensors.items()}
        target.load_state(tensors, copy.deepcopy(state), copy.deepcopy(source.rank_state()))
        for name, learner in (("student", target.student), ("aux", target.aux)):
            for key, p in learner.model.named_parameters():
                assert torch.equal(p, tensors[name][key].to(p.dtype)), (name, key)
        target.step(1)
        held = target.state()[1]["optimizers"]["student"]
        assert {float(moments["step"]) for moments in held.values()} == {float(source_step(state)) + 1}
    assert_copies(copies.networks.aux)


def source_step(state):
    return next(iter(state["optimizers"]["student"].values()))["step"]


TWO_RANKS = f"""
import torch, torch.distributed as dist
import dimo.train.engine as engine
from dimo.config import load_config
from dimo.train.masters import copies_of
from dimo.train.trainer import Trainer

engine.SENT_ALONE = 5000  # matrices alone while backward goes on, norms together
trainer = Trainer(load_config("smoke", {BF16!r}))
learner, found = trainer.student, []


def alike(tensor):
    parts = [torch.zeros_like(tensor) for _ in range(2)]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.equal(*parts)


def update(norm, name, inner=learner.update):
    found.append(learner.gradients)
    assert all(alike(gradient) for gradient in learner.gradients)
    whole = torch.cat([gradient.float().flatten() for gradient in learner.gradients]).norm()
    assert abs(whole / norm - 1) < 1e-5
    inner(norm, name)


learner.update = update
for index in range(2):
    trainer.step(index)
assert len(found) == 2 and not trainer.guard.skipped
for network in (trainer.networks.student, trainer.networks.aux):
    for p, (held, rows) in copies_of(network).items():
        assert alike(p) and torch.equal(held.detach()[rows], p.bfloat16())
"""


def test_two_ranks_average_the_gradients_of_copies(tmp_path):
    run_script(tmp_path, TWO_RANKS)
