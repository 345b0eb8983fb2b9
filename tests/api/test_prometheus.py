"""Tests of `/metrics`, by Prometheus's own parsers and its own checker."""

from __future__ import annotations

import asyncio
import math
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from support.programs import find_program
from support.running import StartWorker, wait_until

from fastgpt2 import Client
from fastgpt2.api.pool.prometheus import render_metrics
from fastgpt2.api.pool.redis_metrics import redis_metrics
from fastgpt2.protocol.keys import TOTAL_FIELDS, model_totals_name, models_key, queue_of, recent_key, totals_key
from fastgpt2.system.redis_server import RedisServer

Read = Callable[..., tuple[str, bytes]]
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


@pytest.fixture
def read(redis_server: RedisServer, queue_name: str) -> Read:
    def read(accept: str = "") -> tuple[str, bytes]:
        async def talk() -> tuple[str, bytes]:
            async with AsyncRedis.from_url(redis_server.url) as connection:
                return await render_metrics(connection, queue_name, accept)

        return asyncio.run(talk())

    return read


def samples(body: bytes) -> dict[tuple[str, ...], float]:
    """Return the samples by name and labels' values, each of which must be there once."""
    found: dict[tuple[str, ...], float] = {}
    for family in parse(body.decode()):
        for sample in family.samples:
            key = sample.name, *(sample.labels[label] for label in sorted(sample.labels))
            assert key not in found
            found[key] = sample.value
    return found


def families(body: bytes) -> list[Metric]:
    return list(parse(body.decode()))


def openmetrics_families(body: bytes) -> list[Metric]:
    parse_strictly: Any = openmetrics.text_string_to_metric_families
    return list(parse_strictly(body.decode()))


def check_histograms(body: bytes) -> None:
    """Check that the buckets only grow, and that the last one is the count."""
    for family in families(body):
        if family.type != "histogram":
            continue
        buckets = [(float(s.labels["le"]), s.value) for s in family.samples if s.name.endswith("_bucket")]
        (count,) = [s.value for s in family.samples if s.name.endswith("_count")]
        (total,) = [s.value for s in family.samples if s.name.endswith("_sum")]
        assert buckets == sorted(buckets)
        assert [value for _, value in buckets] == sorted(value for _, value in buckets)
        assert buckets[-1] == (math.inf, count)
        assert total >= 0


def test_what_jobs_leave(client: Client, queue_name: str, start_worker: StartWorker, read: Read) -> None:
    start_worker(FASTGPT2_NAME=f"w-{queue_name}")
    for n in (1, 4):
        client.enqueue("a", max_new_tokens=n, ignore_eos=True).result(20)
    ended = ("fastgpt2_jobs_ended_total", "finished", "length")
    wait_until(lambda: samples(read()[1])[ended] == 2, "both to be counted")
    content_type, body = read()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    found = samples(body)
    assert found["fastgpt2_generated_tokens_total",] == 5
    assert found["fastgpt2_prompt_tokens_total",] == 2
    assert found["fastgpt2_job_queue_seconds_count",] == found["fastgpt2_time_to_first_token_seconds_count",] == 2
    assert found["fastgpt2_time_per_output_token_seconds_count",] == 1
    assert found["fastgpt2_step_batch_size_count",] == found["fastgpt2_step_batch_size_bucket", "1.0"] == 5
    assert found["fastgpt2_jobs", "finished"] == 2
    assert found["fastgpt2_queue_jobs", "normal"] == found["fastgpt2_queue_oldest_wait_seconds", "normal"] == 0
    assert sum(value for key, value in found.items() if key[0] == "fastgpt2_workers") == 1
    assert found["fastgpt2_worker_jobs", f"w-{queue_name}"] == 0
    assert found["fastgpt2_worker_heartbeat_age_seconds", f"w-{queue_name}"] < 60
    assert found["fastgpt2_redis_memory_used_bytes",] > found["fastgpt2_redis_memory_max_bytes",] == 0
    assert found["fastgpt2_redis_persistence_ok", "aof"] == found["fastgpt2_redis_aof_enabled",] == 1
    assert 0 < found["fastgpt2_redis_clients",] < found["fastgpt2_redis_max_clients",]
    assert found["fastgpt2_redis_evicted_keys_total",] == found["fastgpt2_redis_replicas",] == 0
    check_histograms(body)


def test_figures_written_by_hand(redis: Redis, client: Client, queue_name: str, read: Read) -> None:
    redis.hset(
        totals_key(queue_name),
        mapping={
            "queue_seconds<=0.002": 3, "queue_seconds<=0.05": 2, "queue_seconds>": 1, "queue_seconds:sum": "400.25",
            "ended:failed:poison": 2, "restarts:died": 7, "recoveries": 9, "refused": 11, "of another release": 5,
        },
    )  # fmt: skip
    client.enqueue("a", priority="high")
    _, body = read()
    found = samples(body)
    buckets = {le: found["fastgpt2_job_queue_seconds_bucket", le] for le in ("0.002", "0.025", "0.05", "300.0", "+Inf")}
    assert buckets == {"0.002": 3, "0.025": 3, "0.05": 5, "300.0": 5, "+Inf": 6}
    assert (found["fastgpt2_job_queue_seconds_count",], found["fastgpt2_job_queue_seconds_sum",]) == (6, 400.25)
    assert found["fastgpt2_jobs_ended_total", "failed", "poison"] == 2
    assert found["fastgpt2_worker_restarts_total", "died"] == 7
    assert found["fastgpt2_worker_restarts_total", "ended"] == 0
    assert (found["fastgpt2_job_recoveries_total",], found["fastgpt2_jobs_refused_total",]) == (9, 11)
    assert found["fastgpt2_queue_jobs", "high"] == found["fastgpt2_jobs", "queued"] == 1
    assert 0 < found["fastgpt2_queue_oldest_wait_seconds", "high"] < 60
    assert all(family.documentation for family in families(body))


def test_figures_of_models_written_by_hand(redis: Redis, queue_name: str, read: Read) -> None:
    """Two workers with a name in common, one of them silent; jobs that wait for a name that nobody serves."""
    now: Any = redis.time()
    for name, models, silent in (("a", '["big", "ours"]', 0), ("b", '["small", "ours"]', 60)):
        fields: dict[Any, Any] = {"state": "busy", "models": models, "heard_at": now[0] - silent}
        redis.hset(f"rq:worker:{name}-{queue_name}", mapping=fields)
        redis.sadd(f"rq:workers:{queue_name}", f"rq:worker:{name}-{queue_name}")
    redis.zadd(models_key(queue_name), {"big": 1000 * now[0] + 9000, "ours": 1000 * now[0] + 9000, 'a"b': 5})
    redis.rpush(f"rq:queue:{queue_of(queue_name, 'high', 'a' + chr(34) + 'b')}", "x", "y")
    counts: dict[Any, Any] = {"prompt_tokens": 5, "generated_tokens": 7, "ended:failed:timeout": 2}
    redis.hset(totals_key(model_totals_name(queue_name, "big")), mapping=counts)
    found = samples(read()[1])
    of_model = {key[1:]: value for key, value in found.items() if key[0] == "fastgpt2_model_queue_jobs"}
    assert of_model == {('a"b',): 2, ("big",): 0, ("ours",): 0, ("small",): 0}
    assert found["fastgpt2_queue_jobs", "high"] == found["fastgpt2_jobs", "queued"] == 2
    assert found["fastgpt2_model_oldest_wait_seconds", "big"] == 0
    assert ("fastgpt2_model_oldest_wait_seconds", 'a"b') not in found, "the jobs do not say since when they wait"
    workers = {key[1:]: value for key, value in found.items() if key[0] == "fastgpt2_model_workers" and value}
    assert workers == {("big", "busy"): 1, ("ours", "busy"): 1, ("ours", "silent"): 1, ("small", "silent"): 1}
    assert found["fastgpt2_model_tokens_total", "prompt", "big"] == 5
    assert found["fastgpt2_model_tokens_total", "generated", "big"] == 7
    assert found["fastgpt2_model_jobs_total", "big", "timeout", "failed"] == 2
    assert openmetrics_families(read(OPENMETRICS)[1])


def test_openmetrics(redis: Redis, queue_name: str, read: Read) -> None:
    redis.hset(totals_key(queue_name), "generated_tokens", 12)
    content_type, body = read(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    found = {family.name: family for family in openmetrics_families(body)}
    assert [(s.name, s.value) for s in found["fastgpt2_generated_tokens"].samples] == [
        ("fastgpt2_generated_tokens_total", 12)
    ]
    assert found["fastgpt2_job_queue_seconds"].type == "histogram"


def test_promtool_has_no_complaint(read: Read, start_worker: StartWorker) -> None:
    start_worker()
    done = subprocess.run(
        [find_program("promtool"), "check", "metrics"], input=read()[1], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("odd", ["many", "-5", "nan", "1e400", "9" * 39, b"\xff", "", str(2**63 - 1)], ids=repr)
def test_hostile_values_are_no_figures(redis: Redis, queue_name: str, read: Read, odd: Any) -> None:
    redis.hset(totals_key(queue_name), mapping=dict.fromkeys(TOTAL_FIELDS, odd))
    name = f'w-{queue_name}"\n\\{{}}'
    redis.sadd(f"rq:workers:{queue_name}", f"rq:worker:{name}", b"rq:worker:\xff")
    fields: dict[Any, Any] = dict.fromkeys(("state", "kv_bytes", "max_batch", "last_heartbeat", "restarts"), odd)
    redis.hset(f"rq:worker:{name}", mapping=fields)
    _, body = read()
    found = samples(body)
    assert all(value >= 0 and math.isfinite(value) for value in found.values())
    assert found["fastgpt2_worker_jobs", name] == 0
    assert found["fastgpt2_workers", "other"] == 1
    check_histograms(body)
    assert openmetrics_families(read(OPENMETRICS)[1])


def test_keys_of_the_wrong_kind_are_not_there(redis: Redis, queue_name: str, read: Read) -> None:
    now: Any = redis.time()
    for key in (totals_key(queue_name), recent_key(queue_name, now[0] // 10 * 10), f"rq:workers:{queue_name}"):
        redis.set(key, "x", ex=60)
    found = samples(read()[1])
    assert found["fastgpt2_generated_tokens_total",] == 0


def test_what_redis_says_of_itself() -> None:
    def found(info: dict[str, Any]) -> dict[tuple[str, ...], float]:
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in redis_metrics(info)
            for sample in family.samples
        }

    info: dict[str, Any] = {"used_memory": 70, "maxmemory": 100, "evicted_keys": 3, "connected_slaves": 2}
    assert found(info) == {
        ("fastgpt2_redis_memory_used_bytes",): 70,
        ("fastgpt2_redis_memory_max_bytes",): 100,
        ("fastgpt2_redis_evicted_keys_total",): 3,
        ("fastgpt2_redis_replicas",): 2,
    }
    for written, rewritten, well in (("ok", "ok", 1), ("err", "ok", 0), ("ok", "err", 0)):
        said = {"aof_last_write_status": written, "aof_last_bgrewrite_status": rewritten}
        assert found(said) == {("fastgpt2_redis_persistence_ok", "aof"): well}
    assert found({"rdb_last_bgsave_status": "err"}) == {("fastgpt2_redis_persistence_ok", "rdb"): 0}
    assert found({}) == found({"used_memory": "many", "evicted_keys": -1, "maxclients": [1]}) == {}
