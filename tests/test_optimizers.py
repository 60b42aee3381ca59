"""Muon against torch's own and against the singular value decomposition; the schedules against their closed forms."""

import pytest
import torch

from dimo.config import Optim
from dimo.train.optimizers import Muon, lr_factor, make_optimizers, orthogonalise, set_lr_factor
from dimo.ursa import UrsaConfig, UrsaTransformer
from dimo.ursa.cuda_graph import make_capturable

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL |= {"num_hidden_layers": 2, "vocab_size": 30, "lm_vocab_size": 20, "lm_head_size": 10, "bov_token_id": 2}


def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values():
    torch.manual_seed(0)
    for shape in ((3, 8, 20), (3, 20, 8), (1, 12, 12)):
        x = torch.randn(shape, dtype=torch.float64)
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        got = u.mT @ orthogonalise(x) @ vh.mT  # diagonal in x's own singular vectors
        values = got.diagonal(dim1=1, dim2=2)
        assert (got - torch.diag_embed(values)).abs().max() < 1e-9
        # the quintic sends [0.1, 1] of the spectrum to [0.68, 1.14] in five rounds
        large = s / s.norm(dim=1, keepdim=True) > 0.1
        assert (values[large] > 0.6).all() and (values[large] < 1.2).all()


def test_muon_takes_torchs_steps():
    torch.manual_seed(0)
    shapes = [(8, 20), (20, 8), (8, 20), (12, 12)]
    start = [torch.randn(s) for s in shapes]
    ours = [torch.nn.Parameter(x.clone()) for x in start]
    theirs = [torch.nn.Parameter(x.clone()) for x in start]
    a = Muon(ours, lr=0.01, momentum=0.9, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for mine, other in zip(ours, theirs):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        a.step()
        b.step()
    for mine, other, x in zip(ours, theirs, start):
        moved = (other - x).norm()
        assert moved > 0.01
        assert (mine - other).norm() < 0.03 * moved  # torch's rounds are in bfloat16


def test_stacks_that_are_cut_take_the_same_steps(monkeypatch):
    torch.manual_seed(0)
    start, grads = [torch.randn(4, 6) for _ in range(5)], [torch.randn(4, 6) for _ in range(5)]

    def stepped():
        params = [torch.nn.Parameter(x.clone()) for x in start]
        for p, g in zip(params, grads):
            p.grad = g.clone()
        Muon(params, lr=0.1).step()
        return torch.stack([p.detach() for p in params])

    whole = stepped()
    monkeypatch.setattr("dimo.train.optimizers.STACK_ENTRIES", 2 * 24)
    assert torch.allclose(stepped(), whole, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_stepped_once(optimizer):
    model = UrsaTransformer(UrsaConfig.from_dict(SMALL))
    made = make_optimizers(model, 1e-3, 1e-2, Optim(optimizer=optimizer))
    held = [id(p) for o in made for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    matrices = {id(p) for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    muon = {id(p) for o in made if isinstance(o, Muon) for group in o.param_groups for p in group["params"]}
    assert muon == (matrices if optimizer == "muon" else set())
    set_lr_factor(made, 0.5)
    set_lr_factor(made, 0.25)  # of the initial rate, not of the last one
    assert [o.param_groups[0]["lr"] for o in made] == pytest.approx([2.5e-4, 2.5e-3][: len(made)])


def test_rates_in_tensors_make_the_steps_of_rates_that_are_numbers():
    torch.manual_seed(0)
    start = UrsaTransformer(UrsaConfig.from_dict(SMALL))
    moved = []
    for in_tensors in (False, True):
        model = UrsaTransformer(UrsaConfig.from_dict(SMALL))
        model.load_state_dict(start.state_dict())
        made = make_optimizers(model, 1e-3, 1e-2, Optim(weight_decay=0.1, muon_weight_decay=0.1))
        if in_tensors:
            make_capturable(made, torch.device("cpu"))
        held = [group["lr"] for o in made for group in o.param_groups]
        g = torch.Generator().manual_seed(1)
        for factor in (0.5, 0.25, 1.0):
            set_lr_factor(made, factor)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=g)
            for optimizer in made:
                optimizer.step()
        if in_tensors:
            assert [group["lr"] for o in made for group in o.param_groups] == pytest.approx([1e-3, 1e-2])
            assert all(a is b["lr"] for a, b in zip(held, (group for o in made for group in o.param_groups)))
        moved.append([(p - q).detach() for p, q in zip(model.parameters(), start.parameters())])
    for plain, tensors in zip(*moved):
        assert plain.norm() > 1e-4 and (plain - tensors).norm() < 1e-5 * plain.norm()


def test_schedules():
    def at(decay, steps, warmup_steps=50, least=0.1):
        return [lr_factor(Optim(decay=decay, warmup_steps=warmup_steps), step, 100, least) for step in steps]

    no_warmup = {"warmup_steps": 0, "least": 0.0}
    assert at("linear", (0, 25, 100), **no_warmup) == pytest.approx([1, 0.75, 0])
    assert at("linear", (0, 50, 100), warmup_steps=0, least=0.1) == pytest.approx([1, 0.55, 0.1])
    assert at("cosine", (0, 50, 100), **no_warmup) == pytest.approx([1, 0.5, 0])
    assert at("wsd", (0, 80, 90, 99), **no_warmup) == pytest.approx([1, 1, 0.5, 0.05])
    assert at("constant", (0, 1, 9), warmup_steps=4) == pytest.approx([0.25, 0.5, 1])
