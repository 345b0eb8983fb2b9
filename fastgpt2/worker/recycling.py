"""The memory of a worker's processes, and when a worker ends of itself so that a fresh one takes its place."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fastgpt2.plurals import counted

GROWTH_CHECK_SECONDS = 1.0
_STATUS = Path("/proc/self/status")
_MIB = 1 << 20

# Not more often than this: to find out what is shared, the kernel walks all mapped pages, which takes milliseconds for
# a large model.
MEMORY_SECONDS = 4.0


class Recycling:
    """A rule that says when a worker has done its share: after a number of jobs, or when it has grown too large.

    A memory leak, or a heap in shreds, then costs a restart instead of the machine's memory. Growth is looked for on
    Linux only: elsewhere the standard library knows no more than the peak.

    Args:
        max_jobs: end after this many jobs; None: no limit.
        max_growth: how many bytes private memory may grow by.
    """

    def __init__(self, max_jobs: int | None, max_growth: int) -> None:
        self.max_jobs = max_jobs
        self.max_growth = max_growth
        self._baseline: int | None = None
        self._next_check = 0.0
        self._reason: str | None = None

    def start(self) -> None:
        """Note what the process needs in any case. Call it when the model is loaded and warmed up."""
        self._baseline = private_memory()

    def due(self, jobs_taken: int, kv_bytes: int, now: float) -> str | None:
        """Return why the worker should claim no more jobs, finish those it has and end; None if it should go on.

        Cheap enough for every decode step: memory is looked at once a second. A reason, once given, stays.

        Args:
            jobs_taken: how many jobs have ended here, in whatever way, or still run.
            kv_bytes: how much of this process's private memory keys and values may have taken, which have limits of
                their own: kept prefixes, and those of running jobs unless they lie in memory shared with helpers.
            now: of `time.monotonic()`.
        """
        if self._reason is None and self.max_jobs is not None and jobs_taken >= self.max_jobs:
            self._reason = f"it has taken {counted(jobs_taken, 'job')}, and --max-jobs is {self.max_jobs}"
        elif self._reason is None:
            self._reason = self._check_growth(kv_bytes, now)
        return self._reason

    def _check_growth(self, kv_bytes: int, now: float) -> str | None:
        if self._baseline is None or now < self._next_check:
            return None
        self._next_check = now + GROWTH_CHECK_SECONDS
        memory = private_memory()
        if memory is None or (growth := memory - kv_bytes - self._baseline) <= self.max_growth:
            return None
        return (
            f"its own memory has grown by {growth / _MIB:.1f} MiB, keys and values apart, "
            f"and --max-growth is {self.max_growth / _MIB:.1f} MiB"
        )


class Memory:
    """The memory of a worker and its helper processes, not measured again within a few seconds.

    Args:
        helpers: returns the ids of the processes beside this one.
    """

    def __init__(self, helpers: Callable[[], Sequence[int]]) -> None:
        self._helpers = helpers
        self._known: tuple[int | None, int | None] = (None, None)
        self._measured_at: float | None = None

    def measure(self) -> tuple[int | None, int | None]:
        """Return the bytes in RAM that only one process maps, summed over all; and those that others map too.

        The latter are those of the process that has most of them. Both are None where the system does not say: not
        Linux, or a sandbox that imitates one.
        """
        now = time.monotonic()
        if self._measured_at is None or now - self._measured_at >= MEMORY_SECONDS:
            pids = ["self", *map(str, self._helpers())]
            found = [each for pid in pids if (each := private_and_shared(pid)) is not None]
            private, shared = zip(*found, strict=True) if found else ((), ())
            self._known = (sum(private), max(shared)) if found else (None, None)
            self._measured_at = now
        return self._known


def private_memory() -> int | None:
    """Return how many bytes of anonymous memory this process has: heap and stacks, in RAM or swapped out.

    No file and nothing shared is among it. None where the system does not say: not Linux, or a Linux before 4.5, or a
    sandbox that imitates one.
    """
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    # proc(5). What is swapped out would else pass for given back.
    sizes = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon:", "VmSwap:")))
    if "RssAnon" not in sizes:
        return None
    return sum(int(text.split()[0]) for text in sizes.values()) * 1024


def private_and_shared(pid: str) -> tuple[int, int] | None:
    """Return the private and the shared memory of one process in bytes, as proc(5) defines them; None if unknown."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        kinds = ("Clean", "Dirty", "Hugetlb")
        private, shared = (sum(sizes.get(f"{of}_{kind}", 0) for kind in kinds) for of in ("Private", "Shared"))
        return private, shared
    except (OSError, ValueError, IndexError):
        return None
