"""The trial of a grammar: a process of its own compiles the grammar first, within limits of time and memory.

    python -m fastgpt2.engine.decoding.grammar_trial      started by `Trial`, which writes to its standard input

llguidance bounds what it does by numbers of its own, but for a few schemas: eight `multipleOf` take it hours, and six
hundred `pattern` gigabytes. The operating system bounds a process. A line of the input is a grammar as JSON, a line of
the output what llguidance says against that grammar, "" if nothing. The process ends when its input is closed, and when
it had nothing to do for a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import weakref
from subprocess import DEVNULL, PIPE
from typing import TYPE_CHECKING, Any

from fastgpt2.errors import BadRequest

if TYPE_CHECKING:
    from llguidance import LLParserLimits

# Twice what the largest schema takes that was found to be compiled at all, and a bit for the library itself.
MAX_MEGABYTES = 256
MAX_SECONDS = 2

# A safeguard, as the operating system counts the seconds above. They may take longer where others compute too.
_MAX_WAIT_SECONDS = 60.0

# A process that waits for its next grammar takes 20 MB; a new one takes 100 ms to start.
_IDLE_SECONDS = 60.0


def limits() -> LLParserLimits:
    """Return the limits within which llguidance compiles a grammar and follows a text in it.

    Its own limits are twice as high and more. These leave it about 10 ms a token and 30 MB a grammar. A schema of 4 MB,
    where `json_schema` has at most 64 KB, takes all of `initial_lexer_fuel`.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=500_000, step_lexer_fuel=100_000, max_lexer_states=25_000, verbose_errors=False
    )


class Trial:
    """The process that tries grammars, started when there is the first one. For one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: Any = None

    def run(self, name: str, source: str) -> str:
        """Return what llguidance says against a grammar, "" if nothing.

        Raises:
            BadRequest: the grammar took more time or memory than it may. The message has the `name` of its field.
        """
        line = json.dumps(source).encode() + b"\n"
        answer = self._ask(line)
        # A process that had nothing to do for a while may leave when there is something again.
        if not answer and self._end() == 0:
            answer = self._ask(line)
        if not answer:
            limit = f"{MAX_SECONDS} s or {MAX_MEGABYTES} MB to compile"
            raise BadRequest(f"{name} is too complex: it takes more than {limit}; simplify it")
        return str(json.loads(answer))

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
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], _MAX_WAIT_SECONDS)[0]:
            self._process.kill()
        return self._process.stdout.readline()

    @staticmethod
    def _start() -> subprocess.Popen[bytes]:
        # -P: without it, a file in the current folder could take the place of a module of the same name. A session of
        # its own: the process that started it answers Ctrl-C in the terminal.
        command = [sys.executable, "-P", "-m", "fastgpt2.engine.decoding.grammar_trial"]
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


def main() -> None:
    """Run as the process that tries grammars, until the parent ends."""
    import resource

    from llguidance import LLMatcher, LLTokenizer

    megabytes = (MAX_MEGABYTES + 64) << 20
    # What an operating system cannot limit is left to the other limit.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (megabytes, megabytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # If the machine runs out of memory nevertheless, this process is the one to go.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("1000")
    # Its tokens are the 256 bytes. More tokens would make nothing dearer but what llguidance's own limits bound.
    tokenizer = LLTokenizer("byte")
    while select.select([sys.stdin], [], [], _IDLE_SECONDS)[0]:
        line = sys.stdin.readline()
        if not line:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + 1 + MAX_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        matcher = LLMatcher(tokenizer, json.loads(line), log_level=0, limits=limits())
        matcher.compute_bitmask()
        sys.stdout.write(json.dumps(matcher.get_error()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
