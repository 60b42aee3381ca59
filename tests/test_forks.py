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
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def both(words, **more):
    """(exit code, stdout, last line of stderr) of a forked process and of one that is started as in a terminal."""
    found, started = [], {"preexec_fn": as_in_a_terminal}  # tests in the background hand an ignored SIGINT on
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
