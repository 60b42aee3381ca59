"""What is left out or done once, compiled or computed again: the step's result is the same."""

import copy
import dataclasses
import json

import pytest
import torch

from dimo.bench import bench, bench_config, write_report
from dimo.bench.sizes import SIZES, model_flops, random_ursa, step_flops
from dimo.config import load_config
from dimo.distill import stages
from dimo.distill.stages import Step
from dimo.errors import DimoError
from dimo.train.engine import Engine
from dimo.train.trainer import Trainer
from dimo.ursa import Chunked, UrsaConfig, UrsaTransformer, load_ursa, predict, recompute, sampler, visual_logits
from dimo.ursa.inputs import rope_positions
from dimo.ursa.loading import load_transformer
from dimo.worlds import checkpoint_folder

GRID = (3, 4, 4)
MEASURED = "loss/total loss/distill loss/aux loss/kd entropy/student entropy/aux gap/aux_teacher_tv reward/mean".split()


def trainer_for(folder, *more):
    same = ["model.device=cpu", "distill.batch_size_per_gpu=4", f"experiment.output_dir={folder}"]
    return Trainer(load_config("smoke", [*same, *more]))


def run(trainer, steps=3):
    rows = []
    for index in range(steps):
        step, norms = trainer.step(index)
        metrics = trainer.metrics(step)
        rows.append([metrics[name] for name in MEASURED] + [float(norms["grad_norm/student"])])
    return torch.tensor(rows)


def passes_in(monkeypatch, trainer, index=0):
    """Samples that went through each network in one step."""
    counts = {}
    inner = UrsaTransformer.hidden

    def counted(self, input_ids, rope_pos):
        name = next(name for name, network in vars(trainer.networks).items() if network is self)
        counts[name] = counts.get(name, 0) + len(input_ids) // 4
        return inner(self, input_ids, rope_pos)

    monkeypatch.setattr(UrsaTransformer, "hidden", counted)
    step, _ = trainer.step(index)
    monkeypatch.setattr(UrsaTransformer, "hidden", inner)
    return step, counts


@pytest.mark.parametrize(
    "more",
    [
        ["distill.w_reinforce=0.1"],
        ["distill.estimator=reinforce", "distill.divergence=jeffreys"],
        ["distill.aux_objective=match_teacher", "distill.aux_steps=1", "distill.aux_pass=shared"],
        [
            "distill.t_per=frame",
            "distill.aux_pass=shared",
            "distill.t_draws=2",
            "training.gradient_accumulation_steps=2",
        ],
        ["distill.aux_pass=shared", "distill.t_draws=1"],
    ],
)
def test_a_step_of_hidden_states_is_that_of_logits(tmp_path, more):
    every_term = ["distill.w_kd=0.1", "distill.lambda_ent=0.01", "distill.guidance_scale=2"]
    dense, chunked = (trainer_for(tmp_path, *every_term, *more) for _ in range(2))
    assert dense.dense
    chunked.dense = False
    want = run(dense)
    assert torch.allclose(run(chunked), want, atol=2e-5)
    for a, b in zip(dense.networks.student.parameters(), chunked.networks.student.parameters()):
        assert (a - b).abs().max() < 1e-4  # Muon and AdamW step by about 1e-2 here
    assert want.std(0).min() > 0


def test_a_step_of_hidden_states_can_be_looked_at(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path)
    trainer.dense = False
    step, _ = trainer.step(0)
    want = visual_logits(trainer.networks.teacher, step.txt_ids.repeat(4, 1), step.x_t, trainer.grid)
    assert torch.allclose(step.teacher.logits(), want, atol=1e-5)
    assert step.aux.logits().shape == want.shape and step.student.logits().shape == (4, *want.shape[1:])
    again = dataclasses.replace(step, beta=0.0, gaps=None)
    stages.total_loss(again, w_distill=0.0, lambda_ent=0.0)
    assert again.loss.item() == 0 != again.distill.item() and step.loss is not again.loss
    monkeypatch.setattr(Chunked, "_rows", lambda *_: pytest.fail("logits were made"))
    assert "x_hat=(4, 48), " in repr(step) and "teacher=Chunked(16 x 48 tokens, 10 codes, cpu)" in repr(step)
    assert "reward=(4,)" in repr(step) and repr(Step()) == "Step(dense=True, w_policy=0.0)"


def test_no_unconditional_pass_where_no_t_asks_for_guidance(ursa, generator, monkeypatch):
    ids, empty = ursa.tokenize(["blue bar moving up", "pink square moving left"], 4), ursa.tokenize([""], 4)
    x, sizes = torch.randint(10, (2, 48), generator=generator), []
    for module in (stages, sampler):
        monkeypatch.setattr(module, "predict", lambda n, i, *r: (sizes.append(len(i)), predict(n, i, *r))[1])
    for t in ([0.95, 0.91], [0.95, 0.2]):
        step = Step(txt_ids=ids, x_t=x, t=torch.tensor(t))
        stages.teacher_pass(step, ursa.transformer, GRID, 3.0, 0.9, empty)
        assert torch.allclose(step.teacher.logits()[0], visual_logits(ursa.transformer, ids, x, GRID)[0], atol=1e-5)
    assert sizes == [2, 4]


def test_a_shared_pass_of_the_auxiliary_is_its_answer_from_before_the_update(tmp_path, monkeypatch):
    for dense in (True, False):
        trainer = trainer_for(tmp_path, "distill.aux_pass=shared", "distill.aux_steps=1", "distill.t_draws=1")
        trainer.dense, before = dense, copy.deepcopy(trainer.networks.aux)
        step, counts = passes_in(monkeypatch, trainer)
        assert counts == {"student": 1, "teacher": 1, "aux": 1}
        want = visual_logits(before, step.txt_ids, step.x_t, trainer.grid)
        assert torch.allclose(step.aux.logits(), want, atol=1e-5)
    _, counts = passes_in(monkeypatch, trainer_for(tmp_path, "distill.aux_steps=1", "distill.t_draws=1"))
    assert counts == {"student": 1, "teacher": 1, "aux": 2}


def test_what_further_draws_of_t_cost(tmp_path, monkeypatch):
    """In passes of a batch: a draw more is one of the teacher, and one of the auxiliary unless a fit is its answer."""
    _, counts = passes_in(monkeypatch, trainer_for(tmp_path, "distill.t_draws=3"))
    assert counts == {"student": 1, "teacher": 3, "aux": 2 + 3}
    _, counts = passes_in(monkeypatch, trainer_for(tmp_path, "distill.t_draws=2", "distill.aux_pass=shared"))
    assert counts == {"student": 1, "teacher": 2, "aux": 2}


def test_knowledge_is_distilled_every_so_many_steps(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, "distill.w_kd=0.1", "distill.kd_every=2", "distill.t_draws=1")
    counts = [passes_in(monkeypatch, trainer, index) for index in range(3)]
    assert [count["student"] for _, count in counts] == [2, 1, 2]
    assert [step.kd is not None for step, _ in counts] == [True, False, True]
    with pytest.raises(DimoError, match="distill.kd_every must be at least 1"):
        load_config("smoke", ["distill.kd_every=0"])


@pytest.mark.parametrize(
    "key, part, stays", [("train_embeddings", "model.embed_tokens", ()), ("train_head", "lm_head", ("model.norm",))]
)
def test_a_frozen_part_is_one_tensor_and_changes_nothing_else(tmp_path, key, part, stays):
    # no clipping by a norm that the part is in; the auxiliary answers before its own part has moved, so that the
    # entropy bonus alone moves the student
    loose = ["optim.max_grad_norm=1e9", "distill.aux_pass=shared", "distill.aux_steps=1", "distill.lambda_ent=0.01"]
    loose += ["distill.t_draws=1", "model.train_head=true", "model.logit_gain=1"]
    own, shared = (trainer_for(tmp_path, *loose, f"model.{key}={learns}") for learns in ("true", "false"))
    teacher = {name: p.clone() for name, p in shared.networks.teacher.named_parameters()}
    for trainer in (own, shared):
        trainer.step(0)
    n = shared.networks
    assert len({net.get_submodule(part).weight.data_ptr() for net in vars(n).values()}) == 1
    trained = {id(p) for o in shared.student.optimizers for group in o.param_groups for p in group["params"]}
    assert len(trained) > 30
    frozen = [f"{name}.weight" for name in (part, *stays)]
    for (name, a), (_, b) in zip(own.networks.student.named_parameters(), n.student.named_parameters(), strict=True):
        if name in frozen:
            assert not torch.equal(a, b) and id(b) not in trained
            for network in vars(n).values():
                assert torch.equal(network.get_parameter(name), teacher[name])
        else:
            assert torch.allclose(a, b, atol=1e-6), name


def test_a_student_starts_with_the_teachers_logits_times_the_gain(tmp_path):
    trainer = trainer_for(tmp_path, "model.logit_gain=3")
    n, x = trainer.networks, torch.randint(trainer.path.codebook_size, (4, trainer.num_visual_tokens))
    student, aux, ema, teacher = (
        visual_logits(net, trainer.empty_ids.expand(4, -1), x, trainer.grid)
        for net in (n.student, n.aux, n.ema, n.teacher)
    )
    assert torch.allclose(student, 3 * teacher, atol=1e-4) and torch.equal(student, ema) and torch.equal(aux, teacher)
    for _ in range(3):
        trainer.step(0)
    assert torch.equal(n.ema.model.norm.weight, n.student.model.norm.weight)
    with pytest.raises(DimoError, match="model.logit_gain must be positive, got 0"):
        load_config("smoke", ["model.logit_gain=0"])


def small(seed):
    torch.manual_seed(seed)
    return UrsaTransformer(UrsaConfig(64, 128, 4, 2, 2, 10.0, 25, 15, 10, 2, 16))


def gradients(model, ids):
    model.zero_grad()
    logits = model(ids, rope_positions(3, (2, 2, 2)))
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("checkpointing", recompute.CHECKPOINTING)
def test_compiled_and_checkpointed_layers_give_the_same_from_one_graph(
    monkeypatch, generator, graphs_made, checkpointing
):
    graphs, compiling = graphs_made
    compiled = compiling(recompute.run_layer)
    monkeypatch.setattr(recompute, "compiled_run", lambda: compiled)
    for seed in (0, 1):  # two networks
        model, ids = small(seed), torch.randint(25, (2, 12), generator=generator)
        want = gradients(model, ids)
        model.run_with(compile=False, checkpointing=checkpointing)
        for a, b in zip(gradients(model, ids), want):
            assert torch.equal(a, b)
        model.run_with(compile=True, checkpointing=checkpointing)
        for _ in range(2):  # another prompt
            for a, b in zip(gradients(model, ids), want):
                assert torch.allclose(a, b, atol=2e-5, rtol=1e-4)
            ids = torch.randint(25, (2, 12), generator=generator)
            want = gradients(copy.deepcopy(model).run_with(), ids)
    assert len(graphs) == 1


def test_checkpointing_keeps_less(monkeypatch, generator):
    """Entries that autograd holds after the forward pass."""
    from dimo.ursa import cpu

    monkeypatch.setattr(cpu, "serves", lambda *_, **__: False)  # PyTorch's attention, as on a GPU
    held, ids = {}, torch.randint(25, (2, 12), generator=generator)
    for how in recompute.CHECKPOINTING:
        model, kept = small(0).run_with(checkpointing=how), {}
        own = {p.data_ptr() for p in model.parameters()}

        def pack(x, kept=kept, own=own):
            if x.data_ptr() not in own:
                kept[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logits = model(ids, rope_positions(3, (2, 2, 2)))
        held[how] = sum(kept.values())
        del logits
    assert held["none"] > 2 * held["full"]  # what the two kinds in between keep is not shown to hooks, see test_plan.py
    with pytest.raises(DimoError, match="checkpointing must be one of none, swiglu, selective, full"):
        small(0).run_with(checkpointing="some")


def test_bench_measures_what_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("dimo.bench.attention.CHECKED", 50)  # of the default 1000 a CPU takes its time
    config = bench_config(None, "tiny", [
        "model.device=cpu", "distill.num_frames=5", "distill.height=16", "distill.width=16",
        "distill.max_prompt_length=4", "distill.divergence=forward",
    ])  # fmt: skip
    lines = []
    parts = ("step", "generate", "path", "losses", "attention", "kernels", "save")
    report = bench(config, "tiny", parts, against=("naive",), repeats=1, warmup=0, generate_steps=(1, 2),
                   progress=lines.append)  # fmt: skip
    assert {name: count for name, count in report["passes"].items() if count} == {
        "student at x_init": 3, "teacher": 2, "auxiliary's fit": 3, "student at x_t": 3,
    }  # fmt: skip
    spent = report["stages"]
    assert [name[0] for name in spent] == list("123456789")
    assert min(spent["3 student's pass"], spent["6 auxiliary"], spent["9 losses, update"]) > spent["2 x_init"]
    assert report["step"]["seconds"] > 0 and report["naive"]["ratio"] > 0 and set(report["generate"]) == {1, 2}
    assert {"draw", "auxiliary", "student", "all"} < report["losses"].keys() and any("naive" in line for line in lines)
    assert report["attention"]["flash, grouped"]["seconds"] > 0 and "why" in report["attention"]["cudnn, grouped"]
    assert report["kernels"]["aten::mm"][1] > 10
    network = random_ursa("tiny", torch.device("cpu")).transformer
    frozen = sum(part.weight.numel() for part in (network.model.embed_tokens, network.model.norm, network.lm_head))
    trained = sum(p.numel() for p in network.parameters()) - frozen
    # both networks with AdamW's second moment, and the average, in float32; what is frozen of each in bfloat16
    assert 20 * trained + 6 * frozen < 1e9 * report["save"]["gb"] < 1.01 * (20 * trained + 6 * frozen)
    write_report(report, tmp_path / "deep" / "bench.json")
    assert json.loads((tmp_path / "deep" / "bench.json").read_text())["tokens"] == 8
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["bench.json"]
    with pytest.raises(DimoError, match="unknown name 'stepp'; did you mean 'step'"):
        bench(config, "tiny", parts=("stepp",))
    with pytest.raises(DimoError, match="size must be one of"):
        bench(config, "7B", repeats=1, warmup=0)


def test_the_count_of_operations_is_torchs(generator):
    from torch.utils.flop_counter import FlopCounterMode

    model = small(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(25, (1, 12), generator=generator), rope_positions(3, (2, 2, 2)), last=8)
    assert model_flops(model.config, 12, 8) == counter.get_total_flops()


def test_a_head_that_stays_has_no_gradient_to_count():
    own, stays = (bench_config(None, "tiny", [f"model.train_head={learns}"]) for learns in ("true", "false"))
    network = UrsaConfig.from_dict(SIZES["tiny"])
    gradients = 2 * 3 * 2 * network.hidden_size * 4096 * 8  # batch 2; at x_init, at x_t, and the auxiliary's
    assert step_flops(own, network, 2, 12, 8) - step_flops(stays, network, 2, 12, 8) == gradients


def test_a_step_of_several_batches_counts_all_of_them_and_the_pass_that_is_made_twice():
    network, counts = UrsaConfig.from_dict(SIZES["tiny"]), []
    for parts in (1, 3):
        config = bench_config(None, "tiny", [f"training.gradient_accumulation_steps={parts}"])
        counts.append(step_flops(config, network, 2, 12, 8))
    assert counts[1] == 3 * (counts[0] + 2 * model_flops(network, 12, 8))


def test_bf16_losses_follow_the_float32_ones(tmp_path):
    """The mean of the first losses; `python scripts/numerics.py` compares 200, compiled, on a GPU."""
    many = ["distill.batch_size_per_gpu=8", "distill.w_kd=0.1", "optim.warmup_steps=1"]
    plain, fast = trainer_for(tmp_path, *many), trainer_for(tmp_path, *many, "training.mixed_precision=bf16")
    assert plain.dense and not fast.dense
    assert fast.networks.teacher.lm_head.weight.dtype == torch.bfloat16
    want, got = run(plain), run(fast)
    assert not torch.equal(got, want)
    for name in ("loss/aux", "entropy/student", "entropy/aux"):
        column = MEASURED.index(name)
        assert got[:, column].mean().item() == pytest.approx(want[:, column].mean().item(), rel=0.05), name


def test_a_run_with_shared_bf16_embeddings_samples_saves_and_goes_on(tmp_path):
    frozen = ["model.train_embeddings=false", "training.mixed_precision=bf16", "training.max_train_steps=2"]
    trainer = trainer_for(tmp_path, *frozen, "experiment.sample_every=1", "experiment.save_every=1")
    trainer.train(progress=False)
    student = load_transformer(tmp_path / "checkpoints" / "final" / "student")
    own, teacher = student.model.embed_tokens.weight, load_ursa(checkpoint_folder("shapes")).transformer
    assert own.dtype == torch.float32 and torch.equal(own, teacher.model.embed_tokens.weight.bfloat16().float())
    again = trainer_for(tmp_path, *frozen[:2], "training.max_train_steps=3")
    again.train(progress=False)
    rows = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] == 3


@pytest.mark.parametrize("asked", [True, False])
def test_layers_are_compiled_on_a_gpu_where_it_is_asked_for(tmp_path, monkeypatch, ursa, asked):
    """A GPU is only claimed, so the trainer is left when its first network is told how to run."""

    class Told(Exception):
        pass

    def told(self, *how):
        raise Told(*how)

    def on_a_gpu(self, config, inner=Engine.__init__):
        inner(self, config)
        self.device = torch.device("cuda")

    monkeypatch.setattr(Engine, "__init__", on_a_gpu)
    monkeypatch.setattr(UrsaTransformer, "run_with", told)
    overrides = ["model.device=cpu", f"model.compile={asked}", f"experiment.output_dir={tmp_path}"]
    with pytest.raises(Told) as how:
        Trainer(load_config("smoke", overrides), ursa)
    assert how.value.args == (asked, "none", "auto"), "model.compile"
