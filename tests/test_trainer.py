"""The training loop: a resumed run is the run, whatever killed it, and every metric can move."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import python
from safetensors.torch import load_file

from dimo.commands.cli import main
from dimo.config import load_config
from dimo.distill.step import nine_stages
from dimo.errors import DimoError
from dimo.run.folder import RunFolder
from dimo.train.results import write_samples
from dimo.train.trainer import Trainer, step_through
from dimo.ursa import MixturePath, load_ursa, visual_logits
from dimo.ursa.loading import load_transformer
from dimo.worlds import checkpoint_folder

# every stateful part takes part: mix, controller, curriculum, EMA baseline
SMALL = [
    "model.device=cpu", "distill.batch_size_per_gpu=4", "distill.p_corrupt=0.5", "distill.lambda_ent=0.01",
    "distill.entropy_floor=1.0", "distill.t_curriculum_steps=10", "distill.w_kd=0.1", "distill.w_reinforce=0.1",
    "training.max_train_steps=16", "experiment.save_every=4", "experiment.log_every=3", "experiment.sample_every=1000",
]  # fmt: skip


def config_for(folder, *more):
    return load_config("smoke", [*SMALL, f"experiment.output_dir={folder}", *more])


def final_state(folder):
    last = sorted(Path(folder, "checkpoints").glob("step-*"))[-1]
    tensors = {f.stem: load_file(f) for f in last.glob("*.safetensors")}
    return tensors, {f.name: torch.load(f, weights_only=True) for f in sorted(last.glob("*.pt"))}


def assert_same(a, b, where=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def metrics_of(folder):
    """Rows without what depends on the clock."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_s"))} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    Trainer(config_for(folder)).train(progress=False)
    return folder


def test_a_line_of_metrics_is_the_mean_over_its_steps_and_their_parts(tmp_path, monkeypatch):
    more = ["training.gradient_accumulation_steps=2", "distill.kd_every=2"]
    trainer, seen = Trainer(config_for(tmp_path, *more)), []
    monkeypatch.setattr("dimo.train.trainer.nine_stages", lambda *a: (seen.append(a[2]), nine_stages(*a))[1])
    for index in range(4):
        step, _ = trainer.step(index)
    got, parts = trainer.metrics(step), [part for steps in seen for part in steps]
    assert len(parts) == 8
    assert got["entropy/student"] == pytest.approx(sum(p.entropy.mean().item() for p in parts) / 8, rel=1e-5)
    reward = torch.cat([p.reward for p in parts])
    assert got["reward/mean"] == pytest.approx(reward.mean().item(), rel=1e-5)
    assert got["reward/std"] == pytest.approx(reward.std(unbiased=False).item(), rel=1e-3)
    kd = [p.kd.item() for p in parts if p.kd is not None]
    assert len(kd) == 4 and got["loss/kd"] == pytest.approx(sum(kd) / 4, rel=1e-5)
    step, _ = trainer.step(4)
    assert trainer.metrics(step)["t/mean"] == pytest.approx(
        (seen[-1][0].t.mean() + seen[-1][1].t.mean()).item() / 2, rel=1e-5
    )  # the last line's steps are forgotten
    again = trainer.metrics(step)
    assert again["t/mean"] == pytest.approx(step.t.mean().item()) and not any(map(math.isnan, again.values()))


@pytest.mark.parametrize(("precision", "most"), [("no", 7), ("bf16", 8)])  # logits and hidden states
def test_a_step_looks_at_few_values(tmp_path, monkeypatch, precision, most):
    trainer = Trainer(config_for(tmp_path, f"training.mixed_precision={precision}", "distill.aux_steps=1"))
    trainer.step(0)
    looks = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        inner = getattr(torch.Tensor, name)
        look = lambda tensor, name=name, inner=inner: (looks.append(name), inner(tensor))[1]  # noqa: E731
        monkeypatch.setattr(torch.Tensor, name, look)
    step, _ = trainer.step(1)
    assert 0 < len(looks) <= most, looks
    with pytest.raises(DimoError, match="visual_tokens must lie in"):  # for others all doors are shut
        visual_logits(trainer.networks.student, step.txt_ids, step.x_hat + 16, trainer.grid)


def test_of_bf16_on_a_cpu_it_is_said_what_is_faster(tmp_path, capsys):
    for precision, told in (("no", 0), ("bf16", 1)):
        more = [f"training.mixed_precision={precision}", "training.max_train_steps=1"]
        Trainer(config_for(tmp_path / precision, *more)).train()
        err = capsys.readouterr().err
        assert "steps 0 to 1 of" in err and err.count("most CPUs are slow at bf16") == told


def test_weights_that_are_not_finite_are_not_saved_and_not_a_finished_run(tmp_path):
    trainer = Trainer(config_for(tmp_path, "training.max_train_steps=2"))
    inner = trainer.student.update

    def ruin(norm, name):
        inner(norm, name)
        trainer.student.learning[0].detach().fill_(math.nan)  # no step comes after the last one to notice

    trainer.student.update = ruin
    with pytest.raises(DimoError, match="after step 2 .* of the student is not finite .* nothing was saved"):
        trainer.train(progress=False)
    assert not list(tmp_path.glob("checkpoints/*/*.safetensors")) and not (tmp_path / "checkpoints" / "final").exists()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_a_gpu_that_is_full_is_a_sentence_and_says_what_to_ask(tmp_path, monkeypatch, capsys):
    told = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.11 GiB of which 1.05 GiB is free. Including non-"
    )

    def full(*_):
        raise torch.OutOfMemoryError(told)

    words = [*SMALL, f"experiment.output_dir={tmp_path}"]
    monkeypatch.setattr(Trainer, "step", full)
    assert main(["train", "-c", "smoke", *words]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"dimo: {told.removesuffix(' Including non-')} `dimo plan` with the same keys says what needs less"
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and status["error"] == said.removeprefix("dimo: ")
    monkeypatch.setattr("dimo.train.trainer.make_networks", full)
    assert main(["train", "-c", "smoke", *words]) == 2 and "`dimo plan`" in capsys.readouterr().err.splitlines()[-1]


def test_pictures_are_made_by_as_many_at_once_and_in_the_precision_as_training_has(tmp_path):
    trainer, seen, drawn = Trainer(config_for(tmp_path, "training.mixed_precision=bf16")), [], []
    trainer.networks.ema.register_forward_hook(lambda module, args, out: seen.append((len(args[0]), out.dtype)))
    decode = trainer.ursa.vae.decode
    trainer.ursa.vae = SimpleNamespace(decode=lambda codes: (drawn.append(codes), decode(codes))[1])
    for step in (1, 2):
        write_samples(trainer, RunFolder(tmp_path), step)
    assert seen == 4 * [(4, torch.bfloat16)] and (tmp_path / "samples" / "step-00000001.png").exists()
    assert len(drawn[0]) == 8 and torch.equal(*drawn) and not torch.equal(*drawn[0].chunk(2))


COMMAND = "import sys, torch; torch.set_num_threads(1); from dimo.commands.cli import main; sys.exit(main())"


def start(folder):
    arguments = ["train", "-c", "smoke", *SMALL, f"experiment.output_dir={folder}"]
    return python.start(["-c", COMMAND, *arguments], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("sign", "code", "after"), [(signal.SIGKILL, -9, 8), (signal.SIGINT, 75, 4)])
def test_a_killed_run_goes_on_to_the_same_bits(uninterrupted, tmp_path, sign, code, after):
    process = start(tmp_path)
    while not (tmp_path / "checkpoints" / f"step-{after:08d}").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, sign)
    process.communicate()
    assert process.returncode == code
    assert not (tmp_path / "checkpoints" / "final").exists()
    again = start(tmp_path)
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert_same(final_state(uninterrupted), final_state(tmp_path))
    assert metrics_of(uninterrupted) == metrics_of(tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


def test_the_student_out_is_the_ema_and_loads_strictly(uninterrupted):
    tensors, _ = final_state(uninterrupted)
    final = uninterrupted / "checkpoints" / "final"
    student = load_transformer(final / "student")
    teacher, last = load_ursa(checkpoint_folder("shapes")).transformer, "model.norm.weight"
    norm = teacher.get_parameter(last).detach()  # with the head it stays the teacher's, but for logit_gain
    assert_same(tensors["ema"][last], 3 * norm)
    want = tensors["ema"] | {last: tensors["ema"][last] * 4}  # final_logit_gain is 12
    assert_same(want, dict(student.state_dict()))
    assert_same(want, torch.load(final / "student.pt", weights_only=True))
    assert_same(student.lm_head.weight.detach(), teacher.lm_head.weight.detach())
    assert any(not torch.equal(a, b) for a, b in zip(teacher.state_dict().values(), student.state_dict().values()))


def test_a_finished_run_is_not_trained_again(uninterrupted):
    before = (uninterrupted / "checkpoints" / "final" / "student.pt").read_bytes()
    Trainer(config_for(uninterrupted)).train(progress=False)
    assert (uninterrupted / "checkpoints" / "final" / "student.pt").read_bytes() == before
    assert [row["step"] for row in metrics_of(uninterrupted)] == [3, 6, 9, 12, 15, 16]


def test_every_metric_can_move(uninterrupted):
    rows = metrics_of(uninterrupted)
    fixed = {name for name in rows[0] if len({row[name] for row in rows}) == 1}
    # the bonus moves when the entropy falls under its floor; batch statistics of whole numbers may coincide
    assert fixed <= {"lambda_ent", "codes/used", "guard/skipped"}  # test_guards moves the last
    assert rows[-1]["loss/total"] != rows[0]["loss/total"]
    shares = [row["x_init/corrupt_share"] for row in rows]
    # a run's first step has no earlier sample to start from, and from step 0.7 * 16 on none is asked for
    assert 0 < shares[0] <= 2 / 3 and all(shares[:4]) and shares[4:] == [0, 0]


def test_the_bonus_rises_when_the_entropy_falls(tmp_path):
    quick = ["distill.w_kd=0", "distill.w_reinforce=0", "distill.aux_steps=1", "distill.t_draws=1"]
    trainer = Trainer(config_for(tmp_path, "optim.warmup_steps=1", "distill.entropy_floor=0.98", *quick))
    seen = [(m["entropy/student"], m["lambda_ent"]) for _, _, m in step_through(trainer, 30)]
    # the scale is the mean of the first 20; from then on the lowest entropy must be answered, the highest must not
    low, high = min(seen[20:]), max(seen[20:])
    assert seen[0][1] == 0.01 and low[1] == 0.05 and (high[0] < seen[0][0] or high[1] == 0.01)


def test_the_ema_follows_by_its_decay(tmp_path):
    trainer = Trainer(config_for(tmp_path, "optim.ema_decay=0.9"))
    before = [p.clone() for p in trainer.networks.ema.parameters()]
    trainer.step(200)  # far enough for the decay to be the configured one
    for old, new, student in zip(before, trainer.networks.ema.parameters(), trainer.networks.student.parameters()):
        assert torch.allclose(new, 0.9 * old + 0.1 * student, atol=1e-6)


def test_an_ema_of_every_fourth_step_decays_by_four_steps(tmp_path):
    trainer = Trainer(config_for(tmp_path, "optim.ema_decay=0.9", "optim.ema_every=4"))
    ema, student = (list(network.parameters()) for network in (trainer.networks.ema, trainer.networks.student))
    with torch.no_grad():
        for p in student:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    before = [p.clone() for p in ema]
    for index in (200, 201, 202, 203):  # of which the last is the 204th
        assert all(torch.equal(old, new) for old, new in zip(before, ema))
        trainer.prepare(index)
        trainer.update_ema()
    trained = [rows for rows in zip(before, ema, student) if rows[2].requires_grad]
    assert all(torch.allclose(new, 0.9**4 * old + (1 - 0.9**4) * now, atol=1e-6) for old, new, now in trained)
    trainer.prepare(3)  # with the warm-up's decay of each of the four
    assert trainer.ema_weight == pytest.approx(1 - (1 / 10) * (2 / 11) * (3 / 12) * (4 / 13))


@pytest.mark.parametrize(
    "more", [["distill.estimator=reinforce"], ["distill.guidance_scale=2"], ["distill.t_per=frame"]]
)
def test_every_switch_of_the_method_runs(tmp_path, more):
    ((_, step, metrics),) = step_through(Trainer(config_for(tmp_path, *more)), 1)
    assert step.loss.isfinite() and metrics["grad_norm/student"] > 0


@pytest.mark.parametrize(("t_per", "dimensions"), [("sample", 1), ("frame", 2)])
def test_student_and_auxiliary_are_renoised_alike(tmp_path, t_per, dimensions):
    trainer, times = Trainer(config_for(tmp_path, f"distill.t_per={t_per}", "distill.aux_steps=1")), []
    inner = trainer.path.sample
    trainer.path.sample = lambda x, t, g: (times.append(t), inner(x, t, g))[1]
    trainer.step(0)
    seen = [t.dim() for t in times]  # of stage 4, of the auxiliary's fit
    assert seen == [dimensions, dimensions], f"distill.t_per={t_per} gives t of {seen} dimensions"


def test_the_mixture_path_goes_through_all_nine_stages(tmp_path):
    """x_t is x_hat's token with probability t, else uniform, in stage 4 and in the auxiliary's fits."""
    teacher = shutil.copytree(checkpoint_folder("shapes"), tmp_path / "teacher")
    file = teacher / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha": None}))
    large = ["distill.batch_size_per_gpu=64", "distill.t_draws=2", "distill.aux_steps=2"]
    trainer, drawn = Trainer(config_for(tmp_path / "run", f"distill.teacher_ckpt={teacher}", *large)), []
    assert isinstance(trainer.path, MixturePath)
    inner, codes = trainer.path.sample, trainer.path.codebook_size

    def recording(x_1, t, generator):
        drawn.append((x_1, t, inner(x_1, t, generator)))
        return drawn[-1][2]

    trainer.path.sample = recording
    networks = [trainer.networks.student, trainer.networks.aux, trainer.networks.ema]
    before = [{k: v.clone() for k, v in network.state_dict().items()} for network in networks]
    step, metrics = trainer.step(0)
    assert step.loss.isfinite() and step.kd.isfinite() and metrics["grad_norm/aux"] > 0
    assert all(any(not torch.equal(w, old[k]) for k, w in n.state_dict().items()) for n, old in zip(networks, before))
    assert len(drawn) == 3 and torch.equal(drawn[0][2], step.x_t)  # 128 videos, then twice 64, of 48 tokens each
    for x_1, t, x_t in drawn:
        assert torch.equal(x_1, step.x_hat.repeat(len(x_1) // 64, 1))
        want = t[:, None] + (1 - t[:, None]) / codes
        assert ((x_t == x_1).float() - want).mean().abs() < 0.03  # three standard deviations of the fewer tokens
        assert ((x_t == x_1).float() - want)[t < 0.2].mean().abs() < 0.05
        away = ((x_t - x_1) % codes)[x_t != x_1]
        shares = torch.bincount(away, minlength=codes) / len(away)
        assert shares[0] == 0 and torch.allclose(shares[1:], torch.tensor(1 / (codes - 1)), atol=0.04)


def test_the_teacher_is_never_changed(tmp_path):
    trainer = Trainer(config_for(tmp_path))
    before = {k: v.clone() for k, v in trainer.networks.teacher.state_dict().items()}
    list(step_through(trainer, 2))
    assert_same(before, dict(trainer.networks.teacher.state_dict()))


def test_a_nan_stops_the_run_with_a_sentence_and_its_last_checkpoint(tmp_path):
    trainer = Trainer(config_for(tmp_path, "training.max_bad_steps=2"))
    inner = trainer.step

    def broken(index):
        if index == 6:
            with torch.no_grad():
                trainer.networks.student.lm_head.weight.fill_(float("nan"))
        return inner(index)

    trainer.step = broken
    with pytest.raises(DimoError, match="2 steps in a row were skipped for values that are not finite"):
        trainer.train(progress=False)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and "finite" in status["error"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_prompts_come_from_a_text_file_too(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffblue bar moving up\n\npink square moving left\n", encoding="utf-8")
    trainer = Trainer(config_for(tmp_path / "run", f"distill.prompt_source={file}"))
    assert sorted(trainer.prompts.examples) == ["blue bar moving up", "pink square moving left"]
    assert trainer.prompts.example_ids.min() > 2
    file.write_text("\n")
    with pytest.raises(DimoError, match="holds no prompt"):
        Trainer(config_for(tmp_path / "run", f"distill.prompt_source={file}"))
    with pytest.raises(DimoError, match="nowhere.txt does not exist"):
        Trainer(config_for(tmp_path / "run", "distill.prompt_source=nowhere.txt"))


def test_a_grid_that_the_world_does_not_have_is_refused(tmp_path):
    with pytest.raises(DimoError, match="latents_shape"):
        Trainer(config_for(tmp_path, "distill.width=64"))


def test_a_teacher_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        DimoError, match="teacher_ckpt shape is neither a folder nor a built-in world; did you mean 'shapes'"
    ):
        Trainer(config_for(tmp_path, "distill.teacher_ckpt=shape"))


def test_walking_is_stepping_with_a_stop_after_each_stage(tmp_path):
    whole, walked = (Trainer(config_for(tmp_path, "training.mixed_precision=bf16")) for _ in range(2))
    step, values = whole.step(0)
    seen = []
    for number, other, figures in walked.walk(0):  # noqa: B007
        assert not torch.is_autocast_enabled("cpu")  # whoever looks is not left in bf16
        seen.append(number)
    assert seen == list(range(1, 10)) and figures == values
    assert torch.equal(step.x_hat, other.x_hat) and torch.equal(step.loss, other.loss)
    mine, its = (t.networks.student.state_dict() for t in (whole, walked))
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_a_walk_that_is_left_before_the_updates_changes_no_weight(tmp_path):
    trainer = Trainer(config_for(tmp_path))
    nets = (trainer.networks.student, trainer.networks.aux, trainer.networks.ema)
    before = [{name: w.clone() for name, w in net.state_dict().items()} for net in nets]
    for number, step, _ in trainer.walk(0):  # noqa: B007
        if number == 5:
            break
    assert step.teacher is not None and step.loss is None
    assert all(torch.equal(w, net.state_dict()[name]) for net, old in zip(nets, before) for name, w in old.items())
    trainer.step(0)  # and the trainer goes on
