"""Which BLAS, and how many threads: the one place that touches either. Imports neither numpy nor a BLAS."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

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


def numpys_kernel() -> str:
    """The BLAS that numpy brought and the kernels that it chose for this CPU: "openblas-SkylakeX".

    Two processes of one name multiply alike: it is part of a packed file's name.
    """
    import numpy

    # The wheels' OpenBLAS lies beside numpy; asking it directly takes a tenth of the time that threadpoolctl takes.
    for path in (Path(numpy.__file__).parent.parent / "numpy.libs").glob("*openblas*"):
        library = ctypes.CDLL(str(path))
        for symbol in ("scipy_openblas_get_corename64_", "scipy_openblas_get_corename", "openblas_get_corename"):
            if hasattr(library, symbol):
                corename = getattr(library, symbol)
                corename.restype = ctypes.c_char_p
                return f"openblas-{(corename() or b'unknown').decode()}"
    import threadpoolctl

    for library_info in threadpoolctl.threadpool_info():
        if library_info["user_api"] == "blas":
            return f"{library_info['internal_api']}-{library_info.get('architecture') or platform.machine()}"
    return f"blas-{platform.machine()}"


def cpu_name() -> str:
    """The CPU's model as the system tells it, for records of what was measured on it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
