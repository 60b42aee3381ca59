"""A forked process is for its test what a started one would be."""

import os
import signal
import subprocess
import sys

import pytest
from forks import python

LOOK = """
import os, signal, sys
print(__name__, sys.argv, sys.path[0], os.getcwd(), os.environ.get("GIVEN"), os.environ.get("HOME"))
print([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD)])
print(sorted(os.listdir("/proc/self/fd")), sys.stdout.isatty(), sys.stderr.errors, sys.stdin.read())
"""


def as_in_a_terminal():
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def both(words, **more):
    """(exit code, stdout, last line of stderr) of a forked process and of one that is started as in a terminal."""
    found, started = [], {"preexec_fn": as_in_a_terminal}  # tests in the background hand ignored signals on
    for run, prefix, how in ((python.run, [], {}), (subprocess.run, [sys.executable], started)):
        done = run([*prefix, *words], capture_output=True, text=True, **how, **more)
        found.append((done.returncode, done.stdout, done.stderr.splitlines()[-1:]))
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="Linux has /proc")
def test_it_sees_what_a_started_one_sees(tmp_path):
    forked, started = both(["-c", LOOK, "a b"], input="said", cwd=tmp_path, env=os.environ | {"GIVEN": "1"})
    assert forked == started and forked[0] == 0


def test_no_two_draw_the_same():
    code = "import random, torch, numpy; print(random.random(), torch.rand(1).item(), numpy.random.rand())"
    one, other = (python.run(["-c", code], capture_output=True, text=True).stdout.split() for _ in range(2))
    assert len(one) == 3 and not set(one) & set(other)


@pytest.mark.parametrize(
    "code",
    [
        "", "import sys; sys.exit(3)", "import sys; sys.exit('no')", "import sys; sys.exit(None)", "1 / 0",
        "raise KeyboardInterrupt", "import os; os._exit(9)", "import os; os.kill(os.getpid(), 9)", "exit(-1)",
        "import atexit; atexit.register(print, 'last'); print('first', end='')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
    ],
)  # fmt: skip
def test_it_ends_as_a_started_one_ends(code):
    forked, started = both(["-c", code])
    assert forked == started


def test_modules_and_scripts_and_their_folders(tmp_path):
    (tmp_path / "other.py").write_text("SAID = 'here'")
    (tmp_path / "a.py").write_text("import sys, other; print(__name__, other.SAID, sys.argv[1:], __file__)")
    for words, where in ((["-m", "a", "x"], tmp_path), ([str(tmp_path / "a.py"), "x"], "/")):
        forked, started = both(words, cwd=where)
        assert forked == started and forked[1].startswith("__main__ here ['x']")


def test_signals_sessions_and_descriptors(tmp_path):
    code = "import signal, sys; print('ready', flush=True); print('no', file=sys.stderr); signal.pause()"
    more = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "ignored": [signal.SIGHUP]}
    with python.start(["-c", code], start_new_session=True, **more) as process:
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "no\n"]
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        assert process.poll() is None
        process.terminate()
        assert process.wait() == -signal.SIGTERM == process.poll()
    with pytest.raises(subprocess.TimeoutExpired):
        python.run(["-c", code], capture_output=True, timeout=0.2)


STARTS = """
import atexit, os, signal, subprocess, sys, tempfile, threading
import psutil
own = tempfile.TemporaryDirectory()
atexit.register(print, "the parent's end", flush=True)
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
stays, _ = os.pipe()
os.set_inheritable(stays, True)
code = "import atexit, multiprocessing, os, signal, sys; atexit.register(print, 'its own end')\\n"
code += "print(sys.argv, os.getcwd(), os.getsid(0) == os.getpid(), os.environ.get('GIVEN'), sys.stdin.read())\\n"
code += "print([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)])\\n"
code += f"print(os.path.exists('/proc/self/fd/{stays}'), os.getppid() == {os.getpid()})\\n"
code += "print('no', file=sys.stderr); sys.exit(3)"
more = {"capture_output": True, "text": True, "cwd": "/", "env": os.environ | {"GIVEN": "1"}, "input": "said"}
for how in ({"pass_fds": [stays]}, {"start_new_session": True}):
    done = subprocess.run([sys.executable, "-u", "-c", code, "a b"], **more, **how)
    print(done.returncode, done.stdout, done.stderr)
killed = subprocess.Popen([sys.executable, "-c", "import signal; print('here', flush=True); signal.pause()"], stdout=-1)
killed.stdout.readline(), killed.terminate()
print(killed.wait(), subprocess.run(["sh", "-c", "echo other programs are started"], capture_output=True))
print(os.path.exists(own.name))
"""


def test_its_own_processes_are_forked_and_are_what_started_ones_would_be(tmp_path):
    (tmp_path / "starts.py").write_text(STARTS)
    found = [
        python.run([tmp_path / "starts.py"], capture_output=True, text=True, forks=forks) for forks in (True, False)
    ]
    assert found[0].stderr == found[1].stderr == "" and found[0].stdout == found[1].stdout
    assert found[0].stdout.count("its own end") == 2 and found[0].stdout.count("the parent's end") == 1


POOL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

if __name__ == "__main__":
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        print(list(pool.map(abs, range(-3, 0))))
"""


def test_a_pool_of_processes_is_forked_too(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    done = python.run([tmp_path / "pool.py"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[3, 2, 1]\n", "")
