"""Jobs that name a model which their worker does not serve: they go to that model's queue, or are refused."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

from fastgpt2.errors import ModelUnknown
from fastgpt2.protocol import keys
from fastgpt2.protocol.scripts import Script
from fastgpt2.protocol.untrusted import read_model_names
from fastgpt2.worker.batch import Attempt
from fastgpt2.worker.set_aside import shown

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger("fastgpt2.worker")
_ROUTE = Script(__file__, "route")


class Router:
    """The router of one worker looks which model each claimed job names, before the job is started.

    fastgpt2's clients put a job into the queue of the model that it names. Clients of plain RQ put it where they like.

    Args:
        queue: the name of the pool's queue.
        names: the names of this worker's model.
    """

    def __init__(self, connection: Redis, queue: str, worker_name: str, names: Collection[str]) -> None:
        self._connection = connection
        self._queue = queue
        self._worker_name = worker_name
        self._names = frozenset(names)

    def route(self, attempts: list[Attempt]) -> list[Attempt]:
        """Return the attempts of those jobs that are this worker's to start; the others go where they belong.

        A job whose model nobody serves stays, with the `error` to refuse it by.
        """
        return [attempt for attempt in attempts if not self._send_on(attempt)]

    def _send_on(self, attempt: Attempt) -> bool:
        """Move a job to the queue of the model that it names. Return False if the job stays here."""
        model = attempt.rq_job.model
        if model is None or model in self._names:
            return False
        plain = keys.plain_queue_of(attempt.queue.name)
        target = f"{plain}{keys.MODEL_MARK}{model}"
        of_script = [
            attempt.rq_job.key,
            keys.claimed_key(self._worker_name, attempt.queue.name),
            keys.queue_key(target),
            keys.models_key(self._queue),
        ]
        reply = _ROUTE.run(self._connection, of_script, [attempt.id, model, target, attempt.queue.name])
        if isinstance(reply, list):
            attempt.error = ModelUnknown.among(model, read_model_names(reply))
            return False
        told = self._worker_name, shown(attempt.id), model
        log.info("%s: job %s names the model %s and goes to its queue", *told, extra=attempt.log_extra)
        return True
