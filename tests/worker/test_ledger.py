"""A worker writes about a job what RQ's own worker writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer
from support.running import GOLDEN, StartWorker, wait_until
from support.stock_worker import run_by_stock

from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import ATTEMPTS_FIELD, EXECUTION_FIELD, PARTIAL_META
from fastgpt2.system.redis_server import RedisServer

pytestmark = pytest.mark.processes

ENTRY: dict[str, Any] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"][0]
TASK = "fastgpt2.worker.tasks.generate"


def traces(redis: Redis, job: Job) -> dict[str, Any]:
    """Return all that Redis has of a job: the fields of its hash, its status, its keys and kinds, its registries."""
    fields: Any = redis.hgetall(job.key)
    found: Any = redis.keys(f"*{job.id}*")
    registries = ("finished", "failed", "started", "canceled", "deferred", "scheduled")
    entries: Any = redis.xrevrange(f"rq:results:{job.id}")
    return {
        "fields": sorted(name.decode() for name in fields if name.decode() not in (ATTEMPTS_FIELD, EXECUTION_FIELD)),
        "status": fields[b"status"],
        "keys": [(key.decode().replace(job.id, "ID"), redis.type(key), redis.ttl(key) > 0) for key in sorted(found)],
        "registries": [
            n for n in registries if job.id in getattr(Queue(job.origin, connection=redis), f"{n}_job_registry")
        ],
        "results": [(sorted(each), each[b"type"]) for _, each in entries],
    }


def outcome_of(job: Job) -> Any:
    result = job.latest_result()
    assert result is not None
    if result.type == Result.Type.FAILED:
        return str(result.exc_string).strip().splitlines()[-1]
    value: Any = result.return_value
    return {name: value[name] for name in value if name != "timings"}


CASES: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 5, "ignore_eos": True},
    {"max_new_tokens": 5, "result_ttl": 77, "failure_ttl": 88, "job_timeout": 99, "meta": {"a": 1}},
    {"max_new_tokens": 5, "result_ttl": -1},
    {"num_beams": 4},
    {"num_beams": 4, "failure_ttl": 55, "meta": {"a": 1}},
    {"max_new_tokens": 100_000},
    {"max_new_tokens": 5, "stream": True},
    {"max_new_tokens": 5, "echo": True, "logprobs": 2},
)


@pytest.fixture(scope="module")
def pairs(redis: Redis, redis_server: RedisServer) -> list[tuple[Job, Job]]:
    """The same jobs, run by a stock worker and by ours; one of each runs them all."""
    queue = Queue("test-ledger", connection=redis, serializer=JSONSerializer)
    theirs = [queue.enqueue(TASK, ENTRY["prompt"], **options) for options in CASES]
    run_by_stock(queue, redis_server)
    ours = [queue.enqueue(TASK, ENTRY["prompt"], **options) for options in CASES]
    own = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": queue.name, "FASTGPT2_MODEL": "demo"}
    command = [sys.executable, "-m", "fastgpt2", "worker", "--burst"]
    subprocess.run(command, env={**os.environ, **own}, check=True, timeout=120, capture_output=True)
    return list(zip(ours, theirs, strict=True))


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(str, CASES))
def test_a_job_leaves_the_same_traces(redis: Redis, pairs: list[tuple[Job, Job]], number: int) -> None:
    ours, theirs = pairs[number]
    assert outcome_of(ours) == outcome_of(theirs)
    assert traces(redis, ours) == traces(redis, theirs)


def test_a_result_that_nobody_wants_leaves_nothing(queue: Queue, redis: Redis, start_worker: StartWorker) -> None:
    job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=2, result_ttl=0)
    start_worker()
    wait_until(lambda: not redis.exists(job.key), "the job to be gone")
    assert not redis.keys(f"*{job.id}*")
    assert queue.started_job_registry.get_job_ids() == []


def test_a_stock_worker_keeps_the_deadline_and_what_it_has(queue: Queue, redis_server: RedisServer) -> None:
    job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=100, timeout=1e-3)
    run_by_stock(queue, redis_server)
    assert "JobTimedOut" in outcome_of(job)
    partial = job.get_meta(refresh=True)[PARTIAL_META]
    assert partial["finish_reason"] == "timeout"
    assert partial["token_ids"] == ENTRY["ids"][:1]


def test_what_is_left_beside_what_a_stock_worker_leaves(queue_name: str) -> None:
    """Only the pool's figures and the names of its models, which expire, and the mark of the worker that wrote them."""
    left: list[dict[str, int]] = []
    for ours in (False, True):
        with RedisServer() as server, connect(server.url) as redis:
            queue = Queue(queue_name, connection=redis, serializer=JSONSerializer)
            job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=5)
            if ours:
                own = {"FASTGPT2_REDIS_URL": server.url, "FASTGPT2_QUEUE": queue_name, "FASTGPT2_MODEL": "demo"}
                command = [sys.executable, "-m", "fastgpt2", "worker", "--burst", "--name", "w"]
                subprocess.run(command, env={**os.environ, **own}, check=True, timeout=60, capture_output=True)
            else:
                run_by_stock(queue, server)
            keys: Any = redis.keys()
            names = {key: key.decode().replace(job.id, "ID").replace(queue_name, "QUEUE") for key in keys}
            names = {key: re.sub(r":\d+$", ":TIME", name) for key, name in names.items()}
            left.append({re.sub(r"^rq:worker:\w+$", "rq:worker:NAME", names[key]): redis.ttl(key) for key in keys})
    theirs, of_ours = left
    more = {name: ttl for name, ttl in of_ours.items() if name not in theirs}
    figures = ["latest:QUEUE", "models:QUEUE", "recent:QUEUE:TIME", "told:w", "totals:QUEUE", "totals:QUEUE@demo"]
    assert sorted(more) == [f"fastgpt2:{name}" for name in figures]
    assert all(ttl > 0 for ttl in more.values())
