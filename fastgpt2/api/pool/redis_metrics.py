"""What Redis says of itself, for Prometheus: its memory, its persistence, its replicas and its connections.

A pool is only as well as its Redis. A provider may hide parts of `INFO`: what is hidden has no metric.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fastgpt2.protocol.untrusted import real, text, whole

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# A field of INFO, the metric, and what the metric means.
_GAUGES = (
    ("used_memory", "fastgpt2_redis_memory_used_bytes", "Memory that Redis has allocated."),
    (
        "maxmemory",
        "fastgpt2_redis_memory_max_bytes",
        "Memory at which Redis refuses what is new (maxmemory); 0 if it has no limit.",
    ),
    ("connected_clients", "fastgpt2_redis_clients", "Connections to Redis, of this pool and of others."),
    ("maxclients", "fastgpt2_redis_max_clients", "Connections that Redis allows."),
    ("connected_slaves", "fastgpt2_redis_replicas", "Replicas that follow this Redis."),
    ("uptime_in_seconds", "fastgpt2_redis_uptime_seconds", "Seconds since Redis was started."),
    ("aof_enabled", "fastgpt2_redis_aof_enabled", "1 if Redis keeps an append-only file, else 0."),
)

# How Redis last fared with each way to keep its data: all these fields must say "ok".
_PERSISTENCE = {"aof": ("aof_last_write_status", "aof_last_bgrewrite_status"), "rdb": ("rdb_last_bgsave_status",)}


def redis_metrics(info: Mapping[str, Any]) -> Iterator[Metric]:
    """Yield the metrics of what `INFO` has said."""
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    for field, name, meaning in _GAUGES:
        value = real(info.get(field))
        if value is not None:
            yield GaugeMetricFamily(name, meaning, value=value)
    evicted = whole(info.get("evicted_keys"))
    if evicted is not None:
        # Of a pool that keeps jobs, each of them may be a job that is lost.
        yield CounterMetricFamily(
            "fastgpt2_redis_evicted_keys", "Keys that Redis has thrown away for want of memory.", value=evicted
        )
    persistence = GaugeMetricFamily(
        "fastgpt2_redis_persistence_ok",
        "1 if Redis last wrote its append-only file, or its snapshot, without an error, else 0.",
        labels=["kind"],
    )
    for kind, fields in _PERSISTENCE.items():
        said = [text(info[field]) for field in fields if field in info]
        if said:
            persistence.add_metric([kind], float(all(word == "ok" for word in said)))
    yield persistence
