"""The names that this package adds to RQ's in Redis, and the queues by priority, in one place."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
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


# RQ's own names (rq/job.py, rq/queue.py, rq/worker/, rq/registry.py, rq/executions.py, rq/results.py).
QUEUES_KEY = "rq:queues"
WORKERS_KEY = "rq:workers"
WORKER_PREFIX = "rq:worker:"
# After a worker's key: the set of its executions, each "job id:execution id".
EXECUTIONS_SUFFIX = ":executions"
JOB_PREFIX = "rq:job:"
QUEUE_PREFIX = "rq:queue:"
# The sorted sets of jobs in each state, by RQ's word for the state.
REGISTRY_PREFIXES = {
    "started": "rq:wip:",
    "finished": "rq:finished:",
    "failed": "rq:failed:",
    "deferred": "rq:deferred:",
    "scheduled": "rq:scheduled:",
    "canceled": "rq:canceled:",
}


def job_key(job_id: str) -> str:
    """Return the key of a job's hash."""
    return f"{JOB_PREFIX}{job_id}"


def results_key(job_id: str) -> str:
    """Return the key of the Redis stream in which RQ keeps a job's results."""
    return f"rq:results:{job_id}"


def executions_key(job_id: str) -> str:
    """Return the key of the sorted set of a job's executions."""
    return f"rq:executions:{job_id}"


def queue_key(queue_name: str) -> str:
    """Return the key of the list of the ids of the jobs that wait in an RQ queue."""
    return f"{QUEUE_PREFIX}{queue_name}"


def registry_key(state: str, queue_name: str) -> str:
    """Return the key of the sorted set of an RQ queue's jobs in one state, a key of `REGISTRY_PREFIXES`."""
    return f"{REGISTRY_PREFIXES[state]}{queue_name}"


def workers_key(queue_name: str) -> str:
    """Return the key of the set of the keys of an RQ queue's workers."""
    return f"{WORKERS_KEY}:{queue_name}"


def worker_key(worker_name: str) -> str:
    """Return the key of a worker's hash."""
    return f"{WORKER_PREFIX}{worker_name}"


def stream_key(job_id: str) -> str:
    """The Redis stream of a job's text; see `fastgpt2.protocol.messages`."""
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
    """What the pool of a queue has done since it was first started: a hash; see `fastgpt2.protocol.keys`."""
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


# NOTE worker.measures: What is counted of a pool, and under which fields it stands in Redis; written by workers, read
# by the endpoint.
#
# All of it only grows: counts, sums, and histograms as counts by bucket. The totals of a pool are one hash, the same
# for ten seconds at a time are another each (`names.totals_key`, `names.recent_key`).
TOTALS_TTL_SECONDS = 30 * 24 * 3600
BUCKET_SECONDS = 10

# Longer than the longest of the rates, by what clocks and tellings may be late.
RECENT_TTL_SECONDS = 20 * 60
LATEST_TTL_SECONDS = 24 * 3600
MAX_LATEST = 100
PROMPT_TOKENS = "prompt_tokens"
CACHED_TOKENS = "cached_tokens"
GENERATED_TOKENS = "generated_tokens"
DRAFTED_TOKENS = "drafted_tokens"
ACCEPTED_TOKENS = "accepted_tokens"
RECOVERIES = "recoveries"
REFUSED = "refused"
RETRIED = "retried"
GIVEN_BACK = "given_back"
COUNTS = (
    PROMPT_TOKENS,
    CACHED_TOKENS,
    GENERATED_TOKENS,
    DRAFTED_TOKENS,
    ACCEPTED_TOKENS,
    RECOVERIES,
    REFUSED,
    RETRIED,
    GIVEN_BACK,
)

# How a job can end: RQ's status, and why: the finish reason, the kind of error, or that somebody asked for it.
POISON = ("failed", "poison")
CANCELED = ("canceled", "on_request")
OUTCOMES = (
    ("finished", "stop"),
    ("finished", "length"),
    ("failed", "bad_request"),
    ("failed", "prompt_too_long"),
    ("failed", "model_error"),
    ("failed", "timeout"),
    ("failed", "malformed"),
    POISON,
    ("failed", "error"),
    ("stopped", "on_request"),
    CANCELED,
)

# Why a worker was started again: it died, or it had ended in good order (`--max-jobs`, `--max-growth`).
DIED, ENDED = RESTARTS = ("died", "ended")


def ended_field(status: str, reason: str) -> str:
    return f"ended:{status}:{reason}"


def restarts_field(reason: str) -> str:
    return f"restarts:{reason}"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations by size: how many are at most `bounds[i]` and more than the bound before, and their sum.

    A field is named for its bound, so that what another release counted by other bounds is not mixed up with it.
    """

    name: str
    bounds: tuple[float, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """Of the buckets; the last one has what is over all bounds."""
        return tuple(self._field(at) for at in range(len(self.bounds) + 1))

    @property
    def sum_field(self) -> str:
        return f"{self.name}:sum"

    def field_of(self, value: float) -> str:
        return self._field(bisect_left(self.bounds, value))

    def _field(self, at: int) -> str:
        return f"{self.name}<={self.bounds[at]:g}" if at < len(self.bounds) else f"{self.name}>"


QUEUE_SECONDS = Histogram(
    "queue_seconds", (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
)
FIRST_TOKEN_SECONDS = Histogram("first_token_seconds", QUEUE_SECONDS.bounds)
TOKEN_SECONDS = Histogram("token_seconds", (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5))
BATCH_SIZE = Histogram("batch_size", (1, 2, 4, 6, 8, 12, 16, 24, 32, 64))
KV_USED = Histogram("kv_used", (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1))
HISTOGRAMS = (QUEUE_SECONDS, FIRST_TOKEN_SECONDS, TOKEN_SECONDS, BATCH_SIZE, KV_USED)

# What one job gives an observation of, at its end.
OF_JOBS = (QUEUE_SECONDS, FIRST_TOKEN_SECONDS, TOKEN_SECONDS)
TOTAL_FIELDS = (
    *COUNTS,
    *(ended_field(*outcome) for outcome in OUTCOMES),
    *(restarts_field(reason) for reason in RESTARTS),
    *(field for histogram in HISTOGRAMS for field in (*histogram.fields, histogram.sum_field)),
)

# Of ten seconds: tokens generated; jobs that workers ended, and those of them that failed; steps, the sequences in all
# of them, and how many there was room for; of what jobs observe, the sum and how many did; how many jobs waited.
TOKENS, JOBS, FAILED, STEPS, SEQUENCES, ROOM, DEPTH = RECENT_COUNTS = (
    "tokens", "jobs", "failed", "steps", "sequences", "room", "depth",
)  # fmt: skip


def count_field(histogram: Histogram) -> str:
    """In a recent hash: how many observations there were."""
    return f"{histogram.name}:count"


RECENT_FIELDS = (
    *RECENT_COUNTS,
    *(field for histogram in OF_JOBS for field in (histogram.sum_field, count_field(histogram))),
)

# A Lua function: add to a pool's totals, whatever else stands under the key. `pcall`: it is no reason for the script
# that it stands in to fail.
COUNT = f"""
local function count(key, field, by)
    redis.pcall('HINCRBY', key, field, by)
    redis.pcall('EXPIRE', key, {TOTALS_TTL_SECONDS})
end
"""

# After so many deaths of workers that had it in hand a job is run alone: if it is the cause, it takes nobody along.
SUSPECT_CRASHES = 2
LEASE_SECONDS = 9.0
