"""Whatever RQ's features a job uses, and however it ends, our worker leaves in Redis what a stock worker leaves.

Each row of the table, a feature, is played with each way of ending by a worker of ours and by one of RQ's, both in this
process: one job is run, and all keys are compared. What differs by intention is said where it is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as NoConnection
from rq import Callback, Queue, RateLimit, Repeat, Retry, SimpleWorker
from rq.cron import CronJob
from rq.group import Group
from rq.job import Dependency, Job
from rq.serializers import DefaultSerializer, JSONSerializer
from rq.timeouts import JobTimeoutException
from rq.webhook import Webhook
from support.redis_process import OpenRedis
from support.turns import Turns, take_turns

from fastgpt2 import Client, Engine
from fastgpt2.protocol.keys import CRASHES_FIELD
from fastgpt2.worker import aftermath, ledger, tasks
from fastgpt2.worker.reaper import MAX_CRASHES, Reaper

pytestmark = pytest.mark.processes

TASK = "fastgpt2.worker.tasks.generate"
QUEUE = "ends"
LIMIT = RateLimit("limit", 1)
Enqueue = Callable[[Queue], object]


def enqueue(queue: Queue, name: str = "a", **options: Any) -> Job:
    return queue.enqueue(TASK, "Once", max_new_tokens=2, job_id=name, **options)


def in_a_group(queue: Queue, **options: Any) -> None:
    data = Queue.prepare_data(TASK, ("Once",), {"max_new_tokens": 2}, job_id="a", **options)
    Group.create(queue.connection, "group").enqueue_many(queue, [data])


def with_dependents(queue: Queue, **options: Any) -> None:
    first = enqueue(queue, **options)
    enqueue(queue, "b", depends_on=first)
    enqueue(queue, "c", depends_on=Dependency(jobs=[first], allow_failure=True, enqueue_at_front=True))


def behind_a_limit(queue: Queue, **options: Any) -> None:
    for name in ("a", "b", "c"):
        enqueue(queue, name, rate_limit=LIMIT, **options)


def with_a_limited_dependent(queue: Queue) -> None:
    first = enqueue(queue, rate_limit=LIMIT)
    enqueue(queue, "b", depends_on=first, rate_limit=LIMIT)


def by_cron(queue: Queue) -> None:
    arguments = {"prompt": "Once", "max_new_tokens": 2}
    cron = CronJob(QUEUE, func=tasks.generate, kwargs=arguments, interval=3600, name="cron", result_ttl=700)
    queue.connection.set("test:cron", cron.enqueue(queue.connection).id)


FEATURES: dict[str, Enqueue] = {
    "nothing": enqueue,
    "times to live": partial(enqueue, result_ttl=700, failure_ttl=900, ttl=5000, meta={"a": 1}),
    "no results": partial(enqueue, result_ttl=0, failure_ttl=0),
    "results for ever": partial(enqueue, result_ttl=-1, failure_ttl=-1),
    "retry": partial(enqueue, retry=Retry(2)),
    "retry at the front": partial(enqueue, retry=Retry(2, enqueue_at_front=True)),
    "retry later": partial(enqueue, retry=Retry(2, [1000, 2000])),
    "repeat": partial(enqueue, repeat=Repeat(2)),
    "repeat later": partial(enqueue, repeat=Repeat(3, [1000, 2000])),
    "dependents": with_dependents,
    "dependents, no results": partial(with_dependents, result_ttl=0, failure_ttl=0),
    "dependents, retry later": partial(with_dependents, retry=Retry(1, 1000)),
    "dependents, repeat": partial(with_dependents, repeat=Repeat(1)),
    "group": in_a_group,
    "group, no results": partial(in_a_group, result_ttl=0),
    "unique": partial(enqueue, unique=True),
    "cron": by_cron,
    "callbacks": partial(
        enqueue,
        on_success=Callback("builtins.print"),
        on_failure=Callback("builtins.print"),
        on_stopped=Callback("builtins.print"),
        webhooks=[Webhook("http://127.0.0.1:9/", "failed")],
    ),
    "limit": behind_a_limit,
    "limit, no results": partial(behind_a_limit, result_ttl=0, failure_ttl=0),
    "limit, retry": partial(behind_a_limit, retry=Retry(1)),
    "limit, retry later": partial(behind_a_limit, retry=Retry(1, 1000)),
    "limit, repeat": partial(behind_a_limit, repeat=Repeat(1)),
    "limit, repeat later": partial(behind_a_limit, repeat=Repeat(1, 1000)),
    "limit, dependents": with_a_limited_dependent,
}
LIMITED = [name for name in FEATURES if name.startswith("limit")]

# Fields that are ours, and the metadata, where ours keep the text of a job that was stopped or is out of time.
OWN_FIELDS = ("fastgpt2_attempts", "fastgpt2_execution", "fastgpt2_crashes", "meta", "last_heartbeat")
# What workers keep of themselves; and the settings of rate limits, which RQ's upkeep deletes when it comes by.
NOT_COMPARED = (
    "rq:worker", "rq:suspended", "rq:clean", "rq:scheduler-lock", "rq:rl-keys", "rq:rl:settings", "fastgpt2:", "test:",
)  # fmt: skip
TOLD_FIELDS = ("status", "retries_left", "repeats_left", "repeat_intervals", "enqueue_at_front")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("demo", max_batch=2, threads=1, prefix_memory=0, drafts="off")


@pytest.fixture(scope="module")
def server() -> Iterator[OpenRedis]:
    with OpenRedis() as made:
        yield made


@pytest.fixture(scope="module")
def connection(server: OpenRedis) -> Iterator[Redis]:
    with server.administered() as made:
        yield made


@pytest.fixture(scope="module")
def worker_of_ours(engine: Engine, server: OpenRedis) -> Iterator[Turns]:
    with take_turns(engine, server, QUEUE) as made:
        made.take()
        yield made


@pytest.fixture
def redis(connection: Redis) -> Redis:
    connection.flushall()
    return connection


@pytest.fixture
def turns(worker_of_ours: Turns, redis: Redis) -> Turns:  # noqa: ARG001 (emptied first)
    """Return our worker, which has not run a job yet as far as this Redis knows."""
    worker_of_ours.worker._claims._turn = 0
    return worker_of_ours


def first(redis: Redis) -> Job:
    """Return the job that is run."""
    cron: Any = redis.get("test:cron")
    serializer = JSONSerializer if cron is None else DefaultSerializer
    return Job.fetch("a" if cron is None else cron.decode(), connection=redis, serializer=serializer)


def state(redis: Redis, of_job: str) -> dict[str, Any]:
    """Return all that Redis has, without what workers keep of themselves, and without ids and moments."""
    found: dict[str, Any] = {}
    for key in sorted(key.decode() for key in redis.scan_iter()):
        key = key.replace("rq:rl:limit", "rq:rl:settings") if key == "rq:rl:limit" else key
        if key.startswith("fastgpt2:taken:"):
            raise AssertionError(f"{key} is left")
        if not key.startswith(NOT_COMPARED):
            lives: Any = redis.ttl(key)
            found[key.replace(of_job, "a")] = round(lives / 100) if lives > 0 else lives, content(redis, key, of_job)
    return found


def content(redis: Redis, key: str, of_job: str) -> Any:
    connection: Any = redis
    match connection.type(key):
        case b"hash":
            fields = {name.decode(): value for name, value in connection.hgetall(key).items()}
            kept = {name: value if name in TOLD_FIELDS else bool(value) for name, value in fields.items()}
            return {name: value for name, value in kept.items() if name not in OWN_FIELDS}
        case b"zset":
            now = time.time()
            entries = {name.decode(): score for name, score in connection.zrange(key, 0, -1, withscores=True)}
            return {name.replace(of_job, "a"): f"{(score - now) / 100:.0f}" for name, score in entries.items()}
        case b"list":
            return [value.decode().replace(of_job, "a") for value in connection.lrange(key, 0, -1)]
        case b"set":
            return sorted(value.decode().replace(of_job, "a") for value in connection.smembers(key))
        case b"stream":
            return [(sorted(fields), fields[b"type"]) for _, fields in connection.xrange(key)]
        case kind:
            return kind


class StockWorker(SimpleWorker):
    """One of RQ's workers without its upkeep, and that listens for no commands: to stop listening takes it a second."""

    should_run_maintenance_tasks = False

    def subscribe(self) -> None:
        pass

    def unsubscribe(self) -> None:
        pass


def play_stock(redis: Redis, monkeypatch: pytest.MonkeyPatch, way: str, feature: Enqueue) -> dict[str, Any]:
    """Have one of RQ's workers run the first job, and return what is in Redis then."""
    feature(Queue(QUEUE, connection=redis, serializer=JSONSerializer))
    job = first(redis)
    worker = StockWorker([QUEUE], connection=redis, serializer=job.serializer)

    def run(*_args: Any, **_kwargs: Any) -> dict[str, Any]:
        if way in ("failed", "stopped"):
            # A stop command kills the process that runs the job; the worker then does what it does of a failure.
            worker._stopped_job_id = job.id if way == "stopped" else None
            raise ValueError("as the test wants")
        if way == "timed out":
            raise JobTimeoutException("as the test wants")
        interfere(way, job)
        return {"text": ""}

    if way == "cancelled in the queue":
        job.cancel()
        return state(redis, job.id)
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "generate", run)
        worker.work(burst=True, max_jobs=1, logging_level="CRITICAL")
    return state(redis, job.id)


def interfere(way: str, job: Job) -> None:
    if way == "cancelled as it runs":
        Job.fetch(job.id, connection=job.connection, serializer=job.serializer).cancel()
    elif way == "deleted as it runs":
        Job.fetch(job.id, connection=job.connection, serializer=job.serializer).delete()


def begin(redis: Redis, turns: Turns, feature: Enqueue) -> Job:
    """Enqueue the jobs, and have our worker start the first one, and no other after it."""
    feature(Queue(QUEUE, connection=redis, serializer=JSONSerializer))
    job = first(redis)
    turns.until(lambda: len(turns.worker.batch), "the job to begin")
    redis.set("rq:suspended", 1)
    assert [each.id for each in turns.worker.batch] == [job.id]
    return job


def play_ours(redis: Redis, turns: Turns, monkeypatch: pytest.MonkeyPatch, way: str, feature: Enqueue) -> Any:
    """As `play_stock`, by a worker of ours."""
    worker = turns.worker
    if way == "cancelled in the queue":
        feature(Queue(QUEUE, connection=redis, serializer=JSONSerializer))
        job = first(redis)
        job.cancel()
        redis.set("rq:suspended", 1)
        turns.take()
        return state(redis, job.id)
    job = begin(redis, turns, feature)
    (running,) = worker.batch
    match way:
        case "failed":
            monkeypatch.setattr(worker.batch, "step", fail)
        case "stopped":
            worker._stop_commands.put(job.id)
        case "timed out":
            running.deadline = 0.0
        case "dead of it":
            redis.hset(job.key, CRASHES_FIELD, MAX_CRASHES - 1)
            worker.batch.drop(running)
            Reaper(redis, QUEUE).reap(worker.name)
        case _:
            interfere(way.removesuffix(", and its worker dies"), job)
            if way.endswith("dies"):
                worker.batch.drop(running)
                Reaper(redis, QUEUE).reap(worker.name)
            worker._last_heartbeat = 0.0  # at the next one it finds out that a job was deleted
    turns.until(lambda: worker._has_no_jobs(), "the job to end")
    return state(redis, job.id)


def fail() -> None:
    raise ValueError("as the test wants")


WAYS = ("finished", "failed", "timed out", "stopped", "cancelled in the queue")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("feature", FEATURES)
def test_the_end_of_a_job(redis: Redis, turns: Turns, monkeypatch: pytest.MonkeyPatch, feature: str, way: str) -> None:
    ours = play_ours(redis, turns, monkeypatch, way, FEATURES[feature])
    redis.flushall()
    assert ours == play_stock(redis, monkeypatch, way, FEATURES[feature])


@pytest.mark.parametrize("feature", [name for name in FEATURES if "retry" not in name])
def test_a_job_that_workers_die_of(redis: Redis, turns: Turns, monkeypatch: pytest.MonkeyPatch, feature: str) -> None:
    """It leaves what a failure leaves, and is not retried: that would cost another four workers."""
    ours = play_ours(redis, turns, monkeypatch, "dead of it", FEATURES[feature])
    redis.flushall()
    assert ours == play_stock(redis, monkeypatch, "failed", FEATURES[feature])


AWAY = ("cancelled as it runs", "deleted as it runs")
# A stock worker repeats what was cancelled or deleted, and keeps its slot; the second deletion of a job stops it short.
STOCK_KEEPS = [("limit, repeat", AWAY[0]), ("limit, repeat", AWAY[1]), ("limit, no results", AWAY[1])]


@pytest.mark.parametrize("dies", [False, True], ids=["", "and its worker dies"])
@pytest.mark.parametrize("way", AWAY)
@pytest.mark.parametrize("feature", ["group", "dependents", "repeat later", "retry", *LIMITED])
def test_who_takes_a_running_job_away(
    redis: Redis, turns: Turns, monkeypatch: pytest.MonkeyPatch, feature: str, way: str, dies: bool
) -> None:
    """A stock worker finishes the job all the same, and writes it anew. With ours it stays cancelled, or deleted.

    The slot of a job under a limit, and all that tells that it runs, are as they are after a stock worker.
    """
    ours = play_ours(redis, turns, monkeypatch, f"{way}, and its worker dies" if dies else way, FEATURES[feature])
    if way == "deleted as it runs":
        assert not [key for key in ours if key.endswith((":a", ":a:dependents"))]
    else:
        assert ours["rq:job:a"][1]["status"] == b"canceled"
        assert list(ours[f"rq:canceled:{QUEUE}"][1]) == ["a"]
    assert not [key for key in ours if key.startswith(("rq:wip", "rq:execution", "rq:finished", "rq:failed"))]
    waits = feature in LIMITED and feature != "limit, dependents"
    assert list(ours.get("rq:rl:limit:allowed", ("", ""))[1]) == (["b"] if waits else [])
    redis.flushall()
    theirs = play_stock(redis, monkeypatch, way, FEATURES[feature])
    if (feature, way) not in STOCK_KEEPS and feature != "limit, dependents":  # which stock releases in any case
        assert slots(ours) == slots(theirs)


def slots(found: dict[str, Any]) -> dict[str, Any]:
    """Return who has a slot, who waits for one, and the state of those behind the first job."""
    kept = {key: value for key, value in found.items() if key.startswith("rq:rl:")}
    for key in ("rq:job:b", "rq:job:c"):
        kept[key] = found[key][1]["status"] if kept and key in found else None
    return kept


@pytest.mark.parametrize("feature", LIMITED)
def test_a_client_of_ours_cancels_in_the_queue(
    redis: Redis, server: OpenRedis, turns: Turns, monkeypatch: pytest.MonkeyPatch, feature: str
) -> None:
    """RQ frees the slot as it cancels. Our clients may do less in Redis, and leave that to a worker."""
    FEATURES[feature](Queue(QUEUE, connection=redis, serializer=JSONSerializer))
    with Client(server.url, QUEUE) as client:
        assert client.cancel("a")
    turns.take()
    redis.set("rq:suspended", 1)
    ours = slots(state(redis, "a"))
    redis.flushall()
    assert ours == slots(play_stock(redis, monkeypatch, "cancelled in the queue", FEATURES[feature]))


@pytest.mark.parametrize("way", ["finished", "failed"])
@pytest.mark.parametrize("feature", LIMITED)
def test_a_worker_that_dies_before_it_frees_a_slot(
    redis: Redis, turns: Turns, monkeypatch: pytest.MonkeyPatch, feature: str, way: str
) -> None:
    def die(*_: Any) -> None:
        raise NoConnection

    with monkeypatch.context() as patch:
        patch.setattr(aftermath, "free_slot", die)
        patch.setattr(ledger, "free_slot", die)
        begin(redis, turns, FEATURES[feature])
        if way == "failed":
            patch.setattr(turns.worker.batch, "step", fail)
        turns.until(lambda: turns.worker._has_no_jobs() or turns.worker._faults.count, "the end to be written")
    turns.worker.outbox._unwritten.clear()
    Reaper(redis, QUEUE).reap(turns.worker.name)
    turns.worker._faults.clear()
    ours = state(redis, "a")
    redis.flushall()
    assert slots(ours) == slots(play_stock(redis, monkeypatch, way, FEATURES[feature]))


@pytest.mark.parametrize("way", ["given back", "its worker died", "its worker died as it was read"])
@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "callbacks"])
def test_what_comes_back_is_as_it_was(redis: Redis, turns: Turns, feature: str, way: str) -> None:
    """A stock worker gives nothing back, and takes a job whose worker died for failed."""
    FEATURES[feature](Queue(QUEUE, connection=redis, serializer=JSONSerializer))
    job = first(redis)
    before = state(redis, job.id)
    worker = turns.worker
    if way == "its worker died as it was read":
        assert worker._claims.claim(1)
    else:
        turns.until(lambda: len(worker.batch), "the job to begin")
    redis.set("rq:suspended", 1)
    if way == "given back":
        worker.outbox.give_back(list(worker.batch))
    else:
        for running in worker.batch:
            worker.batch.drop(running)
        Reaper(redis, QUEUE).reap(worker.name)
    assert state(redis, job.id) == before
