"""Helpers: the processes beside the first one, how they are started and what they do.

    python -m fastgpt2.engine.network.helpers      started by `HelperProcesses`, which writes to its standard input

The first line of its input tells a helper what to map. It opens the packed weights and the state by the first
process's descriptors in /proc, maps them, and then carries out its share of every step. Each byte after the line wakes
it, should it sleep. It ends when the process that started it closes the pipe or dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from subprocess import DEVNULL, PIPE
from typing import TYPE_CHECKING, Any

from fastgpt2.engine.machine import hold_to_one_thread
from fastgpt2.engine.model.config import GPT2Config

if TYPE_CHECKING:
    from fastgpt2.engine.network.step import Barrier

# A helper that has nothing to do looks this long for a new step, then it sleeps.
SPIN_SECONDS = 0.003

# After a longer pause than this between two steps, helpers may sleep, or be about to; well below the time above.
WAKE_AFTER_SECONDS = 0.001

# How often a sleeping helper checks whether its parent still lives, should the pipe not tell.
_CHECK_PARENT_MS = 1000


class TeamBroken(Exception):
    """Another process of the team has ended; its share of this step is not done."""


class HelperProcesses:
    """Helpers that have been started; they end when this object is no longer held.

    They import what they need while this process does the same. Raises OSError if no process can be started.
    """

    def __init__(self, count: int) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        # Not a method: with a reference to `self`, this object would live for ever.
        self.stop = weakref.finalize(self, _stop, self._processes)
        command = [sys.executable, "-P", "-m", "fastgpt2.engine.network.helpers"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        for _ in range(count):
            # -P: without it, a file in the current folder could take the place of a module of the same name. A session
            # of its own: the first process answers Ctrl-C in the terminal.
            self._processes.append(
                subprocess.Popen(command, stdin=PIPE, stdout=DEVNULL, env=environment, start_new_session=True)
            )

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def send_order(self, order: dict[str, Any]) -> None:
        """Tell each helper what to map and which share is its own."""
        for rank, process in enumerate(self._processes, 1):
            assert process.stdin is not None
            # One that has ended is found while it is waited for.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps({**order, "rank": rank}).encode() + b"\n")
                process.stdin.flush()
            os.set_blocking(process.stdin.fileno(), False)

    def wake(self) -> None:
        """Have the helpers that sleep look for a new step."""
        for process in self._processes:
            assert process.stdin is not None
            # The pipe is full of bytes that a helper did not read as it was awake, or closed by one that has ended.
            with contextlib.suppress(OSError):
                os.write(process.stdin.fileno(), b"\0")

    def check(self) -> None:
        """Raise TeamBroken if one of the helpers has ended."""
        for process in self._processes:
            status = process.poll()
            if status is not None:
                raise TeamBroken(f"by signal {-status}" if status < 0 else f"with status {status}")

    def disown(self) -> None:
        """Leave the helpers to the process from which this one was forked."""
        self.stop.detach()
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
            process.returncode = 0  # not ours to wait for


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        # A helper holds nothing of its own, and may be in the midst of a step.
        process.kill()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        process.wait()
    processes.clear()


def main() -> None:
    """Run as a helper, until the parent ends."""
    if os.environ.get("FASTGPT2_LOG_FORMAT") == "json":  # what a defect here prints is read with the other events
        from fastgpt2.events import log_events

        log_events("helper")
    hold_to_one_thread()
    from fastgpt2.engine.kernels import machine_code, make_product
    from fastgpt2.engine.kernels.kernel import Kernel
    from fastgpt2.engine.model.packing import open_packed
    from fastgpt2.engine.model.weights import view_weights
    from fastgpt2.engine.network.arena import Arena
    from fastgpt2.engine.network.kv_cache import KVCache
    from fastgpt2.engine.network.step import Barrier
    from fastgpt2.engine.network.transformer import Shape, WeightSet, make_shards, state_specs

    order = json.loads(_first_line())
    machine_code.give(order["code"])
    parent, shape = order["parent"], Shape(**order["shape"])

    def check() -> None:
        if os.getppid() != parent:
            sys.exit(0)

    config = GPT2Config(**order["config"])
    sets = []
    for described in order["sets"]:
        packed = open_packed(_open_shared(described["weights"], os.O_RDONLY))
        product = make_product(described["product"])
        kernel = Kernel(product, None, described["exact_chunks"], described["compiled"])
        sets.append(WeightSet(packed, view_weights(packed.tensors, config), kernel))
    arena = Arena(state_specs(config, sets, shape), fd=_open_shared(order["state"], os.O_RDWR))
    share = order["rank"], shape.size
    barrier = Barrier(arena["control"], *share, check)
    shards = make_shards(config, sets, KVCache(config, shape.n_slots, arena), arena, share, barrier)
    for weight_set in sets:
        weight_set.packed.tensors.populate()
    barrier.join()
    while _await_step(barrier, check):
        step = barrier.receive()
        shards[step.weights].run(step)


def _first_line() -> bytes:
    """Read the standard input up to its first newline, and not a byte more: the rest is there to wake this process."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            sys.exit(0)
        line += byte
    return bytes(line)


def _open_shared(path: str, flags: int) -> int:
    """Open what the parent shares with its helpers. End if that is gone since the parent is, soon after its start."""
    try:
        return os.open(path, flags)
    except OSError:
        poll = select.poll()
        poll.register(sys.stdin, select.POLLIN)
        while poll.poll(_CHECK_PARENT_MS):
            if not os.read(sys.stdin.fileno(), 4096):
                sys.exit(0)
        raise


def _await_step(barrier: Barrier, check: Callable[[], None]) -> bool:
    """Wait for the next step: look for it for a moment, then sleep. Return False when there will be none."""
    poll = select.poll()
    poll.register(sys.stdin, select.POLLIN)
    until = time.monotonic() + SPIN_SECONDS
    while True:
        # The clock is read first: by the time it says so, a step that sends no byte has begun, and is found below.
        idle_too_long = time.monotonic() > until
        for _ in range(100):
            if barrier.has_begun():
                return True
        if not idle_too_long:
            continue
        if poll.poll(_CHECK_PARENT_MS) and not os.read(sys.stdin.fileno(), 4096):
            return False
        check()
        until = time.monotonic() + SPIN_SECONDS


if __name__ == "__main__":
    main()
