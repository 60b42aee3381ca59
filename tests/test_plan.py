"""What `dimo plan` counts, against real tensors, the allocator's own record, and arithmetic by hand."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from dimo.bench.sizes import SIZES, random_ursa, strides_for
from dimo.commands import plan
from dimo.commands.cli import main
from dimo.commands.dry_run import dry_run
from dimo.commands.plan import GIB, alternatives, make_plan, parts_of
from dimo.config import load_config
from dimo.errors import DimoError
from dimo.train.trainer import Trainer
from dimo.ursa import UrsaConfig, UrsaTransformer
from dimo.ursa.recompute import CHECKPOINTING
from dimo.worlds import checkpoint_folder

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.filterwarnings("error:Accessing the data pointer of FakeTensor")  # `dimo plan` showed it


def optimizer_bytes(trainer):
    optimizers = trainer.student.optimizers + trainer.aux.optimizers
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    tensors = {id(t): t for state in states for t in state.values() if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


ONE_UPDATE = "distill.aux_steps=1"  # of the auxiliary, which is gone through sooner than two


def checkpoint_of(layers, tmp_path):
    """The built-in world's checkpoint with so many of its layers."""
    folder = shutil.copytree(checkpoint_folder("shapes"), tmp_path / "few-layers")
    file, weights = folder / "transformer" / "config.json", load_file(folder / WEIGHTS)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": layers}))
    left_out = tuple(f"model.layers.{i}." for i in range(layers, 3))
    save_file({name: weight for name, weight in weights.items() if not name.startswith(left_out)}, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """Overrides: a teacher of one layer and one update of the auxiliary."""
    return [f"distill.teacher_ckpt={checkpoint_of(1, tmp_path_factory.mktemp('plan'))}", ONE_UPDATE]


SAVING = ["model.activation_checkpointing=selective", "model.train_embeddings=false", "training.mixed_precision=bf16"]


@pytest.mark.parametrize(("optimizer", "settings"), [("adamw", []), ("muon", []), ("adamw", SAVING)])
def test_a_dry_run_counts_what_a_real_step_holds(optimizer, settings, tmp_path):
    words = ["model.device=cpu", f"optim.optimizer={optimizer}", "distill.w_kd=0.1", ONE_UPDATE, *settings]
    config = load_config("smoke", [f"distill.teacher_ckpt={checkpoint_of(2, tmp_path)}", *words])
    trainer = Trainer(config)
    trainer.step(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        trainer.step(1)
    run = dry_run(config)
    real = {
        p.data_ptr(): p.numel() * p.element_size() for net in vars(trainer.networks).values() for p in net.parameters()
    }
    assert sum(run.weights.values()) == sum(real.values())
    moments = optimizer_bytes(trainer)
    assert moments > 0
    # beside the moments: ids of prompts, the codebook, the remembered samples
    assert moments <= run.kept < moments + 64 * 1024
    now = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert run.peak == pytest.approx(peak, rel=0.02)


def test_the_sizes_are_ursas():
    for size, layers in (("1.7B", 28), ("0.6B", 28)):
        hidden, inner = {"1.7B": (2048, 6144), "0.6B": (1024, 3072)}[size]
        attention = 2 * hidden * 16 * 128 + 2 * hidden * 8 * 128 + 2 * 128
        layer = attention + 3 * hidden * inner + 2 * hidden
        parameters = 215_669 * hidden + layers * layer + hidden + 64_000 * hidden
        with torch.device("meta"):
            model = UrsaTransformer(UrsaConfig.from_dict(SIZES[size]))
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_size_without_a_folder_is_an_image_model_where_one_frame_is_asked_for():
    words = ["model.activation_checkpointing=none", "training.mixed_precision=no"]
    for preset, tokens in (("distill_dimo_image", 64 * 64), ("distill_dimo", 5 * 32 * 32)):
        assert dry_run(load_config(preset, words), "tiny").num_visual_tokens == tokens
        d = load_config(preset).distill
        ursa = random_ursa("tiny", torch.device("cpu"), strides_for(d.num_frames))
        assert math.prod(ursa.latents_shape(d.num_frames, d.height, d.width)) == tokens


def test_all_ranks_send_their_gradients(one_layer):
    run = dry_run(load_config("smoke", [*one_layer, "distill.aux_steps=2"]), num_processes=8)
    one = run.trained["student"]
    sent = sum(run.collectives.values())
    assert 3 * one <= sent < 3 * one + 4096  # the student's once, the auxiliary's twice, and a few numbers
    assert dry_run(load_config("smoke", one_layer)).collectives == {}
    assert not torch.distributed.is_initialized()
    assert Trainer(load_config("smoke", ["model.device=cpu"])).accelerator.num_processes == 1  # nothing is left behind


def test_what_engines_cut(one_layer):
    words = [*one_layer, "optim.optimizer=adamw", "training.num_processes=2"]
    whole, cut = (dry_run(load_config("smoke", [*words, f"training.engine={e}"]), None, 2) for e in ("ddp", "fsdp2"))
    ddp, zero, fsdp = parts_of(whole, "ddp", 2), parts_of(whole, "deepspeed_zero2", 2), parts_of(cut, "fsdp2", 2)
    assert ddp["weights of the student"] == whole.weights["student"] and ddp["optimizers"] == whole.kept
    assert sum(ddp.values()) == sum(whole.weights.values()) + whole.kept + whole.peak
    assert zero["optimizers"] == (whole.kept + sum(whole.trained.values())) // 2  # with a second copy of the weights
    assert zero["weights of the auxiliary"] == whole.weights["aux"]
    assert fsdp["weights of the teacher"] == whole.weights["teacher"]
    for part in ("weights of the student", "weights of the moving average", "optimizers", "gradients"):
        assert fsdp[part] == pytest.approx(ddp[part] / 2, rel=0.02), part  # odd rows are padded
    assert cut.collectives["reduce_scatter_base"] > 0 and set(whole.collectives) == {"allreduce"}


def test_what_fsdp2_sends(one_layer):
    """Under bf16 weights are gathered as bf16 and gradients averaged in float32; what is frozen is whole everywhere."""
    words = [*one_layer, "optim.optimizer=adamw", "training.engine=fsdp2", "model.device=cpu"]
    kept = ["model.train_embeddings=false", "training.mixed_precision=bf16"]
    more = ([], kept[1:], kept)
    full, half, frozen = (dry_run(load_config("smoke", [*words, *some]), None, 2) for some in more)
    assert full.collectives["allgather_base"] == pytest.approx(2 * half.collectives["allgather_base"], rel=1e-3)
    assert full.collectives["reduce_scatter_base"] == half.collectives["reduce_scatter_base"] > 0
    assert frozen.collectives["allgather_base"] < half.collectives["allgather_base"]
    assert frozen.weights["student"] == pytest.approx(frozen.trained["student"], rel=0.01)


def test_more_video_is_more_memory_and_the_rest_stays(one_layer):
    small, large = (dry_run(load_config("smoke", [f"distill.batch_size_per_gpu={b}", *one_layer])) for b in (8, 32))
    assert small.weights == large.weights and small.gradients == large.gradients
    assert large.peak == pytest.approx(4 * small.peak, rel=0.1)


def test_each_kind_of_checkpointing_keeps_less_than_the_one_before(one_layer):
    settings = [*one_layer, "training.mixed_precision=bf16", "model.activation_checkpointing="]
    peaks = [dry_run(load_config("smoke", [*settings[:-1], settings[-1] + how])).peak for how in CHECKPOINTING]
    assert sorted(set(peaks), reverse=True) == peaks


def test_the_largest_batch_fits_and_one_more_does_not(one_layer, monkeypatch):
    monkeypatch.setattr(plan, "SPARE", 0)
    own = [*one_layer, "distill.t_draws=1", "distill.batch_size_per_gpu=4"]
    how = "model.activation_checkpointing=swiglu"  # in place of none
    runs = [dry_run(load_config("smoke", [*own, how, f"distill.batch_size_per_gpu={n}"])) for n in (6, 7)]
    memory = sum(sum(parts_of(run, "ddp", 1).values()) for run in runs) / 2
    asked = plan.Plan(load_config("smoke", own), runs[0], {})
    told = plan.largest_batch(asked, None, "smoke", own, memory)
    assert told.startswith(f"{how} distill.batch_size_per_gpu=6, ")


def test_compiled_layers_are_expected_to_need_what_an_h100_measured():
    """Parts of URSA-1.7B at 17x256x256 as counted, GiB, against `dimo bench`'s peaks: docs/performance.md."""
    for how, activations, peak in (("none", 37.44, 56.6), ("swiglu", 68.37, 70.6)):
        counted = {"weights, optimizers, gradients": int(37.82 * GIB), "activations and logits": int(activations * GIB)}
        words = [f"model.activation_checkpointing={how}"]
        asked = plan.Plan(load_config("distill_dimo", words), None, counted)
        assert peak - 0.5 < asked.expected / GIB < peak + 2  # SPARE
        heads = plan.Plan(load_config("distill_dimo", [*words, "model.train_head=true"]), None, counted)
        assert heads.expected == heads.total


ZERO, HALVED = "training.engine=deepspeed_zero2", "distill.batch_size_per_gpu=8 training.gradient_accumulation_steps=2"
LARGE = ["training.num_processes=2", "distill.batch_size_per_gpu=16"]


def test_all_that_saves_memory_is_tried(one_layer, monkeypatch):
    monkeypatch.setattr(plan, "_go_through", lambda config, _: plan.Plan(config, None, {}))
    overrides = [*one_layer, *LARGE, "optim.optimizer=adamw"]
    found = alternatives(plan.Plan(load_config("smoke", overrides), None, {}), None, "smoke", overrides)
    single = ["training.mixed_precision=bf16", "model.activation_checkpointing=full", "model.train_embeddings=false"]
    single += ["distill.t_draws=1", HALVED]
    engines = [" ".join([*some, engine]) for some in ([], single) for engine in (ZERO, "training.engine=fsdp2")]
    assert found.keys() == {*single, " ".join(single), *engines}


def test_what_to_change_is_gone_through_too(one_layer):
    saved = ["model.activation_checkpointing=full", "model.train_embeddings=false", "distill.t_draws=1"]
    overrides, single = [*one_layer, *LARGE, *saved], ["training.mixed_precision=bf16", HALVED]
    plan = make_plan(load_config("smoke", overrides), memory_gib=1e-4, probe=False)
    found = alternatives(plan, None, "smoke", overrides)
    assert plan.seconds is None and plan.total > 1e-4 * GIB
    assert found.keys() == {*single, " ".join(single), ZERO, " ".join([*single, ZERO])}  # Muon is not for fsdp2
    assert all(size < plan.total for size in found.values())
    assert found[HALVED] < 0.6 * plan.total + sum(plan.run.weights.values())
    assert found[" ".join([*single, ZERO])] == min(found.values())


def test_the_command(capsys, one_layer):
    words = ["plan", "-c", "smoke", *one_layer, "--num_processes", "4", "--num_steps", "1000", "--batch_size", "2"]
    assert main([*words, "--memory", "1"]) == 0
    text = capsys.readouterr().out
    tokens = math.prod((1000, 2, 4, 48))
    assert f"{tokens:.3g} tokens" in text and "fits into 1" in text and "not covered: " in text
    if not torch.cuda.is_available():
        assert "not measured (no GPU here)" in text
    # what is saved already is not tried again, and what is left takes fewer dry runs
    saved = [*SAVING[1:], "model.activation_checkpointing=full", "distill.t_draws=1", "--batch_size", "1"]
    assert main([*words, *saved, "--memory", "0.0001"]) == 0
    assert "does NOT fit" in (text := capsys.readouterr().out) and "training.engine=deepspeed_zero2" in text
    assert main([*words, "--dry-run"]) == 0
    assert "ran as rank 0 of 4" in capsys.readouterr().out


DAMAGE = {
    "whole": (lambda f: None, None),
    "cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:999]), "is damaged .an incomplete cop"),
    "of integers": (lambda f: save_file({k: v.int() for k, v in load_file(f / WEIGHTS).items()}, f / WEIGHTS),
                    "must hold floating-point numbers, got I32"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer is missing"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_plan_says_what_training_would_refuse(damage, capsys, tmp_path, monkeypatch):
    """All but values, which it does not read."""
    monkeypatch.setattr(plan, "largest_batch", lambda *_: "")  # two more dry runs
    folder = checkpoint_of(1, tmp_path)
    do, sentence = DAMAGE[damage]
    do(folder)
    assert main(["plan", "-c", "smoke", f"--teacher_ckpt={folder}", ONE_UPDATE, "--memory", "80"]) == 0
    said = re.search(f"{folder} cannot be trained as it is: (.*)", capsys.readouterr().out)
    assert re.search(sentence, said[1]) if sentence else said is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--size", "3B"], "size must be one of 0.6B, 1.7B, tiny, got '3B'"),
        (["--memory", "-1"], "--memory must be positive"),
        (["-c", "smoke", "--height", "40"], "the configuration gives (3, 5, 4)"),
        (["--teacher_ckpt", "/nowhere"], "/nowhere"),
    ],
)
def test_refusals_are_sentences(words, sentence, capsys):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error


def test_a_dry_run_wants_a_process_without_a_group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(DimoError, match="needs its own process"):
        dry_run(load_config("smoke"))
