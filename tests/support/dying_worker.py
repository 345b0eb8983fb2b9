"""`fastgpt2 worker`, but it kills itself with SIGKILL at a stage of a job: -m support.dying_worker STAGE [MARKER].

With a MARKER, a file, only the first process does, and makes it; without one, each does. A test can hold it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redis.connection import Connection

from fastgpt2.cli import main
from fastgpt2.engine.network.step import Step
from fastgpt2.worker import ledger
from fastgpt2.worker.batch import Batch, End, EndKind
from fastgpt2.worker.claims import Claims
from fastgpt2.worker.ledger import Ledger
from support.holding import let_batches_be_held

POISON = "the poisoned well"
MARKER = sys.argv[2] if len(sys.argv) > 2 else ""


def die() -> None:
    if MARKER:
        try:
            Path(MARKER).open("x").close()
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, when: Callable[..., bool] = lambda *_a, **_k: True) -> None:
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            die()
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def after(owner: Any, name: str, when: Callable[[Any], bool] = lambda _result: True) -> None:
    original = getattr(owner, name)

    def patched(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if when(result):
            die()
        return result

    setattr(owner, name, patched)


def unheard(owner: Any, name: str, when: Callable[..., bool] = lambda *_a, **_k: True) -> None:
    """Die when Redis has run what the method sends first: the answer is not read any more."""
    original, read = getattr(owner, name), Connection.read_response

    def patched(*args: Any, **kwargs: Any) -> Any:
        if not when(*args, **kwargs):
            return original(*args, **kwargs)

        def dying(self: Connection, *a: Any, **k: Any) -> Any:
            answer = read(self, *a, **k)  # it has surely been carried out
            die()
            return answer

        Connection.read_response = dying  # type: ignore[assignment,method-assign]
        try:
            return original(*args, **kwargs)
        finally:
            Connection.read_response = read  # type: ignore[method-assign]

    setattr(owner, name, patched)


def in_a_layer(generated: int) -> None:
    """Die in the second layer of the network, once some job has `generated` tokens."""
    known: list[Batch] = []
    remember = Batch.__init__

    def init(self: Batch, *args: Any) -> None:
        remember(self, *args)
        known.append(self)

    Batch.__init__ = init  # type: ignore[assignment,method-assign]

    def far_enough(_self: Step) -> bool:
        decoding = known[0].decoding if known else []
        return any(len(s.token_ids) >= generated for job in decoding for s in job.sequences)

    # A step asks this when all layers have run and the logits have not.
    before(Step, "rows_with_logits", far_enough)


def poisoned(batch: Batch) -> bool:
    return any(job.prompt.request.prompt == POISON for job in batch.decoding)


def finishes(_ledger: Ledger, end: End) -> bool:
    return end.kind == EndKind.FINISHED


STAGES: dict[str, Callable[[], None]] = {
    "after the claim": lambda: after(Claims, "_decode", bool),
    "claimed and read": lambda: after(Ledger, "read", bool),
    "the start sent": lambda: unheard(Ledger, "start"),
    "after the start": lambda: after(Ledger, "start", bool),
    "mid-prefill": lambda: in_a_layer(0),
    "mid-decode": lambda: in_a_layer(7),
    "before the commit": lambda: before(Ledger, "write", finishes),
    "the commit sent": lambda: unheard(Ledger, "write", finishes),
    "after the commit": lambda: after(Ledger, "write", bool),
    "before the dependents": lambda: before(ledger.Queue, "enqueue_ready_jobs_by_queue"),  # type: ignore[attr-defined]
    "before the failure's dependents": lambda: before(ledger, "complete"),
    "before the give-back": lambda: before(Ledger, "give_back"),
    "the give-back sent": lambda: unheard(Ledger, "give_back"),
    "the poison": lambda: before(Batch, "step", poisoned),
}


def out_of_memory() -> None:
    """Let a step with the poisoned job raise MemoryError, as numpy does at the limit of its memory."""
    original = Batch.step

    def step(self: Batch) -> Any:
        if poisoned(self):
            raise MemoryError("Unable to allocate 1.00 GiB")
        return original(self)

    Batch.step = step  # type: ignore[method-assign]


STAGES["out of memory"] = out_of_memory

if __name__ == "__main__":
    let_batches_be_held()
    STAGES[sys.argv[1]]()
    sys.argv = ["fastgpt2", "worker"]
    sys.exit(main())
