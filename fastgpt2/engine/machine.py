"""How much memory there is to use. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

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
