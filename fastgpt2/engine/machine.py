"""What this machine offers: cores, memory, BLAS threads, a cache folder, what was measured. Imports nothing heavy."""

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

if TYPE_CHECKING:
    from fastgpt2.engine.model.config import GPT2Config

# Of this process's share of the memory: weights, the system's cache of files, and other programs need the rest.
KV_SHARE = 4


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may use: what the machine has, or less where a control group limits it.

    Source: `memory.max` in the kernel's admin-guide/cgroup-v2.rst, `memory.limit_in_bytes` in cgroup-v1/memory.rst.
    """
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_limits(root)])


def fair_share_of_kv_memory() -> int:
    """Bytes for keys and values: this process's, as one of so many workers that a supervisor has started here."""
    workers = os.environ.get("FASTGPT2_POOL_WORKERS", "")
    return usable_memory() // KV_SHARE // max(1, int(workers) if workers.isdecimal() else 1)


def _limits(root: Path) -> Iterator[int]:
    """The limits of this process's control group and of all above it. Within a container its own is the topmost."""
    for hierarchy, group, name in _groups(root):
        for folder in (group, *group.parents):
            try:
                limit = (root / "sys/fs/cgroup" / hierarchy / str(folder).lstrip("/") / name).read_text().strip()
            except OSError:
                continue
            # "max"; version 1 has a number beyond any memory instead.
            if limit.isdecimal():
                yield int(limit)


def _groups(root: Path) -> Iterator[tuple[str, Path, str]]:
    """Hierarchy, group, and the file with the limit: lines of /proc/self/cgroup are "0::/group", "9:memory:/group"."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if number == "0":
            yield "", Path(group), "memory.max"
        elif "memory" in controllers.split(","):
            yield "memory", Path(group), "memory.limit_in_bytes"


# NOTE engine.blas: Which BLAS, and how many threads: the one place that touches either. Imports neither numpy nor a
# BLAS.

# Read by the libraries once, when numpy loads them.
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

# Whether the variables were set before numpy read them. Asking the library takes 9 ms of a cold start.
_held = False


def usable_cores() -> int:
    """The cores that this process may use: under taskset, a cpuset or a CPU quota, fewer than the machine's."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, _quota() or cores))


def fair_share_of_cores() -> int:
    """The cores that are this process's to use, as one of so many workers that a supervisor has started here."""
    workers = os.environ.get("FASTGPT2_POOL_WORKERS", "")
    return max(1, usable_cores() // max(1, int(workers) if workers.isdecimal() else 1))


def _quota(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Whole cores that the control group's CPU quota pays for (`docker run --cpus`), at least one; None without one.

    Source: `cpu.max` in the kernel's admin-guide/cgroup-v2.rst, `cpu.cfs_quota_us` in scheduler/sched-bwc.rst.
    """
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((root / name).read_text() for name in files).split()
            return None if quota in ("max", "-1") else max(1, int(quota) // int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


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


def cpu_name() -> str:
    """The CPU's model as the system tells it, for records of what was measured on it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# NOTE engine.sizing: What is decided by a model's size, before anything heavy is imported.

# Below this, sharing saves less than a file in the cache costs, and a helper process more than it brings.
MIN_BYTES = 64 << 20


def is_large(config: GPT2Config) -> bool:
    """Whether its weights are worth a file in the cache and more than one process."""
    return 4 * config.n_parameters >= MIN_BYTES


def processes_for(config: GPT2Config, threads: int | None) -> int:
    """Processes to run a model on: as many as asked for, else this process's share of the cores if it is large.

    One where processes cannot see each other's writes in order: they can on x86, by its memory model, and elsewhere
    that is not relied on. No more than the model has heads.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "i686"):
        return 1
    if threads is None:
        threads = fair_share_of_cores() if is_large(config) else 1
    return min(threads, config.n_head)


# NOTE engine.cache: The folder that keeps packed weights and what was measured: where it is, and who may write in it.


def cache_folder() -> Path:
    """`FASTGPT2_CACHE`, else `$XDG_CACHE_HOME/fastgpt2`, else `~/.cache/fastgpt2`.

    Raises:
        FileNotFoundError: there is no home folder.
    """
    explicit = os.environ.get("FASTGPT2_CACHE")
    folder = Path(explicit) if explicit else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastgpt2"
    try:
        return folder.expanduser()
    except RuntimeError as reason:
        raise FileNotFoundError(f"{folder}: {reason}") from None


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """An exclusive lock among processes, given up by the kernel however its holder ends.

    The holder may delete the file. Whoever waited for it then begins anew, with the file that has its name by now:
    else two processes could hold a lock of one name.

    Raises:
        BlockingIOError: another process holds it, and `wait` is not set.
        OSError: the file cannot be made.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _names(path, fd):
                yield
                return
        finally:
            os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether a process holds that lock now. Makes no file, and hinders nobody who asks the same."""
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


def _names(path: Path, fd: int) -> bool:
    """Whether the path leads to the open file, and not to another or to none."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def anonymous_file(name: str) -> int:
    """The descriptor of an unnamed file: in memory where the system can (Linux), else a temporary one without a name.

    Raises:
        OSError: neither can be had.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


FILE = "calibration.json"


log = logging.getLogger("fastgpt2.engine")


class Calibration:
    """What was measured for one BLAS on one CPU."""

    def __init__(self, folder: Path | None, key: str) -> None:
        """
        Args:
            folder: where it is kept; None, or one that cannot be written, keeps it in this process.
            key: of the BLAS and the CPU: for another, everything is measured anew.
        """
        self._path = folder / FILE if folder is not None else None
        self._key = key
        self._known: dict[str, Any] = self._read().get(key, {})

    def known(self, name: str) -> int | None:
        """What has been measured under a name."""
        value = self._known.get(name)
        return value if isinstance(value, int) else None

    def get(self, name: str, measure: Callable[[], int]) -> int:
        """What is known under a name, or else what `measure` finds."""
        value = self.known(name)
        if value is not None:
            return value
        found = self._known[name] = measure()
        self._write()
        return found

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_text("utf-8")) if self._path is not None else {}
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(known, dict) or not isinstance(known.get(self._key, {}), dict):
            return {}
        return known

    def _write(self) -> None:
        if self._path is None:
            return
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Two processes may measure at once; what one of them writes last is as right as the other's.
            known = self._read()
            known[self._key] = {**known.get(self._key, {}), **self._known}
            temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", "utf-8")
            temporary.replace(self._path)
        except OSError as reason:
            log.debug("%s: not kept (%s)", self._path, reason)
            with contextlib.suppress(OSError):
                temporary.unlink()
