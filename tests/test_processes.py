"""Two real processes: one folder, one set of weights, the gradient of both."""

import json
import os
import subprocess
import sys

CHECK = """
import sys
import torch
from dimo.train.config import load_config
from dimo.train.trainer import Trainer

trainer = Trainer(load_config("smoke", ["distill.batch_size_per_gpu=2", "distill.w_kd=0.1", "distill.lambda_ent=0.01"]))
a, gradients = trainer.accelerator, []
update = trainer._update


def spy(model, optimizers, loss):
    own = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    step = [o.step for o in optimizers]
    optimizers[0].step = lambda: (gradients.append((own, [p.grad.clone() for p in model.parameters()])), step[0]())
    norm = update(model, optimizers, loss)
    optimizers[0].step = step[0]
    return norm


trainer._update = spy
trainer.config.optim.max_grad_norm = 1e9
step, _ = trainer.step(0)
own, used = gradients[-1]
mean = [a.gather(g[None]).mean(0) for g in own]  # what averaging over processes means, by another road
worst = max((m - u).abs().max().item() for m, u in zip(mean, used))
weights = torch.cat([p.flatten() for p in trainer.networks.student.parameters()])[None]
both, samples = a.gather(weights), a.gather(step.x_hat[None])
if a.is_main_process:
    same = torch.equal(both[0], both[1]), torch.equal(samples[0], samples[1])
    print("RESULT", worst, mean[0].abs().max().item(), *same)
"""


def launch(tmp_path, *command):
    """What `accelerate launch` does for several GPUs of one machine, on the CPU."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)


def test_gradients_are_averaged_and_weights_stay_equal(tmp_path):
    (tmp_path / "check.py").write_text(CHECK)
    done = launch(tmp_path, str(tmp_path / "check.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    _, worst, size, same_weights, same_samples = next(
        line for line in done.stdout.splitlines() if line.startswith("RESULT")
    ).split()
    assert float(size) > 0 and float(worst) < 1e-6 * float(size) + 1e-9
    assert same_weights == "True" and same_samples == "False"


def test_a_run_of_two_processes_writes_one_folder_and_resumes(tmp_path):
    out = tmp_path / "run"
    words = ["-m", "dimo.train", "config=smoke", "--batch_size", "2", f"experiment.output_dir={out}"]
    words += ["experiment.save_every=3", "experiment.log_every=1", "training.max_train_steps=4"]
    done = launch(tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    assert (out / "checkpoints/final/student.pt").exists()
    again = launch(tmp_path, *words)  # nothing is left to do, and nothing is done twice
    assert again.returncode == 0, again.stderr[-3000:]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
