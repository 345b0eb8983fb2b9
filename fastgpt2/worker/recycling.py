"""When a worker ends of itself, so that a fresh one takes its place: after so many jobs, or grown too large."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

CHECK_SECONDS = 1.0
_STATUS = Path("/proc/self/status")
_MIB = 1 << 20


class Recycling:
    """Says when a worker has done its share.

    A memory leak, or a heap in shreds, then costs a restart instead of the machine's memory. Growth is looked for on
    Linux only: elsewhere the standard library knows no more than the peak.

    Args:
        max_jobs: end after so many; None: no limit.
        max_growth: bytes that private memory may grow by.
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
        """Why the worker should take no more jobs, finish those it has and end: a sentence; None: it should go on.

        Cheap enough for every decode step: memory is looked at once a second. A reason, once given, stays.

        Args:
            jobs_taken: how many jobs have ended here, whichever way, or are still in hand.
            kv_bytes: how much of this process's private memory keys and values may have taken, which have limits of
                their own: kept prefixes, and those of jobs in hand unless they lie in memory shared with helpers.
            now: of `time.monotonic()`.
        """
        if self._reason is None:
            self._reason = self._too_many(jobs_taken) or self._too_large(kv_bytes, now)
        return self._reason

    def _too_many(self, jobs_taken: int) -> str | None:
        if self.max_jobs is None or jobs_taken < self.max_jobs:
            return None
        return f"it has taken {jobs_taken} jobs, and --max-jobs is {self.max_jobs}"

    def _too_large(self, kv_bytes: int, now: float) -> str | None:
        if self._baseline is None or now < self._next_check:
            return None
        self._next_check = now + CHECK_SECONDS
        memory = private_memory()
        if memory is None:
            return None
        growth = memory - kv_bytes - self._baseline
        if growth <= self.max_growth:
            return None
        return (
            f"its own memory has grown by {growth / _MIB:.1f} MiB, keys and values apart, "
            f"and --max-growth is {self.max_growth / _MIB:.1f} MiB"
        )


def private_memory() -> int | None:
    """Bytes of anonymous memory of this process, in RAM or swapped out: heap and stacks, no file, nothing shared.

    None where the system does not say: not Linux, or a Linux before 4.5, or a sandbox that imitates one.
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


# NOTE worker.memory: How much memory a worker's processes have of their own, and how much they share.

# The kernel walks all mapped pages to tell: milliseconds for a large model.
LOOK_SECONDS = 4.0


class Memory:
    """Looked at on demand, but not again within a few seconds.

    Args:
        helpers: tells the ids of the processes beside this one.
    """

    def __init__(self, helpers: Callable[[], Sequence[int]]) -> None:
        self._helpers = helpers
        self._known: tuple[int | None, int | None] = (None, None)
        self._looked_at: float | None = None

    def lately(self) -> tuple[int | None, int | None]:
        """Bytes in RAM that are mapped by one process only, of all of them; and by others too, of the one with most.

        None where the system does not say: not Linux, or a sandbox that imitates one.
        """
        now = time.monotonic()
        if self._looked_at is None or now - self._looked_at >= LOOK_SECONDS:
            pids = ["self", *map(str, self._helpers())]
            found = [each for pid in pids if (each := private_and_shared(pid)) is not None]
            private, shared = zip(*found, strict=True) if found else ((), ())
            self._known = (sum(private), max(shared)) if found else (None, None)
            self._looked_at = now
        return self._known


def private_and_shared(pid: str) -> tuple[int, int] | None:
    """Of one process, in bytes; see proc(5)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        sizes = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        return (
            sum(sizes.get(f"Private_{kind}", 0) for kind in ("Clean", "Dirty", "Hugetlb")),
            sum(sizes.get(f"Shared_{kind}", 0) for kind in ("Clean", "Dirty", "Hugetlb")),
        )
    except (OSError, ValueError, IndexError):
        return None
