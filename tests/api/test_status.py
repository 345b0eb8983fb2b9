"""Tests of the pool's state: read from figures written by hand, whose sums are known, and from hostile ones."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
import signal
import zlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from rq import Queue
from rq.serializers import JSONSerializer
from rq.utils import utcformat
from support.running import StartWorker, run, wait_until

from fastgpt2 import Client
from fastgpt2.api.pool import snapshot
from fastgpt2.api.pool.job_list import read_latest, read_prompts
from fastgpt2.api.pool.prometheus import render_metrics
from fastgpt2.api.pool.status import check_readiness, read_status, record_depth
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import (
    RECENT_FIELDS,
    TOTAL_FIELDS,
    latest_key,
    leases_key,
    model_totals_name,
    models_key,
    queue_of,
    recent_key,
    totals_key,
)
from fastgpt2.system.redis_server import RedisServer

T = TypeVar("T")
Ask = Callable[..., Any]
TASK = "fastgpt2.worker.tasks.generate"


@pytest.fixture
def ask(redis_server: RedisServer) -> Ask:
    """Return a function that calls one of the endpoint's functions with a connection of its kind."""

    def call(function: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        async def talk() -> T:
            async with AsyncRedis.from_url(redis_server.url) as connection:
                return await function(connection, *args, **kwargs)

        return asyncio.run(talk())

    return call


def bucket(redis: Redis, ago: int = 0) -> int:
    """Return the start of the present ten seconds by Redis's clock, or of the ten seconds `ago` times before."""
    now: Any = redis.time()
    return int(now[0]) // 10 * 10 - 10 * ago


def in_one_bucket(redis: Redis) -> None:
    """Wait until at least five of the present ten seconds are left for a test."""

    def roomy() -> bool:
        now: Any = redis.time()
        return int(now[0]) % 10 < 5

    wait_until(roomy, "the next ten seconds")


def test_rates_and_history(redis: Redis, ask: Ask, queue_name: str) -> None:
    in_one_bucket(redis)
    at = bucket(redis)
    written: dict[int, dict[Any, Any]] = {
        0: {"tokens": 50, "steps": 10, "sequences": 20, "room": 40},
        2: {"tokens": 300, "jobs": 4, "failed": 1, "steps": 100, "sequences": 300, "room": 400, "depth": 7,
            "queue_seconds:sum": "6.0", "queue_seconds:count": 3, "first_token_seconds:sum": "9.0",
            "first_token_seconds:count": 3, "token_seconds:sum": "0.5", "token_seconds:count": 2},
        20: {"tokens": 1000, "steps": 500, "sequences": 500, "room": 2000},
        60: {"tokens": 10_000, "jobs": 6, "queue_seconds:sum": "30", "queue_seconds:count": 6},
        95: {"tokens": 10**9},
    }  # fmt: skip
    for ago, fields in written.items():
        redis.hset(recent_key(queue_name, at - 10 * ago), mapping=fields)
        redis.expire(recent_key(queue_name, at - 10 * ago), 100)
    status = ask(read_status, queue_name, history=True)
    elapsed = status["time"] - at
    assert 0 <= elapsed < 10
    minute, five, quarter = (status["rates"][name] for name in ("1m", "5m", "15m"))
    assert minute["tokens_per_second"] == pytest.approx(350 / (60 + elapsed), abs=0.01)
    assert minute["jobs_per_second"] == pytest.approx(4 / (60 + elapsed), abs=1e-3)
    assert minute["failed_per_second"] == pytest.approx(1 / (60 + elapsed), abs=1e-3)
    assert (minute["queue_seconds"], minute["first_token_seconds"], minute["token_seconds"]) == (2.0, 3.0, 0.25)
    assert minute["batch"] == round(320 / 110, 6)
    assert five["tokens_per_second"] == pytest.approx(1350 / (300 + elapsed), abs=0.01)
    assert quarter["tokens_per_second"] == pytest.approx(11_350 / (900 + elapsed), abs=0.01)
    assert quarter["queue_seconds"] == 4.0
    points = status["history"]["points"]
    assert status["history"]["seconds"] == 10
    assert [point["at"] for point in points] == list(range(at - 900, at, 10))
    assert points[-2] == {
        "at": at - 20, "tokens_per_second": 30.0, "jobs_per_second": 0.4, "failed_per_second": 0.1,
        "queue_seconds": 2.0, "first_token_seconds": 3.0, "token_seconds": 0.25, "batch": 3.0, "batch_occupancy": 0.75,
        "depth": 7,
    }  # fmt: skip
    assert points[-20]["tokens_per_second"] == 100.0
    assert points[-20]["depth"] is None
    assert set(points[-1].values()) == {at - 10, None}
    assert "history" not in ask(read_status, queue_name)


def test_nothing_is_known_of_a_pool_that_never_was(ask: Ask, queue_name: str) -> None:
    status = ask(read_status, queue_name, history=True)
    assert status["queue"]["oldest_wait_seconds"] is None
    assert (status["models"], status["workers"]) == ([], [])
    for rates in status["rates"].values():
        assert (rates["tokens_per_second"], rates["jobs_per_second"]) == (0.0, 0.0)
        assert rates["queue_seconds"] is rates["batch"] is None
    assert len(status["history"]["points"]) == 90
    json.dumps(status, allow_nan=False)


def test_the_depth_is_noted_while_no_worker_lives(redis: Redis, ask: Ask, client: Client, queue_name: str) -> None:
    for priority in ("high", "normal", "low"):
        client.enqueue("a", priority=priority)
    in_one_bucket(redis)
    at = bucket(redis)
    ask(record_depth, queue_name)
    assert redis.hgetall(recent_key(queue_name, at)) == {b"depth": b"3"}
    ttl: Any = redis.ttl(recent_key(queue_name, at))
    assert 1100 < ttl <= 1200
    # Move the record to ten seconds that are over.
    redis.rename(recent_key(queue_name, at), recent_key(queue_name, at - 10))
    point = ask(read_status, queue_name, history=True)["history"]["points"][-1]
    assert (point["depth"], point["tokens_per_second"], point["batch"]) == (3, 0.0, None)


def write_models(redis: Redis, queue_name: str) -> None:
    """Write what workers of three models leave: two live ones with a name in common, one silent, one of long ago."""
    now: Any = redis.time()
    second = now[0] + now[1] / 1e6
    told: list[tuple[str, Any, dict[str, Any], float]] = [
        ("a", ["big", "ours"], {"max_batch": 8, "tokens_per_second": 5}, 0),
        ("b", ["small", "ours"], {"max_batch": 4, "tokens_per_second": 2.5, "named_only": 1}, 0),
        ("c", ["small"], {"max_batch": 4, "tokens_per_second": 9, "named_only": 1}, 60),
        ("of an earlier release", None, {"model": "plain"}, 0),
    ]
    for name, models, fields, silent in told:
        key = f"rq:worker:{queue_name}-{name}"
        names = {} if models is None else {"model": models[0], "models": json.dumps(models)}
        written: dict[Any, Any] = {"state": "idle", "heard_at": second - silent, **names, **fields}
        redis.hset(key, mapping=written)
        redis.expire(key, 60)
        redis.sadd(f"rq:workers:{queue_name}", key)
    until = {"big": 9e3, "ours": 9e3, "small": 9e3, "gone": -1e6, "empty": -1e6}
    redis.zadd(models_key(queue_name), {name: 1000 * second + more for name, more in until.items()})
    counts: dict[Any, Any] = {"generated_tokens": 7, "ended:finished:stop": 2, "ended:failed:error": 1}
    redis.hset(totals_key(model_totals_name(queue_name, "small")), mapping=counts)


def test_figures_by_model(redis: Redis, ask: Ask, queue_name: str) -> None:
    write_models(redis, queue_name)
    ago = {"ours": 20, "gone": 5}
    for model, seconds in ago.items():
        moment = utcformat(datetime.now(UTC) - timedelta(seconds=seconds))
        redis.hset(f"rq:job:{queue_name}-{model}", "enqueued_at", moment)
        redis.rpush(f"rq:queue:{queue_of(queue_name, 'low', model)}", f"{queue_name}-{model}")
    redis.rpush(f"rq:queue:{queue_of(queue_name, 'low')}", "x", "y")
    redis.zadd(f"rq:finished:{queue_of(queue_name, 'high', 'small')}", {"z": 2e9})
    status = ask(read_status, queue_name)
    assert status["queue"]["by_priority"] == {"high": 0, "normal": 0, "low": 4}
    assert (status["queue"]["depth"], status["jobs"]["queued"], status["jobs"]["finished"]) == (4, 4, 1)
    assert 19 < status["queue"]["oldest_wait_seconds"] < 60
    assert status["models"] == ["big", "ours", "plain", "small"]
    found = status["by_model"]
    assert list(found) == ["big", "gone", "ours", "plain", "small"], "of `empty`, nothing is left"
    names = ("served", "models", "workers", "silent", "depth", "max_batch", "tokens_per_second")
    assert {model: tuple(state[name] for name in names) for model, state in found.items()} == {
        "big": (True, ["big"], 1, 0, 0, 8, 5.0),
        "gone": (False, [], 0, 0, 1, 0, 0.0),
        "ours": (True, ["big", "small"], 2, 0, 1, 12, 7.5),
        "plain": (False, ["plain"], 1, 0, 0, 1, 0.0),
        "small": (True, ["small"], 1, 1, 0, 4, 2.5),
    }
    assert 19 < found["ours"]["oldest_wait_seconds"] < 60
    assert 4 < found["gone"]["oldest_wait_seconds"] < 45
    assert found["ours"]["by_priority"] == {"high": 0, "normal": 0, "low": 1}
    totals = found["small"]["totals"]
    assert (totals["generated_tokens"], totals["finished"], totals["failed"]) == (7, 2, 1)
    assert set(found["ours"]["totals"].values()) == {0}, "the totals are those of first names"
    workers = {worker["name"].removeprefix(f"{queue_name}-"): worker for worker in status["workers"]}
    assert [(one["model"], one["named_only"]) for one in workers.values()] == [
        ("big", False), ("small", True), ("small", True), ("plain", False)
    ]  # fmt: skip
    assert ask(record_depth, queue_name) is None
    at = bucket(redis)
    depths = [redis.hget(recent_key(queue_name, start), "depth") for start in (at, at - 10)]
    assert b"4" in depths, "the jobs that name a model are counted with the others"


@pytest.mark.parametrize("odd", ["", "[", "3", "{}", '["a"', "[[]]", "[null]", '["\\u0000"]', "[" * 9000, b"\xff"])
def test_hostile_names_are_none(redis: Redis, ask: Ask, queue_name: str, odd: Any) -> None:
    redis.sadd(f"rq:workers:{queue_name}", f"rq:worker:w-{queue_name}")
    redis.hset(f"rq:worker:w-{queue_name}", mapping={"state": "idle", "model": "known", "models": odd})
    hostile: dict[Any, Any] = {"\x00": 1e15, b"\xff": math.inf, "x" * 1000: 1e15}
    redis.zadd(models_key(queue_name), hostile)
    status = ask(read_status, queue_name)
    check_sane(status)
    assert status["models"] == ["known"]
    assert set(status["by_model"]) <= {"known", "\ufffd"}
    redis.delete(models_key(queue_name))
    redis.set(models_key(queue_name), "x", ex=60)
    assert set(ask(read_status, queue_name)["by_model"]) == {"known"}
    ask(record_depth, queue_name)


def test_the_oldest_wait(redis: Redis, ask: Ask, client: Client, queue_name: str) -> None:
    jobs = {priority: client.enqueue("a", priority=priority) for priority in ("high", "normal")}
    client.enqueue("a")
    for priority, seconds in {"high": 30, "normal": 200}.items():
        moment = datetime.now(UTC) - timedelta(seconds=seconds)
        redis.hset(f"rq:job:{jobs[priority].id}", "enqueued_at", moment.isoformat().replace("+00:00", "Z"))
    assert ask(read_status, queue_name)["queue"]["oldest_wait_seconds"] == pytest.approx(200, abs=2)
    for odd in (b"\xff", "yesterday", "9999-99-99", "0001-01-01T00:00:00+23:59", "x" * 100_000, ""):
        redis.hset(f"rq:job:{jobs['normal'].id}", "enqueued_at", odd)
        found = ask(read_status, queue_name)["queue"]["oldest_wait_seconds"]
        assert found == pytest.approx(30, abs=2) or (found > 1e9 and str(odd).startswith("0001"))


def test_a_live_worker(ask: Ask, client: Client, queue_name: str, start_worker: StartWorker) -> None:
    start_worker(FASTGPT2_MAX_BATCH="2", FASTGPT2_RESTARTS="1")
    for job in [client.enqueue("a", max_new_tokens=480, ignore_eos=True) for _ in range(2)]:
        job.result(60)

    def worker() -> Any:
        (found,) = ask(read_status, queue_name)["workers"]
        return found

    wait_until(lambda: worker()["tokens_per_second"], "the worker to tell its pace")
    found = worker()
    assert found["batch_occupancy"] == round(found["batch_mean"] / 2, 4)
    assert 0 < found["batch_occupancy"] <= 1
    assert 0 <= found["kv_used"] <= 1
    assert (found["threads"], found["restarts"], found["blas"]) == (1, 1, found["computes_by"].split(" in ")[0])
    status = ask(read_status, queue_name)
    assert status["models"] == ["demo"]
    assert status["rates"]["1m"]["tokens_per_second"] > 0
    wait_until(lambda: ask(read_status, queue_name)["totals"]["generated_tokens"] == 960, "all to be told")
    status = ask(read_status, queue_name)
    assert {"status": "finished", "reason": "length", "jobs": 2} in status["totals"]["ended"]


def test_ready(redis: Redis, ask: Ask, queue_name: str, start_worker: StartWorker) -> None:
    reason = ask(check_readiness, queue_name)
    assert "no worker that has loaded its model lives" in reason
    assert "fastgpt2 up" in reason
    process = start_worker()
    assert ask(check_readiness, queue_name) is None
    assert ask(check_readiness, f"{queue_name}-other") is not None
    process.terminate()
    process.wait(60)
    assert ask(check_readiness, queue_name) is not None
    # These leases have lapsed, or end later than any lease could that was taken now.
    now: Any = redis.time()
    for until in (now[0] * 1000 - 1, now[0] * 1000 + 60_000, math.inf):
        redis.zadd(leases_key(queue_name), {"somebody": until})
        assert ask(check_readiness, queue_name) is not None
    redis.zadd(leases_key(queue_name), {"somebody": now[0] * 1000 + 8000})
    assert ask(check_readiness, queue_name) is None
    redis.delete(leases_key(queue_name))
    redis.set(leases_key(queue_name), "x", ex=10)
    assert ask(check_readiness, queue_name) is not None


def test_a_worker_that_hangs_is_silent_until_it_is_heard_again(
    ask: Ask, queue_name: str, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Below the time between two heartbeats: also a worker that is well is silent in between.
    monkeypatch.setattr(snapshot, "SILENT_SECONDS", 1.0)
    process = start_worker()

    def state() -> str:
        (worker,) = ask(read_status, queue_name)["workers"]
        return str(worker["state"])

    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: state() == "silent", "the stopped worker to be silent")
    _, metrics = ask(render_metrics, queue_name)
    assert b'fastgpt2_workers{state="silent"} 1.0' in metrics
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: state() == "idle", "the worker to be heard again")


def test_only_redis_s_clock_tells_who_is_silent(
    redis_server: RedisServer, redis: Redis, ask: Ask, queue_name: str
) -> None:
    """The machine of a worker may be an hour ahead or behind. A stock worker has no other clock to tell of."""
    now: Any = redis.time()
    hour_ago = utcformat(datetime.now(UTC) - timedelta(hours=1))
    told = {"heard": now[0] - 2, "long-ago": now[0] - 13, "in-the-future": now[0] + 3600}
    for name, heard_at in told.items():
        redis.hset(f"rq:worker:{name}", mapping={"state": "busy", "last_heartbeat": hour_ago, "heard_at": heard_at})
    redis.hset("rq:worker:stock", mapping={"state": "busy", "last_heartbeat": hour_ago})
    redis.hset("rq:worker:stock-new", mapping={"state": "idle", "last_heartbeat": utcformat(datetime.now(UTC))})
    names = [*told, "stock", "stock-new"]
    redis.sadd(f"rq:workers:{queue_name}", *(f"rq:worker:{name}" for name in names))
    found = {worker["name"]: worker["state"] for worker in ask(read_status, queue_name)["workers"]}
    shown = run("status", FASTGPT2_REDIS_URL=redis_server.url, FASTGPT2_QUEUE=queue_name).stdout
    redis.delete(*(f"rq:worker:{name}" for name in names))
    assert "worker long-ago: silent, " in shown
    assert found == {
        "heard": "busy",
        "long-ago": "silent",
        "in-the-future": "busy",
        "stock": "silent",
        "stock-new": "idle",
    }


HOSTILE: list[Any] = [
    "many",
    "-5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 39,
    "9" * 10_000,
    b"\xff\xfe",
    "",
    "0x10",
    "1 2",
]


def check_sane(value: Any) -> None:
    """Check that no number in a value is negative, infinite or not a number."""
    json.dumps(value, allow_nan=False)
    if isinstance(value, dict):
        for each in value.values():
            check_sane(each)
    elif isinstance(value, list):
        for each in value:
            check_sane(each)
    elif isinstance(value, int | float):
        assert value >= 0


@pytest.mark.parametrize("odd", HOSTILE, ids=lambda odd: repr(odd)[:20])
def test_hostile_values_are_no_figures(redis: Redis, ask: Ask, queue_name: str, odd: Any) -> None:
    worker = f"rq:worker:w-{queue_name}"
    redis.sadd(f"rq:workers:{queue_name}", worker, "rq:job:x", "elsewhere", b"rq:worker:\xff\xfe", f"{worker}-gone")
    names = ("max_batch", "kv_bytes", "kv_bytes_limit", "tokens", "pid", "birth", "last_heartbeat", "state", "restarts",
             "heard_at", "tokens_per_second", "batch_mean", "private_bytes", "total_working_time",
             "prefix_bytes", "prefix_bytes_limit", "weights", "drafts")  # fmt: skip
    redis.hset(worker, mapping=dict.fromkeys(names, odd))
    redis.hset(totals_key(queue_name), mapping=dict.fromkeys(TOTAL_FIELDS, odd))
    for ago in range(3):
        redis.hset(recent_key(queue_name, bucket(redis, ago)), mapping=dict.fromkeys(RECENT_FIELDS, odd))
    status = ask(read_status, queue_name, history=True)
    check_sane(status)
    (found,) = status["workers"]
    assert (found["name"], found["kv_used"], found["batch_occupancy"]) == (f"w-{queue_name}", None, None)
    assert status["totals"]["generated_tokens"] == 0
    assert status["rates"]["1m"]["tokens_per_second"] == 0.0


def test_keys_of_the_wrong_kind_are_not_there(redis: Redis, ask: Ask, client: Client, queue_name: str) -> None:
    client.enqueue("a")
    lately = [recent_key(queue_name, bucket(redis, ago)) for ago in range(-1, 3)]
    high = f"rq:queue:{queue_of(queue_name, 'high')}"
    of_pool = totals_key(queue_name), latest_key(queue_name), f"rq:wip:{queue_name}", f"rq:workers:{queue_name}"
    for key in (*of_pool, high, *lately):
        redis.set(key, "x", ex=60)
    status = ask(read_status, queue_name, history=True)
    assert status["queue"]["by_priority"] == {"high": 0, "normal": 1, "low": 0}
    assert status["workers"] == []
    assert ask(read_latest, queue_name, 10) == []
    ask(record_depth, queue_name)
    for number in range(3):
        redis.sadd(f"rq:workers:{queue_name}-2", f"rq:worker:{queue_name}-{number}")
        redis.set(f"rq:worker:{queue_name}-{number}", "x", ex=60)
    assert ask(read_status, f"{queue_name}-2")["workers"] == []


def test_a_thousand_workers_are_enough(redis: Redis, ask: Ask, queue_name: str) -> None:
    names = [f"rq:worker:{queue_name}-{n}" for n in range(1100)]
    redis.sadd(f"rq:workers:{queue_name}", *names)
    with redis.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.hset(name, "state", "idle")
            pipeline.expire(name, 100)
        pipeline.execute()
    assert len(ask(read_status, queue_name)["workers"]) == 1000


RECORD: dict[str, Any] = {
    "id": "a", "status": "finished", "finish_reason": "stop", "prompt_tokens": 3, "cached_tokens": 0,
    "completion_tokens": 5, "steps": 3, "drafted": 2, "accepted": 1,
    "queue_seconds": 0.5, "prefill_seconds": 0.25, "decode_seconds": 1.5, "ended_at": 1.8e9, "worker": "w",
}  # fmt: skip


def test_the_latest_jobs(redis: Redis, ask: Ask, queue_name: str) -> None:
    assert ask(read_latest, queue_name, 10) == []
    key = latest_key(queue_name)
    odd: list[Any] = [
        b"\xff",
        "{",
        "[" * 4000,
        "3",
        "null",
        "[]",
        "{}",
        '{"id": 3, "status": "x"}',
        json.dumps({"id": "x" * 5000}),
    ]
    redis.rpush(key, json.dumps(RECORD), *odd)
    hostile = {"id": "b" * 300, "status": "failed", "error": {"a": 1}, "prompt_tokens": -3, "queue_seconds": "soon",
               "decode_seconds": 1e999, "text": "secret", "ended_at": True}  # fmt: skip
    redis.rpush(key, json.dumps(hostile))
    for number in range(100):
        redis.rpush(key, json.dumps({**RECORD, "id": str(number)}))
    first, second, *others = ask(read_latest, queue_name, 1000)
    assert first == {**RECORD, "error": None}
    assert second == {**dict.fromkeys(first), "id": "b" * 200, "status": "failed"}
    assert len(others) == 100 - 11
    assert [each["id"] for each in ask(read_latest, queue_name, 1)] == ["a"]
    assert ask(read_latest, queue_name, 0) == []


def test_the_prompts_of_jobs(redis: Redis, ask: Ask, client: Client, queue_name: str) -> None:
    queue = Queue(queue_name, connection=redis, serializer=JSONSerializer)
    long, ids = "größer als " * 50, list(range(300))
    jobs = {
        client.enqueue(long).id: long[:200],
        client.enqueue(ids).id: ids[:200],
        client.enqueue("").id: "",
        client.enqueue([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]).id: "user: Hi",
        queue.enqueue(TASK, "by position").id: "by position",
        Queue(queue_name, connection=redis).enqueue(TASK, "pickled", max_new_tokens=3).id: "pickled",
    }
    left_out = [client.enqueue("word " * 20_000).id, "gone", ""]
    odd = [
        b"\xff", b"[]", b"[1, 2, 3, 4]", b'["f", null, [], {}]', b'["f", null, [{"a": 1}], {}]', b"[" * 10_000,
        b'["f", null, [[1, "a"]], {}]', pickle.dumps(("f", None, (Redis,), {})), zlib.compress(b"[" + b" " * 10**8),
    ]  # fmt: skip
    for number, data in enumerate(odd):
        left_out.append(f"{queue_name}-{number}")
        redis.hset(f"rq:job:{queue_name}-{number}", "data", data)
    redis.set(f"rq:job:{queue_name}-string", "x", ex=60)
    left_out.append(f"{queue_name}-string")
    assert ask(read_prompts, [*jobs, *left_out]) == jobs
    assert ask(read_prompts, []) == {}
    some = next(iter(jobs))
    assert ask(read_prompts, [*(str(n) for n in range(100)), some]) == {}
    assert ask(read_prompts, [some] * 200) == {some: jobs[some]}


def test_status_takes_the_same_work_however_many_jobs_there_are(redis_server: RedisServer, queue_name: str) -> None:
    """Redis itself counts the commands."""
    admin = connect(redis_server.url)

    def calls() -> int:
        stats: Any = admin.info("commandstats")
        return sum(entry["calls"] for name, entry in stats.items() if name not in ("cmdstat_info", "cmdstat_hello"))

    async def read() -> int:
        async with AsyncRedis.from_url(redis_server.url) as connection:
            await read_status(connection, queue_name, history=True)
            before = calls()
            await read_status(connection, queue_name, history=True)
            return calls() - before

    queue = Queue(queue_name, connection=admin, serializer=JSONSerializer)
    queue.enqueue(TASK, "a")
    # The workers of other tests have ended. Should one still send a heartbeat, the smallest count is without it.
    few = min(asyncio.run(read()) for _ in range(3))
    admin.rpush(f"rq:queue:{queue_name}", *map(str, range(5000)))
    sent: Any = admin.info("stats")["total_net_output_bytes"]
    many = min(asyncio.run(read()) for _ in range(3))
    assert many == few < 150
    # Six times the state, and `commandstats` as often: the ids of the 5,000 jobs alone would be as much once.
    assert admin.info("stats")["total_net_output_bytes"] - sent < 6 * 30_000
    admin.close()
