"""The reports of a worker to Redis: its share of the pool's figures each second, its own state with each heartbeat."""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as NoAnswer

from fastgpt2 import __version__
from fastgpt2.errors import BadRequest, JobStopped, JobTimedOut, ModelError, PromptTooLong
from fastgpt2.protocol import keys
from fastgpt2.protocol.scripts import Script
from fastgpt2.worker.batch import End, EndKind
from fastgpt2.worker.recycling import Memory

if TYPE_CHECKING:
    from redis import Redis

    from fastgpt2.engine.decoding.decoder import Decoder
    from fastgpt2.engine.decoding.sequence import Sequence as DecodedSequence
    from fastgpt2.engine.engine import Engine
    from fastgpt2.worker.batch import ActiveJob, Batch

log = logging.getLogger("fastgpt2.worker")
REPORT_SECONDS = 1.0

# How long the mark of the last report is remembered; if Redis is away for longer, a second's work may count twice.
MARK_TTL_SECONDS = 3600

# How often the memory for keys and values is looked at while there are jobs; to add it up takes some microseconds.
KV_SECONDS = 0.25

# Over how many reports, so over about as many seconds, a worker's rate is taken.
RATE_REPORTS = 10

# RQ's ids are of 36 characters; an entry's may be anything.
MAX_ID_CHARACTERS = 200
_REPORT = Script(__file__, "report")


class Metrics:
    """One worker's figures since its last report.

    Steps and tokens are read off its batch, jobs are counted as they end; `report_if_due` does the rest. What Redis did
    not take is kept, and reported again under the same mark, so that it counts once. What a worker that is killed had
    not reported yet, a second's work at most, is not counted.

    Args:
        queue: the name of the pool's queue.
        model: the first name of the worker's model, for whose workers the same is added up.
    """

    def __init__(
        self, connection: Redis, queue: str, worker_name: str, model: str, batch: Batch, decoder: Decoder
    ) -> None:
        self._connection = connection
        of_pool, of_model = keys.totals_key(queue), keys.totals_key(keys.model_totals_name(queue, model))
        self._keys = of_pool, keys.last_report_key(worker_name), keys.latest_key(queue), of_model
        self._recent_prefix = keys.recent_key(queue, "")
        self._name = worker_name
        self._batch, self._decoder = batch, decoder
        self._totals: defaultdict[str, float] = defaultdict(int)
        self._recent: defaultdict[str, float] = defaultdict(int)
        self._records: deque[str] = deque(maxlen=keys.MAX_LATEST)
        self._counted_tokens, self._counted_sizes = 0, [0] * len(batch.sizes)
        self._unanswered: list[Any] | None = None
        self._reported_at = self._kv_at = -math.inf
        # For each of the last reports: when it was, and the batch's tokens, steps, and sequences in all steps then.
        self._history: deque[tuple[float, int, int, int]] = deque(maxlen=RATE_REPORTS + 1)

    def sample(self) -> None:
        """Look at what can only be sampled; call it before each step."""
        now = time.monotonic()
        if now - self._kv_at >= KV_SECONDS and self._batch.decoding:
            self._kv_at = now
            cache = self._decoder.model.cache
            self._observe(keys.KV_USED, cache.bytes_reserved / cache.bytes_limit)

    def count_end(self, end: End, job: ActiveJob | None = None) -> None:
        """Count a job that has ended, and record it among the latest.

        Args:
            job: None if it could not even begin.
        """
        if job is not None and end.kind != EndKind.LOST:
            self._count_tokens(job)
        match end.kind:
            case EndKind.FINISHED:
                assert job is not None
                assert end.result is not None
                self._count_finished(job, end.result)
            case EndKind.FAILED | EndKind.STOPPED:
                assert end.error is not None
                status, reason = outcome_of(end.error)
                self._count_outcome(status, reason)
                why = {"finish_reason": "cancelled"} if end.kind == EndKind.STOPPED else {"error": reason}
                self._record(end.attempt.id, status, why, None if job is None else job.partial_result("cancelled"), job)
            case EndKind.RETRIED:
                self._totals[keys.RETRIED] += 1
            case EndKind.CANCELED:  # whoever cancels a job counts it; see `fastgpt2.api.client.session`
                assert job is not None
                self._record(job.id, "canceled", {"finish_reason": "cancelled"}, job.partial_result("cancelled"), job)
            case EndKind.LOST:
                pass

    def count_malformed(self, job_id: str) -> None:
        """Count a job whose entry in Redis could not be read, or not be written."""
        self._count_outcome("failed", "malformed")
        self._record(job_id, "failed", {"error": "malformed"})

    def count_given_back(self, jobs: list[ActiveJob]) -> None:
        self._totals[keys.GIVEN_BACK] += len(jobs)
        for job in jobs:
            self._count_tokens(job)

    def count_unconfirmed(self, number: int) -> None:
        """Count ends and give-backs that were written, but let go of before anybody confirmed that they will last."""
        self._totals[keys.UNCONFIRMED] += number

    def _count_finished(self, job: ActiveJob, result: dict[str, Any]) -> None:
        usage, timings, reason = result["usage"], result["timings"], result["finish_reason"]
        self._count_outcome("finished", reason)
        self._observe(keys.QUEUE_SECONDS, timings["queue_seconds"])
        self._observe(keys.FIRST_TOKEN_SECONDS, job.first_token_seconds)
        if usage["completion_tokens"] > 1:
            self._observe(keys.TOKEN_SECONDS, timings["decode_seconds"] / (usage["completion_tokens"] - 1))
        self._record(job.id, "finished", {"finish_reason": reason}, result, job)

    def _count_outcome(self, status: str, reason: str) -> None:
        self._totals[keys.ended_field(status, reason)] += 1
        self._recent[keys.JOBS] += 1
        if status == "failed":
            self._recent[keys.FAILED] += 1

    def _count_tokens(self, job: ActiveJob) -> None:
        """Count the tokens of a job that leaves, unless its prompt was not read to the end.

        The prompt counts once, as the first text's sequence has read it; the others have taken it over.
        """
        if not job.sequences or not job.sequences[0].token_ids:
            return
        self._totals[keys.PROMPT_TOKENS] += len(job.prompt.ids)
        self._totals[keys.CACHED_TOKENS] += job.sequences[0].cached_tokens
        self._totals[keys.DRAFTED_TOKENS] += sum(sequence.drafted for sequence in job.sequences)
        self._totals[keys.ACCEPTED_TOKENS] += sum(sequence.accepted for sequence in job.sequences)

    def _observe(self, histogram: keys.Histogram, value: float) -> None:
        self._totals[histogram.field_of(value)] += 1
        self._totals[histogram.sum_field] += float(value)
        if histogram in keys.OF_JOBS:
            self._recent[histogram.sum_field] += float(value)
            self._recent[keys.count_field(histogram)] += 1

    def _record(
        self,
        job_id: str,
        status: str,
        why: dict[str, str],
        result: dict[str, Any] | None = None,
        job: ActiveJob | None = None,
    ) -> None:
        """Record a job that ended, with counts and times of its result, and nothing of its text.

        Of several texts, also of those that are not given, the counts are sums, and the time is that of all together.
        """
        figures = {} if result is None else {**result["usage"], **result["timings"], **result["drafting"]}
        if job is not None and len(job.sequences) > 1:
            figures.update(_sums_of(job.sequences))
        record = {"id": job_id[:MAX_ID_CHARACTERS], "status": status, **why, **figures}
        self._records.append(json.dumps({**record, "ended_at": round(time.time(), 3), "worker": self._name}))

    def report_if_due(self) -> None:
        """Report once a second; see `report` for errors."""
        now = time.monotonic()
        if now - self._reported_at >= REPORT_SECONDS:
            self._reported_at = now
            self.report()
            self._history.append((now, *self._sums()))

    def report(self) -> None:
        """Report what there is to report, now.

        Raises:
            RedisError: Redis cannot be reached. What it says no to is tried again, and disturbs nothing.
        """
        self._count_steps()
        try:
            self._send()
        except (NoConnection, NoAnswer):
            raise
        except RedisError as reason:
            log.warning("%s: the figures of the pool cannot be written (%s)", self._name, reason)

    def close(self) -> None:
        """Report the rest."""
        self._count_steps()
        try:
            self._send()
            self._send()  # what has come since a report that was not answered
        except RedisError as reason:
            log.warning("%s: the last figures could not be written (%s)", self._name, reason)

    def rates(self) -> tuple[float, float | None]:
        """Return the tokens per second of the last ten seconds, and the mean number of sequences in a step.

        The mean is None if there was no step.
        """
        tokens, steps, sequences = self._sums()
        if not self._history:
            return 0.0, sequences / steps if steps else None
        at, tokens_then, steps_then, sequences_then = self._history[0]
        seconds, steps = time.monotonic() - at, steps - steps_then
        rate = (tokens - tokens_then) / seconds if seconds > 0 else 0.0
        return rate, (sequences - sequences_then) / steps if steps else None

    def _sums(self) -> tuple[int, int, int]:
        batch = self._batch
        return batch.tokens, batch.steps, sum(size * count for size, count in enumerate(batch.sizes))

    def _count_steps(self) -> None:
        """Count what the batch has done since the last call."""
        tokens, sizes = self._batch.tokens, list(self._batch.sizes)
        before = enumerate(self._counted_sizes)
        new = Counter({size: sizes[size] - count for size, count in before if sizes[size] > count})
        steps, sequences = new.total(), sum(size * count for size, count in new.items())
        if not steps:
            return
        for size, count in new.items():
            self._totals[keys.BATCH_SIZE.field_of(size)] += count
        self._totals[keys.BATCH_SIZE.sum_field] += float(sequences)
        self._totals[keys.GENERATED_TOKENS] += tokens - self._counted_tokens
        self._recent[keys.TOKENS] += tokens - self._counted_tokens
        self._recent[keys.STEPS] += steps
        self._recent[keys.SEQUENCES] += sequences
        self._recent[keys.ROOM] += steps * (len(sizes) - 1)
        self._counted_tokens, self._counted_sizes = tokens, sizes

    def _send(self) -> None:
        if self._unanswered is None:
            totals, recent = _pairs(self._totals), _pairs(self._recent)
            if not (totals or recent or self._records):
                return
            head = uuid.uuid4().hex, MARK_TTL_SECONDS, self._recent_prefix, len(totals) // 2, len(recent) // 2
            self._unanswered = [*head, *totals, *recent, *self._records]
            self._totals.clear()
            self._recent.clear()
            self._records.clear()
        _REPORT.run(self._connection, self._keys, self._unanswered)
        self._unanswered = None


def outcome_of(error: Exception) -> tuple[str, str]:
    """Return the one of `keys.OUTCOMES` that an error is."""
    if isinstance(error, JobStopped):
        return "stopped", "on_request"
    kinds: tuple[tuple[type[Exception], str], ...] = (
        (JobTimedOut, "timeout"),
        (PromptTooLong, "prompt_too_long"),
        (BadRequest, "bad_request"),
        (ModelError, "model_error"),
    )
    return "failed", next((name for kind, name in kinds if isinstance(error, kind)), "error")


def _sums_of(sequences: Sequence[DecodedSequence]) -> dict[str, float]:
    """Return what was done for several texts: counts, and the seconds from the first token of all to the last."""
    begun = [sequence for sequence in sequences if sequence.token_ids]
    first = min((sequence.first_token_at for sequence in begun), default=0.0)
    return {
        "completion_tokens": sum(len(sequence.token_ids) for sequence in begun),
        "steps": sum(sequence.steps for sequence in begun),
        "drafted": sum(sequence.drafted for sequence in begun),
        "accepted": sum(sequence.accepted for sequence in begun),
        "decode_seconds": max((sequence.finished_at - first for sequence in begun), default=0.0),
    }


def notes_to_field(notes: Sequence[str]) -> str:
    """Return notes as they stand in a worker's hash: a list in JSON, of those that there is room for."""
    shown = [one[: keys.MAX_NOTE_CHARACTERS] for one in notes]
    if len(shown) > keys.MAX_NOTES:
        shown[keys.MAX_NOTES - 1 :] = [f"{len(shown) - keys.MAX_NOTES + 1} more are in the worker's log"]
    return json.dumps(shown)


def _pairs(counts: dict[str, float]) -> list[str]:
    """Return fields, each followed by what to add: whole numbers to counts, and to sums numbers with a point."""
    return [
        word
        for field, count in counts.items()
        if count
        for word in (field, str(count) if isinstance(count, int) else f"{count:.9f}")
    ]


class WorkerInfo:
    """The fields of a worker's hash in Redis beside RQ's: what clients need to know of its model, and how it is doing.

    Args:
        restarts: how often its supervisor has started a worker in its place again.
        names: the names of its model.
        named_only: it takes only jobs that give one of them.

    Attributes:
        longest_token_bytes: of the tokenizer, which takes a while to find it.
    """

    def __init__(
        self,
        engine: Engine,
        batch: Batch,
        metrics: Metrics,
        restarts: int,
        names: Sequence[str],
        named_only: bool,
    ) -> None:
        self._engine, self._batch, self._metrics = engine, batch, metrics
        self._memory = Memory(engine.decoder.model.helper_pids)
        self.longest_token_bytes = engine.tokenizer.longest_token_bytes
        self._constant = {
            "fastgpt2_version": __version__,
            keys.MODEL_FIELD: names[0],
            keys.MODELS_FIELD: json.dumps(list(names)),
            keys.NAMED_ONLY_FIELD: "1" if named_only else "",
            keys.CHAT_FIELD: "1" if engine.chats else "",
            "computes_by": engine.describe(),
            "blas": engine.decoder.model.product_name,
            "weights": engine.weights,
            "drafts": engine.drafts,
            # Each a process of its own, with BLAS held to one thread.
            "threads": engine.decoder.model.size,
            "n_positions": engine.config.n_positions,
            "vocab_size": engine.config.vocab_size,
            "longest_token_bytes": self.longest_token_bytes,
            "restarts": restarts,
            "notes": notes_to_field(engine.notes),
        }

    def fields(self) -> Mapping[str, Any]:
        """Return the fields as they are now; what is not known is the empty text."""
        batch, decoder = self._batch, self._engine.decoder
        private_bytes, shared_bytes = self._memory.measure()
        tokens_per_second, batch_mean = self._metrics.rates()
        return {
            **self._constant,
            "max_batch": self._engine.max_batch,
            "in_flight": len(batch),
            "kv_bytes": decoder.model.cache.bytes_reserved,
            "kv_bytes_limit": decoder.model.cache.bytes_limit,
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
