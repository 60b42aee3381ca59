"""Training in processes of its own: real ones, stopped and killed at every level, and stand-ins for what is slow."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from forks import python

from dimo.commands.cli import main
from dimo.commands.train import train
from dimo.config import load_config
from dimo.errors import DimoError
from dimo.run import launch as launching
from dimo.run.folder import RunFolder
from dimo.run.launch import launch, launch_command, machine_of, needs_launch
from dimo.run.signals import Preempted


def living_in(folder):
    """All processes with this working directory, which every process that a test starts there inherits."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != "zombie":
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


@pytest.fixture(autouse=True)
def _none_is_left(tmp_path):
    """Of a test that fails: its runs are endless."""
    yield
    for process in living_in(tmp_path):
        process.kill()


LIMIT_S = 900  # for what never comes; a busy machine is no failure


def wait_until(true, seconds=LIMIT_S):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


# ------------------------------------------------------------------ a stand-in for the workers

WORKER = """
import json, os, signal, sys, time
from dimo.run.lifeline import end_with_launcher

end_with_launcher()
out, mode = sys.argv[1:]


def write_status(**status):  # as RunFolder does, without the seconds that importing it takes
    beside = f"{out}/status.{os.getpid()}"
    with open(beside, "w") as file:
        json.dump({**status, "pid": os.getpid()}, file)
    os.replace(beside, f"{out}/status.json")


def stop(*_):
    print("asked", flush=True)
    if mode == "deaf":
        return
    print("saving", flush=True)
    time.sleep(0.5)
    write_status(state="preempted", step=3)
    os._exit(75)


signal.signal(signal.SIGTERM, stop)
if mode == "refuses":
    sys.exit("dimo: no such thing")
if mode == "early":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
else:
    write_status(state="running", step=1)
print("ready", flush=True)
if mode == "fails":
    sys.exit(2)
while mode != "done":
    time.sleep(0.1)
write_status(state="finished", step=9)
"""

LAUNCHER = """
import sys
from dimo.run import launch as launching
from dimo.config import load_config

out, mode, folder, grace = sys.argv[1:]
words = launching.launch_command
def stand_in(config):
    command = words(config)
    return command[: command.index("-m", 2)] + [f"{folder}/worker.py", out, mode]
launching.launch_command = stand_in
config = load_config("smoke", [f"experiment.output_dir={out}", "training.num_processes=2", "model.device=cpu"])
sys.exit(launching.launch(config, float(grace)))
"""


class StandIn:
    def __init__(self, folder, mode, grace=30):
        self.folder, self.out = folder, folder / "run"
        (folder / "worker.py").write_text(WORKER)
        (folder / "launcher.py").write_text(LAUNCHER)
        words = [folder / "launcher.py", str(self.out), mode, str(folder), str(grace)]
        self.process = python.start(words, cwd=folder, stderr=subprocess.PIPE, text=True)

    def ready(self):
        return self.both_say("ready")

    def both_say(self, word):
        log = self.out / "launch.log"
        wait_until(lambda: log.exists() and log.read_text().count(word) >= 2)
        return self

    def end(self):
        """(exit code, status, stderr), after no process is left."""
        _, err = self.process.communicate(timeout=LIMIT_S)
        wait_until(lambda: not living_in(self.folder))
        return self.process.returncode, RunFolder(self.out).status(), err


def test_what_workers_print_is_kept_and_shown(tmp_path):
    code, status, err = StandIn(tmp_path, "done").end()
    assert code == 0 and status["state"] == "finished"
    assert err.count("ready") == 2 and (tmp_path / "run/launch.log").read_text().count("ready") == 2


def test_failing_workers_are_exit_code_one(tmp_path):
    code, status, _ = StandIn(tmp_path, "fails").end()
    assert code == 1 and status["state"] == "failed" and status["error"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGUSR1"])
def test_what_asks_to_stop_reaches_the_workers_and_they_end_by_themselves(tmp_path, name):
    run = StandIn(tmp_path, "saves").ready()
    run.process.send_signal(getattr(signal, name))
    code, status, err = run.end()
    assert code == 75 and status["state"] == "preempted" and err.count("saving") >= 2  # torchrun asks the second again
    assert "Traceback" not in err  # torchrun's


def test_the_launcher_s_terminal_may_go(tmp_path):
    run = StandIn(tmp_path, "saves").ready()
    run.process.stderr.close()
    run.process.terminate()
    assert run.process.wait(LIMIT_S) == 75 and RunFolder(run.out).status()["state"] == "preempted"
    assert (run.out / "launch.log").read_text().count("saving") >= 2


def test_an_error_of_an_earlier_launch_is_not_told_again(tmp_path):
    """Workers that end before they write a status: what they said is the reason."""
    RunFolder(tmp_path / "run").write_status(state="failed", error="an old story", last_lines=["long ago"])
    code, status, _ = StandIn(tmp_path, "refuses").end()
    assert code == 1 and status["state"] == "failed" and status["error"] == "no such thing"
    assert "long ago" not in status["last_lines"] and "dimo: no such thing" in status["last_lines"]


def test_asked_before_training_began_is_no_failure(tmp_path):
    run = StandIn(tmp_path, "early").ready()
    run.process.terminate()
    code, status, _ = run.end()
    assert code == 75 and status == {}


def test_the_deaf_are_killed_after_the_grace_time_and_at_a_second_ctrl_c(tmp_path):
    run = StandIn(tmp_path, "deaf", grace=1).ready()
    run.process.terminate()
    code, status, _ = run.end()
    assert code == 1 and status["state"] == "failed" and "killed" in status["error"]
    other = tmp_path / "other"
    other.mkdir()
    run = StandIn(other, "deaf", grace=1000).ready()
    run.process.send_signal(signal.SIGINT)
    run.both_say("asked").process.send_signal(signal.SIGINT)
    assert run.end()[0] == 1


def test_kill_9_of_the_launcher_lets_the_workers_save_and_leaves_none(tmp_path):
    run = StandIn(tmp_path, "saves").ready()
    run.process.kill()
    code, status, _ = run.end()
    assert code == -9 and status["state"] == "preempted"


def test_only_what_a_notebook_left_is_waited_for_and_killed():
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleep) as other:
        others = psutil.Process().children(recursive=True)
        left = subprocess.Popen(sleep)
        launching.wait_for_children(others, 0.1)
        assert not psutil.pid_exists(left.pid) and other.poll() is None
        launching.wait_for_children(others, 1000)
        other.kill()


# ------------------------------------------------------------------ without processes


def test_one_plain_process_needs_no_launch():
    assert not needs_launch(load_config("smoke"))
    assert needs_launch(load_config("smoke", ["training.num_processes=2"]))
    assert needs_launch(load_config("smoke", ["training.engine=fsdp2"]))


def test_the_command_names_engine_processes_and_a_free_port(tmp_path):
    config = load_config("smoke", ["training.num_processes=2", "model.device=cpu", f"experiment.output_dir={tmp_path}"])
    words = launch_command(config)
    after = dict(zip(words, words[1:]))
    assert after["--num_processes"] == "2" and after["--main_process_port"] == "0"
    assert after["--log_dir"] == os.devnull  # torchrun would leave a folder in /tmp
    assert Path(after["--config_file"]).name == "ddp.yaml" and words[-1] == f"config={tmp_path}/launch.yaml"
    config = of_two_machines(tmp_path, 1, num_processes=16)
    words = launch_command(config)
    assert dict(zip(words, words[1:]))["--num_processes"] == "16" and "--main_process_port" not in words
    assert words[-1] == f"config={tmp_path}/run/launch-machine-1.yaml" and machine_of(config) == (1, 2)


def of_two_machines(folder, rank, **more):
    """The configuration on machine `rank`, with an engine file of its own."""
    file = folder / f"machine{rank}.yaml"
    given = {"distributed_type": "MULTI_GPU", "num_machines": 2, "num_processes": 2, "machine_rank": rank}
    given |= {"main_process_ip": "127.0.0.1", "main_process_port": 29501}
    file.write_text(yaml.safe_dump(given | more))
    out = f"experiment.output_dir={folder}/run"
    return load_config("smoke", [f"training.engine={file}", "model.device=cpu", out])


def test_files_of_several_machines_that_cannot_work_are_refused(tmp_path):
    for more, sentence in [
        ({"num_processes": 3}, r"is for 2 machines, which cannot share 3 process\(es\) evenly"),
        ({"main_process_ip": None}, "is for 2 machines and needs main_process_ip"),
    ]:
        with pytest.raises(DimoError, match=sentence):
            launch(of_two_machines(tmp_path, 0, **more))
    for text in ("- a", "a: [", "only words", "", "# nothing"):
        (tmp_path / "machine0.yaml").write_text(text)
        with pytest.raises(DimoError, match="must be a YAML file of accelerate's `key: value` lines"):
            launch(load_config("smoke", [f"training.engine={tmp_path}/machine0.yaml"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.engine=fsdp3", "neither a preset nor an existing YAML file"),
        ("training.engine=/nowhere.yaml", "neither a preset nor an existing YAML file"),
        ("training.num_processes=0", "training.num_processes must be at least 1"),
    ],
)
def test_refusals_come_before_anything_starts(override, sentence, tmp_path):
    with pytest.raises(DimoError, match=sentence):
        launch(load_config("smoke", [f"experiment.output_dir={tmp_path}/run", override]))
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(launching.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launching.torch.cuda, "device_count", lambda: 4)
    config = load_config("smoke", ["training.num_processes=8", f"experiment.output_dir={tmp_path}/run"])
    with pytest.raises(DimoError, match=r"num_processes is 8, but there are 1 machine\(s\) with 4 GPU"):
        launch(config)


def test_train_says_how_it_ended(tmp_path, monkeypatch):
    config = load_config("smoke", ["training.num_processes=2", f"experiment.output_dir={tmp_path}"])
    RunFolder(tmp_path).write_status(state="failed", error="the disk is full")
    for code, error, sentence in [(75, Preempted, "same command"), (1, DimoError, "the disk is full")]:
        monkeypatch.setattr("dimo.commands.train.launch", lambda config, code=code: code)
        with pytest.raises(error, match=sentence):
            train(config)


# ------------------------------------------------------------------ the whole chain, through papermill


def steps(out):
    try:
        return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []


ENDLESS = "training.max_train_steps=1000000"  # however late a signal comes, the run has not ended
ONE_KEPT = "experiment.keep_last=1"  # checkpoint, and so one in the explorer of the report


def few_steps_more(out):
    """The override with which a stopped run comes to its end soon: its folder says that no more were ever wanted."""
    at, file = max(steps(out)), out / "config.yaml"
    file.write_text(file.read_text().replace("max_train_steps: 1000000", f"max_train_steps: {at}"))
    return f"training.max_train_steps={at + 3}"


def pick(folder, level, first):
    """The process of a level: dimo run -> kernel -> accelerate launch -> worker."""
    named = {p.name()[:10]: p for p in living_in(folder)}
    accelerate = named["dimo.train"].parent()  # torchrun gives itself a name of its own
    if level == "dimo run":
        return psutil.Process(first)
    if level == "kernel":
        return named["ipykernel_"]
    return accelerate if level == "accelerate" else accelerate.children()[-1]


@pytest.mark.parametrize(
    ("command", "stopped_by"),
    [
        (
            ["run", "--only", "03_train"],  # test_notebooks executes the others
            [("SIGHUP", "dimo run"), ("SIGTERM", "kernel"), ("SIGKILL", "kernel"), ("SIGKILL", "dimo run")],
        ),
        (  # below the kernel everything is the same under `dimo train`, which starts sooner
            ["train"],
            [("SIGUSR1", "accelerate"), ("SIGUSR2", "worker"), ("SIGKILL", "worker"), ("SIGKILL", "accelerate")],
        ),
    ],
    ids=["run", "train"],
)
def test_two_processes_survive_signals_and_kills_at_every_level(tmp_path, command, stopped_by):
    out = tmp_path / "run"
    words = ["-m", "dimo.commands.cli", *command, "-c", "smoke", f"experiment.output_dir={out}", "--log_every", "1"]
    words += ["model.device=cpu", "experiment.save_every=4", "experiment.sample_every=99", "--num_processes", "2"]
    words += ["distill.batch_size_per_gpu=1", ONE_KEPT]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    for name, level in stopped_by:
        before = max(steps(out), default=0)
        with open(tmp_path / "printed.txt", "a+") as printed:
            process = python.start([*words, ENDLESS], cwd=tmp_path, env=env, stdout=printed, stderr=printed)
            resumed_log = (out / "launch.log").stat().st_size if (out / "launch.log").exists() else 0
            where = f"{name} to {level}"

            def trains(process=process, size=resumed_log, where=where):
                assert process.poll() is None, f"{where}: {(tmp_path / 'printed.txt').read_text()[-2000:]}"
                log = out / "launch.log"
                return log.exists() and "step " in log.read_bytes()[size:].decode()

            wait_until(trains)
            pick(tmp_path, level, process.pid).send_signal(getattr(signal, name))
            code = process.wait(LIMIT_S)
            wait_until(lambda: not living_in(tmp_path))  # no orphan
        status, at = RunFolder(out).status(), max(steps(out))
        assert before <= at, where
        if name != "SIGKILL":
            assert (code, status["state"]) == (75, "preempted"), where
        else:
            # whoever was not killed saves; where one of two workers is gone, the other cannot go on
            assert code != 0 and status["state"] == ("failed" if level == "worker" else "preempted"), (where, status)
            assert code == (-9 if level == "dimo run" else 75 if level == "accelerate" else 2), where
    # below `dimo train` once as typed, each process with a start of its own
    last, forks = [*words, few_steps_more(out)], command == ["run", "--only", "03_train"]
    done = python.run(last, capture_output=True, text=True, timeout=LIMIT_S, forks=forks)
    assert done.returncode == 0, done.stderr[-3000:]
    # each once, though five runs made them
    assert steps(out) == list(range(1, RunFolder(out).status()["max_steps"] + 1))
    assert RunFolder(out).status()["state"] == "finished"
    assert (out / "report.html").exists() == (command[0] == "run")


def test_two_machines_train_one_student_and_a_signal_to_one_stops_both(tmp_path, capsys):
    """Two launchers that know of each other only by address, as on two machines that share a disk."""
    out = tmp_path / "run"
    settings = ["-c", "smoke", "model.device=cpu", "distill.batch_size_per_gpu=2", f"experiment.output_dir={out}"]
    settings += ["experiment.log_every=1", "experiment.sample_every=1000000", "experiment.save_every=1000000"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}

    def start(last, *commands):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        machines = []
        for rank, command in zip((1, 0), commands):
            of_two_machines(tmp_path, rank, main_process_port=port)
            words = ["-m", "dimo.commands.cli", *command, *settings, last]
            words.append(f"training.engine={tmp_path}/machine{rank}.yaml")
            machines.append(python.start(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return machines

    def ended(machines):
        """What the machines said; if one failed, the other would wait for it for a quarter of an hour."""

        def codes():
            return [machine.poll() for machine in machines]

        wait_until(lambda: None not in codes() or any(code not in (None, 0, 75) for code in codes()))
        for machine in machines:
            if machine.poll() is None:
                machine.terminate()
        return [machine.communicate(timeout=LIMIT_S) for machine in machines]

    joining = ["run", "--only", "03_train"]
    machines = start(ENDLESS, joining, ["train"])
    wait_until(lambda: steps(out) or any(machine.poll() is not None for machine in machines))
    machines[0].terminate()
    said = ended(machines)
    assert [machine.returncode for machine in machines] == [75, 75], said
    assert "waiting for machine 0, which runs the notebooks" in said[0][0]
    (saved,), at = (out / "checkpoints").iterdir(), max(steps(out))
    assert saved.name == f"step-{at:08d}" and RunFolder(out).status()["state"] == "preempted"
    assert [f.name for f in sorted(saved.glob("rank-*"))] == ["rank-00000.pt", "rank-00001.pt"]
    last = few_steps_more(out)
    machines = start(last, ["train"], ["train"])
    said = ended(machines)
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert steps(out) == list(range(1, at + 4)) and RunFolder(out).status()["state"] == "finished"
    assert (out / "checkpoints/final/student.pt").exists() and not (out / "notebooks").exists()
    # each says what its own workers print, and rank 0 is machine 0's
    assert f"step {at + 3}/{at + 3}" in (out / "launch.log").read_text()
    assert f"step {at + 3}/{at + 3}" not in (out / "launch-machine-1.log").read_text()
    assert main([*joining, *settings, last, f"training.engine={tmp_path}/machine1.yaml"]) == 0
    assert "machine 1 of 2: nothing to train" in capsys.readouterr().out


def test_a_run_in_one_process_stops_and_continues_too(tmp_path):
    out = tmp_path / "run"
    words = ["-m", "dimo.commands.cli", "run", "-c", "smoke", "-p", "batch_size=1", ONE_KEPT]
    words += [f"experiment.output_dir={out}", "experiment.log_every=1", "model.device=cpu", "--only", "03_train"]
    process = python.start([*words, ENDLESS], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: steps(out) or process.poll() is not None)
    process.terminate()
    _, err = process.communicate(timeout=LIMIT_S)
    at = max(steps(out))
    assert process.returncode == 75 and "the same command continues" in err
    assert RunFolder(out).status()["state"] == "preempted"
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{at:08d}"]
    process = python.start([*words, few_steps_more(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()  # nobody reads what it prints
    assert process.wait(LIMIT_S) == 0 and steps(out) == list(range(1, at + 4))
