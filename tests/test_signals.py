"""SIGTERM, Ctrl-C, crashes, in real processes: the step is finished and saved, and the folder says what happened."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from forks import python

from dimo.config import load_config
from dimo.run import signals as signals_module
from dimo.run.checkpoints import Checkpoints
from dimo.run.folder import RunFolder
from dimo.run.signals import SAME_KEYPRESS_S, STOPPING, Preempted, Signals
from dimo.train.trainer import Trainer

SETTINGS = ["model.device=cpu", "distill.batch_size_per_gpu=2", "distill.aux_steps=1", "experiment.log_every=1"]

LIMIT_S = 900  # for what never comes; a busy machine is no failure

# the steps of a run that is watched: each says that it was taken
WATCHED = """
import sys, time
from dimo.train import __main__ as command
from dimo.train.trainer import Trainer

def step(trainer, index, inner=Trainer.step):
    print("step", index, flush=True)
    {inside}
    return inner(trainer, index)

Trainer.step = step
sys.exit(command.main(sys.argv[1:]))
"""


def start(folder, inside="pass", steps=200, saves=1000, ignored=(), **environment):
    words = ["config=smoke", *SETTINGS, f"experiment.output_dir={folder}", f"training.max_train_steps={steps}"]
    words += [f"experiment.save_every={saves}"]
    return python.start(
        ["-c", WATCHED.format(inside=inside), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment, ignored=ignored,
    )  # fmt: skip


def start_two(folder, inside="pass", saves=1000):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": "2"}
    return [start(folder, inside, saves=saves, RANK=str(r), LOCAL_RANK=str(r), **address) for r in range(2)]


def wait_for(process, line):
    while (got := process.stdout.readline().strip()) != line:
        assert got or process.poll() is None, process.stderr.read()


def steps_saved(folder):
    whole, damaged = Checkpoints(Path(folder, "checkpoints")).newest()
    assert not damaged
    return int(whole.name[5:])


def test_sigterm_finishes_the_step_saves_and_the_same_command_continues(tmp_path):
    process = start(tmp_path)
    wait_for(process, "step 3")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 75, errors
    status = RunFolder(tmp_path).status()
    done = steps_saved(tmp_path)
    assert status["state"] == "preempted" and status["error"] is None and status["step"] == done >= 4
    assert f"dimo: SIGTERM after step {done}, which is saved; the same command continues" in errors
    assert [row["step"] for row in RunFolder(tmp_path).metrics()] == list(range(1, done + 1))
    again = start(tmp_path)
    wait_for(again, f"step {done}")
    again.send_signal(signal.SIGHUP)  # its terminal was closed
    again.communicate()
    assert again.returncode == 75 and RunFolder(tmp_path).status()["state"] == "preempted"
    assert RunFolder(tmp_path).events()[0]["event"] == "resumed"


def test_a_signal_to_one_of_two_ranks_stops_both_after_the_same_step(tmp_path):
    ranks = start_two(tmp_path)
    wait_for(ranks[1], "step 3")
    ranks[1].send_signal(signal.SIGUSR1)  # as `sbatch --signal=USR1@60` does
    said = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [75, 75], said
    done = steps_saved(tmp_path)
    assert RunFolder(tmp_path).status()["state"] == "preempted" and RunFolder(tmp_path).status()["step"] == done
    assert [f"SIGUSR1 after step {done}" in errors for _, errors in said] == [True, False]  # told once
    files = sorted(f.name for f in (tmp_path / "checkpoints" / f"step-{done:08d}").iterdir())
    assert [f for f in files if f.startswith("rank-")] == ["rank-00000.pt", "rank-00001.pt"]


def test_nohup_is_respected(tmp_path):
    """SIGHUP was ignored before; what stops the run is what comes after it."""
    process = start(tmp_path, ignored=[signal.SIGHUP])
    wait_for(process, "step 1")
    process.send_signal(signal.SIGHUP)
    wait_for(process, "step 4")
    process.send_signal(signal.SIGUSR2)
    _, errors = process.communicate()
    assert process.returncode == 75 and f"SIGUSR2 after step {steps_saved(tmp_path)}" in errors, errors


@pytest.mark.parametrize("number", STOPPING)
def test_what_asks_to_stop_is_noted_unless_it_was_ignored_before(number):
    before = signal.getsignal(number)
    try:
        signal.signal(number, signal.SIG_DFL)
        with Signals() as signals:
            signal.raise_signal(number)
        assert signals.received == signal.Signals(number).name and signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        with Signals() as signals:
            signal.raise_signal(number)
        # what a shell starts with `&` has Ctrl-C ignored, and is stopped by `kill -INT` all the same
        assert signals.received == ("SIGINT" if number == signal.SIGINT else None)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_launcher_s_copy_of_a_ctrl_c_is_no_second_one(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(signals_module.time, "monotonic", lambda: now[0])
    with Signals() as signals:
        for at in (5.0, 5.0 + SAME_KEYPRESS_S / 2):
            now[0] = at
            signal.raise_signal(signal.SIGINT)
        now[0] += SAME_KEYPRESS_S
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt, match="at once"):
            signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    process = start(tmp_path, inside="time.sleep(10_000)")
    wait_for(process, "step 0")
    process.send_signal(signal.SIGINT)
    while process.poll() is None:  # how often is no matter: the copies of the first second are nothing new
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
    process.communicate()
    status = RunFolder(tmp_path).status()
    assert status["state"] == "preempted" and "at once" in status["error"] and not RunFolder(tmp_path).is_held()


SLOW_START = """
import sys, time
from dimo.train import __main__ as command, trainer

def load(*arguments, **more):
    print("loading", flush=True)
    time.sleep(1000)

trainer.load_ursa = load
{main}
"""
MAINS = {
    "a worker": "sys.exit(command.main(sys.argv[1:]))",
    "dimo": "from dimo.commands import cli; sys.exit(cli.main(['train', '-c', *sys.argv[1:]]))",
}


@pytest.mark.parametrize("main, number", [("dimo", "SIGTERM"), ("dimo", "SIGINT"), ("a worker", "SIGUSR1")])
def test_a_signal_while_the_teacher_is_loaded_ends_it_as_a_later_one_would(tmp_path, main, number):
    words = ["smoke" if main == "dimo" else "config=smoke", *SETTINGS, f"experiment.output_dir={tmp_path}"]
    code = SLOW_START.format(main=MAINS[main])
    process = python.start(["-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(process, "loading")
    process.send_signal(getattr(signal, number))
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75
    assert errors == f"dimo: {number} before the first step; the same command continues\n"


def test_a_crash_says_failed_with_the_error_and_the_last_lines(tmp_path):
    process = start(tmp_path, inside="1 / 0 if index == 2 else None")
    _, errors = process.communicate()
    assert process.returncode == 1 and "ZeroDivisionError" in errors
    status = RunFolder(tmp_path).status()
    assert status["state"] == "failed" and status["error"] == "ZeroDivisionError: division by zero"
    assert status["last_lines"][-1].endswith("failed: ZeroDivisionError: division by zero")
    assert any("Traceback" in line for line in status["last_lines"]) and len(status["last_lines"]) <= 20


def test_the_rank_that_failed_is_heard_and_the_others_end(tmp_path):
    ranks = start_two(tmp_path, "1 / 0 if index == 2 and trainer.accelerator.process_index == 1 else None")
    said = [rank.communicate(timeout=LIMIT_S) for rank in ranks]
    assert all(rank.returncode == 1 for rank in ranks), said
    assert RunFolder(tmp_path).status()["error"] == "rank 1: ZeroDivisionError: division by zero"


RANK_1_CANNOT_WRITE = """
    if index == 0 and trainer.accelerator.process_index == 1:
        from dimo.run import checkpoints
        def refuse(*_):
            raise OSError(28, "No space left on device")
        checkpoints.sync = refuse
"""


def test_a_rank_that_cannot_write_its_file_stops_all_with_the_reason(tmp_path):
    ranks = start_two(tmp_path, RANK_1_CANNOT_WRITE.strip(), saves=3)
    said = [rank.communicate(timeout=LIMIT_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    error = RunFolder(tmp_path).status()["error"]
    assert error.startswith("rank 1: checkpoint of step 3 could not be written") and "No space left" in error
    assert list((tmp_path / "checkpoints").iterdir()) == []


NO_SPACE = """
    if index == 5:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""


def test_a_full_disk_stops_the_run_with_a_sentence_and_the_last_good_checkpoint(tmp_path):
    def run(inside):
        words = ["config=smoke", *SETTINGS, f"experiment.output_dir={tmp_path}", "experiment.save_every=4"]
        words += ["training.max_train_steps=12"]
        return python.run(["-c", WATCHED.format(inside=inside), *words], capture_output=True, text=True)

    done = run(NO_SPACE.strip())
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "dimo: checkpoint of step 8 could not be written to " in done.stderr
    status = RunFolder(tmp_path).status()
    assert status["state"] == "failed" and "step-00000004 is kept" in status["error"]
    assert steps_saved(tmp_path) == 4
    assert run("pass").returncode == 0 and steps_saved(tmp_path) == 12


def test_old_handlers_come_back_and_other_threads_are_left_alone():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == "SIGTERM"
        inside = signal.getsignal(signal.SIGTERM)
        seen = []
        thread = threading.Thread(
            target=lambda: [seen.append(signal.getsignal(signal.SIGTERM)) for _ in [Signals().__enter__()]]
        )
        thread.start()
        thread.join()
        assert seen == [inside]
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_an_error_of_the_writing_thread_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    from dimo.errors import DimoError
    from dimo.run import checkpoints

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", refuse)
    settings = [*SETTINGS, f"experiment.output_dir={tmp_path}", "experiment.save_every=2"]
    trainer, taken = Trainer(load_config("smoke", settings)), []
    inner = trainer.step

    def slow(index):
        taken.append(index)
        for writing in [t for t in threading.enumerate() if t.name.startswith("checkpoint-")]:
            writing.join()
        return inner(index)

    trainer.step = slow
    with pytest.raises(DimoError, match="checkpoint of step 2 could not be written.*No space left.*no older one"):
        trainer.train(progress=False)
    assert taken == [0, 1, 2]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


CELL = """
from dimo.config import load_config
from dimo.train.trainer import Trainer
print("ready", flush=True)
Trainer(load_config("smoke", {settings!r})).train(progress=False)
"""


def wait_until(true, seconds=LIMIT_S):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def answer(client, request):
    """The reply to this request: a slow kernel may still owe others."""
    while (message := client.get_shell_msg(timeout=LIMIT_S))["parent_header"]["msg_id"] != request:
        pass
    return message["content"]


def test_a_kernel_is_interrupted_and_goes_on(tmp_path):
    from jupyter_client.manager import start_new_kernel

    cell = CELL.format(settings=[*SETTINGS, f"experiment.output_dir={tmp_path}", "training.max_train_steps=200"])
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        request = client.execute(cell, stop_on_error=False)  # else the next one, if it comes soon, is aborted with it
        wait_until(lambda: RunFolder(tmp_path).status().get("step", 0) >= 2)
        manager.interrupt_kernel()
        reply = answer(client, request)
        assert reply["status"] == "error" and reply["ename"] == "Preempted", reply
        assert RunFolder(tmp_path).status()["state"] == "preempted" and steps_saved(tmp_path) >= 2
        request = client.execute(f"open({str(tmp_path / 'begun')!r}, 'w'); import time; time.sleep(60)")
        wait_until((tmp_path / "begun").exists)
        manager.interrupt_kernel()
        assert answer(client, request)["ename"] == "KeyboardInterrupt"  # the kernel's own handler is back
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert issubclass(Preempted, KeyboardInterrupt)
