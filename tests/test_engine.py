"""Engines: the gradients of several processes and parts against one process with the whole batch, in float64."""

import copy

import pytest
import torch
from processes import WITH_ZERO2, run_script

from dimo.config import load_config
from dimo.distill.step import nine_stages
from dimo.errors import DimoError
from dimo.train.learner import average
from dimo.train.sharded import load_full_state
from dimo.train.trainer import Trainer, step_through
from dimo.ursa import load_ursa, visual_logits
from dimo.worlds import checkpoint_folder

BATCH, W_KD, LAMBDA, AUX_STEPS, T_DRAWS = 2, 0.3, 0.02, 2, 3
SETTINGS = [
    "model.device=cpu", f"distill.batch_size_per_gpu={BATCH}", f"distill.w_kd={W_KD}", f"distill.lambda_ent={LAMBDA}",
    f"distill.aux_steps={AUX_STEPS}", "distill.divergence=jeffreys", "optim.optimizer=adamw",
    "distill.guidance_scale=2", "distill.p_corrupt=0", "optim.warmup_steps=1", "model.train_head=true",
    "model.logit_gain=1", f"distill.t_draws={T_DRAWS}",
]  # fmt: skip

# One step in float64 of a Trainer with `parts` parts; what was drawn and what was stepped on goes to a file per rank.
ONE_STEP = f"""
import sys
import torch
import dimo.train.learner as learner
import dimo.train.trainer as module
from dimo.distill.step import nine_stages
from dimo.config import load_config

learner.SENT_ALONE, send, sent = 5000, learner.Learner._send, []  # norms together
learner.Learner._send = lambda self, p: (sent.append(p), send(self, p))[1]
load, shorten = module.load_ursa, torch.Tensor.float


def load_double(*args, **kwargs):
    ursa = load(*args, **kwargs)
    ursa.transformer.double()
    return ursa


module.load_ursa = load_double
torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else shorten(self)  # losses do


def gradients(learner):
    pairs = learner.model.named_parameters()
    return {{name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone() for name, p in pairs}}


for parts in (1, 2):
    trainer = module.Trainer(load_config("smoke", {SETTINGS!r} + [f"training.gradient_accumulation_steps={{parts}}"]))
    assert trainer.engine.kind == sys.argv[1], trainer.engine.kind
    updates, draws, aux_ids = [], [], []

    def spy(learner, name):
        def update(norm, _, inner=learner.update):
            weights = {{k: v.clone() for k, v in trainer.engine.full_state_dict(learner.model).items()}}
            updates.append((name, gradients(learner), float(norm), weights))
            inner(norm, name)
        learner.update = update

    spy(trainer.student, "student")
    spy(trainer.aux, "aux")
    hook = lambda module, args, kwargs: aux_ids.append(args[0]) if torch.is_grad_enabled() else None
    trainer.networks.aux.register_forward_pre_hook(hook, with_kwargs=True)
    module.nine_stages = lambda *a, draws=draws: (draws.extend(a[2]), nine_stages(*a))[1]
    trainer.step(0)
    drawn = [{{k: getattr(s, k) for k in ("txt_ids", "x_init", "x_hat", "t", "x_t")}} for s in draws]
    tensors, state = trainer.state()
    saved = {{"updates": updates, "draws": drawn, "aux_ids": aux_ids, "tensors": tensors, "state": state}}
    torch.save(saved, f"parts{{parts}}-rank{{trainer.engine.rank}}.pt")
assert bool(sent) == (trainer.engine.kind == "ddp")
"""


def naive_student_loss(student, teacher, aux, draws, uncond, grid):
    """The design's stages 5, 7, 8 and 9 on one batch, in float64; every draw of t is a row of its own."""
    rows = [{k: v if k in ("t", "x_t") else v.repeat(T_DRAWS, 1) for k, v in d.items()} for d in draws]
    cat = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        cond = visual_logits(teacher, cat["txt_ids"], cat["x_t"], grid)
        free = visual_logits(teacher, uncond.expand_as(cat["txt_ids"]), cat["x_t"], grid)
        w = torch.where(cat["t"] < 0.9, 2.0, 1.0).double()[:, None, None]
        log_t = (free + w * (cond - free)).log_softmax(-1)
        log_a = visual_logits(aux, cat["txt_ids"], cat["x_t"], grid).log_softmax(-1)
        p_t, p_a = log_t.exp(), log_a.exp()
        reverse = (p_a * (log_a - log_t)).sum(-1, keepdim=True)
        g = 0.5 * (p_a - p_t) + 0.5 * p_a * (log_a - log_t - reverse)
    z = visual_logits(student, cat["txt_ids"], cat["x_init"], grid)
    log_s = z.log_softmax(-1)
    entropy = -(log_s.exp() * log_s).sum(-1).mean()
    log_st = visual_logits(student, cat["txt_ids"], cat["x_t"], grid).log_softmax(-1)
    kd = (p_t * (log_t - log_st)).sum(-1).mean()
    return (g * z).sum(-1).mean() + W_KD * kd - LAMBDA * entropy


def assert_gradients(got, model, loss):
    names = [name for name, _ in model.named_parameters()]
    want = dict(zip(names, torch.autograd.grad(loss, list(model.parameters()))))
    assert got.keys() == want.keys()
    for name in names:
        assert want[name].abs().max() > 0
        assert (got[name] - want[name]).abs().max() < 1e-10 * want[name].abs().max(), name
    return torch.cat([g.flatten() for g in want.values()]).norm().item()


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """{engine: folder of what two processes did}, made when first asked for."""
    folders = {}

    def of(engine):
        if engine not in folders:
            folders[engine] = tmp_path_factory.mktemp(engine)
            run_script(folders[engine], ONE_STEP, engine, engine=engine)
        return folders[engine]

    return of


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_processes_and_parts_give_the_gradient_of_the_whole_batch(stepped, engine, parts):
    ranks = [torch.load(stepped(engine) / f"parts{parts}-rank{r}.pt") for r in range(2)]
    ursa = load_ursa(checkpoint_folder("shapes"))
    teacher, uncond = ursa.transformer.double().requires_grad_(False), ursa.tokenize([""], 4)
    draws = [d for rank in ranks for d in rank["draws"]]
    assert len(draws) == 2 * parts and not torch.equal(draws[0]["x_init"], draws[-1]["x_init"])
    x_hat = torch.cat([d["x_hat"] for d in draws])
    grid, learning = (3, 4, 4), copy.deepcopy(teacher).requires_grad_(True)
    updates = ranks[0]["updates"]
    assert [u[0] for u in updates] == ["aux"] * AUX_STEPS + ["student"]

    for k, (_, got, norm, weights) in enumerate(updates[:AUX_STEPS]):
        learning.load_state_dict(weights)
        ids = torch.cat([rank["aux_ids"][k * parts + part] for rank in ranks for part in range(parts)])
        codes = ids[:, 5:] - teacher.config.lm_vocab_size
        logits = visual_logits(learning, ids[:, :4], codes, grid)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x_hat.flatten())
        assert assert_gradients(got, learning, loss) == pytest.approx(norm, rel=1e-9)
    aux = copy.deepcopy(teacher)
    aux.load_state_dict(ranks[0]["tensors"]["aux"])
    student = copy.deepcopy(teacher).requires_grad_(True)
    loss = naive_student_loss(student, teacher, aux, draws, uncond, grid)
    assert assert_gradients(updates[-1][1], student, loss) == pytest.approx(updates[-1][2], rel=1e-9)


@pytest.mark.parametrize("parts", [1, 2])
def test_fsdp2_ends_where_ddp_ends(stepped, parts):
    ddp, fsdp = (torch.load(stepped(e) / f"parts{parts}-rank0.pt") for e in ("ddp", "fsdp2"))
    teacher = load_ursa(checkpoint_folder("shapes")).transformer.double().state_dict()
    for name in ("student", "aux", "ema"):
        for key, value in ddp["tensors"][name].items():
            moved = (value - teacher[key]).abs().max()
            assert moved > 0 and (fsdp["tensors"][name][key] - value).abs().max() < 1e-6 * moved, (name, key)
    for name in ("student", "aux"):
        held, other = ddp["state"]["optimizers"][name], fsdp["state"]["optimizers"][name]
        assert held.keys() == other.keys() == teacher.keys()
        for key in held:
            for moment in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.allclose(held[key][moment], other[key][moment], rtol=1e-8, atol=0)
    other_rank = torch.load(stepped("fsdp2") / f"parts{parts}-rank1.pt")
    assert other_rank["tensors"]["student"] == {}  # gathered once, on rank 0


# Six steps in float32, two parts each; the student's and its average's whole weights.
SIX_STEPS = f"""
import sys
import torch
from dimo.config import load_config
from dimo.train.trainer import Trainer

more = ["training.gradient_accumulation_steps=2", "optim.beta1=0.9", "optim.lr=1e-4", "optim.aux_lr=2e-4"]
trainer = Trainer(load_config("smoke", {SETTINGS!r} + more))
assert trainer.engine.kind == sys.argv[1]
for index in range(6):
    trainer.step(index)
tensors, _ = trainer.state()
if trainer.engine.rank == 0:
    torch.save(tensors, "ended.pt")
"""


@pytest.mark.parametrize("engine", WITH_ZERO2[2:])
def test_zero2_takes_adamws_steps(tmp_path, engine):
    ended = []
    for which in ("ddp", engine):
        run_script(tmp_path, SIX_STEPS, which, engine=which)
        ended.append(torch.load(tmp_path / "ended.pt"))
    start = load_ursa(checkpoint_folder("shapes")).transformer.state_dict()
    for name in ("student", "aux", "ema"):
        a, b, s = (torch.cat([v[k].flatten() for k in start]) for v in (ended[0][name], ended[1][name], start))
        assert (a - s).norm() > 0 and (a - b).norm() < 1e-3 * (a - s).norm()


# Under fsdp2 the head is used apart from the layers too: `hidden`, then `lm_head.weight`.
HIDDEN = f"""
import torch
from dimo.config import load_config
from dimo.train.trainer import Trainer

trainer = Trainer(load_config("smoke", {SETTINGS!r}))
assert trainer.engine.kind == "fsdp2"
net, learner = trainer.networks.student, trainer.student
ids = torch.randint(0, 20, (2, 20), generator=torch.Generator().manual_seed(trainer.engine.rank))
pos = torch.arange(20)[:, None].expand(-1, 3)
ema = trainer.networks.ema
for index in range(2):  # the average is updated, passed, updated, passed: never with the weights of before
    trainer.step(index)
    with torch.no_grad():
        out = torch.nn.functional.linear(ema.hidden(ids, pos), ema.lm_head.weight)
with torch.no_grad():
    trainer.networks.student.hidden(ids, pos)  # leaves its head gathered
held = trainer.student.state()
whole = trainer.engine.full_state_dict(ema)
if trainer.engine.rank == 0:
    plain = trainer.ursa.transformer
    plain.load_state_dict(whole)
    with torch.no_grad():
        assert torch.allclose(plain(ids, pos), out, atol=1e-5), (plain(ids, pos) - out).abs().max()
    assert held.keys() == whole.keys()
found = []
for passes in (lambda: net(ids, pos), lambda: torch.nn.functional.linear(net.hidden(ids, pos), net.lm_head.weight)):
    for _ in range(2):  # also after a pass without a gradient, and after one whose backward never came
        with torch.no_grad():
            passes()
        passes()
        logits = passes() + passes().flip(0)
        learner.backward(logits.square().mean())
        norm = learner.gradient_norm()
        found.append([logits.detach(), norm, *(p.grad.full_tensor().clone() for p in net.parameters())])
        learner.discard()
for other in found[1:]:
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(found[0], other))
assert all(g.abs().max() > 0 for g in found[0])
"""


def test_fsdp2_serves_the_head_apart_from_the_layers(tmp_path):
    run_script(tmp_path, HIDDEN, engine="fsdp2")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_state_of_one_engine_is_taken_up_by_another(stepped, engine):
    """A checkpoint of two processes, whichever the engine, goes on in one plain process with the same numbers."""
    saved = torch.load(stepped(engine) / "parts1-rank0.pt")
    trainer = Trainer(load_config("smoke", SETTINGS))
    trainer.load_state(saved["tensors"], saved["state"], trainer.rank_state())
    tensors, state = trainer.state()
    for name in ("student", "aux", "ema"):
        assert all(torch.equal(tensors[name][k], v.float()) for k, v in saved["tensors"][name].items())
    for key, values in state["optimizers"]["student"].items():
        for moment, value in saved["state"]["optimizers"]["student"][key].items():
            assert torch.equal(values[moment].double(), value.double())


def test_parts_draw_the_same_x_hat_in_both_passes(monkeypatch):
    trainer = Trainer(load_config("smoke", [*SETTINGS, "training.gradient_accumulation_steps=2"]))
    seen, inner = [], trainer.x_init.remember
    trainer.x_init.remember = lambda x_hat, txt_ids: (seen.append(x_hat.clone()), inner(x_hat, txt_ids))[1]
    stages, kept = nine_stages, []
    monkeypatch.setattr("dimo.train.trainer.nine_stages", lambda *a: (kept.extend(a[2]), stages(*a))[1])
    trainer.step(0)
    assert len(kept) == len(seen) == 2 and not torch.equal(seen[0], seen[1])
    assert all(torch.equal(step.x_hat, first) for step, first in zip(kept, seen))


def test_bf16_masters_are_float32_and_every_pass_sees_the_latest_weights():
    """autocast keeps bf16 copies of weights as long as its context lasts: an update inside it went unseen."""
    more = ["training.mixed_precision=bf16", "optim.aux_lr=0.05", "optim.warmup_steps=1", "distill.aux_steps=3"]
    trainer = Trainer(load_config("smoke", [*SETTINGS, *more]))
    assert next(trainer.networks.teacher.parameters()).dtype == torch.bfloat16
    assert {p.dtype for net in ("student", "aux", "ema") for p in getattr(trainer.networks, net).parameters()} == {
        torch.float32
    }
    answers, hidden = [], trainer.networks.aux.hidden
    trainer.networks.aux.hidden = lambda *args: answers.append((args, hidden(*args))) or answers[-1][1]
    update, weights = trainer.aux.update, [copy.deepcopy(trainer.networks.aux.state_dict())]

    def spy(norm, name):
        update(norm, name)
        weights.append(copy.deepcopy(trainer.networks.aux.state_dict()))

    trainer.aux.update = spy
    with trainer.engine.autocast():  # one context for the whole step is the hard case
        trainer.step(0)
    assert len(answers) == len(weights) == 4
    fresh = copy.deepcopy(load_ursa(checkpoint_folder("shapes")).transformer)
    for (args, out), held in zip(answers, weights):
        fresh.load_state_dict(held)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            want = fresh.hidden(*args)
        assert torch.equal(out.detach(), want)
    assert len({float(held["model.norm.weight"].double().sum()) for held in weights}) == 4


AVERAGE = """
import pytest, torch, torch.distributed as dist
import dimo.train.learner as learner
from dimo.errors import DimoError
from dimo.config import load_config
from dimo.train.engine import Engine

dist.init_process_group("gloo")
for entries in (1, 7, 10_000):
    learner.BUCKET_ENTRIES = entries
    own = [torch.arange(n, dtype=torch.float64).add(100 * dist.get_rank() + n).view(shape)
           for n, shape in ((6, (2, 3)), (1, ()), (12, (3, 4)), (3, (3,)))]
    want = [t - 100 * dist.get_rank() + 50 for t in own]
    learner.average(own)
    assert all(torch.equal(a, b) for a, b in zip(own, want)), entries
Engine(load_config("smoke", ["model.device=cpu", "optim.optimizer=adamw"]))
with pytest.raises(DimoError, match="muon needs full matrices, but fsdp2 shards them; use optim.optimizer=adamw"):
    Engine(load_config("smoke", ["model.device=cpu", "optim.optimizer=muon"]))
"""


def test_gradients_are_averaged_in_buckets_and_muon_is_refused_where_matrices_are_cut(tmp_path):
    run_script(tmp_path, AVERAGE, engine="fsdp2")
    assert average([]) is None


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version must be 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage must be 2, got 3"),
    ],
)
def test_engines_that_are_not_served_are_refused(monkeypatch, environment, sentence):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DimoError, match=sentence):
        Trainer(load_config("smoke", SETTINGS))


def test_weights_that_do_not_fit_are_refused():
    model = load_ursa(checkpoint_folder("shapes")).transformer
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_full_state(model, model.state_dict() | {"more": torch.zeros(1)})


def test_a_step_of_parts_learns_and_is_measured():
    trainer = Trainer(load_config("smoke", [*SETTINGS, "training.gradient_accumulation_steps=3"]))
    for _, _, metrics in step_through(trainer, 2):
        assert metrics["grad_norm/student"] > 0 and metrics["guard/skipped"] == 0
