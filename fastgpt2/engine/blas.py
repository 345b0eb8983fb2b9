"""How many threads BLAS may use: the one place that touches them. Imports neither numpy nor a BLAS."""

from __future__ import annotations

import os
import sys

# Read by the libraries once, when numpy loads them.
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def usable_cores() -> int:
    """The cores that this process may run on: under taskset or a cpuset, fewer than the machine's.

    A CPU quota, as `docker run --cpus` sets it, does not show here.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_threads(threads: int) -> None:
    """Hold BLAS to so many threads, in this process and in those that it starts.

    Before numpy is imported this only sets variables; afterwards it asks the loaded library itself.
    """
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    if "numpy" in sys.modules:
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads, user_api="blas")


def describe() -> str:
    """The BLAS in use and its threads, for the log: "openblas 0.3.30 (SkylakeX), 2 threads"."""
    import threadpoolctl

    found = [lib for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]
    names = [
        f"{lib['internal_api']} {lib['version'] or ''} ({lib.get('architecture', '?')}), {lib['num_threads']} threads"
        for lib in found
    ]
    return "; ".join(names) or "an unknown BLAS"
