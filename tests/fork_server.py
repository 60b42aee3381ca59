"""The process that those of forks.py are forked from: it imports, and does nothing else."""

import _posixsubprocess
import asyncio
import atexit
import concurrent.futures.process
import concurrent.futures.thread
import contextlib
import gc
import importlib
import itertools
import json
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
import warnings
import weakref

import numpy
import torch
from ipykernel import kernelapp
from traitlets.config import Application

IMPORTED = (  # a second or two each
    "dimo.__main__", "dimo.commands.cli", "dimo.commands.notebooks", "dimo.train.trainer", "dimo.evaluation.evaluate",
    "dimo.evaluation.worker", "dimo.views.sheets", "torch._dynamo", "torch.distributed.run",
    "accelerate.commands.launch", "transformers.models.auto.tokenization_auto", "papermill", "nbconvert",
    "transformers.tokenization_utils_tokenizers", "matplotlib.backends.backend_agg",
)  # fmt: skip
started = _posixsubprocess.fork_exec
reports = {}  # per process, where its exit code is written
parents = []  # streams that would write what they hold when they are collected


def serve(requests):
    signal.signal(signal.SIGCHLD, reap)
    while True:
        size, descriptors, *_ = socket.recv_fds(requests, 8, 4)
        if not size:  # the tests are over
            os._exit(0)
        request = json.loads(requests.recv(int(size), socket.MSG_WAITALL))
        *streams, report = descriptors
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # until it is known whose end it tells
        process = os.fork()
        if process == 0:
            become(request, streams, report)
        reports[process] = report
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        for number in streams:  # a pipe ends with the process
            os.close(number)


def reap(*_):
    """Report exit codes at once: `dimo run` waits until all that began with a notebook is gone, and a zombie is not."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with contextlib.suppress(BrokenPipeError), open(reports.pop(ended[0]), "wb") as report:
                report.write(b"%8d" % os.waitstatus_to_exitcode(ended[1]))


def become(request, streams, report=None, kept=()):
    """Be the process that was asked for as if Python had just started, to its end. It is known by its id as soon as it
    has its session and its signal handlers. Descriptors in `kept` stay open.
    """
    code = 1
    try:
        if request["session"]:
            os.setsid()
        handle_signals(request["ignored"])
        if report is not None:
            os.write(report, b"%8d" % os.getpid())
        open_streams(streams, kept)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ |= request["env"]
        importlib.reload(kernelapp)  # it reads whose kernel it is when it is imported
        numpy.random.seed()
        torch.seed()
        _posixsubprocess.fork_exec = subprocess._fork_exec = fork_exec if request["forks"] else started
        code = run(request["words"])
        code = leave(code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def fork_exec(words, executables, close_fds, kept, cwd, env, *streams_and_more):
    """In place of the function that `subprocess` and `multiprocessing` start processes with: Python is forked from this
    process, its parent, and so has imported what this one has.
    """
    words = [os.fsdecode(word) for word in words]
    if words[0] != sys.executable:
        return started(words, executables, close_fds, kept, cwd, env, *streams_and_more)
    reads, _, _, writes, _, complains, _, failure, _, session, *_ = streams_and_more
    pairs = [os.fsdecode(pair).partition("=") for pair in env or ()]
    request = {
        "words": words[1:], "cwd": cwd or os.getcwd(), "session": session, "forks": True,
        "env": dict(os.environ) if env is None else {name: value for name, _, value in pairs},
        "ignored": [n for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN],
    }  # fmt: skip
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    with warnings.catch_warnings(action="ignore"):  # of this process's other threads
        process = os.fork()
    if process == 0:
        forget_parent()
        streams = [number if given == -1 else given for number, given in enumerate((reads, writes, complains))]
        become(request, streams, kept=[number for number in kept if number != failure])
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return process


def forget_parent():
    """What the parent has yet to do at its end, and objects that would do something when they are collected."""
    gc.freeze()
    weakref.finalize._registry.clear()
    weakref.finalize._registered_with_atexit = False
    concurrent.futures.process._threads_wakeups.clear()
    concurrent.futures.thread._threads_queues.clear()
    if Application.initialized():  # JupyterLab, whose kernels are applications themselves
        type(Application.instance()).clear_instance()
    asyncio.events._set_running_loop(None)  # a kernel's
    asyncio.set_event_loop_policy(None)
    sys.excepthook, sys.displayhook = sys.__excepthook__, sys.__displayhook__
    atexit._clear()
    atexit.register(multiprocessing.util._exit_function)


def handle_signals(ignored):
    """Those of a fresh Python, whatever is ignored where the tests run, under nohup or in CI."""
    signal.set_wakeup_fd(-1)
    usual = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    for number in signal.valid_signals():
        if number in usual or callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def open_streams(streams, kept):
    parents.extend((sys.stdout, sys.stderr))
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
    start = 3
    for number in [*sorted(kept), 4096]:
        os.closerange(start, number)
        start = number + 1
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        buffering = 1 if name == "stderr" else -1  # by lines; stdout is so only in a terminal
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = open(number, "w" if number else "r", buffering, errors=errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def run(words):
    """`python -m module ...`, `python -c code ...` or `python script ...`; returns the exit code."""
    options = list(itertools.takewhile(lambda word: word[0] == "-" and word not in ("-m", "-c"), words))
    words = words[len(options) :]
    for stream in (sys.stdout, sys.stderr) if "-u" in options else ():
        stream.reconfigure(write_through=True)
    kind, words = (words[0], words[1:]) if words[0] in ("-m", "-c") else ("", words)
    sys.argv = ["-c", *words[1:]] if kind == "-c" else words
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(f"python {kind}" if kind == "-c" else os.path.basename(words[0]))  # psutil's `name`, of 15 letters
    own = "" if kind == "-c" else os.getcwd() if kind == "-m" else os.path.dirname(os.path.abspath(words[0]))
    sys.path.insert(0, own)  # before the folder of this file: scripts of tests import from it
    try:
        if kind == "-c":
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(words[0], "<string>", "exec"), vars(sys.modules["__main__"]))
        elif kind == "-m":
            if not hasattr(sys.modules.get(words[0]), "__path__"):
                sys.modules.pop(words[0], None)  # runpy warns of a module that is there already
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) % 256
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def leave(code):
    """What an interpreter does at its end, but for unloading its modules, which takes a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = 120
    if code == -signal.SIGINT:  # so that a shell sees why it ended
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the tests' to answer
    requests = socket.socket(fileno=int(sys.argv[1]))
    sys.modules["rfc3987_syntax"] = None  # as in conftest.py
    gc.disable()  # millions of objects, all of which stay
    for name in IMPORTED:
        importlib.import_module(name)
    gc.enable()
    assert threading.active_count() == 1, "a fork would lose the other threads"
    gc.collect()
    gc.freeze()
    serve(requests)
