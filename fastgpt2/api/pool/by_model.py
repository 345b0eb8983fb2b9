"""The figures of a pool by model: for each name that jobs may give, who serves it, what waits for it, what was done."""

from __future__ import annotations

from dataclasses import dataclass

from fastgpt2.api.pool.snapshot import Snapshot, WorkerEntry
from fastgpt2.protocol.keys import SILENT


@dataclass(frozen=True, slots=True)
class ModelState:
    """One name of a model.

    Attributes:
        workers: those that serve it, silent ones too.
        is_served: a job that names it is taken by a live worker, as far as is known.
    """

    name: str
    workers: list[WorkerEntry]
    is_served: bool

    @property
    def serving(self) -> list[WorkerEntry]:
        """Return the workers that are heard of."""
        return [worker for worker in self.workers if worker.state != SILENT]


def read_model_states(snapshot: Snapshot) -> list[ModelState]:
    """Return the names that workers serve, and those that none serves any more while something is left of them.

    Left are jobs that wait for it, or what was counted. Names are in the order of the alphabet.
    """
    workers: dict[str, list[WorkerEntry]] = {}
    for entry in snapshot.workers:
        for name in entry.models:
            workers.setdefault(name, []).append(entry)
    left = {name for name in snapshot.models if any(snapshot.depths(name).values())} | snapshot.totals_by_model.keys()
    names = sorted({*workers, *(name for name, seconds in snapshot.models.items() if seconds), *left})
    return [ModelState(name, workers.get(name, []), snapshot.models.get(name, 0.0) > 0) for name in names]
