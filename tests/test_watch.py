"""A run is watched for collapse within its share of the passes; one that has turns red; milestones are kept."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from processes import run_script
from safetensors.torch import load_file

from dimo.commands.notebooks import run_notebooks
from dimo.config import load_config, to_yaml
from dimo.errors import DimoError
from dimo.run.folder import TEACHER_SAMPLES, RunFolder
from dimo.run.origin import run_of
from dimo.train import watch
from dimo.train.passes import passes_of_step
from dimo.train.trainer import Trainer
from dimo.train.watch import SHARE, Plan, plan_for, read_reference
from dimo.ursa.loading import load_student
from dimo.views.alarms import alarms
from dimo.views.collapse import beside_teacher, student_over_noises
from dimo.worlds import SHIPPED_STUDENT

TINY = Path(__file__).parent / "data" / "tiny-ursa"


@pytest.mark.parametrize(
    ("preset", "more", "processes", "planned"),
    [
        ("smoke", [], 1, Plan(2, 8, 4, 25, 0)),
        ("smoke", ["training.max_train_steps=40"], 1, None),
        ("shapes", [], 1, Plan(4, 64, 16, 120, 0)),
        ("distill_dimo", [f"distill.teacher_ckpt={TINY}"], 1, Plan(2, 64, 16, 500, 0)),
        ("distill_dimo", [f"distill.teacher_ckpt={TINY}", "training.max_train_steps=2000"], 8, Plan(2, 32, 16, 500, 0)),
        ("shapes", ["experiment.sample_every=1"], 1, Plan(2, 8, 4, 1, 0)),
        ("smoke", ["training.max_train_steps=60", "experiment.sample_every=1"], 1, Plan(2, 8, 4, 12, 0)),
    ],
)
def test_watching_takes_at_most_its_share_of_a_runs_passes(preset, more, processes, planned):
    """Counted here as the trainer's forward passes are, with two for a backward pass and one for an update."""
    config = load_config(preset, more)
    d, last = config.distill, config.training.max_train_steps
    per_sample = 48 if d.guidance_scale > 1 else 25
    plan = plan_for(config, 3, 48, processes, per_sample)
    if planned is None:
        assert plan is None
        return
    assert dataclasses.replace(plan, share=0) == planned
    step = {"smoke": 8 * (4 + 4 + 2 * 4 + 4), "shapes": 64 * (4 + 2 + 2 * 4), "distill_dimo": 1 * (4 + 2 + 4)}[preset]
    assert passes_of_step(config, 3) == step
    stops = len([i for i in range(1, last + 1) if i % plan.every == 0 or i == last])
    watching = -(-plan.prompts * plan.samples // processes) * per_sample + stops * plan.prompts * plan.noises
    assert watching / (step * last) == pytest.approx(plan.share) and plan.share <= SHARE


@pytest.mark.parametrize(
    ("more", "passes"),
    [
        (["distill.w_kd=1"], 4 + 4 + 2 * 4 + 4 + 3 * 4),
        (["distill.w_kd=1", "distill.kd_every=6"], 4 + 4 + 2 * 4 + 4 + 2),
        (["distill.aux_objective=match_teacher", "distill.aux_pass=shared"], 4 + 4 + 2 * (3 * 4 + 1)),
    ],
)
def test_a_step_costs_what_its_passes_of_all_draws_of_t_cost(more, passes):
    """Of four draws, the student's pass at x_t and the auxiliary's fit to the teacher take all; see the test above."""
    assert passes_of_step(load_config("smoke", more), 3) == 8 * passes


TINY_RUN = ["model.device=cpu", "distill.batch_size_per_gpu=2", "distill.t_draws=1", "distill.aux_steps=1"]
TINY_RUN += [
    "experiment.sample_every=2",
    "experiment.save_every=2",
    "experiment.keep_every=2",
    "experiment.log_every=3",
]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train a few steps, watched by a given plan."""
    monkeypatch.setattr("dimo.views.sheets.save_sheet", lambda *_: None)
    monkeypatch.setattr(watch, "TEACHER_STEPS", 2)

    def trained(name, steps, plan):
        monkeypatch.setattr(watch, "plan_for", lambda *_: plan)
        words = [*TINY_RUN, f"experiment.output_dir={tmp_path / name}", f"training.max_train_steps={steps}"]
        return Trainer(load_config("smoke", words)).train(progress=False)

    return trained


def test_a_watched_run_learns_the_same_and_compares_with_one_reference(train, monkeypatch, capsys):
    plan = Plan(2, 8, 4, 2, 0.03)
    run, other = train("watched", 5, plan), train("not", 5, None)
    weights = [load_file(r.path / "checkpoints/step-00000005/ema.safetensors") for r in (run, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    measured = [row["step"] for row in run.metrics() if "collapse/spread" in row]
    assert (measured, [row["step"] for row in run.metrics()]) == ([2, 4, 5], [2, 3, 4, 5])
    assert not any("collapse/spread" in row for row in other.metrics()) and not (other.path / TEACHER_SAMPLES).exists()
    log = (run.path / "train.log").read_text()
    assert "watched for collapse every 2 steps: 2 prompts x 8 noises" in log
    assert log.index("to the end of the first step") < log.index("sampled the teacher")
    assert "not watched for collapse" in (other.path / "train.log").read_text()
    before = (run.path / TEACHER_SAMPLES).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(watch, "make_reference", None)
        train("watched", 6, Plan(2, 2, 4, 2, 0.03))
    row = run.metrics()[-1]
    assert row["step"] == 6 and row["collapse/log_m"] == pytest.approx(math.log(2))
    assert before == (run.path / TEACHER_SAMPLES).read_bytes()
    (run.path / TEACHER_SAMPLES).write_bytes(before[:-9])
    with pytest.raises(DimoError, match=f"{TEACHER_SAMPLES} is not readable"):
        read_reference(run.path, 48)
    train("watched", 7, plan)
    assert "the teacher is sampled again: " in capsys.readouterr().err
    assert (run.path / TEACHER_SAMPLES).read_bytes() == before
    with pytest.raises(DimoError, match=r"must have shape \(2, m, 47\)"):
        read_reference(run.path, 47)


def test_milestones_are_kept_and_are_students_like_any_other(train, ursa):
    run = train("run", 5, None)
    kept = sorted(f.name for f in (run.path / "checkpoints").iterdir())
    assert kept == ["final", "milestone-00000002", "milestone-00000004", "step-00000004", "step-00000005"]
    milestone = run.path / "checkpoints" / "milestone-00000004"
    student, final = load_student(ursa, milestone), load_student(ursa, run.path)
    ema = load_file(run.path / "checkpoints/step-00000004/ema.safetensors")
    ema["model.norm.weight"] *= 4  # model.final_logit_gain is 4 times model.logit_gain
    assert all(torch.equal(weight, ema[name]) for name, weight in student.state_dict().items())
    assert not all(torch.equal(weight, ema[name]) for name, weight in final.state_dict().items())
    assert run_of(milestone) == run.path
    RunFolder.open(run.path, to_yaml(load_config("smoke")), overwrite=True)
    assert not milestone.exists()


WATCHED = """
import sys
from dimo.config import load_config, to_yaml
from dimo.train import watch
from dimo.train.trainer import Trainer

watch.plan_for, watch.TEACHER_STEPS = lambda *_: watch.Plan(2, 8, 3, 1, 0.03), 2
words = ["distill.batch_size_per_gpu=3", "optim.optimizer=adamw", "training.max_train_steps=1", "model.device=cpu"]
Trainer(load_config("smoke", [*words, "experiment.output_dir=run"])).train(progress=False)
"""


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_processes_measure_what_one_does(tmp_path, ursa, engine):
    """Student and EMA are cut over them under fsdp2; each samples a part of the teacher's videos."""
    run_script(tmp_path, WATCHED, engine=engine)
    run, (row,) = tmp_path / "run", RunFolder(tmp_path / "run").metrics()
    reference = read_reference(run, 48)
    assert len(reference.codes.flatten(0, 1).unique(dim=0)) > 3
    student = load_student(ursa, SHIPPED_STUDENT)
    student.load_state_dict(load_file(run / "checkpoints/step-00000001/ema.safetensors"))
    found = student_over_noises(student, ursa.path, reference.txt_ids, (3, 4, 4), torch.arange(48), 8, 3, dense=True)
    for name, value in beside_teacher(found, reference.codes.long(), ursa.path).items():
        assert row[f"collapse/{name}"] == pytest.approx(value, abs=1e-4), name


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    """Settings and folder of a run that makes one video of every prompt: a policy gradient at four times the rates."""
    settings = [
        "distill.estimator=reinforce", "optim.muon_lr=6e-2", "optim.lr=1.2e-2", "optim.aux_lr=1.6e-2",
        "optim.warmup_steps=1", "optim.decay=constant", "distill.t_draws=1", "distill.aux_steps=1", "model.device=cpu",
        "distill.batch_size_per_gpu=24", "training.max_train_steps=20", "experiment.sample_every=10",
        "evaluation.teacher_steps=[4]", f"experiment.output_dir={tmp_path_factory.mktemp('run') / 'collapsed'}",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dimo.views.sheets.save_sheet", lambda *_: None)
        patch.setattr(watch, "plan_for", lambda *_: Plan(2, 16, 8, 10, 0.03))  # as a longer run is watched
        return settings, Trainer(load_config("smoke", settings)).train(progress=False)


def test_the_alarm_rings_early_in_a_run_that_collapses(collapsed):
    _, run = collapsed
    rung = [alarm for alarm in alarms(run.metrics()) if alarm.name == "collapsed"]
    assert [(alarm.step, alarm.over) for alarm in rung] == [(10, None)]
    assert "the teacher's 1." in rung[0].sentence and "of the videos are distinct" in rung[0].sentence


@pytest.mark.parametrize("name", ["04_diagnostics", "05_evaluation"])
def test_a_run_that_has_collapsed_turns_the_notebook_red(collapsed, name, forked_kernels):
    settings, run = collapsed
    said = r"checks failed: .*no alarm of collapse rings at the end \(rings .*\); the student has not collapsed \("
    with pytest.raises(DimoError, match=said):
        run_notebooks("smoke", settings, only=[name])
    executed = json.loads((run.path / "notebooks" / f"{name}.failed.ipynb").read_text())
    printed = "".join(text for cell in executed["cells"] for o in cell.get("outputs", []) for text in o.get("text", []))
    assert "prompt's videos are distinct, of the teacher's" in " ".join(printed.split())  # it is wrapped
