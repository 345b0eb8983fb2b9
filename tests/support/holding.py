"""`fastgpt2`, whose workers a test can hold: python holding.py COMMAND ...

While there is the file that the variable TEST_HOLD names, and the tests' process, whose id that name ends with, a text
that has `HELD_AT` tokens gets no more, and those beside it wait too. The worker itself goes on: it takes jobs, and
hears of signals, cancellations and limits of time. So a job lasts for as long as a test needs it, however fast the
machine is.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from fastgpt2.cli import run
from fastgpt2.commands import serving

# Fewer than jobs have that are held, so that none of them has ended; and enough for the first pieces of a stream.
HELD_AT = 60


def let_batches_be_held() -> None:
    from fastgpt2.worker.batch import Batch

    hold, step = Path(os.environ["TEST_HOLD"]), Batch.step

    def step_unless_held(self: Batch) -> Any:
        if any(len(sequence.token_ids) >= HELD_AT for sequence in self._decoding) and is_wanted(hold):
            time.sleep(0.005)
            return []
        return step(self)

    Batch.step = step_unless_held  # type: ignore[method-assign]


def is_wanted(hold: Path) -> bool:
    """Tell whether the file is there, and was not left behind by tests that were killed."""
    if not hold.exists():
        return False
    try:
        os.kill(int(hold.suffix[1:]), 0)
    except ProcessLookupError:
        return False
    return True


def let_workers_be_held() -> None:
    from fastgpt2.engine.machine import hold_to_one_thread

    work = serving.worker

    def worker(values: dict[str, Any]) -> int:
        hold_to_one_thread()  # as the worker does, before numpy is imported
        let_batches_be_held()
        return work(values)

    serving.worker = worker


def let_pools_be_held() -> None:
    from fastgpt2.system import up

    up.COMMAND = (sys.executable, "-P", __file__)  # type: ignore[assignment]


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        let_workers_be_held()
    elif sys.argv[1] in ("pool", "up", "batch"):
        let_pools_be_held()
    run()
