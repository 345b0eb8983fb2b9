"""The machine under the engine: its cores, its memory, a place to keep things, and what was measured on it.

In this order: how many cores and how much memory this process may use, which in a container is less than the machine
has; how BLAS is held to one thread; what a model's size decides; the cache folder, which keeps packed weights, and its
locks; the figures that were measured, and their store. Nothing heavy is imported: whoever loads a model asks most of
this before numpy.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgpt2.engine.figure import Figure, better_of
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
MEASUREMENTS_LOCK = "calibration.lock"
# A machine has a few thousand bytes in it.
_MAX_MEASUREMENTS_BYTES = 1 << 20

# How long to wait for another process of this machine that measures. It takes some seconds.
MEASURING_WAIT_SECONDS = 30.0
_MEASURING_LOOK_SECONDS = 0.05


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
    """Return `FASTGPT2_CACHE`, else the user's own cache folder; it need not exist.

    Raises FileNotFoundError if there is no home folder.
    """
    explicit = os.environ.get("FASTGPT2_CACHE")
    return _expand(Path(explicit)) if explicit else user_cache_folder()


def user_cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/fastgpt2`, else `~/.cache/fastgpt2`. Raises as `cache_folder`."""
    return _expand(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastgpt2")


def _expand(folder: Path) -> Path:
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
    """The store of what was measured for one BLAS on one CPU: figures by name, in a file of the cache folder.

    A figure is a first guess: one that is old, or that was measured on a busy machine, is measured again by whoever
    asks for it next. One process of the machine measures at a time, under a lock beside the file; the others wait for
    its figures, or take what there is.

    Args:
        folder: where the file is kept; with None, or where it cannot be written, figures are kept in this object only.
        machine: the BLAS and the CPU; for others, everything is measured anew.
    """

    def __init__(self, folder: Path | None, machine: str) -> None:
        self._path = _trusted_path(folder) if folder is not None else None
        self.machine = machine
        self._is_measuring = self._can_keep = False
        self._figures: dict[str, Figure] = {}
        self._take(self._read())

    @property
    def path(self) -> Path | None:
        """The path of the file; None if there is no folder for it."""
        return self._path

    def find(self, name: str) -> Figure | None:
        """Return the figure of that name, whatever it is worth; None if there is none."""
        return self._figures.get(name)

    def find_since(self, date: float) -> dict[str, Figure]:
        """Return the figures that were measured at that moment or later, in vain or not, by name."""
        return {name: figure for name, figure in sorted(self._figures.items()) if figure.looked_at >= date}

    def find_or_measure(self, name: str, measure: Callable[[], Figure]) -> Figure:
        """Return the figure of that name, measuring and keeping it if there is none that is believed."""
        found = self.find_or_measure_all([name], lambda: {name: measure()})
        if name not in found:
            # Another process measures for longer than that. What is found beside it is for this process alone.
            found = {name: measure()}
            self._figures.update(found)
        return found[name]

    def find_or_measure_all(
        self, names: Iterable[str], measure: Callable[[], Mapping[str, Figure]]
    ) -> dict[str, Figure]:
        """Return the figures of those names, measuring all of them together if one of them is not believed.

        Where another process measures for long, or figures cannot be kept, what is not believed is taken as it is. A
        name of which nothing is known is missing only if another process measures all the time.
        """
        names = list(names)
        if self._are_believed(names):
            return {name: self._figures[name] for name in names}
        is_urgent = any(name not in self._figures or self._figures[name].is_asked_for for name in names)
        with self.measuring(MEASURING_WAIT_SECONDS if is_urgent else 0.0) as is_alone:
            if is_alone and not self._are_believed(names) and (is_urgent or self._can_keep):
                self._add(measure())
        return {name: self._figures[name] for name in names if name in self._figures}

    def keep(self, figures: Mapping[str, Figure]) -> bool:
        """Keep figures that belong together and were learnt from other work, unless those that are kept may be better.

        Returns:
            Whether they were: they are not while another process measures, or where the file cannot be written.
        """
        with self.measuring(0.0) as is_alone:
            if is_alone and self._can_keep:
                self._add(figures)
                return True
        return False

    @contextmanager
    def measuring(self, wait_seconds: float) -> Iterator[bool]:
        """Keep other processes from measuring meanwhile, and know what they have found before.

        Yields:
            Whether that is so; False if another process measures for longer than `wait_seconds`. Where there can be no
            lock, nobody is kept from anything.
        """
        if self._path is None or self._is_measuring:
            yield True
            return
        self._can_keep = False
        with contextlib.ExitStack() as stack:
            is_alone = True
            try:
                make_folder(self._path.parent)
                is_alone = self._can_keep = _lock_within(stack, self._path.with_name(MEASUREMENTS_LOCK), wait_seconds)
            except OSError as reason:
                log.debug("%s: nothing can be kept (%s)", self._path, reason)
            if is_alone:
                self._take(self._read())
            self._is_measuring = is_alone
            try:
                yield is_alone
            finally:
                self._is_measuring = False

    def _are_believed(self, names: list[str]) -> bool:
        return all(name in self._figures and not self._figures[name].is_due for name in names)

    def _add(self, figures: Mapping[str, Figure]) -> None:
        """Take figures that belong together in, and write them down, unless those that are known may be better."""
        new = better_of(self._figures, figures)
        self._figures.update(new)
        self._write(new)

    def _take(self, machines: dict[str, Any]) -> None:
        """Take in what a file says of this machine. What this object has found beside it stays."""
        for name, fields in machines.get(self.machine, {}).items():
            figure = Figure.from_json(fields)
            if figure is not None:
                self._figures[name] = figure

    def _read(self) -> dict[str, Any]:
        """Return the figures of all machines in the file, by machine; {} if there is no file or it is spoiled."""
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
        if not isinstance(machines, dict) or not isinstance(machines.get(self.machine, {}), dict):
            return {}
        return machines

    def _write(self, figures: Mapping[str, Figure]) -> None:
        """Put figures into the file, beside what others have put there."""
        if self._path is None or not figures:
            return
        own = {name: figure.as_json() for name, figure in figures.items()}
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            make_folder(self._path.parent)
            machines = self._read()
            text = _as_text({**machines, self.machine: {**machines.get(self.machine, {}), **own}})
            if len(text) > _MAX_MEASUREMENTS_BYTES:
                # A file that is not read to its end would count as spoiled, for ever.
                text = _as_text({self.machine: own})
            with os.fdopen(create_file(temporary), "w", encoding="utf-8") as file:
                file.write(text)
            temporary.replace(self._path)
        except OSError as reason:
            log.debug("%s: not kept (%s)", self._path, reason)
            with contextlib.suppress(OSError):
                temporary.unlink()


def _as_text(machines: dict[str, Any]) -> str:
    return json.dumps(machines, indent=1, sort_keys=True) + "\n"


def _lock_within(stack: contextlib.ExitStack, path: Path, seconds: float) -> bool:
    """Hold a lock until the stack ends; return whether it could be had within that time. Raises as `locked`."""
    deadline, waits = time.monotonic() + seconds, False
    while True:
        try:
            stack.enter_context(locked(path, wait=False))
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        if not waits:
            log.info("another process measures this machine; waiting for what it finds, for up to %.0f s", seconds)
            waits = True
        time.sleep(_MEASURING_LOOK_SECONDS)
