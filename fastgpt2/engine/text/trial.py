"""A process for what may never end: what it is asked, it does within limits of time and memory, or it ends.

Libraries in native code bound what they do by numbers of their own, if at all, and cannot be interrupted. The operating
system bounds a process. A line of its input is a question in JSON, a line of its output the answer. It ends when its
input is closed, and when it had nothing to do for a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import weakref
from collections.abc import Callable
from subprocess import DEVNULL, PIPE
from typing import Any

# A safeguard, as the operating system counts the seconds of a question. They may take longer where others compute too.
_MAX_WAIT_SECONDS = 60.0

# A process that waits for its next question takes 20 MB; a new one takes 100 ms to start.
_IDLE_SECONDS = 60.0


class TrialProcess:
    """A process that runs a module of this package, started when there is the first question. For one thread at a time.

    Args:
        module: the name of the module, whose `main` calls `answer_questions`.

    Attributes:
        first: a question that a new process gets before all others; None for none.
    """

    def __init__(self, module: str, first: Any = None) -> None:
        self._module, self.first = module, first
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: Any = None

    def ask(self, question: Any) -> Any:
        """Return the answer to a question; None if the process had to end instead."""
        line = json.dumps(question).encode() + b"\n"
        answer = self._ask(line)
        # A process that had nothing to do for a while may leave when there is something again.
        if not answer and self._end() == 0:
            answer = self._ask(line)
        return json.loads(answer) if answer else None

    def stop(self) -> None:
        """End the process; any thread may ask for it."""
        process = self._process
        if process is not None:
            process.kill()

    def _ask(self, line: bytes) -> bytes:
        """Send a line to the process, and return the line that it answers; b"" if it ends instead."""
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            self._process = self._start()
            # Not a method: with a reference to `self`, this object would live for ever.
            self._stop = weakref.finalize(self, _end, self._process)
            if self.first is not None:
                self._exchange(self._process, json.dumps(self.first).encode() + b"\n")
        return self._exchange(self._process, line)

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes], line: bytes) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line)
            process.stdin.flush()
        if not select.select([process.stdout], [], [], _MAX_WAIT_SECONDS)[0]:
            process.kill()
        return process.stdout.readline()

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: without it, a file in the current folder could take the place of a module of the same name. A session of
        # its own: the process that started it answers Ctrl-C in the terminal.
        command = [sys.executable, "-P", "-m", self._module]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        return subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment, start_new_session=True
        )

    def _end(self) -> int:
        """Return the status of the process, which has ended or is about to."""
        assert self._process is not None
        process, self._process = self._process, None
        self._stop.detach()
        return _end(process, wait_seconds=5.0)


def _end(process: subprocess.Popen[bytes], wait_seconds: float = 0.0) -> int:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        return process.wait(wait_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def answer_questions(answer: Callable[[Any], Any], seconds: int, idle_seconds: float = _IDLE_SECONDS) -> None:
    """Answer questions, as the process, until the parent ends.

    Args:
        seconds: the time that the process may compute for a question.
        idle_seconds: how long it waits for the next question before it ends.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # If the machine runs out of memory nevertheless, this process is the one to go.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("1000")
    while select.select([sys.stdin], [], [], idle_seconds)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
        sys.stdout.flush()


def limit_memory(megabytes: int) -> None:
    """Limit the memory of this process, where the system can."""
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
