"""The machine under the engine: its cores, its memory, a place to keep things, and what was measured on it.

In this order: how many cores and how much memory this process may use, which in a container is less than the machine
has; how BLAS is held to one thread; what a model's size decides; the cache folder, which keeps packed weights, and its
locks; the store of measurements. Nothing heavy is imported: whoever loads a model asks most of this before numpy.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt2.engine.trust import NotTrusted, check_folder, create_file, make_folder, open_trusted

if TYPE_CHECKING:
    from fastgpt2.engine.model.config import GPT2Config

log = logging.getLogger("fastgpt2.engine")

# Keys and values get this part of the process's memory (1 / KV_SHARE). The weights, the system's cache of files and
# other programs need the rest.
KV_SHARE = 4

# BLAS libraries read these once, when numpy loads them.
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

# Below this, sharing saves less than a file in the cache costs, and a helper process costs more than it brings.
MIN_BYTES = 64 << 20

# In the cache folder.
MEASUREMENTS_FILE = "calibration.json"
# A machine has a few hundred bytes in it.
_MAX_MEASUREMENTS_BYTES = 1 << 20
_MAX_NUMBER = 1 << 31

# Whether the thread variables were set before numpy read them. Asking the library takes 9 ms of a cold start.
_held = False


def usable_cores() -> int:
    """Return the cores that this process may use: with taskset, a cpuset or a CPU quota, fewer than the machine's."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, _cpu_quota() or cores))


def _cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the whole cores that the control group's CPU quota pays for, at least 1; None if there is no quota.

    That is what `docker run --cpus` sets. Source: admin-guide/cgroup-v2.rst and scheduler/sched-bwc.rst of the kernel.
    """
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((root / name).read_text() for name in files).split()
            return None if quota in ("max", "-1") else max(1, int(quota) // int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


def usable_memory(root: Path = Path("/")) -> int:
    """Return the bytes that this process may use: what the machine has, or less if a control group limits it.

    Source: `memory.max` in the kernel's admin-guide/cgroup-v2.rst, `memory.limit_in_bytes` in cgroup-v1/memory.rst.
    """
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_memory_limits(root)])


def _memory_limits(root: Path) -> Iterator[int]:
    """Yield the limits of this process's control groups and of all above them. In a container its own is the topmost.

    The lines of /proc/self/cgroup read "0::/group" in version 2, "9:memory:/group" in version 1.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        hierarchy, name = ("", "memory.max") if number == "0" else ("memory", "memory.limit_in_bytes")
        for folder in (Path(group), *Path(group).parents):
            try:
                limit = (root / "sys/fs/cgroup" / hierarchy / str(folder).lstrip("/") / name).read_text().strip()
            except OSError:
                continue
            # No limit is "max" in version 2; in version 1 it is a number beyond any memory.
            if limit.isdecimal():
                yield int(limit)


def fair_share_of_kv_memory() -> int:
    """Return the bytes for this process's keys and values, as one of the workers that a supervisor started here."""
    return usable_memory() // KV_SHARE // _workers()


def _workers() -> int:
    workers = os.environ.get("FASTGPT2_POOL_WORKERS", "")
    return max(1, int(workers)) if workers.isdecimal() else 1


def cpu_name() -> str:
    """Return the CPU's model as the system tells it, for records of what was measured on it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def hold_to_one_thread() -> None:
    """Hold BLAS to one thread, in this process and in those that it starts: the engine brings its own parallelism.

    Before numpy is imported this only sets variables, which hold from then on; afterwards it asks the loaded library.
    """
    global _held
    if _held:
        return
    for variable in THREAD_VARIABLES:
        os.environ[variable] = "1"
    if "numpy" in sys.modules:
        import threadpoolctl

        threadpoolctl.threadpool_limits(1, user_api="blas")
    else:
        _held = True


def is_large(config: GPT2Config) -> bool:
    """Tell whether a model's weights are worth a file in the cache and more than one process."""
    return 4 * config.n_parameters >= MIN_BYTES


def can_share_steps() -> bool:
    """Tell whether processes surely see each other's writes in order here. On x86 they do, by its memory model."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "i686")


def processes_for(config: GPT2Config, threads: int | None) -> int:
    """Return the number of processes to run a model on, and warn if that is less than was asked for.

    It is as many as asked for, else this process's share of the cores if the model is large, else 1. It is no more than
    the model has heads, and 1 where processes cannot share steps.
    """
    most, reason = config.n_head, f"each takes whole heads, of which the model has {config.n_head}"
    if not can_share_steps():
        most, reason = (
            1,
            f"several can share a model only on x86 Linux, and this is {platform.machine()} {platform.system()}",
        )
    if threads is None:
        threads = max(1, usable_cores() // _workers()) if is_large(config) else 1
    elif threads > most:
        runs = "1 process runs" if most == 1 else f"{most} processes run"
        log.warning("threads is %d, but %s the model: %s; more workers use more cores", threads, runs, reason)
    return min(threads, most)


def cache_folder() -> Path:
    """Return `FASTGPT2_CACHE`, else `$XDG_CACHE_HOME/fastgpt2`, else `~/.cache/fastgpt2`; it need not exist.

    Raises FileNotFoundError if there is no home folder.
    """
    explicit = os.environ.get("FASTGPT2_CACHE")
    folder = Path(explicit) if explicit else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastgpt2"
    try:
        return folder.expanduser()
    except RuntimeError as reason:
        raise FileNotFoundError(f"{folder}: {reason}") from None


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock among processes, which the kernel gives up however its holder ends.

    The holder may delete the file. A process that waited for it then begins anew, with the file that has the name by
    then; else two processes could hold a lock of one name.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is not set.
        OSError: the file cannot be made.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _leads_to(path, fd):
                yield
                return
        finally:
            os.close(fd)


def is_locked(path: Path) -> bool:
    """Tell whether a process holds that lock now. Makes no file, and hinders nobody who asks the same."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _leads_to(path: Path, fd: int) -> bool:
    """Tell whether the path leads to the open file, and not to another or to none."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def anonymous_file(name: str) -> int:
    """Return the descriptor of a new file without a path: in memory if the system can (Linux), else on disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _trusted_path(folder: Path) -> Path | None:
    """Return the path of the measurements in a folder; None if others could have written them."""
    try:
        check_folder(folder)
    except (NotTrusted, OSError) as reason:
        log.debug("no measurements are kept: %s", reason)
        return None
    return folder / MEASUREMENTS_FILE


class Measurements:
    """The store of what was measured for one BLAS on one CPU: whole numbers by name, in a file of the cache folder.

    Args:
        folder: where the file is kept; with None, or where it cannot be written, numbers are kept in this object only.
        machine: the BLAS and the CPU; for others, everything is measured anew.
    """

    def __init__(self, folder: Path | None, machine: str) -> None:
        self._path = _trusted_path(folder) if folder is not None else None
        self._machine = machine
        self._numbers: dict[str, Any] = self._read().get(machine, {})

    def find(self, name: str) -> int | None:
        """Return the number of that name; None if it was not measured yet."""
        value = self._numbers.get(name)
        return value if type(value) is int and 0 <= value <= _MAX_NUMBER else None

    def find_or_measure(self, name: str, measure: Callable[[], int]) -> int:
        """Return the number of that name, measuring and keeping it if it was not measured yet."""
        value = self.find(name)
        if value is None:
            value = self._numbers[name] = measure()
            self._write()
        return value

    def _read(self) -> dict[str, Any]:
        """Return the numbers of all machines in the file, by machine; {} if there is no file or it is spoiled."""
        if self._path is None:
            return {}
        try:
            with os.fdopen(open_trusted(self._path), "rb") as file:
                machines = json.loads(file.read(_MAX_MEASUREMENTS_BYTES))
        except NotTrusted as reason:
            log.warning("%s; what it says is measured anew", reason)
            return {}
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(machines, dict) or not isinstance(machines.get(self._machine, {}), dict):
            return {}
        return machines

    def _write(self) -> None:
        if self._path is None:
            return
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            make_folder(self._path.parent)
            # Two processes may measure at once. What one of them writes last is as right as the other's.
            machines = self._read()
            machines[self._machine] = {**machines.get(self._machine, {}), **self._numbers}
            with os.fdopen(create_file(temporary), "w", encoding="utf-8") as file:
                file.write(json.dumps(machines, indent=1, sort_keys=True) + "\n")
            temporary.replace(self._path)
        except OSError as reason:
            log.debug("%s: not kept (%s)", self._path, reason)
            with contextlib.suppress(OSError):
                temporary.unlink()
