"""The metrics of a pool, for Prometheus.

The figures are those that stand in Redis; Prometheus's own library writes them in its formats.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fastgpt2 import __version__
from fastgpt2.api.pool.by_model import read_model_states
from fastgpt2.api.pool.redis_metrics import redis_metrics
from fastgpt2.api.pool.snapshot import Snapshot, WorkerEntry, read_snapshot
from fastgpt2.protocol import keys
from fastgpt2.protocol.untrusted import real, whole

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from redis.asyncio import Redis

WORKER_STATES = ("starting", "started", "suspended", "busy", "idle", keys.SILENT)
_COUNTERS = {
    keys.PROMPT_TOKENS: ("fastgpt2_prompt_tokens", "Prompt tokens that were read, of jobs that left a worker."),
    keys.CACHED_TOKENS: (
        "fastgpt2_cached_tokens",
        "Prompt tokens that were not computed, as an earlier prompt began alike; of jobs that left a worker.",
    ),
    keys.GENERATED_TOKENS: (
        "fastgpt2_generated_tokens",
        "Generated tokens, also those of jobs that were started again.",
    ),
    keys.DRAFTED_TOKENS: ("fastgpt2_drafted_tokens", "Guessed tokens that were verified, of jobs that left a worker."),
    keys.ACCEPTED_TOKENS: (
        "fastgpt2_accepted_tokens",
        "Guessed tokens that came true, each of which saved a step; of jobs that left a worker.",
    ),
    keys.RETRIED: ("fastgpt2_jobs_retried", "Jobs that failed and were enqueued again, as their Retry asks."),
    keys.GIVEN_BACK: (
        "fastgpt2_jobs_given_back",
        "Jobs that a worker put back into the queue, in most cases because the worker was stopped.",
    ),
    keys.UNCONFIRMED: (
        "fastgpt2_ends_unconfirmed",
        "Ends of jobs that were written, and not confirmed to be on a replica, or on disk, in time (--durability).",
    ),
    keys.RECOVERIES: ("fastgpt2_job_recoveries", "Jobs that were taken back from workers that died, to run again."),
    keys.REFUSED: ("fastgpt2_jobs_refused", "Attempts to enqueue that were refused because the queue was full."),
}
_HISTOGRAMS = (
    (
        keys.QUEUE_SECONDS,
        "fastgpt2_job_queue_seconds",
        "Seconds from a job's enqueueing to its start, for jobs that finished.",
    ),
    (
        keys.FIRST_TOKEN_SECONDS,
        "fastgpt2_time_to_first_token_seconds",
        "Seconds from a job's enqueueing to its first token (queue and prefill), for jobs that finished.",
    ),
    (
        keys.TOKEN_SECONDS,
        "fastgpt2_time_per_output_token_seconds",
        "Mean seconds for each of a job's tokens after the first, for jobs that finished.",
    ),
    (keys.BATCH_SIZE, "fastgpt2_step_batch_size", "Sequences that a step decodes together."),
    (
        keys.KV_USED,
        "fastgpt2_kv_used_ratio",
        "Reserved part of the memory for keys and values, sampled four times a second while jobs run.",
    ),
)

# For each worker: a field of its hash, the metric, and what the metric means. The values are as old as its heartbeat.
_WORKER_GAUGES = (
    ("tokens_per_second", "fastgpt2_worker_tokens_per_second", "Tokens per second of a worker, over ten seconds."),
    ("max_batch", "fastgpt2_worker_max_batch_size", "Most sequences that a worker decodes together."),
    ("kv_bytes", "fastgpt2_worker_kv_bytes", "Memory that a worker has reserved for keys and values."),
    ("kv_bytes_limit", "fastgpt2_worker_kv_limit_bytes", "Memory that a worker may use for keys and values."),
    ("prefix_bytes", "fastgpt2_worker_prefix_bytes", "Memory in which a worker keeps prompts' keys and values."),
    (
        "prefix_bytes_limit",
        "fastgpt2_worker_prefix_limit_bytes",
        "Memory that a worker may use to keep prompts' keys and values.",
    ),
    ("private_bytes", "fastgpt2_worker_private_memory_bytes", "Memory that only a worker's own processes use."),
    ("shared_bytes", "fastgpt2_worker_shared_memory_bytes", "Memory of a worker that other processes map too."),
    ("restarts", "fastgpt2_worker_slot_restarts", "How often a supervisor has started a worker again in this place."),
)


class Collector(Protocol):
    """What has metrics of its own."""

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics as they are now."""


async def render_metrics(
    connection: Redis, queue: str, accept: str = "", collectors: Iterable[Collector] = ()
) -> tuple[str, bytes]:
    """Write the metrics of a pool in the format that Prometheus asks for.

    Args:
        accept: the request's header of that name. It names Prometheus's text format or OpenMetrics.
        collectors: what has metrics beside the pool's.

    Returns:
        The content type, and the body.
    """
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_PoolCollector(await read_snapshot(connection, queue)))
    for collector in collectors:
        registry.register(collector)
    encode, content_type = choose_encoder(accept)
    return content_type, encode(registry)


class _PoolCollector:
    """The metrics of one snapshot. prometheus_client calls what yields metrics a collector."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from _queue_gauges(self._snapshot)
        yield from _counters(self._snapshot.totals)
        for histogram, name, meaning in _HISTOGRAMS:
            yield _histogram(histogram, name, meaning, self._snapshot.totals)
        yield from _worker_gauges(self._snapshot)
        yield from _model_gauges(self._snapshot)
        yield from _model_counters(self._snapshot)
        yield from redis_metrics(self._snapshot.redis)


def _queue_gauges(snapshot: Snapshot) -> Iterator[Metric]:
    from prometheus_client.metrics_core import GaugeMetricFamily

    # A gauge, since only OpenMetrics knows an info.
    info = GaugeMetricFamily(
        "fastgpt2_build_info", "Versions of the endpoint and of Redis; the value is 1.", labels=["version", "redis"]
    )
    info.add_metric([__version__, snapshot.redis_version], 1)
    yield info
    depths = GaugeMetricFamily("fastgpt2_queue_jobs", "Waiting jobs, by priority.", labels=["priority"])
    waits = GaugeMetricFamily(
        "fastgpt2_queue_oldest_wait_seconds",
        "Seconds that the job at the head of a queue has waited; 0 if none waits, absent if that cannot be read.",
        labels=["priority"],
    )
    longest = snapshot.waits()
    for priority, depth in snapshot.depths().items():
        depths.add_metric([priority], depth)
        wait = longest[priority] if depth else 0.0
        if wait is not None:
            waits.add_metric([priority], wait)
    yield depths
    yield waits
    jobs = GaugeMetricFamily(
        "fastgpt2_jobs", "Jobs that Redis holds, by RQ's states; ended jobs count until they expire.", labels=["state"]
    )
    for state, count in {"queued": sum(snapshot.depths().values()), **snapshot.jobs}.items():
        jobs.add_metric([state], count)
    yield jobs


def _counters(totals: Mapping[str, Any]) -> Iterator[Metric]:
    from prometheus_client.metrics_core import CounterMetricFamily

    ended = CounterMetricFamily(
        "fastgpt2_jobs_ended", "Jobs that ended, by RQ's status and by reason.", labels=["outcome", "reason"]
    )
    for outcome in keys.OUTCOMES:
        ended.add_metric(outcome, _count(totals, keys.ended_field(*outcome)))
    yield ended
    restarts = CounterMetricFamily(
        "fastgpt2_worker_restarts",
        "Workers that their supervisor started again, after one died or after one ended in good order.",
        labels=["reason"],
    )
    for reason in keys.RESTARTS:
        restarts.add_metric([reason], _count(totals, keys.restarts_field(reason)))
    yield restarts
    for field, (name, meaning) in _COUNTERS.items():
        yield CounterMetricFamily(name, meaning, value=_count(totals, field))


def _histogram(histogram: keys.Histogram, name: str, meaning: str, totals: Mapping[str, Any]) -> Metric:
    from prometheus_client.metrics_core import HistogramMetricFamily

    upto, buckets = 0, []
    for bound, field in zip((*histogram.bounds, math.inf), histogram.fields, strict=True):
        upto += _count(totals, field)
        # Prometheus writes bounds like this ("1.0", "+Inf"), and its rules name them so.
        buckets.append(("+Inf" if bound == math.inf else str(float(bound)), float(upto)))
    return HistogramMetricFamily(name, meaning, buckets=buckets, sum_value=real(totals.get(histogram.sum_field)) or 0.0)


def _worker_gauges(snapshot: Snapshot) -> Iterator[Metric]:
    from prometheus_client.metrics_core import GaugeMetricFamily

    states = dict.fromkeys((*WORKER_STATES, "other"), 0)
    ages = GaugeMetricFamily(
        "fastgpt2_worker_heartbeat_age_seconds", "Seconds since a worker's last heartbeat.", labels=["worker"]
    )
    jobs = GaugeMetricFamily(
        "fastgpt2_worker_jobs", "Jobs that a worker has claimed, also running ones.", labels=["worker"]
    )
    gauges = {field: GaugeMetricFamily(name, meaning, labels=["worker"]) for field, name, meaning in _WORKER_GAUGES}
    # By name, as two names that were cut short can be the same.
    for name, entry in {entry.name: entry for entry in snapshot.workers}.items():
        fields = entry.fields
        jobs.add_metric([name], entry.claimed_count)
        states[_state_of(entry)] += 1
        if entry.heard_seconds is not None:
            ages.add_metric([name], entry.heard_seconds)
        for field, gauge in gauges.items():
            value = real(fields.get(field))
            if value is not None:
                gauge.add_metric([name], value)
    workers = GaugeMetricFamily(
        "fastgpt2_workers", "Registered workers, by state; silent ones hang, or were stopped.", labels=["state"]
    )
    for state, count in states.items():
        workers.add_metric([state], count)
    yield workers
    yield ages
    yield jobs
    yield from gauges.values()


def _model_gauges(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield what waits for each name of a model, and who serves it. A worker counts with each of its names."""
    from prometheus_client.metrics_core import GaugeMetricFamily

    depths = GaugeMetricFamily(
        "fastgpt2_model_queue_jobs", "Waiting jobs that name a model, by its name.", labels=["model"]
    )
    waits = GaugeMetricFamily(
        "fastgpt2_model_oldest_wait_seconds",
        "Seconds that the first of these jobs has waited; 0 if none waits, absent if that cannot be read.",
        labels=["model"],
    )
    workers = GaugeMetricFamily(
        "fastgpt2_model_workers",
        "Registered workers that serve a name of a model, by state.",
        labels=["model", "state"],
    )
    for state in read_model_states(snapshot):
        depth = sum(snapshot.depths(state.name).values())
        depths.add_metric([state.name], depth)
        wait = max((wait for wait in snapshot.waits(state.name).values() if wait is not None), default=None)
        if wait is not None or not depth:
            waits.add_metric([state.name], wait or 0.0)
        counts = Counter(_state_of(worker) for worker in state.workers)
        for name in (*WORKER_STATES, "other"):
            workers.add_metric([state.name, name], counts[name])
    yield depths
    yield waits
    yield workers


def _model_counters(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield what was done for each model, by the first name of the workers that did it."""
    from prometheus_client.metrics_core import CounterMetricFamily

    tokens = CounterMetricFamily(
        "fastgpt2_model_tokens",
        "Tokens by the first name of their model: prompt, cached, generated, drafted and accepted ones.",
        labels=["model", "kind"],
    )
    ended = CounterMetricFamily(
        "fastgpt2_model_jobs",
        "Jobs that ended on a worker, by the first name of its model, RQ's status and reason.",
        labels=["model", "status", "reason"],
    )
    for model, totals in sorted(snapshot.totals_by_model.items()):
        for field in keys.TOKEN_COUNTS:
            tokens.add_metric([model, field.removesuffix("_tokens")], _count(totals, field))
        for outcome in keys.OUTCOMES:
            ended.add_metric([model, *outcome], _count(totals, keys.ended_field(*outcome)))
    yield tokens
    yield ended


def _state_of(worker: WorkerEntry) -> str:
    return worker.state if worker.state in WORKER_STATES else "other"


def _count(totals: Mapping[str, Any], field: str) -> int:
    return whole(totals.get(field)) or 0
