"""`fastgpt2 worker` in trouble, which does not wait for long: python -m support.troubled_worker TROUBLE.

Redis counts as away after a second, and a worker that is to stop tries for a second to tell it. A test can hold it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from fastgpt2.cli import main
from fastgpt2.protocol import connection
from fastgpt2.worker import worker
from fastgpt2.worker.liveness import Lease
from support.holding import let_batches_be_held


def no_lease_thread() -> None:
    for name in ("_run", "note_turn"):
        setattr(Lease, name, lambda _lease: None)


TROUBLES: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "no lease thread": no_lease_thread,
}

if __name__ == "__main__":
    connection._OPTIONS["socket_timeout"] = connection._OPTIONS["socket_connect_timeout"] = 1.0
    worker.LAST_TRIES_SECONDS = 1.0
    let_batches_be_held()
    TROUBLES[sys.argv[1]]()
    sys.argv = ["fastgpt2", "worker"]
    sys.exit(main())
