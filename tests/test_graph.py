"""CUDA graphs without a GPU: a replay is the captured function called again, with all that Python decided frozen.

`scripts/graphs.py` checks real graphs, on a GPU.
"""

import copy
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from dimo.commands import train as command
from dimo.commands.cli import parse
from dimo.config import load_config
from dimo.errors import DimoError, trusted_values
from dimo.run.folder import RunFolder
from dimo.run.signals import Preempted
from dimo.train import graph
from dimo.train.graph import ORDINARY
from dimo.train.together import train_together
from dimo.train.trainer import Trainer
from dimo.ursa import UrsaTransformer
from dimo.worlds.teacher import TeacherRecipe, ursa_config, write_checkpoint
from dimo.worlds.tiles import TilesWorld

ROOT = Path(__file__).parents[1]
SMALL = [
    "distill.batch_size_per_gpu=4", "distill.t_draws=1", "distill.aux_steps=1",
    "optim.warmup_steps=1", "optim.weight_decay=0.1", "training.max_train_steps=40", "distill.p_corrupt=0.5",
    "experiment.sample_every=1000",
]  # fmt: skip
CASES = {  # {what they show: (keys, number of graphs)}
    "stabilisers": ([
        "distill.t_curriculum_steps=7", "distill.lambda_ent=0.02", "distill.lambda_ent_high=0.2",
        "distill.entropy_floor=0.9999", "distill.ent_anneal_to=30", "distill.p_corrupt_fade=1",
        "distill.t_power_start=6",
    ], 2),
    "guided, a time per frame": (["distill.guidance_scale=3", "distill.t_per=frame", "distill.aux_pass=shared"], 1),
    "stage 7 in every second step": (["distill.estimator=reinforce", "distill.w_kd=0.5", "distill.kd_every=2"], 2),
    "two passes": (["distill.student_steps=2"], 1),
    "a number for beta": (["distill.divergence=jeffreys", "distill.w_reinforce=0.1", "optim.optimizer=adamw"], 1),
}  # fmt: skip


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """What is captured: the functions, which are not called, as capturing runs nothing."""
    functions = []
    monkeypatch.setattr(graph, "record", lambda function, *_: (functions.append(function), function)[1])
    monkeypatch.setattr("dimo.train.trainer.require_capturable", lambda trainer: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return functions


def trainer_for(folder, *more, graphs=True):
    keys = [*SMALL, f"experiment.output_dir={folder}", f"training.cuda_graph={str(graphs).lower()}", *more]
    trainer = Trainer(load_config("smoke", keys))
    trainer.x_init.capacity = 8  # full after two steps
    return trainer


def weights_of(trainer):
    n = trainer.networks
    return torch.cat([p.detach().flatten() for net in (n.student, n.aux, n.ema) for p in net.parameters()])


def read_by_graphs(trainer):
    """{what: a tensor}: where a graph reads and writes, so that no step may put another tensor in its place."""
    bonus, mix = trainer.entropy_bonus, trainer.x_init
    held = {"mix": mix.fade, "x_hat": mix.x_hat, "txt_ids": mix.txt_ids, "bonus": bonus.fade}
    held |= {"raised": bonus.raised, "seen": bonus.seen, "start": bonus.start, "lambda_ent": trainer.lambda_ent}
    held |= {"baseline": trainer.baseline.value, **trainer.averages.sums}
    for learner in (trainer.student, trainer.aux):
        for i, optimizer in enumerate(learner.optimizers):
            held[learner, i, "lr"] = optimizer.param_groups[0]["lr"]  # there is one group
            held |= {(p, name): x for p in optimizer.state for name, x in optimizer.state[p].items()}
    return held


def last_weights(folder):
    last = sorted(Path(folder, "checkpoints").glob("step-*"))[-1]
    return {f.stem: load_file(f) for f in last.glob("*.safetensors")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(w, b[net][name]) for net in a for name, w in a[net].items())


@pytest.mark.parametrize("case", CASES)
def test_replays_make_the_trainers_steps(tmp_path, recorded, case):
    more, kinds = CASES[case]
    plain, replayed = (trainer_for(tmp_path, *more, graphs=graphs) for graphs in (False, True))
    start = weights_of(plain)
    for index in range(12):
        step, _ = plain.step(index)
        before = read_by_graphs(replayed)
        again, extra = replayed.step(index)
        replayed.look()
    assert len(recorded) == kinds
    after = read_by_graphs(replayed)
    assert before.keys() == after.keys() and [name for name in after if after[name] is not before[name]] == []
    assert all(isinstance(after[name], torch.Tensor) for name in ("mix", "bonus"))
    moved, differ = (weights_of(plain) - start).norm(), (weights_of(plain) - weights_of(replayed)).norm()
    assert moved > 0.1 and differ < 1e-3 * moved  # sums in another order
    assert torch.equal(plain.x_init.x_hat, replayed.x_init.x_hat)
    rate = plain.student.optimizers[0].param_groups[0]["lr"]
    assert (
        replayed.student.optimizers[0].param_groups[0]["lr"].item() == pytest.approx(rate) and extra["optim/lr"] == rate
    )
    want = plain.metrics(step)
    assert replayed.metrics(again) == pytest.approx(want, rel=2e-3, abs=1e-4)
    events = [[(e["step"], e["event"], pytest.approx(e["is"])) for e in t.events] for t in (plain, replayed)]
    assert events[0] == events[1] and bool(events[0]) == (case == "stabilisers")
    assert want["lambda_ent"] == pytest.approx(replayed.lambda_ent)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_resumed_run_knows_the_weight_of_the_entropy_bonus(tmp_path, graphs):
    whole, resumed = (trainer_for(tmp_path, *CASES["stabilisers"][0], graphs=graphs) for _ in range(2))
    whole.step(0)
    whole.entropy_bonus.seen.fill_(whole.entropy_bonus.WARMUP)
    whole.entropy_bonus.start.fill_(100.0)  # of which the entropy is a small share: the bonus is raised
    whole.step(1)
    whole.entropy_bonus.start.fill_(0.0)  # and lowered by the next step
    resumed.load_state(*copy.deepcopy((*whole.state(), whole.rank_state())))
    raised = 0.2 * (1 - 1 / 30)  # lambda_ent_high, annealed
    assert float(resumed.lambda_ent) == float(whole.lambda_ent) == pytest.approx(raised)
    whole.events.clear()
    for trainer in (whole, resumed):
        trainer.step(2)
        trainer.look()
    assert resumed.events == whole.events != []
    assert whole.events[0]["event"] == "entropy_bonus_lowered" and whole.events[0]["was"] == pytest.approx(raised)


def test_captions_are_drawn_before_a_replay(tmp_path, recorded):
    captions = trainer_for(tmp_path, graphs=False).prompts.examples
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    more = [f"distill.prompt_source={tmp_path / 'captions.txt'}", "distill.p_corrupt=0"]
    plain, replayed = (trainer_for(tmp_path, *more, graphs=graphs) for graphs in (False, True))
    drawn = [[trainer.step(index)[0].txt_ids.clone() for index in range(6)] for trainer in (plain, replayed)]
    assert len(recorded) == 1 and all(torch.equal(a, b) for a, b in zip(*drawn))
    assert len({tuple(ids.flatten().tolist()) for ids in drawn[1][ORDINARY:]}) == 6 - ORDINARY
    assert plain.prompts.state_dict() == replayed.prompts.state_dict()


def test_a_replayed_run_is_the_run_without_graphs(tmp_path, monkeypatch, recorded):
    """As the loop makes it, killed and resumed."""
    monkeypatch.setattr("dimo.views.sheets.save_sheet", lambda *_: None)
    more = ["training.max_train_steps=12", "experiment.save_every=5", "experiment.log_every=4"]
    plain, replayed = trainer_for(tmp_path / "plain", *more, graphs=False), trainer_for(tmp_path / "graphs", *more)
    start = weights_of(plain)
    plain.train(progress=False)
    inner = replayed.step

    def step(index):
        if index == 8:
            raise DimoError("killed")
        return inner(index)

    replayed.step = step
    with pytest.raises(DimoError, match="killed"):
        replayed.train(progress=False)
    again = trainer_for(tmp_path / "graphs", *more)
    again.train(progress=False)
    assert len(recorded) == 2 and again.graphs.ordinary.total() == ORDINARY  # of steps 6 to 12
    assert (weights_of(again) - weights_of(plain)).norm() < 1e-3 * (weights_of(plain) - start).norm()
    rows = [RunFolder(tmp_path / name).metrics() for name in ("plain", "graphs")]
    assert [row["step"] for row in rows[1]] == [4, 8, 12] and rows[0][0].keys() == rows[1][0].keys()
    for a, b in zip(*rows):
        assert b["loss/aux"] == pytest.approx(a["loss/aux"], rel=1e-4) and b["optim/lr"] == a["optim/lr"]
        assert b["grad_norm/student"] == pytest.approx(a["grad_norm/student"], rel=1e-3)
        assert b["x_init/corrupt_share"] == a["x_init/corrupt_share"] and b["t/mean"] == pytest.approx(a["t/mean"])


def test_a_replay_that_is_not_finite_ends_the_run_before_anything_is_written(tmp_path, monkeypatch):
    """Values cannot be looked at during a replay, as in a capture."""
    more = ["experiment.save_every=6", "experiment.log_every=4"]
    trainer = trainer_for(tmp_path, *more)
    inner = trainer.step

    def step(index):
        if index == 9:
            monkeypatch.setattr("dimo.distill.stages.require_finite", lambda *_: None)
            monkeypatch.setattr("dimo.distill.losses.require_finite", lambda *_: None)
            monkeypatch.setattr("dimo.train.learner.require_finite", lambda *_: None)
            trainer.networks.teacher.model.norm.weight.data.fill_(torch.nan)
        return inner(index)

    trainer.step = step
    with pytest.raises(DimoError, match="step 10 met a value that is not finite.* last checkpoint is step-00000006"):
        trainer.train(progress=False)
    run = RunFolder(tmp_path)
    assert run.status()["state"] == "failed" and [row["step"] for row in run.metrics()] == [4, 8]
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]
    with pytest.raises(DimoError, match="step 10 met"):
        trainer.state()


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """A world of tiles with strays, and a teacher that has learnt nothing."""
    world, recipe = TilesWorld(2, 4, 4, codes=16, strays=20), TeacherRecipe(layers=1, hidden=32, heads=2)
    folder = tmp_path_factory.mktemp("tiles") / "world"
    return write_checkpoint(folder, world, UrsaTransformer(ursa_config(world, recipe)), 0.9, 3.0)


class Reads(TorchDispatchMode):
    """Notes what no CUDA graph can contain: values that come back to Python, sizes that depend on values, and numbers
    that Python sends."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), more=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "_unique2", "equal", "is_nonzero", "lift_fresh"):
            self.seen.append(name)
        return function(*arguments, **(more or {}))


@pytest.mark.parametrize("dense", [True, False], ids=["stored logits", "chunks of tokens"])
@pytest.mark.parametrize("teacher", ["exact", "network"])
def test_a_captured_step_reads_and_sends_no_value(tmp_path, monkeypatch, recorded, tiles, teacher, dense):
    keys = [f"distill.teacher_ckpt={tiles}", f"distill.teacher={teacher}", "distill.num_frames=5", "distill.height=32"]
    keys += ["distill.width=32", "distill.guidance_scale=3", "distill.aux_target=exact", "distill.t_per=mixed"]
    keys += ["distill.t_shift=2", "distill.lambda_ent=0.02", "distill.t_draws=2", "distill.aux_steps=2"]
    keys += ["training.mixed_precision=no" if dense else "training.mixed_precision=bf16"]
    trainer = trainer_for(tmp_path, *keys)
    trainer.dense = dense
    for index in range(ORDINARY + 3):
        trainer.step(index)
    (captured,) = recorded
    monkeypatch.setattr("dimo.errors.capturing", lambda _: True)
    monkeypatch.setattr("dimo.distill.stages.capturing", lambda _: True)
    with Reads() as reads, trusted_values():
        captured()
    assert reads.seen == []


def config_for(folder, *more):
    small = ["distill.batch_size_per_gpu=2", "training.max_train_steps=4", "experiment.save_every=2"]
    return load_config("smoke", [*SMALL, *small, f"experiment.output_dir={folder}", *more])


def test_seeds_side_by_side_are_the_runs_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("dimo.views.sheets.save_sheet", lambda *_: None)
    runs = command.train_seeds(config_for(tmp_path / "run"), [3, 5])
    assert [run.path for run in runs] == [tmp_path / "run-3", tmp_path / "run-5"]
    for seed, run in zip((3, 5), runs):
        alone = Trainer(config_for(tmp_path / f"alone-{seed}", f"experiment.seed={seed}")).train(progress=False)
        assert same(last_weights(alone.path), last_weights(run.path))
        assert run.status()["state"] == "finished" and (run.path / "checkpoints/final/student.pt").exists()
    assert not same(last_weights(runs[0].path), last_weights(runs[1].path))


def test_one_signal_saves_all_and_one_failure_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("dimo.views.sheets.save_sheet", lambda *_: None)

    def failing_at(folder, index, failure):
        trainer = Trainer(config_for(tmp_path / folder))
        inner = trainer.step
        trainer.step = lambda i: failure() if i == index else inner(i)
        return trainer

    def fail():
        raise DimoError("no more")

    trainers = [failing_at("a", 1, fail), Trainer(config_for(tmp_path / "b"))]
    with pytest.raises(DimoError, match="no more"):
        train_together(trainers, progress=False)
    assert [RunFolder(tmp_path / name).status()["state"] for name in "ab"] == ["failed", "finished"]

    trainers = [Trainer(config_for(tmp_path / name)) for name in "cd"]
    inner = trainers[0].step
    trainers[0].step = lambda i: (i == 2 and os.kill(os.getpid(), signal.SIGTERM), inner(i))[1]
    with pytest.raises(Preempted, match="SIGTERM after step 3"):
        train_together(trainers, progress=False)
    for name in "cd":
        assert RunFolder(tmp_path / name).status()["state"] == "preempted"
        assert (tmp_path / name / "checkpoints/step-00000003/manifest.json").exists()

    other = config_for(tmp_path / "d", "optim.lr=1e-5")  # its run has another rate
    with pytest.raises(DimoError, match="belongs to a run with another configuration"):
        train_together([Trainer(config_for(tmp_path / "e")), Trainer(other)], progress=False)
    assert RunFolder(tmp_path / "e").status()["state"] == "preempted" and not (tmp_path / "e/metrics.jsonl").exists()


def test_what_cannot_be_captured_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("dimo.train.trainer.require_capturable", graph.require_capturable)
    load = functools.partial(load_config, "shapes_long")
    load(["training.cuda_graph=true", "distill.guidance_scale=3", "distill.lambda_ent=0.1", "model.compile=true"])
    for key, needed in (
        ("model.device=cpu", "model.device=auto, got cpu"),
        ("training.num_processes=2", "training.num_processes=1, got 2"),
        ("training.gradient_accumulation_steps=2", "training.gradient_accumulation_steps=1, got 2"),
        ("model.backend=upstream", "model.backend=native, got upstream"),
    ):
        with pytest.raises(DimoError, match=f"^training.cuda_graph=true needs {needed}"):
            load(["training.cuda_graph=true", key])
    with pytest.raises(DimoError, match="training.cuda_graph=true needs a GPU"):
        Trainer(load(["training.cuda_graph=true", f"experiment.output_dir={tmp_path}"]))
    for seeds, sentence in (([1, 1], "must differ, got 1, 1"), ([1, -2], r"seed must lie in \[0, 2\^63\), got -2")):
        with pytest.raises(DimoError, match=sentence):
            command.train_seeds(config_for(tmp_path), seeds)
    with pytest.raises(DimoError, match="a single process, but training.num_processes is 2"):
        command.train_seeds(config_for(tmp_path, "training.num_processes=2"), [1])


def test_seeds_are_read_wherever_they_stand(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "train_seeds", lambda config, seeds: (asked.append((config, seeds)), [])[1])
    from dimo.commands.cli import main

    for words in (["--seeds", "1", "2", "optim.lr=1e-4"], ["optim.lr=1e-4", "--seeds", "1,2"]):
        assert main(["train", "-c", "smoke", *words]) == 0
        assert asked[-1][1] == [1, 2] and asked[-1][0].optim.lr == 1e-4
    assert parse(["train"]).seeds == []
    assert main(["train", "--seeds", "one"]) == 2 and len(asked) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    words = [ROOT / "scripts" / "graphs.py", "steps", "resume", "seeds", "nan"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
