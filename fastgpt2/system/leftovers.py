"""What a pool that has ended leaves in Redis: jobs that nobody will run, or not before somebody sees to it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from fastgpt2.errors import QueueUnavailable
from fastgpt2.plurals import counted
from fastgpt2.protocol.connection import connect, redis_errors
from fastgpt2.protocol.keys import PRIORITIES, list_models, models_key, queue_key, queue_of, queues_of
from fastgpt2.system.served_model import ServedModel

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger("fastgpt2.pool")


def warn_of_losses(redis_url: str, queue: str) -> None:
    """Say how many jobs nobody will run any more, as their Redis ends with its data."""
    from fastgpt2.protocol.untrusted import read_model_names

    connection = connect(redis_url)
    try:
        with closing(connection), redis_errors(redis_url):
            known = connection.execute_command(*list_models(queue))  # type: ignore[no-untyped-call]
            count = _count(connection, queues_of(queue, read_model_names(known)))
    except QueueUnavailable:
        return
    if count:
        gone = counted(count, "job that had not been finished is", "jobs that had not been finished are")
        log.warning("%s gone with the embedded Redis; --redis-dir DIR keeps such", gone)


def warn_of_waiting(redis_url: str, queue: str, models: Sequence[ServedModel]) -> None:
    """Say how many jobs wait for models of a pool that has ended, where no other worker serves them."""
    connection = connect(redis_url)
    try:
        with closing(connection), redis_errors(redis_url):
            waiting = {name: _count_unserved(connection, queue, name) for model in models for name in model.names}
    except QueueUnavailable:
        return
    for name, count in waiting.items():
        if count:
            log.warning(
                "%s for the model %s, which no worker serves any more; a worker that serves this name "
                "(--served-model-name) runs %s",
                counted(count, "job waits", "jobs wait"),
                name,
                "it" if count == 1 else "them",
            )


def _count_unserved(connection: Redis, queue: str, model: str) -> int:
    """Return how many jobs wait for a model by this name; 0 if a worker serves it."""
    seconds, micros = connection.time()
    until = connection.zscore(models_key(queue), model)
    if until is not None and until > seconds * 1000 + micros / 1000:
        return 0
    return _count(connection, [queue_of(queue, priority, model) for priority in PRIORITIES])


def _count(connection: Redis, queues: Sequence[str]) -> int:
    return sum(connection.llen(queue_key(name)) for name in queues)
