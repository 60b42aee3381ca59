"""The run folder: one run at a time, the same configuration, and files that a kill does not spoil."""

import os
import signal
import subprocess
import tempfile

import pytest
from forks import python

from dimo.config import load_config, to_yaml
from dimo.errors import DimoError
from dimo.run.folder import RunFolder

CONFIG = to_yaml(load_config("smoke"))


def test_metrics_survive_a_torn_last_line_and_are_cut_at_the_checkpoint(tmp_path):
    run = RunFolder.open(tmp_path, CONFIG)
    for step in (5, 10, 15):
        run.log({"step": step, "loss/total": 1.0 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "loss/to')
    assert [row["step"] for row in run.metrics()] == [5, 10, 15]
    run.cut_at(10)
    run.log({"step": 15, "loss/total": float("nan")})
    assert run.metrics()[-1] == {"step": 15, "loss/total": None, "non_finite": ["loss/total"]}
    assert [row["step"] for row in run.metrics()] == [5, 10, 15]


def test_a_folder_of_another_run_is_refused_and_shows_the_difference(tmp_path):
    RunFolder.open(tmp_path, CONFIG)
    other = to_yaml(load_config("smoke", ["optim.lr=5e-4"]))
    with pytest.raises(DimoError, match=r"another configuration \(optim.lr was 0.\d+, is 0.0005\)"):
        RunFolder.open(tmp_path, other)
    with pytest.raises(DimoError, match="experiment.resume is false"):
        RunFolder.open(tmp_path, CONFIG, resume=False)
    RunFolder.open(tmp_path, to_yaml(load_config("smoke", ["experiment.log_every=1"])))  # how to log may change
    (tmp_path / "metrics.jsonl").write_text("{}")
    RunFolder.open(tmp_path, other, overwrite=True)
    assert not (tmp_path / "metrics.jsonl").exists()


def everything_in(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": "optim: {lr: 1}\n"},
        {"config.yaml": "experiment: {}\ndistill: {}\noptim: {}\nserver: {}\n"},
        {"config.yaml": "- a\n"},
        {"config.yaml": "a: ["},
        {"status.json": '{"state": "ok"}'},
        {"config.yaml": "a: 1", "status.json": ""},
    ],
)
def test_the_folder_of_something_else_is_left_as_it_is(tmp_path, files, overwrite):
    for name, text in {**files, "notebooks/my.txt": "work", "samples/a.png": "work"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = everything_in(tmp_path)
    with pytest.raises(DimoError, match="is not a run folder of dimo"):
        RunFolder.open(tmp_path, CONFIG, overwrite=overwrite)
    assert everything_in(tmp_path) == before


def test_starting_over_removes_what_dimo_wrote_and_nothing_else(tmp_path):
    RunFolder.open(tmp_path, CONFIG).write_status(state="finished")
    ours = ["checkpoints/step-00000050/ema.safetensors", "checkpoints/final/config.json", "samples/step-00000050.png"]
    ours += ["checkpoints/.step-00000075.partial/state.pt", "notebooks/03_train.ipynb", "notebooks/03_train.html"]
    ours += ["notebooks/03_train.failed.ipynb", "report.json", "sheet.png", "metrics.jsonl"]
    ours += ["evaluation_jobs/about.json", "evaluation_jobs/teacher_25-00003.safetensors"]
    theirs = ["checkpoints/best/student.pt", "samples/mine.png", "notebooks/my.txt", "notes.md"]
    for name in ours + theirs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints" / "step-00000025").symlink_to(tmp_path / "elsewhere")
    RunFolder.open(tmp_path, CONFIG, overwrite=True)
    assert set(everything_in(tmp_path)) == {*theirs, "config.yaml", "sources.json", ".lock"}
    assert not (tmp_path / "checkpoints" / "step-00000025").exists() and (tmp_path / "elsewhere").exists()


def test_a_damaged_configuration_or_status_is_a_sentence_and_no_end(tmp_path):
    RunFolder.open(tmp_path, CONFIG).write_status(state="running")
    (tmp_path / "config.yaml").write_text("optim: [")
    with pytest.raises(DimoError, match=r"config.yaml is not valid YAML: line 1: "):
        RunFolder.open(tmp_path, CONFIG)
    run = RunFolder.open(tmp_path, CONFIG, overwrite=True)
    for text in ("", "{", "[]", '{"state": "r\xe9"}'):
        (tmp_path / "status.json").write_text(text, encoding="latin-1")
        with pytest.raises(DimoError, match="status.json .*; delete it, the run continues without"):
            run.write_status(step=1)
    RunFolder.open(tmp_path, CONFIG)


def test_status_keeps_what_is_not_changed(tmp_path):
    run = RunFolder.open(tmp_path, CONFIG)
    run.write_status(state="running", step=3)
    run.write_status(step=4)
    assert run.status()["state"] == "running" and run.status()["step"] == 4 and run.status()["pid"] == os.getpid()


def test_events_of_steps_to_be_taken_again_are_dropped_and_the_history_stays(tmp_path):
    run = RunFolder.open(tmp_path, CONFIG)
    for step, event in ((4, "bad_step"), (8, "damaged_checkpoint"), (8, "bad_step")):
        run.event({"step": step, "event": event})
    run.cut_at(4)
    assert [(e["step"], e["event"]) for e in run.events()] == [(4, "bad_step"), (8, "damaged_checkpoint")]
    assert all(e["time"] for e in run.events())


def test_what_leaves_the_training_alone_may_change_and_is_shown(tmp_path):
    RunFolder.open(tmp_path, CONFIG)
    longer = ["training.max_train_steps=60", "experiment.save_every=7", "evaluation.seed=5", "model.device=cpu"]
    run = RunFolder.open(tmp_path, to_yaml(load_config("smoke", longer)))
    (event,) = run.events()
    assert event["event"] == "config_changed" and event["changes"]["training.max_train_steps"] == [50, 60]
    assert set(event["changes"]) == {key.split("=")[0] for key in longer}
    assert "training.max_train_steps was 50, is 60" in (tmp_path / "train.log").read_text()
    assert load_config(tmp_path / "config.yaml").training.max_train_steps == 60
    with pytest.raises(DimoError, match="max_train_steps was 60, is 50"):  # it would end before its checkpoint
        RunFolder.open(tmp_path, CONFIG)


@pytest.mark.parametrize("change", ["experiment.seed=1", "distill.shuffle_buffer=5", "training.mixed_precision=bf16"])
def test_what_would_change_the_model_or_the_order_of_its_data_is_refused(tmp_path, change):
    RunFolder.open(tmp_path, CONFIG)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(DimoError, match=f"another configuration .{change.split('=')[0]} was "):
        RunFolder.open(tmp_path, to_yaml(load_config("smoke", [change])))
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_key_that_an_older_folder_does_not_know_had_its_default(tmp_path):
    RunFolder.open(tmp_path, CONFIG)
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace("  w_kd: 0.0\n", ""))
    RunFolder.open(tmp_path, CONFIG)
    file.write_text(file.read_text().replace("  w_kd: 0.0\n", ""))
    with pytest.raises(DimoError, match="distill.w_kd was 0.0, is 0.5"):
        RunFolder.open(tmp_path, to_yaml(load_config("smoke", ["distill.w_kd=0.5"])))


def test_a_folder_named_like_a_leftover_is_cleared_and_no_end(tmp_path):
    run = RunFolder.open(tmp_path, CONFIG)
    for name in (".x.partial/a", "samples/.b.partial/c", "checkpoints/final/.student.old.partial/config.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / ".report.7.partial.json").touch()
    another = tmp_path / ".launch-machine-1.8.partial.yaml"  # which that machine is writing
    another.touch()
    RunFolder.open(tmp_path, CONFIG)
    assert (tmp_path / "checkpoints/final/student/config.json").exists()
    assert [f for f in run.path.rglob("*") if ".partial" in f.name] == [another]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "a//b", "x/", "./x", "~/x", "..", "..\\x"])
def test_a_name_stays_inside_runs(name):
    with pytest.raises(DimoError, match="experiment.name must name a folder inside runs/.*output_dir may be anywhere"):
        load_config("smoke", [f"experiment.name='{name}'"])


def test_a_name_of_two_levels_and_any_folder_are_taken():
    assert load_config("smoke", ["experiment.name=sweep/lr..1"]).experiment.output_dir == "runs/sweep/lr..1"
    assert load_config("smoke", ["experiment.output_dir=../x"]).experiment.output_dir == "../x"


HOLDER = """
import sys, time
from dimo.run.folder import RunFolder
run = RunFolder.open(sys.argv[1], open(sys.argv[2]).read(), hold=True)
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    words = ["-c", HOLDER, str(tmp_path / "run"), str(tmp_path / "c.yaml")]
    with python.start(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        run = RunFolder(tmp_path / "run")
        assert run.is_held()
        for overwrite in (False, True):
            with pytest.raises(DimoError, match=f"is being trained by process {holder.pid} on "):
                RunFolder.open(run.path, CONFIG, overwrite=overwrite)
        assert (run.path / "config.yaml").exists()
        holder.send_signal(signal.SIGKILL)
    assert not run.is_held()
    again = RunFolder.open(run.path, CONFIG, hold=True)
    assert again.is_held()
    again.close()
    assert not again.is_held()


READ_ONLY = """
import os, sys
from dimo.commands.cli import main
from dimo.train.trainer import Trainer

train = Trainer.train

def as_nobody(trainer, progress):
    if os.geteuid() == 0:  # who may write anywhere
        os.seteuid(65534)
    return train(trainer, progress)

Trainer.train = as_nobody
sys.exit(main(["train", "-c", "smoke", "model.device=cpu", "experiment.output_dir=" + sys.argv[1]]))
"""


def test_a_read_only_folder_is_a_sentence():
    with tempfile.TemporaryDirectory() as parent:  # tmp_path lies where only its owner may look
        os.chmod(parent, 0o555)
        words = ["-c", READ_ONLY, f"{parent}/run"]
        done = python.run(words, capture_output=True, text=True)
        os.chmod(parent, 0o755)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"dimo: {parent}/run: Permission denied" in done.stderr
