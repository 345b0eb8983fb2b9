"""`fastgpt2 worker` in trouble, which does not wait for long: python troubled_worker.py TROUBLE.

Redis counts as away after a second, and a worker that is to stop tries for a second to tell it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from fastgpt2.cli import main
from fastgpt2.protocol import connection
from fastgpt2.worker import worker
from fastgpt2.worker.liveness import Lease
from fastgpt2.worker.rq_worker import RQWorker
from fastgpt2.worker.worker import GenerationWorker


def fail(*_: Any) -> Any:
    raise ValueError("an entry that nobody has foreseen")


def patch(owner: type, **methods: Callable[..., Any]) -> Callable[[], None]:
    """Return what replaces methods of a class."""

    def replace() -> None:
        for name, method in methods.items():
            setattr(owner, name, method)

    return replace


def nothing(*_: Any) -> None:
    return None


TROUBLES: dict[str, Callable[[], None]] = {
    "none": nothing,
    "no exchange": patch(GenerationWorker, _exchange=fail),
    "no upkeep": patch(RQWorker, keep_up=fail),
    "no lease thread": patch(Lease, _run=nothing, note_turn=nothing),
}

if __name__ == "__main__":
    connection._OPTIONS["socket_timeout"] = connection._OPTIONS["socket_connect_timeout"] = 1.0
    worker.LAST_TRIES_SECONDS = 1.0
    TROUBLES[sys.argv[1]]()
    sys.argv = ["fastgpt2", "worker"]
    sys.exit(main())
