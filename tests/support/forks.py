"""Runs of Python code, each in a process of its own with an environment of its own, without each starting anew.

A process that has loaded what takes long forks itself for each run. It loads nothing that looks at the environment
while it is loaded.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Self

# How a process id and an exit code are told.
NUMBER = struct.Struct("i")


class Run:
    """One run. It has the part of `subprocess.Popen` that tests use."""

    def __init__(self, forks: socket.socket, asked: Mapping[str, Any]) -> None:
        self._output: list[IO[str]] = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        self._control, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(forks, [b"."], [theirs.fileno(), *(file.fileno() for file in self._output)])
        self._control.sendall(json.dumps(asked).encode() + b"\n")
        self._pid = self._told()
        self.returncode: int | None = None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end. Returns what was written to standard output and standard error.

        Raises:
            TimeoutError: it still runs.
        """
        self._control.settimeout(timeout)
        self.returncode = self._told()
        self._control.close()
        written = []
        for file in self._output:
            with file:
                file.seek(0)
                written.append(file.read())
        return written[0], written[1]

    def _told(self) -> int:
        (number,) = NUMBER.unpack(self._control.recv(NUMBER.size, socket.MSG_WAITALL))
        return int(number)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)


class Forks:
    """The process that forks, with these modules loaded; those that are not installed are left out."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, __file__, *modules]
            self._process = subprocess.Popen(command, stdin=theirs.fileno(), env=environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, code: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Run:
        """Run the code as `python -c` would, with this environment and nothing else."""
        asked = {"code": code, "arguments": arguments, "folder": str(folder), "environment": environment}
        return Run(self._socket, asked)


def serve(requests: socket.socket) -> None:
    """Fork for each request until the tests close their end: a process that runs, and one that tells of its end."""
    while True:
        _, descriptors, _, _ = socket.recv_fds(requests, 1, 3)
        if not descriptors:
            return
        if os.fork() == 0:
            watch(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def watch(control: int, stdout: int, stderr: int) -> NoReturn:
    """Start the run, and tell its process id and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=control) as teller:
        with teller.makefile() as lines:
            asked = json.loads(lines.readline())
        pid = os.fork()
        if pid == 0:
            teller.close()
            run(asked, stdout, stderr)
        teller.sendall(NUMBER.pack(pid))
        _, status = os.waitpid(pid, 0)
        teller.sendall(NUMBER.pack(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def run(asked: Mapping[str, Any], stdout: int, stderr: int) -> NoReturn:
    """Become what was asked for."""
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (stdout, 1), (stderr, 2)):
        os.dup2(source, target)
        os.close(source)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv[:] = ["-c", *asked["arguments"]]
    status = 0
    try:
        exec(asked["code"], {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    for module in sys.argv[1:]:
        with suppress(ImportError):
            importlib.import_module(module)
    # Nobody waits for the processes that tell.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=os.dup(0)) as requests:
        serve(requests)
