"""The processes beside the first one: how they are started, and what they do.

    python -m fastgpt2.engine.network.helpers      started by `HelperProcesses`, told by its standard input what to map

A helper maps the packed weights and the state, which it opens by way of the first process's descriptors in /proc, and
then carries out its share of every step.
It ends when the process that started it closes the pipe or dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastgpt2.engine.machine import hold_to_one_thread
from fastgpt2.engine.model.config import GPT2Config

if TYPE_CHECKING:
    from fastgpt2.engine.kernels.kernel import Kernel
    from fastgpt2.engine.model.packing import PackedFile
    from fastgpt2.engine.model.weights import Weights
    from fastgpt2.engine.network.arena import Arena, Spec
    from fastgpt2.engine.network.step import Step


# How often a sleeping helper looks whether its parent still lives, should the pipe not tell.
_LOOK_AFTER_PARENT_MS = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Of a network's state: sequences, the most tokens in a step, processes."""

    n_slots: int
    max_rows: int
    size: int


def state_specs(config: GPT2Config, weights: Sequence[Weights], shape: Shape) -> dict[str, Spec]:
    """The memory that the processes of a team share; buffers for each set of weights."""
    from fastgpt2.engine.network.kv_cache import KVCache
    from fastgpt2.engine.network.step import control_spec, encoded_size
    from fastgpt2.engine.network.transformer import activation_specs

    return {
        "control": control_spec(shape.size, encoded_size(shape.max_rows, shape.max_rows)),
        **{
            f"{by} {name}": spec
            for by, of in enumerate(weights)
            for name, spec in activation_specs(config, of, shape.max_rows).items()
        },
        **KVCache.specs(config, shape.n_slots),
    }


def buffers(arena: Arena, by: int) -> dict[str, Any]:
    """Those for one set of weights."""
    from fastgpt2.engine.network.transformer import BUFFERS

    return {name: arena[f"{by} {name}"] for name in BUFFERS}


class HelperProcesses:
    """Helpers that have been started, and import what they need while this process does the same.

    Ended when this object is no longer held.
    """

    def __init__(self, count: int) -> None:
        """
        Raises:
            OSError: no process can be started.
        """
        self._processes: list[subprocess.Popen[bytes]] = []
        # Not of `self`, which would live for ever then.
        self.stop = weakref.finalize(self, _stop, self._processes)
        for _ in range(count):
            self._processes.append(_start())

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def order(self, order: dict[str, Any]) -> None:
        """Tell each of them what to map and which share is its own."""
        for rank, process in enumerate(self._processes, 1):
            assert process.stdin is not None
            # One that has ended is found out while waiting for it.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps({**order, "rank": rank}).encode() + b"\n")
                process.stdin.flush()
            os.set_blocking(process.stdin.fileno(), False)

    def wake(self) -> None:
        """Have those that sleep look for a new step."""
        for process in self._processes:
            assert process.stdin is not None
            # Full of bytes that one that was awake has not read, or closed by one that has ended.
            with contextlib.suppress(OSError):
                os.write(process.stdin.fileno(), b"\0")

    def ended(self) -> str | None:
        """How one of them ended, None while all live."""
        for process in self._processes:
            status = process.poll()
            if status is not None:
                return f"by signal {-status}" if status < 0 else f"with status {status}"
        return None

    def forget(self) -> None:
        """They are those of another process, from which this one was forked."""
        self.stop.detach()
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
            process.returncode = 0  # not ours to wait for


class Helpers:
    """The helpers of one network, seen from the first process."""

    def __init__(
        self,
        processes: HelperProcesses,
        config: GPT2Config,
        sets: Sequence[tuple[PackedFile, Kernel]],
        arena: Arena,
        shape: Shape,
    ) -> None:
        from fastgpt2.engine.network.step import Meeting

        control = arena["control"]
        control[:] = 0
        self.processes = processes
        self.meeting = Meeting(control, 0, shape.size, self._check)
        self.meeting.join()
        # By way of /proc, whatever was opened before the helpers were started, or after.
        files = f"/proc/{os.getpid()}/fd"
        processes.order(
            {
                "config": dataclasses.asdict(config),
                "state": f"{files}/{arena.fd}",
                "sets": [
                    {
                        "weights": f"{files}/{packed.fd}",
                        "product": kernel.product.name,
                        "chunkings": kernel.exact_chunks,
                    }
                    for packed, kernel in sets
                ],
                "shape": dataclasses.asdict(shape),
                "parent": os.getpid(),
            }
        )

    @property
    def complete(self) -> bool:
        """Whether all have joined."""
        return self.meeting.complete

    def begin(self, step: Step) -> None:
        """Start a step in every helper."""
        from fastgpt2.engine.network.step import WAKE_AFTER_SECONDS

        # They have been idle since this process came to the last meeting, or later.
        may_sleep = time.monotonic() - self.meeting.arrived_at > WAKE_AFTER_SECONDS
        self.meeting.begin(step.encode())
        if may_sleep:
            self.processes.wake()

    def _check(self) -> None:
        from fastgpt2.engine.network.step import TeamBroken

        how = self.processes.ended()
        if how is not None:
            raise TeamBroken(how)


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -P: else a file of the current folder could stand in for a module of the same name.
        [sys.executable, "-P", "-m", "fastgpt2.engine.network.helpers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        # Ctrl-C in the terminal is the first process's to answer.
        start_new_session=True,
    )


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        # They hold nothing of their own, and may be in the midst of a step.
        process.kill()
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        process.wait()
    processes.clear()


def main() -> None:
    hold_to_one_thread()
    from fastgpt2.engine.kernels import make_product
    from fastgpt2.engine.kernels.kernel import Kernel
    from fastgpt2.engine.model.packing import open_packed
    from fastgpt2.engine.model.weights import view_weights
    from fastgpt2.engine.network.arena import Arena
    from fastgpt2.engine.network.kv_cache import KVCache
    from fastgpt2.engine.network.step import Meeting, Step
    from fastgpt2.engine.network.transformer import Shard

    order = json.loads(_first_line())
    parent, shape = order["parent"], Shape(**order["shape"])

    def check() -> None:
        if os.getppid() != parent:
            sys.exit(0)

    fields = order["config"]
    config = GPT2Config(**{**fields, "eos_token_ids": tuple(fields["eos_token_ids"])})
    sets = order["sets"]
    packed = [open_packed(os.open(of["weights"], os.O_RDONLY)) for of in sets]
    weights = [view_weights(of.tensors, config) for of in packed]
    arena = Arena(state_specs(config, weights, shape), fd=os.open(order["state"], os.O_RDWR))
    kernels = [Kernel(make_product(of["product"]), None, of["chunkings"]) for of in sets]
    share = order["rank"], shape.size
    meeting = Meeting(arena["control"], *share, check)
    cache = KVCache(config, shape.n_slots, arena)
    shards = [
        Shard(config, of, cache, buffers(arena, by), kernel, share, meeting.wait)
        for by, (of, kernel) in enumerate(zip(weights, kernels, strict=True))
    ]
    for of in packed:
        of.touch()
    meeting.join()
    while _await_step(meeting, check):
        step = Step.decode(meeting.take_up())
        shards[step.by].run(step)


def _first_line() -> bytes:
    """What stands before the first newline of the standard input, and not a byte more: the rest is to wake."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            sys.exit(0)
        line += byte
    return bytes(line)


def _await_step(meeting: Any, check: Any) -> bool:
    """Wait for the next step: looking for a moment, then asleep. False when there will be none."""
    from fastgpt2.engine.network.step import SPIN_SECONDS

    poll = select.poll()
    poll.register(sys.stdin, select.POLLIN)
    until = time.monotonic() + SPIN_SECONDS
    while True:
        # The clock first: a step begun so long before this moment that nobody sends a byte is seen below.
        idle_too_long = time.monotonic() > until
        for _ in range(100):
            if meeting.begun():
                return True
        if not idle_too_long:
            continue
        if poll.poll(_LOOK_AFTER_PARENT_MS) and not os.read(sys.stdin.fileno(), 4096):
            return False
        check()
        until = time.monotonic() + SPIN_SECONDS


if __name__ == "__main__":
    main()
