"""Layers that the auxiliary shares with the teacher: what they save, and that nothing else changes."""

import copy
import json

import pytest
import torch
from processes import WITH_ZERO2, run_script
from safetensors.torch import load_file, save_file

from dimo.bench import bench_config
from dimo.bench.sizes import SIZES, step_flops
from dimo.commands.dry_run import dry_run
from dimo.config import load_config
from dimo.distill import stages
from dimo.distill.stages import Step
from dimo.errors import DimoError
from dimo.run.checkpoints import MANIFEST, describe
from dimo.train.passes import passes_of_step
from dimo.train.trainer import Trainer
from dimo.ursa import UrsaConfig, UrsaTransformer, load_ursa, predict
from dimo.ursa.lower import going_on, keeping
from dimo.ursa.token_losses import denoising
from dimo.ursa.transformer import Layer
from dimo.views.models import open_models
from dimo.worlds import checkpoint_folder

GRID = (2, 2, 2)


def shared_pair(layers):
    """(teacher of 4 layers, an auxiliary that has moved and shares its first ones, the same with copies of them)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 25, "lm_vocab_size": 15, "lm_head_size": 10}
    teacher = UrsaTransformer(UrsaConfig.from_dict({**sizes, "bov_token_id": 2})).requires_grad_(False)
    lower = [teacher.model.embed_tokens, *teacher.model.layers[:layers]]
    aux = copy.deepcopy(teacher, {id(part): part for part in lower}).requires_grad_(True)
    for part in lower:
        part.requires_grad_(False)
    with torch.no_grad():
        for p in aux.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.01)
    naive = copy.deepcopy(aux)
    return teacher, aux, naive


def ran(monkeypatch):
    """The layers that run from now on."""
    seen, inner = [], Layer.forward
    monkeypatch.setattr(Layer, "forward", lambda layer, *how: (seen.append(layer), inner(layer, *how))[1])
    return seen


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_fits_and_answers_go_on_from_the_teachers_states(monkeypatch, generator, dense, guidance, checkpointing):
    """Two draws of t, one fit at each of them and one elsewhere, against an auxiliary that runs all its layers."""
    teacher, aux, naive = shared_pair(2)
    aux.run_with(checkpointing=checkpointing)
    ids = torch.randint(15, (3, 2), generator=generator)
    x_hat, x_t, elsewhere = (torch.randint(10, (n, 8), generator=generator) for n in (3, 6, 3))
    step = Step(dense=dense, txt_ids=ids, x_hat=x_hat, x_t=x_t, t=torch.full((6,), 0.5))
    seen = ran(monkeypatch)
    stages.teacher_pass(step, teacher, GRID, guidance, 0.9, torch.zeros(1, 2, dtype=torch.long), shared_layers=2)
    assert seen == list(teacher.model.layers) and step.lower.states.shape == (6, 2 + 1 + 8, 64)
    assert step.lower.states.untyped_storage().nbytes() == 4 * step.lower.states.numel()  # the other half is gone
    path = type("Path", (), {"sample": lambda self, *_: elsewhere})()
    fits = stages.auxiliary_losses(step, aux, path, GRID, aux_steps=3, share_x_t=True, generator=generator)
    for x in (*x_t.split(3), elsewhere):
        seen.clear()
        loss = next(fits)
        assert seen == list(aux.model.layers[0 if x is elsewhere else 2 :])
        loss.backward()
        want = denoising(predict(naive, ids, x, GRID, dense), x_hat)
        assert torch.allclose(loss, want, atol=1e-6)
        want.backward()
    for (name, p), q in zip(aux.named_parameters(), naive.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad and (p.grad is None) == (q.grad is None) == (not p.requires_grad)
        assert p.grad is None or torch.allclose(p.grad, q.grad, atol=1e-6), name
    want = predict(naive, ids.repeat(2, 1), x_t, GRID, dense).logits()
    assert torch.allclose(step.aux.logits(), want, atol=1e-5)
    seen.clear()
    stages.auxiliary_pass(step, aux, GRID)
    assert seen == list(aux.model.layers[2:]) and torch.allclose(step.aux.logits(), want, atol=1e-5)


def test_going_on_after_the_last_layer_gives_the_teachers_own_states(generator):
    teacher, aux, _ = shared_pair(4)
    ids, x = torch.randint(15, (2, 2), generator=generator), torch.randint(10, (2, 8), generator=generator)
    with torch.no_grad():
        aux.model.norm.weight.copy_(teacher.model.norm.weight)
        with keeping(4) as lower:
            want = predict(teacher, ids, x, GRID).states
        with going_on(lower):
            assert torch.equal(predict(aux, ids, x, GRID).states, want)
        with going_on(lower), pytest.raises(DimoError, match="states to go on from must have shape .1, 11, 64."):
            predict(aux, ids[:1], x[:1], GRID)
    with keeping(0) as nothing:
        assert nothing is None


def trainer_for(folder, *more):
    same = ["model.device=cpu", "distill.batch_size_per_gpu=4", "training.max_train_steps=4", "distill.t_draws=1"]
    return Trainer(load_config("smoke", [*same, f"experiment.output_dir={folder}", *more]))


@pytest.mark.parametrize("more", [[], ["training.mixed_precision=bf16", "optim.optimizer=adamw"]])
def test_a_run_trains_the_upper_layers_alone_saves_and_goes_on(tmp_path, more):
    keys = ["model.aux_shared_layers=2", "distill.aux_pass=shared", "distill.guidance_scale=2", *more]
    whole = trainer_for(tmp_path / "whole", *keys)
    n = whole.networks
    teacher, layers = copy.deepcopy(n.teacher.state_dict()), n.aux.model.layers
    assert layers[0] is n.teacher.model.layers[0] and layers[1] is n.teacher.model.layers[1]
    assert layers[2] is not n.teacher.model.layers[2] and n.aux.model.embed_tokens is n.teacher.model.embed_tokens
    assert n.student.model.layers[0] is not layers[0] and n.student.model.embed_tokens.weight.requires_grad
    before = {name: p.clone() for name, p in n.aux.named_parameters()}
    whole.train(progress=False)
    moved = {name for name, p in n.aux.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".layers.2." in name}
    assert set(whole.aux.state()) == moved
    assert all(torch.equal(value, teacher[name]) for name, value in n.teacher.state_dict().items())
    stopped = trainer_for(tmp_path / "parts", *keys, "experiment.save_every=2")
    steps = stopped.step
    stopped.step = lambda index: steps(index) if index < 3 else pytest.fail("stopped")
    with pytest.raises(pytest.fail.Exception):
        stopped.train(progress=False)
    again = trainer_for(tmp_path / "parts", *keys, "experiment.save_every=2")
    again.train(progress=False)
    for a, b in zip(n.aux.parameters(), again.networks.aux.parameters(), strict=True):
        assert torch.equal(a, b)
    folder = tmp_path / "parts" / "checkpoints" / "step-00000004"
    saved, shown = load_file(folder / "aux.safetensors"), open_models(tmp_path / "parts", 4).networks["auxiliary"]
    assert saved.keys() == moved | {"model.norm.weight", "lm_head.weight"}
    own = n.aux.state_dict()  # in training, a teacher of a bf16 run is rounded
    assert all(torch.equal(value.bfloat16(), own[name].bfloat16()) for name, value in shown.state_dict().items())
    _make_older(folder, n.aux)
    older = trainer_for(tmp_path / "parts", *keys, "training.max_train_steps=5")
    older.train(progress=False)
    assert "resumed: step 4" in (tmp_path / "parts" / "train.log").read_text()
    assert all(torch.equal(value, teacher[name]) for name, value in older.networks.teacher.state_dict().items())


def _make_older(folder, aux):
    """Let a checkpoint be as it was before: with the auxiliary whole."""
    save_file({name: value.clone() for name, value in aux.state_dict().items()}, folder / "aux.safetensors")
    entries = json.loads((folder / MANIFEST).read_text())
    entries["aux.safetensors"] = describe(folder / "aux.safetensors")
    (folder / MANIFEST).write_text(json.dumps(entries))


# Two steps of a rank, whose fits are at x_t and elsewhere; then one of it and of another that takes up its state.
TWO_STEPS = """
import sys
import torch
from dimo.config import load_config
from dimo.run.ranks import everywhere
from dimo.train.trainer import Trainer

keys = ["model.device=cpu", "distill.batch_size_per_gpu=2", "distill.t_draws=1", "distill.aux_pass=shared",
        "distill.guidance_scale=2", "optim.optimizer=adamw", "model.aux_shared_layers=2"]
trainer = Trainer(load_config("smoke", keys))
teacher = {name: value.clone() for name, value in trainer.networks.teacher.state_dict().items()}
for index in range(2):
    trainer.step(index)
tensors, state = trainer.state()
again = Trainer(load_config("smoke", keys))
first = everywhere((tensors, state))[0]
again.load_state(*first, trainer.rank_state())
for one in (trainer, again):
    assert one.engine.kind == sys.argv[1] and one.networks.aux.model.layers[1] is one.networks.teacher.model.layers[1]
    assert all(torch.equal(value, teacher[name]) for name, value in one.networks.teacher.state_dict().items())
    one.step(2)
a, b = (one.engine.full_state_dict(one.networks.aux) for one in (trainer, again))
assert all(torch.equal(a[name], b[name]) for name in a)
if trainer.engine.rank == 0:
    torch.save((a, state["optimizers"]["aux"]), "aux.pt")
"""


@pytest.mark.parametrize("engine", WITH_ZERO2)
def test_every_engine_leaves_the_shared_layers_alone(tmp_path, engine):
    run_script(tmp_path, TWO_STEPS, engine, engine=engine)
    weights, state = torch.load(tmp_path / "aux.pt")
    assert set(state) == {name for name in weights if ".layers.2." in name}


def test_what_cannot_be_shared_is_refused(tmp_path):
    for keys, message in (
        (["model.aux_shared_layers=3"], "must be at most 2, so that one of the teacher's 3 layers learns, got 3"),
        (["model.aux_shared_layers=-1"], "model.aux_shared_layers must not be negative, got -1"),
        (["model.aux_shared_layers=1", "distill.teacher=exact"], "needs distill.teacher=network, got exact"),
        (["model.aux_shared_layers=1", "model.backend=upstream"], "needs model.backend=native, got upstream"),
    ):
        with pytest.raises(DimoError, match=message):
            trainer_for(tmp_path, *keys)


def test_what_is_shared_takes_no_memory():
    keys = ["optim.optimizer=adamw", "training.gradient_accumulation_steps=1", "distill.aux_steps=1"]
    whole, shared = (dry_run(load_config("smoke", [*keys, f"model.aux_shared_layers={n}"])) for n in (0, 2))
    network = load_ursa(checkpoint_folder("shapes")).transformer
    parts = [network.model.embed_tokens, *network.model.layers[:2]]
    size = 4 * sum(p.numel() for part in parts for p in part.parameters())
    assert whole.weights["aux"] - shared.weights["aux"] == size == whole.trained["aux"] - shared.trained["aux"]
    assert whole.kept - shared.kept == pytest.approx(2 * size, rel=1e-3)  # both moments
    assert shared.peak < whole.peak - size / 2  # activations of the fit


@pytest.mark.parametrize(
    "keys, left_out",
    [
        (["distill.aux_pass=shared"], 3),  # a fit: forward, and backward that counts as two
        (["distill.aux_pass=shared", "distill.aux_steps=2"], 3 + 2),  # the second fit runs the layers, elsewhere
        (["distill.aux_pass=own"], 2 + 1),
        (["distill.aux_pass=own", "distill.aux_objective=match_teacher", "distill.t_draws=2"], 2 * 3 + 2),
    ],
)
def test_what_is_shared_is_not_counted(keys, left_out):
    network, counts = UrsaConfig.from_dict(SIZES["tiny"]), []
    for layers in (0, 1):
        config = bench_config(None, "tiny", [*keys, f"model.aux_shared_layers={layers}"])
        counts.append(step_flops(config, network, 2, 12, 8))
    d, kv, inner = network.hidden_size, network.num_key_value_heads * network.head_dim, network.intermediate_size
    width = network.num_attention_heads * network.head_dim
    layer = 2 * 12 * d * (2 * width + 2 * kv + 3 * inner) + 2 * 2 * 12 * 12 * width
    assert counts[0] - counts[1] == left_out * 2 * layer


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["model.aux_shared_layers=1"],
        ["model.aux_shared_layers=2", "distill.aux_pass=shared", "distill.t_draws=2", "distill.aux_steps=3"],
        ["model.aux_shared_layers=2", "distill.aux_objective=match_teacher", "distill.t_draws=2"],
        ["distill.w_kd=0.1", "distill.kd_every=2", "distill.t_draws=2", "distill.guidance_scale=2"],
        ["distill.w_kd=0.1", "distill.student_steps=2", "training.gradient_accumulation_steps=2"],
    ],
)
def test_the_passes_of_a_step_are_those_that_its_layers_make(tmp_path, monkeypatch, keys):
    """A layer's pass counts a third of the network's, twice more where its weights get a gradient from it."""
    trainer, passes, inner = trainer_for(tmp_path, *keys), [], Layer.forward

    def counted(layer, x, *how):
        learns = torch.is_grad_enabled() and next(layer.parameters()).requires_grad
        passes.append(len(x) * (3 if learns else 1) / 3)
        return inner(layer, x, *how)

    monkeypatch.setattr(Layer, "forward", counted)
    for index in range(2):  # of which distill.kd_every=2 leaves one without stage 7
        trainer.step(index)
    c = trainer.config
    own = sum(next(layer.parameters()).requires_grad for layer in trainer.networks.aux.model.layers)
    updates = 4 * c.training.gradient_accumulation_steps * (1 + c.distill.aux_steps * own / 3)
    assert sum(passes) / 2 + updates == pytest.approx(passes_of_step(c, 3))
