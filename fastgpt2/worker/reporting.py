"""What a worker counts of its own work, kept in plain numbers and told to Redis once a second."""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as NoAnswer

from fastgpt2 import __version__
from fastgpt2.errors import BadRequest, JobStopped, JobTimedOut, ModelError, PromptTooLong
from fastgpt2.protocol.keys import (
    ACCEPTED_TOKENS,
    BATCH_SIZE,
    CACHED_TOKENS,
    DRAFTED_TOKENS,
    FAILED,
    FIRST_TOKEN_SECONDS,
    GENERATED_TOKENS,
    GIVEN_BACK,
    JOBS,
    KV_USED,
    MAX_LATEST,
    OF_JOBS,
    PROMPT_TOKENS,
    QUEUE_SECONDS,
    RETRIED,
    ROOM,
    SEQUENCES,
    STEPS,
    TOKEN_SECONDS,
    TOKENS,
    Histogram,
    count_field,
    ended_field,
    last_report_key,
    latest_key,
    recent_key,
    totals_key,
)
from fastgpt2.protocol.scripts import Script
from fastgpt2.worker.recycling import Memory

if TYPE_CHECKING:
    from redis import Redis

    from fastgpt2.engine.decoding.decoder import Decoder
    from fastgpt2.engine.engine import Engine
    from fastgpt2.worker.batch import Batch, Running

log = logging.getLogger("fastgpt2.worker")
TELL_SECONDS = 1.0

# How long what was told last is remembered; Redis away for longer than that may have a second's work counted twice.
TOLD_TTL_SECONDS = 3600

# How often the memory for keys and values is looked at while there are jobs; to add it up takes some microseconds.
KV_SECONDS = 0.25

# Over how many tellings, so about as many seconds, a worker says how fast it is.
PACE_TELLINGS = 10

# RQ's ids are of 36 characters; an entry's may be anything.
MAX_ID_CHARACTERS = 200

_REPORT = Script(__file__, "report")


class Figures:
    """Of one worker. Steps and tokens are read off its batch, jobs are noted as they end; `tell_if_due` does the rest.

    What Redis did not take is kept, and told again under the same mark, so that it counts once. What a worker that is
    killed had not told yet, a second's work at most, is not counted.

    Args:
        queue: the name of the pool's queue.
    """

    def __init__(self, connection: Redis, queue: str, worker_name: str, batch: Batch, decoder: Decoder) -> None:
        self._connection = connection
        self._keys = totals_key(queue), last_report_key(worker_name), latest_key(queue)
        self._recent_prefix = recent_key(queue, "")
        self._name = worker_name
        self._batch, self._decoder = batch, decoder
        self._totals: defaultdict[str, float] = defaultdict(int)
        self._recent: defaultdict[str, float] = defaultdict(int)
        self._records: deque[str] = deque(maxlen=MAX_LATEST)
        self._counted_tokens, self._counted_sizes = 0, [0] * len(batch.sizes)
        self._untold: list[Any] | None = None
        self._told_at = self._kv_at = -math.inf
        # Of the last tellings: when, and of the batch then: tokens, steps, sequences in all of them.
        self._pace: deque[tuple[float, int, int, int]] = deque(maxlen=PACE_TELLINGS + 1)

    # What happens.

    def look(self) -> None:
        """Before each step, at what can only be sampled."""
        now = time.monotonic()
        if now - self._kv_at >= KV_SECONDS and self._batch.running:
            self._kv_at = now
            self._observe(KV_USED, self._decoder.kv_bytes_reserved / self._decoder.kv_bytes_limit)

    def finished(self, running: Running, value: dict[str, Any]) -> None:
        """A job came to its end; `value` is its result as JSON."""
        usage, timings, reason = value["usage"], value["timings"], value["finish_reason"]
        self._end("finished", reason)
        self._count_tokens(running)
        self._observe(QUEUE_SECONDS, timings["queue_seconds"])
        self._observe(FIRST_TOKEN_SECONDS, running.first_token_seconds)
        if usage["completion_tokens"] > 1:
            self._observe(TOKEN_SECONDS, timings["decode_seconds"] / (usage["completion_tokens"] - 1))
        self._record(running.id, "finished", {"finish_reason": reason}, value)

    def failed(self, running: Running, error: Exception) -> None:
        """An error ended a job, or somebody stopped it."""
        status, reason = outcome_of(error)
        self._end(status, reason)
        self._count_tokens(running)
        end = {"finish_reason": "cancelled"} if status == "stopped" else {"error": reason}
        self._record(running.id, status, end, running.partial("cancelled"))

    def refused(self, job_id: str, error: Exception) -> None:
        """A job could not even begin."""
        self._end(*outcome_of(error))
        self._record(job_id, "failed", {"error": outcome_of(error)[1]})

    def malformed(self, job_id: str) -> None:
        """A job's entry in Redis could not be read, or not be written."""
        self._end("failed", "malformed")
        self._record(job_id, "failed", {"error": "malformed"})

    def cancelled(self, running: Running) -> None:
        """Who cancels a job counts it; see `fastgpt2.api.client.session`."""
        self._count_tokens(running)
        self._record(running.id, "canceled", {"finish_reason": "cancelled"}, running.partial("cancelled"))

    def retried(self, running: Running | None = None) -> None:
        """A job failed, perhaps before it could begin, and is to run again."""
        self._totals[RETRIED] += 1
        if running is not None:
            self._count_tokens(running)

    def given_back(self, everything: list[Running]) -> None:
        self._totals[GIVEN_BACK] += len(everything)
        for running in everything:
            self._count_tokens(running)

    def _end(self, status: str, reason: str) -> None:
        self._totals[ended_field(status, reason)] += 1
        self._recent[JOBS] += 1
        if status == "failed":
            self._recent[FAILED] += 1

    def _count_tokens(self, running: Running) -> None:
        """Of a job that leaves, unless its prompt was not read to the end."""
        sequence = running.sequence
        if sequence is not None and sequence.token_ids:
            self._totals[PROMPT_TOKENS] += len(running.prompt.ids)
            self._totals[CACHED_TOKENS] += sequence.cached_tokens
            self._totals[DRAFTED_TOKENS] += sequence.drafted
            self._totals[ACCEPTED_TOKENS] += sequence.accepted

    def _observe(self, histogram: Histogram, value: float) -> None:
        self._totals[histogram.field_of(value)] += 1
        self._totals[histogram.sum_field] += float(value)
        if histogram in OF_JOBS:
            self._recent[histogram.sum_field] += float(value)
            self._recent[count_field(histogram)] += 1

    def _record(self, job_id: str, status: str, end: dict[str, str], value: dict[str, Any] | None = None) -> None:
        """Of its text, nothing."""
        of_result: dict[str, Any] = {}
        if value is not None:
            of_result = {**value["usage"], **value["timings"], **value["drafting"]}
        record = {"id": job_id[:MAX_ID_CHARACTERS], "status": status, **end, **of_result}
        self._records.append(json.dumps({**record, "ended_at": round(time.time(), 3), "worker": self._name}))

    # What is told.

    def tell_if_due(self) -> None:
        """Tell what there is to tell, once a second.

        Raises:
            RedisError: see `tell`.
        """
        now = time.monotonic()
        if now - self._told_at >= TELL_SECONDS:
            self._told_at = now
            self.tell()
            self._pace.append((now, *self._so_far()))

    def tell(self) -> None:
        """Tell what there is to tell, now.

        Raises:
            RedisError: Redis cannot be reached. What it says no to is tried again, and disturbs nothing.
        """
        self._count_steps()
        try:
            self._tell()
        except (NoConnection, NoAnswer):
            raise
        except RedisError as reason:
            log.warning("%s: the figures of the pool cannot be written (%s)", self._name, reason)

    def close(self) -> None:
        """Tell the rest."""
        self._count_steps()
        try:
            self._tell()
            self._tell()  # what has come since a telling that was not answered
        except RedisError as reason:
            log.warning("%s: the last figures could not be written (%s)", self._name, reason)

    def pace(self) -> tuple[float, float | None]:
        """Of the last ten seconds: tokens per second, and the mean number of sequences in a step, None without one."""
        tokens, steps, sequences = self._so_far()
        if not self._pace:
            return 0.0, sequences / steps if steps else None
        at, tokens_then, steps_then, sequences_then = self._pace[0]
        seconds, steps = time.monotonic() - at, steps - steps_then
        rate = (tokens - tokens_then) / seconds if seconds > 0 else 0.0
        return rate, (sequences - sequences_then) / steps if steps else None

    def _so_far(self) -> tuple[int, int, int]:
        batch = self._batch
        return batch.tokens, batch.steps, sum(size * count for size, count in enumerate(batch.sizes))

    def _count_steps(self) -> None:
        """Take up what the batch has done since."""
        tokens, sizes = self._batch.tokens, list(self._batch.sizes)
        before = enumerate(self._counted_sizes)
        new = Counter({size: sizes[size] - count for size, count in before if sizes[size] > count})
        steps, sequences = new.total(), sum(size * count for size, count in new.items())
        if not steps:
            return
        for size, count in new.items():
            self._totals[BATCH_SIZE.field_of(size)] += count
        self._totals[BATCH_SIZE.sum_field] += float(sequences)
        self._totals[GENERATED_TOKENS] += tokens - self._counted_tokens
        self._recent[TOKENS] += tokens - self._counted_tokens
        self._recent[STEPS] += steps
        self._recent[SEQUENCES] += sequences
        self._recent[ROOM] += steps * (len(sizes) - 1)
        self._counted_tokens, self._counted_sizes = tokens, sizes

    def _tell(self) -> None:
        if self._untold is None:
            totals, recent = (_pairs(counts) for counts in (self._totals, self._recent))
            if not (totals or recent or self._records):
                return
            numbers = len(totals) // 2, len(recent) // 2
            head = uuid.uuid4().hex, TOLD_TTL_SECONDS, self._recent_prefix
            self._untold = [*head, *numbers, *totals, *recent, *self._records]
            for told in (self._totals, self._recent, self._records):
                told.clear()
        _REPORT.run(self._connection, self._keys, self._untold)
        self._untold = None


def outcome_of(error: Exception) -> tuple[str, str]:
    """RQ's status, and one of few kinds."""
    if isinstance(error, JobStopped):
        return "stopped", "on_request"
    kinds: tuple[tuple[type[Exception], str], ...] = (
        (JobTimedOut, "timeout"),
        (PromptTooLong, "prompt_too_long"),
        (BadRequest, "bad_request"),
        (ModelError, "model_error"),
    )
    return "failed", next((name for kind, name in kinds if isinstance(error, kind)), "error")


def _pairs(counts: dict[str, float]) -> list[str]:
    """Fields, each followed by what to add: whole numbers to counts, and to sums numbers with a point."""
    return [
        word
        for field, count in counts.items()
        if count
        for word in (field, str(count) if isinstance(count, int) else f"{count:.9f}")
    ]


# NOTE worker.description: What a worker says of itself in its hash in Redis, beside RQ's fields.


class Description:
    """Of one worker: what clients need to know of its model, and how it is doing.

    Args:
        restarts: how often its supervisor has started a worker in its place again.

    Attributes:
        longest_token_bytes: of the tokenizer, which takes a while to find it.
    """

    def __init__(self, engine: Engine, batch: Batch, figures: Figures, restarts: int) -> None:
        self._engine, self._batch, self._figures = engine, batch, figures
        self._memory = Memory(engine.decoder.model.helper_pids)
        self.longest_token_bytes = engine.tokenizer.longest_token_bytes
        self._lasting = {
            "fastgpt2_version": __version__,
            "model": engine.model,
            "computes_by": engine.describe(),
            "blas": engine.decoder.model.product_name,
            "weights": engine.weights,
            "drafts": engine.drafts,
            # Each a process of its own, with BLAS held to one thread.
            "threads": engine.decoder.model.size,
            "n_positions": engine.config.n_positions,
            "vocab_size": engine.config.vocab_size,
            "longest_token_bytes": self.longest_token_bytes,
            "max_batch": engine.max_batch,
            "restarts": restarts,
        }

    def fields(self) -> Mapping[str, Any]:
        """As they are now; what is not known is the empty text."""
        batch, decoder = self._batch, self._engine.decoder
        private_bytes, shared_bytes = self._memory.lately()
        tokens_per_second, batch_mean = self._figures.pace()
        return {
            **self._lasting,
            "in_flight": len(batch),
            "kv_bytes": decoder.kv_bytes_reserved,
            "kv_bytes_limit": decoder.kv_bytes_limit,
            "prefix_bytes": decoder.prefix_bytes,
            "prefix_bytes_limit": decoder.prefix_bytes_limit,
            "private_bytes": "" if private_bytes is None else private_bytes,
            "shared_bytes": "" if shared_bytes is None else shared_bytes,
            "tokens": batch.tokens,
            "steps": batch.steps,
            "step_seconds": round(batch.step_seconds, 6),
            "tokens_per_second": round(tokens_per_second, 3),
            "batch_mean": "" if batch_mean is None else round(batch_mean, 3),
        }
