"""The names that this package adds to RQ's in Redis, and the queues by priority, in one place."""

from __future__ import annotations

from typing import Literal, get_args

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)

# A field of the job's hash, beside RQ's: how often it has been started.
ATTEMPTS_FIELD = "fastgpt2_attempts"
# The id of the execution that has the job: only what runs under it may write the job's end.
EXECUTION_FIELD = "fastgpt2_execution"
# How many workers have died, or fallen silent, with the job in their hands.
CRASHES_FIELD = "fastgpt2_crashes"
# A key of the job's metadata: what had been generated of a job that did not finish, as a result's JSON.
PARTIAL_META = "partial"


def queue_of(name: str, priority: Priority) -> str:
    """The RQ queue for jobs of a priority: that of the given name, or one beside it."""
    return name if priority == "normal" else f"{name}-{priority}"


def queues_of(name: str) -> list[str]:
    """All queues of a name, in the order in which workers look at them."""
    return [queue_of(name, priority) for priority in PRIORITIES]


def stream_key(job_id: str) -> str:
    """The Redis stream of a job's text; see `fastgpt2.worker.stream`."""
    return f"fastgpt2:stream:{job_id}"


def leases_key(name: str) -> str:
    """Of a queue of this name and those beside it: its workers, each with the time until which it counts as alive."""
    return f"fastgpt2:leases:{name}"


def taken_key(worker_name: str, queue_name: str) -> str:
    """The jobs of one RQ queue that a worker has in its hands: from being claimed until their end is written."""
    return f"fastgpt2:taken:{worker_name}:{queue_name}"


def once_key(digest: str) -> str:
    """What is kept of a request that is to be carried out once: its job, and what it asked for."""
    return f"fastgpt2:once:{digest}"


def wake_key(name: str) -> str:
    """A Redis stream of no content, by which a reader of many streams wakes itself."""
    return f"fastgpt2:wake:{name}"


def totals_key(name: str) -> str:
    """What the pool of a queue has done since it was first started: a hash; see `fastgpt2.worker.measures`."""
    return f"fastgpt2:totals:{name}"


def recent_key(name: str, bucket: int | str) -> str:
    """What the pool did in the ten seconds that began at `bucket`, by Redis's clock: a hash."""
    return f"fastgpt2:recent:{name}:{bucket}"


def latest_key(name: str) -> str:
    """The jobs of a queue that ended last, the last one first: a list of JSON records."""
    return f"fastgpt2:latest:{name}"


def told_key(worker_name: str) -> str:
    """Which of its figures a worker told last, so that none count twice if the answer was lost."""
    return f"fastgpt2:told:{worker_name}"
