"""Python processes that start warm: forked from one that has imported torch and vitfn, which takes seconds.

`warm.run` and `warm.start` are subprocess.run and subprocess.Popen of [sys.executable, *arguments] for the tests: a
process of its own with its own folder, variables, signals, limits and exit. What it cannot show is what happens while
torch is imported, and another hash seed: the documents' snippets, torchrun's processes and test_train.py start cold.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

HERE = Path(__file__)
# What the commands import before they do anything, here once.
IMPORTS = ("torch", "vitfn.train", "vitfn.evaluate", "vitfn.convert", "sklearn.datasets", "torch.distributed.run",
           "torch.distributed.tensor", "torch.distributed.checkpoint", "torch._inductor.compile_fx")  # fmt: skip


class Process:
    """What the tests need of subprocess.Popen: `wait` ends with returncode, stdout and stderr set."""

    def __init__(self, arguments: Iterable, cwd, env: Mapping[str, str], start_new_session: bool):
        self.args, self.returncode, self.stdout, self.stderr = list(map(str, arguments)), None, "", ""
        self._streams = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115 (wait closes them)
        self._socket, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(_server(), [b"."], [file.fileno() for file in (theirs, *self._streams)])
        self._answers = self._socket.makefile("rw")
        request = {"arguments": self.args, "cwd": str(cwd), "env": dict(env), "session": start_new_session}
        print(json.dumps(request), file=self._answers, flush=True)
        self.pid = int(self._answers.readline())

    def wait(self, timeout: float) -> int:
        """The exit code, minus a signal's number; who has not ended by then is killed, and TimeoutExpired raised."""
        in_time, _, _ = select.select([self._socket], [], [], timeout)
        if not in_time:
            os.kill(self.pid, signal.SIGKILL)
        with self._socket, self._answers:
            self.returncode = int(self._answers.readline())
        self.stdout, self.stderr = map(_text, self._streams)
        if not in_time:
            raise subprocess.TimeoutExpired(self.args, timeout, self.stdout, self.stderr)
        return self.returncode


def _text(stream: BinaryIO) -> str:
    with stream:
        stream.seek(0)
        return stream.read().decode()


def start(arguments: Iterable, cwd=".", env=None, start_new_session: bool = False) -> Process:
    """A process that runs."""
    return Process(arguments, cwd, os.environ if env is None else env, start_new_session)


def run(arguments: Iterable, cwd=".", env=None, timeout: float = 300, start_new_session: bool = False) -> Process:
    """A process that has ended."""
    process = start(arguments, cwd, env, start_new_session)
    process.wait(timeout)
    return process


@functools.cache
def _server() -> socket.socket:
    """Starts the process that is forked; it ends when this one does, whose end of the socket then closes."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, str(HERE), str(theirs.fileno())]
        path = os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        server = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=os.environ | {"PYTHONPATH": path}, **nothing)
    atexit.register(server.wait)
    atexit.register(ours.close)  # before it
    return ours


# --- the process that is forked


def _serve(requests: socket.socket) -> list[str]:
    """Forks for each request, and returns in the process that is to run one, with the arguments of its command."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that keep
    while True:
        _, descriptors, *_ = socket.recv_fds(requests, 1, 3)
        if not descriptors:
            os._exit(0)
        if not os.fork():
            requests.close()
            return _keep(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _keep(answers: int, *streams: int) -> list[str]:
    """Forks once more, to tell who asked what became of the process: as its parent alone can."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=answers) as connection, connection.makefile("rw") as lines:
        request = json.loads(lines.readline())
        if child := os.fork():
            print(child, file=lines, flush=True)
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), file=lines, flush=True)
            os._exit(0)
    for target, stream in enumerate(streams, 1):
        os.dup2(stream, target)
        os.close(stream)
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    return request["arguments"]


def _become(option: str, *rest: str) -> None:
    """What python does with its arguments: -c CODE, -m MODULE or SCRIPT, and those of the program."""
    paths = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    if option == "-c":
        code, *argv = rest
        sys.argv, sys.path[:1] = [option, *argv], ["", *paths]
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
    elif option == "-m":
        module, *argv = rest
        sys.argv, sys.path[:1] = [option, *argv], [os.getcwd(), *paths]
        sys.modules.pop(module, None)  # else runpy warns
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:1] = [option, *rest], [str(Path(option).resolve().parent), *paths]
        runpy.run_path(option, run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTS:
        with contextlib.suppress(ImportError):
            __import__(name)
    gc.freeze()  # so that a fork's collections and its end leave what was imported alone
    _become(*_serve(socket.socket(fileno=int(sys.argv[1]))))
