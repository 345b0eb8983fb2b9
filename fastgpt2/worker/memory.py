"""How much memory a worker's processes have of their own, and how much they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

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
