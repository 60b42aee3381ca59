"""Real processes: one folder, one set of weights, and a checkpoint that any number of them takes up."""

import json

import pytest
import torch
from processes import WITH_ZERO2, launch, launch_forked, run_script
from safetensors.torch import load_file

SMALL = ["--batch_size", "2", "experiment.save_every=3", "experiment.log_every=1", "optim.optimizer=adamw"]
SMALL += ["distill.t_draws=1", "distill.aux_steps=1"]

EQUAL = """
import torch
from dimo.config import load_config
from dimo.run.ranks import everywhere
from dimo.train.trainer import Trainer

trainer = Trainer(load_config("smoke", ["distill.batch_size_per_gpu=2", "distill.estimator=reinforce"]))
for index in range(2):
    step, _ = trainer.step(index)
e = trainer.engine
nets = [getattr(trainer.networks, name) for name in ("student", "aux", "ema")]
weights = torch.cat([p.flatten() for net in nets for p in net.parameters()])
first, second = everywhere((weights, trainer.baseline.value))
samples = everywhere(step.x_hat)
own = everywhere(float(step.entropy.mean()))
trainer.averages.take()
trainer.step(2)
trainer.averages.sums["entropy/student"] = torch.tensor(1.0 + e.rank)
assert trainer.metrics(step)["entropy/student"] == 1.5, "the mean over two processes"
if e.rank == 0:
    print("RESULT", torch.equal(first[0], second[0]), torch.equal(first[1], second[1]), torch.equal(*samples))
"""


def test_weights_and_baseline_stay_equal_and_samples_differ(tmp_path):
    assert "RESULT True True False" in run_script(tmp_path, EQUAL)


def run(folder, out, *more, launch=launch, **where):
    words = ["-m", "dimo.train", "config=smoke", *SMALL, f"experiment.output_dir={out}", *more]
    done = launch(folder, *words, **where)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("engine", WITH_ZERO2)
def test_a_run_of_two_processes_writes_one_folder_and_ends_with_one_student(tmp_path, engine):
    out = tmp_path / "run"
    rows = run(tmp_path, out, "training.max_train_steps=4", "experiment.sample_every=4", engine=engine)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    assert (out / "samples" / "step-00000004.png").stat().st_size > 0
    ema = load_file(out / "checkpoints" / "step-00000004" / "ema.safetensors")
    ema["model.norm.weight"] *= 4  # model.final_logit_gain is 4 times model.logit_gain
    student = torch.load(out / "checkpoints" / "final" / "student.pt", weights_only=True)
    assert student.keys() == ema.keys() and all(torch.equal(student[key], ema[key]) for key in ema)
    if engine == "ddp":  # nothing is left to do, and nothing is done twice
        same = ["training.max_train_steps=4", "experiment.sample_every=4"]
        assert run(tmp_path, out, *same, launch=launch_forked) == rows


DIFFERENT = """
import types
import torch.distributed as dist
from dimo.errors import DimoError
from dimo.train import loop
from dimo.config import load_config

loop.SEEN_WITHIN_S = 0.5
dist.init_process_group("gloo")
open("config.yaml", "w").close()
for own in ("optim.warmup_steps=20", "distill.prompt_source=captions.txt", "experiment.log_every=7",
            "experiment.output_dir=elsewhere"):
    words = ["experiment.output_dir=."] + ([own] if dist.get_rank() == 1 else [])
    try:
        loop._require_one_run(types.SimpleNamespace(config=load_config("smoke", words)))
        said = "one run"
    except DimoError as error:
        said = str(error)
    if dist.get_rank() == 0:
        print(said)
"""


def test_ranks_of_different_commands_or_folders_are_refused(tmp_path):
    lines = run_script(tmp_path, DIFFERENT).splitlines()
    assert lines[0].startswith("rank 1: the configuration differs from rank 0's: optim.warmup_steps is 20, not ")
    assert lines[1] == "one run" and lines[2].endswith("rank 0's: experiment.log_every is 7, not 5")
    assert lines[3].startswith("rank 1: elsewhere on ") and lines[3].endswith(" the folder that rank 0 writes to")


# What two processes saved after two steps, taken up by as many processes as are started now.
TAKE_UP = """
import sys
import torch
from dimo.config import load_config
from dimo.train.trainer import Trainer

trainer = Trainer(load_config("smoke", ["distill.batch_size_per_gpu=2", "optim.optimizer=adamw"]))
e, steps = trainer.engine, int(sys.argv[1])
if steps == 0:
    for index in range(2):
        trainer.step(index)
    torch.save(trainer.rank_state(), f"rank{e.rank}.pt")
else:
    tensors, state = torch.load("saved.pt")
    own = torch.load(f"rank{e.rank % 2}.pt")
    trainer.load_state(tensors, {**state, "step": 2}, own)
    assert torch.equal(trainer.x_init.x_hat, own["x_init"]["x_hat"])
again = trainer.state()
if e.rank == 0:
    if steps:
        for name in ("student", "aux", "ema"):
            assert all(torch.equal(again[0][name][k], v) for k, v in tensors[name].items())
        for name in ("student", "aux"):
            got, want = again[1]["optimizers"][name], state["optimizers"][name]
            assert got.keys() == want.keys()
            assert all(torch.equal(got[k][m], v) for k in want for m, v in want[k].items())
    else:
        torch.save(again, "saved.pt")
trainer.step(2)
"""


@pytest.mark.parametrize("engine", WITH_ZERO2[1:])
def test_a_checkpoint_is_taken_up_by_another_number_of_processes(tmp_path, engine):
    run_script(tmp_path, TAKE_UP, "0", engine=engine)
    run_script(tmp_path, TAKE_UP, "1", engine=engine, processes=3)
