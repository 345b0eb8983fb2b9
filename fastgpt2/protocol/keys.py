"""Every name in Redis that both ends of the queue use: RQ's own, this package's, and the fields of the pool's figures.

A Lua script finds the constants here as `$NAME`; see `fastgpt2.protocol.scripts`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from fastgpt2.errors import BadRequest, ModelUnknown
from fastgpt2.fields import Field, is_same, one_of, plain, text, whole

# --- Queues: for each priority a plain RQ queue, and beside it one for the jobs of each model that jobs name ---

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)


def _check_priority(name: str, value: Any) -> Any:
    # vLLM's priorities are whole numbers, of which 0 is the default.
    return "normal" if is_same(plain(value), 0) else one_of(*PRIORITIES).check(name, value)


PriorityField = Annotated[Priority, Field({"anyOf": [one_of(*PRIORITIES).schema, whole(0, 0).schema]}, _check_priority)]


# Between the name of a plain queue and that of a model. No pool's name has it.
MODEL_MARK = "@"

# The most characters of a model's name: the names stand in keys, in each job and in messages.
MAX_MODEL_CHARACTERS = 500

# The most names of one worker: it waits on three connections for each.
MAX_MODELS_OF_WORKER = 16

# The most names that a pool remembers: each has three queues, which are counted at each enqueueing with `max_queue`.
MAX_MODELS_OF_POOL = 100

_MODEL = text(1, MAX_MODEL_CHARACTERS)


def check_model_name(name: str, value: Any) -> Any:
    """Check a model's name, the value of the field `name`, as jobs and workers have it."""
    kept = _MODEL.check(name, value)
    if not kept.isprintable():  # also no text in UTF-8, if it has a lone surrogate
        raise ModelUnknown(f"no worker serves a model {kept[:100]!r}: names of models have printable characters only")
    return kept


ModelName = Annotated[str, Field(_MODEL.schema, check_model_name)]


def check_queue(name: str) -> str:
    """Return the name of a pool's queue; raise BadRequest if no pool can have such a queue."""
    if MODEL_MARK in name:
        raise BadRequest(
            f"the queue {name[:100]!r} has {MODEL_MARK} in its name, which stands before a model's name: take another"
        )
    return name


def queue_of(name: str, priority: Priority, model: str | None = None) -> str:
    """Return the RQ queue of a pool for jobs of a priority: the plain one, or that of jobs that name a model."""
    plain_name = name if priority == "normal" else f"{name}-{priority}"
    return plain_name if model is None else f"{plain_name}{MODEL_MARK}{model}"


def queues_of(name: str, models: Iterable[str] = ()) -> list[str]:
    """Return the RQ queues of a pool: for each priority, the most urgent first, the plain one and these models' own."""
    return [queue_of(name, priority, model) for priority in PRIORITIES for model in (None, *models)]


def plain_queue_of(queue_name: str) -> str:
    """Return the plain queue beside which a model's queue stands; a plain queue itself."""
    return queue_name.partition(MODEL_MARK)[0]


def model_of(queue_name: str) -> str | None:
    """Return the model whose jobs an RQ queue holds; None for a plain queue."""
    return queue_name.partition(MODEL_MARK)[2] or None


def is_queue_of(name: str, queue_name: str) -> bool:
    """Tell whether an RQ queue is one of a pool's, a plain one or any model's."""
    return plain_queue_of(queue_name) in queues_of(name)


# --- RQ's own names (rq/job.py, rq/queue.py, rq/worker/, rq/registry.py, rq/executions.py, rq/results.py) ---

QUEUES_KEY = "rq:queues"
WORKERS_KEY = "rq:workers"
WORKER_PREFIX = "rq:worker:"
# After a worker's key: the set of its executions, each "job id:execution id".
EXECUTIONS_SUFFIX = ":executions"
JOB_PREFIX = "rq:job:"
QUEUE_PREFIX = "rq:queue:"
RESULTS_PREFIX = "rq:results:"
# It exists from `rq suspend` to `rq resume`.
SUSPENDED_KEY = "rq:suspended"
# The set of the keys of all rate limits (`rq.RateLimit`).
RATE_LIMITS_KEY = "rq:rl-keys"
# Before the key of a rate limit: the hash of its settings; with ":allowed" or ":rate_limited" behind it, the sorted set
# of the jobs that have a slot, or wait for one.
RATE_LIMIT_PREFIX = "rq:rl:"

# All executions of a job; one execution, by the ids of the job and of itself with a colon between.
EXECUTIONS_PREFIX = "rq:executions:"
EXECUTION_PREFIX = "rq:execution:"

STARTED_PREFIX = "rq:wip:"
CANCELED_PREFIX = "rq:canceled:"
FINISHED_PREFIX = "rq:finished:"
FAILED_PREFIX = "rq:failed:"
DEFERRED_PREFIX = "rq:deferred:"
SCHEDULED_PREFIX = "rq:scheduled:"
# Jobs whose dependencies have finished, and which wait to be put into their queue.
READY_PREFIX = "rq:ready:"
# The sorted sets of a queue's jobs in each state, by RQ's word for the state.
REGISTRY_PREFIXES = {
    "started": STARTED_PREFIX,
    "finished": FINISHED_PREFIX,
    "failed": FAILED_PREFIX,
    "deferred": DEFERRED_PREFIX,
    "scheduled": SCHEDULED_PREFIX,
    "canceled": CANCELED_PREFIX,
}


def job_key(job_id: str) -> str:
    """Return the key of a job's hash."""
    return f"{JOB_PREFIX}{job_id}"


def results_key(job_id: str) -> str:
    """Return the key of the Redis stream in which RQ keeps a job's results."""
    return f"{RESULTS_PREFIX}{job_id}"


def queue_key(queue_name: str) -> str:
    """Return the key of the list of the ids of the jobs that wait in an RQ queue."""
    return f"{QUEUE_PREFIX}{queue_name}"


def registry_key(state: str, queue_name: str) -> str:
    """Return the key of the sorted set of an RQ queue's jobs in one state, a key of `REGISTRY_PREFIXES`."""
    return f"{REGISTRY_PREFIXES[state]}{queue_name}"


def workers_key(queue_name: str) -> str:
    """Return the key of the set of the keys of an RQ queue's workers."""
    return f"{WORKERS_KEY}:{queue_name}"


# --- This package's fields in a job's hash, and in its metadata ---

# How often the job has been started.
ATTEMPTS_FIELD = "fastgpt2_attempts"

# The id of the execution that has the job: only what runs under it may write the job's end.
EXECUTION_FIELD = "fastgpt2_execution"

# How many workers have died, or fallen silent, while they ran the job.
CRASHES_FIELD = "fastgpt2_crashes"

# A key of the job's metadata: what had been generated of a job that did not finish, as a result's JSON.
PARTIAL_META = "partial"

# A job that this many workers have died of runs alone from then on: if it is the cause, it takes no other along.
SUSPECT_CRASHES = 2

# --- This package's keys ---

# Before the id of a job, the key of its stream; see `stream_key`.
STREAM_PREFIX = "fastgpt2:stream:"

# For how long a worker counts as alive after each renewal of its lease.
LEASE_SECONDS = 9.0

# A field of a worker's hash: the moment of its last heartbeat by Redis's clock, in seconds since 1970. RQ's own field,
# `last_heartbeat`, is by the clock of the worker's machine.
HEARD_FIELD = "heard_at"

# A worker that was not heard of for this long hangs, was stopped, or cannot reach Redis. The loop that runs jobs tells
# every 5 s that it turns, that of a quiet worker every 10 s at most; a stopped worker is taken for dead after 15 s.
SILENT_SECONDS = 12.0
SILENT = "silent"

# Fields of a worker's hash: which of the processes that had the worker's name one after the other has it now; where the
# worker's process id means something (`fastgpt2.process.pid_space`); and one that RQ's own workers do not have.
INCARNATION_FIELD = "fastgpt2_incarnation"
PID_SPACE_FIELD = "fastgpt2_pid_space"
VERSION_FIELD = "fastgpt2_version"

# Fields of a worker's hash: the first name of its model; all its names, as a list in JSON; "1" if it takes no jobs but
# those that name one of them; "1" if the model has a chat template.
MODEL_FIELD = "model"
MODELS_FIELD = "models"
NAMED_ONLY_FIELD = "named_only"
CHAT_FIELD = "chat"

# What a worker's hash holds at most of the notes on its model.
MAX_NOTES = 16
MAX_NOTE_CHARACTERS = 400


def stream_key(job_id: str) -> str:
    """Return the key of the Redis stream of a job's text; see `fastgpt2.protocol.messages`."""
    return f"{STREAM_PREFIX}{job_id}"


def leases_key(name: str) -> str:
    """Return the key of a pool's leases: each of its workers with the time until which it counts as alive."""
    return f"fastgpt2:leases:{name}"


# Before a worker's name and, behind a colon, a queue's: see `claimed_key`.
CLAIMED_PREFIX = "fastgpt2:taken:"


def claimed_key(worker_name: str, queue_name: str) -> str:
    """Return the key of the list of the jobs of one RQ queue that a worker has claimed.

    A job stays in the list until its end is written.
    """
    return f"{CLAIMED_PREFIX}{worker_name}:{queue_name}"


def set_aside_key(queue_name: str) -> str:
    """Return the key of the list of what stood in an RQ queue and could not be served: JSON notes, the last one first.

    What can be failed as a job is among RQ's failed jobs instead.
    """
    return f"fastgpt2:set-aside:{queue_name}"


def once_key(digest: str) -> str:
    """Return the key of what is kept of a request that must run only once: its job, and what it asked for."""
    return f"fastgpt2:once:{digest}"


# Before a queue's name: the Redis stream of the ids of its jobs that were cancelled just now. Those who wait for a job
# read it too, as a cancellation writes nothing else that they would hear of. It is kept for a moment only: who comes
# later asks for the job's state first.
CANCELLATIONS_PREFIX = "fastgpt2:cancelled:"
CANCELLATIONS_TTL_SECONDS = 60
MAX_CANCELLATIONS = 1000


def cancellations_key(queue_name: str) -> str:
    """Return the key of the Redis stream of the jobs of an RQ queue that were cancelled just now.

    A plain queue and all models' queues beside it share one: who waits for jobs need not know the models.
    """
    return f"{CANCELLATIONS_PREFIX}{plain_queue_of(queue_name)}"


# For how long after each heartbeat a worker's names count as served, and how much longer a job that names one is taken:
# while the last worker of a model is started again, nobody is refused.
MODEL_SERVED_SECONDS = 15.0
MODEL_GRACE_SECONDS = 60.0

# For how long a name is remembered that no worker serves any more: its queues may hold jobs, and results of jobs.
MODEL_REMEMBERED_SECONDS = 7 * 24 * 3600

# How long a pool without any worker remembers all names.
MODELS_TTL_SECONDS = 90 * 24 * 3600


def models_key(name: str) -> str:
    """Return the key of the sorted set of the models that a pool's workers serve, by the names that jobs may give.

    The score of a name is the moment, by Redis's clock, in ms, until which a live worker serves it.
    """
    return f"fastgpt2:models:{name}"


def list_models(name: str) -> tuple[str | int, ...]:
    """Return the words of the command that reads the names of `models_key`, those that are served last of all first."""
    return "ZRANGE", models_key(name), 0, MAX_MODELS_OF_POOL - 1, "REV"


def model_totals_name(name: str, model: str) -> str:
    """Return the name for `totals_key` of the totals of those of a pool's workers whose first name is this model's."""
    return f"{name}{MODEL_MARK}{model}"


def wake_key(name: str) -> str:
    """Return the key of a Redis stream without content, by which a reader of many streams wakes itself."""
    return f"fastgpt2:wake:{name}"


def totals_key(name: str) -> str:
    """Return the key of the hash of all that a pool has done since it was first started."""
    return f"fastgpt2:totals:{name}"


def recent_key(name: str, bucket: int | str) -> str:
    """Return the key of the hash of what a pool did in the ten seconds that began at `bucket`, by Redis's clock."""
    return f"fastgpt2:recent:{name}:{bucket}"


def latest_key(name: str) -> str:
    """Return the key of the list of the jobs of a queue that ended last: JSON records, the last one first."""
    return f"fastgpt2:latest:{name}"


def last_report_key(worker_name: str) -> str:
    """Return the key of the mark of a worker's last report: a report whose answer was lost must not count twice."""
    return f"fastgpt2:told:{worker_name}"


def asked_key(worker_name: str) -> str:
    """Return the key that a worker writes before it asks whether all that it wrote will last."""
    return f"fastgpt2:asked:{worker_name}"


# --- Tokens of the endpoint: what the jobs of each have used ---

# A pattern of the names that tokens may have. They stand in keys, logs and metrics.
TOKEN_NAME = r"[A-Za-z0-9._@+-]{1,64}"

# A field of a job's hash: the name of the token by which the job was enqueued.
TOKEN_FIELD = "fastgpt2_token"

# How many ends of a token's jobs are kept until the endpoint takes them into account, and for how long.
MAX_USAGES = 100_000
ACCOUNT_TTL_SECONDS = 7 * 24 * 3600


def account_key(queue: str, token: str) -> str:
    """Return the key of the hash of how far a token is within its limits; see `admit.lua`."""
    return f"fastgpt2:account:state:{queue}:{token}"


def account_jobs_key(queue: str, token: str) -> str:
    """Return the key of the sorted set of a token's jobs that have not ended, each with when it was looked at."""
    return f"fastgpt2:account:jobs:{queue}:{token}"


def usage_key(queue: str, token: str) -> str:
    """Return the key of the Redis stream of what a token's jobs used, an entry a job; only tokens with limits have it.

    Workers write it with a job's end, and the endpoint reads it when a request comes.
    """
    return f"fastgpt2:account:usage:{queue}:{token}"


def token_totals_key(queue: str) -> str:
    """Return the key of the hash of all that the jobs of each token have used; see `token_totals_field`."""
    return f"fastgpt2:token-totals:{queue}"


def token_totals_field(token: str, count: str) -> str:
    """Return the field of a token's PROMPT_TOKENS or GENERATED_TOKENS."""
    return f"{token}:{count}"


# --- A pool's figures: what workers count, and the endpoint reads ---
#
# All of them only grow: counts, sums, and histograms as counts by bucket. The totals of a pool are one hash
# (`totals_key`); each ten seconds have a hash of their own (`recent_key`).

TOTALS_TTL_SECONDS = 30 * 24 * 3600
BUCKET_SECONDS = 10

# More than the time over which the slowest of the rates is taken, to allow for late clocks and late reports.
RECENT_TTL_SECONDS = 20 * 60
LATEST_TTL_SECONDS = 24 * 3600
MAX_LATEST = 100
SET_ASIDE_TTL_SECONDS = 7 * 24 * 3600
MAX_SET_ASIDE = 1000

PROMPT_TOKENS = "prompt_tokens"
CACHED_TOKENS = "cached_tokens"
GENERATED_TOKENS = "generated_tokens"
DRAFTED_TOKENS = "drafted_tokens"
ACCEPTED_TOKENS = "accepted_tokens"
RECOVERIES = "recoveries"
REFUSED = "refused"
RETRIED = "retried"
GIVEN_BACK = "given_back"
UNCONFIRMED = "unconfirmed"
TOKEN_COUNTS = (PROMPT_TOKENS, CACHED_TOKENS, GENERATED_TOKENS, DRAFTED_TOKENS, ACCEPTED_TOKENS)
COUNTS = (*TOKEN_COUNTS, RECOVERIES, REFUSED, RETRIED, GIVEN_BACK, UNCONFIRMED)

# How a job can end: RQ's status, and why: the finish reason, the kind of error, or that somebody asked for it.
POISON = ("failed", "poison")
CANCELED = ("canceled", "on_request")
OUTCOMES = (
    *(("finished", reason) for reason in ("stop", "length")),
    *(("failed", reason) for reason in ("bad_request", "prompt_too_long", "model_error", "timeout", "malformed")),
    POISON,
    ("failed", "error"),
    ("stopped", "on_request"),
    CANCELED,
)

# Why a worker was started again: it died, or it had ended in good order (`--max-jobs`, `--max-growth`).
DIED = "died"
ENDED = "ended"
RESTARTS = (DIED, ENDED)


def ended_field(status: str, reason: str) -> str:
    """Return the field of the totals that counts jobs of one of `OUTCOMES`."""
    return f"ended:{status}:{reason}"


CANCELED_FIELD = ended_field(*CANCELED)


def restarts_field(reason: str) -> str:
    """Return the field of the totals that counts restarts for one of `RESTARTS`."""
    return f"restarts:{reason}"


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram counts observations by size, and adds them up.

    Bucket i counts observations of at most `bounds[i]` that are more than the bound before; the last bucket counts
    those over all bounds. A field is named for its bound, so that the counts of another release, which may have other
    bounds, are not mixed up with these.
    """

    name: str
    bounds: tuple[float, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the buckets, one more than there are bounds."""
        return tuple(self._field(at) for at in range(len(self.bounds) + 1))

    @property
    def sum_field(self) -> str:
        return f"{self.name}:sum"

    def field_of(self, value: float) -> str:
        """Return the field of the bucket that an observation belongs to."""
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

# Those to which each job adds one observation, at its end.
OF_JOBS = (QUEUE_SECONDS, FIRST_TOKEN_SECONDS, TOKEN_SECONDS)
TOTAL_FIELDS = (
    *COUNTS,
    *(ended_field(*outcome) for outcome in OUTCOMES),
    *(restarts_field(reason) for reason in RESTARTS),
    *(field for histogram in HISTOGRAMS for field in (*histogram.fields, histogram.sum_field)),
)

# The fields of a recent hash: tokens generated; jobs that workers ended, and those of them that failed; steps, the
# sequences in all of these steps, and how many there was room for; how many jobs waited.
TOKENS = "tokens"
JOBS = "jobs"
FAILED = "failed"
STEPS = "steps"
SEQUENCES = "sequences"
ROOM = "room"
DEPTH = "depth"
RECENT_COUNTS = (TOKENS, JOBS, FAILED, STEPS, SEQUENCES, ROOM, DEPTH)


def count_field(histogram: Histogram) -> str:
    """Return the field of a recent hash that says how many observations its sum is of."""
    return f"{histogram.name}:count"


RECENT_FIELDS = (
    *RECENT_COUNTS,
    *(field for histogram in OF_JOBS for field in (histogram.sum_field, count_field(histogram))),
)
