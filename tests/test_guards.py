"""Guards: a value that is not finite, wherever it comes from and in whichever process, updates nothing anywhere."""

import copy
import json

import pytest
import torch
from processes import WITH_ZERO2, launch_forked, run_script
from safetensors.torch import load_file

from dimo.config import load_config
from dimo.distill import stages
from dimo.distill.schedules import EntropyController
from dimo.errors import DimoError, NonFiniteError
from dimo.train.metrics import MEASURED
from dimo.train.trainer import Trainer, step_through

SETTINGS = [
    "model.device=cpu", "distill.batch_size_per_gpu=2", "optim.optimizer=adamw", "distill.w_kd=0.1",
    "distill.lambda_ent=0.01", "distill.p_corrupt=0.5", "distill.aux_steps=1",
]  # fmt: skip


def trainer_for(folder, *more):
    return Trainer(load_config("smoke", [*SETTINGS, f"experiment.output_dir={folder}", *more]))


def learnt(trainer):
    """Weights, averages and moments: what an update changes."""
    tensors, state = trainer.state()
    return copy.deepcopy((tensors, state["optimizers"]))


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) if isinstance(a, tuple) else torch.equal(a, b)


def spoil_gradient(model, value=float("nan")):
    """From the next backward on, one entry of one gradient is not finite; returns the hook."""

    def hook(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    return model.model.layers[0].input_layernorm.weight.register_hook(hook)


def spoil_output(model):
    return model.register_forward_hook(lambda module, args, out: out * float("nan"))


@pytest.mark.parametrize("where", ["teacher", "student"])
def test_nan_logits_update_nothing_and_the_next_step_is_whole(tmp_path, where):
    trainer = trainer_for(tmp_path)
    list(step_through(trainer, 2))
    before = learnt(trainer)
    hook = spoil_output(getattr(trainer.networks, where))
    step, extra = trainer.step(2)
    assert same(learnt(trainer), before)
    values = trainer.metrics(step) | extra
    assert values["guard/skipped"] == 1 and all(values[name] != values[name] for name in MEASURED)
    (event,) = trainer.events
    assert event["step"] == 3 and event["event"] == "step_skipped" and event["in_a_row"] == 1
    assert f"the {where}'s logits must be finite" in event["why"][0]
    json.dumps(event)
    hook.remove()
    step, extra = trainer.step(3)
    assert not same(learnt(trainer), before) and trainer.guard.in_a_row == 0
    assert all(value == value for value in (trainer.metrics(step) | extra).values())


@pytest.mark.parametrize("precision", ["no", "bf16"])  # of hidden states a NaN is found only after the reward
def test_a_skipped_step_leaves_the_baseline_of_the_reward(tmp_path, precision):
    trainer = trainer_for(tmp_path, "distill.estimator=reinforce", f"training.mixed_precision={precision}")
    list(step_through(trainer, 2))
    before, scale = trainer.baseline.value.clone(), trainer.networks.teacher.model.norm.weight
    healthy = scale.detach().clone()
    scale.data.fill_(float("nan"))
    trainer.step(2)
    scale.data.copy_(healthy)
    assert trainer.guard.in_a_row == 1 and torch.equal(trainer.baseline.value, before)
    trainer.step(3)
    assert trainer.guard.in_a_row == 0 and not torch.equal(trainer.baseline.value, before)


def test_what_is_measured_is_what_is_nan_when_skipped(tmp_path):
    trainer = trainer_for(tmp_path)
    step, _ = trainer.step(0)
    names = {name for name in trainer.metrics(step) if not name.startswith("gap_by_t/")}  # where t was
    assert names - {"lambda_ent"} == set(MEASURED)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_bad_gradient_of_the_student_keeps_it_as_it_was(tmp_path, value, parts):
    trainer = trainer_for(tmp_path, f"training.gradient_accumulation_steps={parts}")
    trainer.step(0)
    (tensors, moments), hook = learnt(trainer), spoil_gradient(trainer.networks.student, value)
    trainer.step(1)
    hook.remove()
    now, now_moments = learnt(trainer)
    # the auxiliary's updates came before, from its own finite gradients
    assert same(now["student"], tensors["student"]) and same(now["ema"], tensors["ema"])
    assert same(now_moments["student"], moments["student"]) and not same(now["aux"], tensors["aux"])
    assert "the norm of the student's gradient" in trainer.events[0]["why"][0]
    trainer.step(2)  # no trace of the bad gradient is left
    assert not same(learnt(trainer)[0]["student"], tensors["student"]) and trainer.guard.in_a_row == 0


def test_a_bad_gradient_of_the_auxiliary_updates_nothing(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.step(0)
    before, hook = learnt(trainer), spoil_gradient(trainer.networks.aux)
    trainer.step(1)
    assert same(learnt(trainer), before) and "auxiliary's gradient" in trainer.events[0]["why"][0]
    hook.remove()


def test_after_so_many_in_a_row_it_stops_and_the_batch_can_be_replayed(tmp_path):
    trainer = trainer_for(tmp_path, "training.max_bad_steps=3")
    bad = {"on": False}
    teacher = trainer.networks.teacher
    teacher.register_forward_hook(lambda module, args, out: out * float("nan") if bad["on"] else out)
    for index, on in enumerate([True, True, False, True, True]):  # two in a row are not three
        bad["on"] = on
        trainer.step(index)
    assert trainer.guard.skipped == 4
    with pytest.raises(DimoError, match="3 steps in a row were skipped for values that are not finite") as stopped:
        trainer.step(5)
    assert not isinstance(stopped.value, NonFiniteError)
    (file,) = (tmp_path / "slices").iterdir()
    assert file.name == "replay-00000006-rank0.safetensors" and file.stem.rsplit("-", 1)[0] in str(stopped.value)
    batch = load_file(file)
    assert batch.keys() == {"txt_ids", "x_init", "x_hat", "x_t", "t", "step", "seed"}
    assert batch["step"] == 5
    replay = stages.Step(txt_ids=batch["txt_ids"], x_t=batch["x_t"], t=batch["t"])
    with pytest.raises(NonFiniteError, match="the teacher's logits"):
        stages.teacher_pass(replay, teacher, trainer.grid)
    bad["on"] = False
    stages.teacher_pass(replay, teacher, trainer.grid)


def test_the_count_survives_a_checkpoint(tmp_path):
    trainer = trainer_for(tmp_path)
    hook = spoil_output(trainer.networks.teacher)
    trainer.step(0)
    again = trainer_for(tmp_path)
    again.load_state(*trainer.state(), trainer.rank_state())
    hook.remove()
    assert again.guard.state_dict() == {"skipped": 1, "in_a_row": 1} and not again.events


def test_the_entropy_bonus_rises_and_falls_as_events(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, "distill.entropy_floor=0.5")
    entropies = iter([2.0] * EntropyController.WARMUP + [0.9, 1.05, 1.2])  # floor 1.0, back only above 1.1
    monkeypatch.setattr(trainer.engine, "mean", lambda value: torch.tensor(next(entropies)))
    for index in range(EntropyController.WARMUP + 3):
        trainer.set_entropy_bonus(index, None)
    raised, lowered = trainer.events
    assert raised["event"] == "entropy_bonus_raised" and raised["step"] == 21
    assert (raised["was"], raised["is"], raised["entropy"]) == (0.01, 0.05, pytest.approx(0.9))
    assert lowered["event"] == "entropy_bonus_lowered" and lowered["step"] == 23 and lowered["is"] == 0.01


ONE_RANK = """
import sys
import pytest
from test_guards import SETTINGS, learnt, same, spoil_output
from dimo.errors import DimoError
from dimo.config import load_config
from dimo.train.trainer import Trainer

more = ["experiment.output_dir=run", "training.max_bad_steps=2"]
trainer = Trainer(load_config("smoke", SETTINGS + more))
engine, n = trainer.engine, trainer.networks
assert engine.kind == sys.argv[1]
trainer.step(0)


class SpoilBackward:
    # the gradient alone: the loss is finite, and what flows back is not

    def __init__(self):
        self.inner = trainer.student.backward
        trainer.student.backward = lambda loss, last: self.inner(loss * float("nan"), last)

    def remove(self):
        trainer.student.backward = self.inner


spoilers = {"teacher": lambda: spoil_output(n.teacher), "student": lambda: spoil_output(n.student)}
spoilers["gradient"] = SpoilBackward
for where, spoil in spoilers.items():
    before, skipped = learnt(trainer), trainer.guard.skipped
    trainer.averages.take()  # what earlier steps measured
    hook = spoil() if engine.rank == 1 else None  # on one process only
    step, extra = trainer.step(1)
    now = learnt(trainer)
    assert trainer.guard.skipped == skipped + 1, where
    if where == "gradient":
        assert all(same(now[part]["student"], before[part]["student"]) for part in (0, 1))
        assert same(now[0]["ema"], before[0]["ema"])
    else:
        assert same(now, before), where
    values = trainer.metrics(step)
    assert values["loss/total"] != values["loss/total"]
    if hook:
        hook.remove()
    trainer.step(2)
    assert not same(learnt(trainer), now) or engine.rank == 1, where  # gathered on rank 0
assert [e["why"] for e in trainer.events][0][0] == "another process met a value that is not finite"
assert "the teacher's logits must be finite" in trainer.events[0]["why"][1]
if engine.rank == 1:
    spoil_output(n.teacher)
trainer.step(3)
with pytest.raises(DimoError, match="2 steps in a row"):
    trainer.step(4)
"""


@pytest.mark.parametrize("engine", WITH_ZERO2)
def test_nan_in_one_process_updates_none(tmp_path, engine):
    run_script(tmp_path, ONE_RANK, engine, engine=engine)
    files = sorted(file.name for file in (tmp_path / "run" / "slices").iterdir())
    assert files == [f"replay-00000005-rank{rank}.safetensors" for rank in (0, 1)]
    assert not torch.equal(*(load_file(tmp_path / "run" / "slices" / name)["x_init"] for name in files))


def test_a_run_that_never_gets_a_finite_step_fails_in_a_sentence(tmp_path):
    words = ["-m", "dimo.train", "config=smoke", *SETTINGS, f"experiment.output_dir={tmp_path / 'run'}"]
    words += ["optim.lr=1e30", "optim.aux_lr=1e30", "optim.warmup_steps=1", "training.max_bad_steps=2"]
    done = launch_forked(tmp_path, *words)
    assert done.returncode != 0 and "dimo: 2 steps in a row were skipped for values that are not finite" in done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert len(list((tmp_path / "run" / "slices").iterdir())) == 2
