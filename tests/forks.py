"""A Python that starts at once: its processes are forked from one that has imported what a run imports, and no more.

`python.run(["-m", "dimo", ...])` and `python.start(["-c", code, ...])` stand for subprocess.run([sys.executable, ...])
and subprocess.Popen, whose interface they have as far as tests need it. The process is a real one, with descriptors,
environment, working directory, signal handlers and, if asked, a session of its own. Python processes that it starts are
forked from it in the same way, unless `forks` is False; psutil knows all of them by their module's name. What is read
while the interpreter or PyTorch starts (PYTHONIOENCODING, a closed stdout, an import that fails) needs an ordinary
process.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from json import dumps
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, CompletedProcess, Popen, TimeoutExpired

SERVER = Path(__file__).with_name("fork_server.py")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Process:
    """As subprocess.Popen: `words` are what follows `python`; `ignored` are signals that it ignores from the start."""

    def __init__(
        self, server, words, *, stdin=None, stdout=None, stderr=None, text=False, cwd=None, env=None,
        start_new_session=False, ignored=(), forks=True,
    ):  # fmt: skip
        self.args, self.returncode, self.text, self.opened = words, None, text, []
        self.stdin, reads = self._stream(0, stdin)
        self.stdout, writes = self._stream(1, stdout)
        self.stderr, complains = self._stream(2, writes if stderr == STDOUT else stderr)
        self.report, reporter = os.pipe()
        request = {
            "words": [os.fspath(word) for word in words], "cwd": os.fspath(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env), "session": start_new_session, "ignored": list(ignored),
            "forks": forks,
        }  # fmt: skip
        data = dumps(request).encode()
        socket.send_fds(server, [b"%8d" % len(data)], [reads, writes, complains, reporter])
        server.sendall(data)
        for number in [reporter, *self.opened]:
            os.close(number)
        self.pid = int(os.read(self.report, 8))

    def _stream(self, number, asked):
        """(file for the test or None, descriptor for the process) of its stdin, stdout or stderr."""
        if asked == PIPE:
            ends = os.pipe()
            given, own = ends if number == 0 else ends[::-1]
            self.opened.append(given)
            return open(own, ("r" if number else "w") + ("" if self.text else "b")), given
        if asked == DEVNULL:
            self.opened.append(os.open(os.devnull, os.O_RDWR))
            return None, self.opened[-1]
        return None, number if asked is None else asked if isinstance(asked, int) else asked.fileno()

    def poll(self):
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self.report], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self.report], [], [], timeout)[0]:
                raise TimeoutExpired(self.args, timeout)
            self.returncode = int(os.read(self.report, 8))
            os.close(self.report)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, input=None, timeout=None):
        """(stdout, stderr), each to its end or None for what is no pipe, after the process has ended."""
        until, files, read = None if timeout is None else time.monotonic() + timeout, [self.stdout, self.stderr], {}
        files = [file for file in files if file and not file.closed]
        threads = [threading.Thread(target=lambda f=f: read.update({f: f.read()}), daemon=True) for f in files]
        for thread in threads:
            thread.start()
        if self.stdin:
            with self.stdin:
                self.stdin.write(input or ("" if self.text else b""))
        self.wait(timeout)
        for thread, file in zip(threads, files):  # a child of the process may hold the other end
            thread.join(None if until is None else max(0, until - time.monotonic()))
            if thread.is_alive():
                raise TimeoutExpired(self.args, timeout)
            file.close()
        return read.get(self.stdout), read.get(self.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in (self.stdin, self.stdout, self.stderr):
            if file:
                file.close()
        self.wait()


class Python:
    """The server starts with the first process or by `begin`; conftest.py ends it after the last test."""

    def __init__(self):
        self.server = self.requests = None

    def begin(self):
        if self.server is None:
            self.requests, theirs = socket.socketpair()
            command, env = [sys.executable, str(SERVER), str(theirs.fileno())], os.environ | ENVIRONMENT
            # of the tests' descriptors it has this one, so that it holds none of their pipes open
            self.server = Popen(command, stdin=DEVNULL, env=env, pass_fds=[theirs.fileno()])
            theirs.close()

    def start(self, words, **more):
        self.begin()
        return Process(self.requests, words, **more)

    def run(self, words, *, input=None, capture_output=False, timeout=None, **more):
        """As `subprocess.run`: one that takes longer than `timeout` seconds is killed."""
        if capture_output:
            more |= {"stdout": PIPE, "stderr": PIPE}
        process = self.start(words, **more if input is None else more | {"stdin": PIPE})
        try:
            said = process.communicate(input, timeout)
        except TimeoutExpired:
            process.kill()
            raise
        return CompletedProcess(words, process.returncode, *said)

    def end(self):
        if self.server is not None:
            self.requests.close()
            self.server.wait()


python = Python()


def in_place_of_popen(words, **more):
    """In place of `subprocess.Popen` where what a module starts is this Python."""
    return python.start(words[1:], **more)


def start_kernel(words, env=None, cwd=None, stdin=None, stdout=None, stderr=None, **_):
    """In place of jupyter_client's `launch_kernel`."""
    files = {"stdin": DEVNULL if stdin is None else stdin, "stdout": stdout, "stderr": stderr}
    return python.start(words[1:], env=env, cwd=cwd, start_new_session=True, **files)
