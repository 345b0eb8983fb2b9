"""What a worker has written is held until it will last; what a failover has lost is written again, or run again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from redis import Redis
from rq import Queue, Retry
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer
from support.redis_process import OpenRedis
from support.running import wait_until
from support.turns import Turns, take_turns

from fastgpt2 import Engine
from fastgpt2.errors import RedisUnfit
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.durability import DISK, MEMORY, REPLICA
from fastgpt2.protocol.keys import ATTEMPTS_FIELD, UNCONFIRMED, totals_key
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker import confirmation, rq_worker
from fastgpt2.worker.confirmation import Confirmation

pytestmark = pytest.mark.processes

TASK = "fastgpt2.worker.tasks.generate"


class Replicated:
    """A master, a replica of it, and a replica of that: what a failover leaves is a master with a replica."""

    def __init__(self, *servers: OpenRedis) -> None:
        self.master, self.heir = servers[0], servers[1]
        self.connections = [connect(server.url) for server in servers]
        for connection, above in zip(self.connections[1:], servers, strict=False):
            connection.replicaof("127.0.0.1", above.port)
        for connection in self.connections[1:]:
            wait_until(partial(is_linked, connection), "a replica to have its master's data")

    def cut_off(self) -> None:
        """Let the master go on alone: what it takes from now on, nobody else gets."""
        self.connections[1].replicaof("NO", "ONE")

    def switch(self, turns: Turns) -> None:
        """Kill the master, and lead the worker to the heir."""
        os.kill(self.master.pid, signal.SIGKILL)
        pool: Any = turns.worker.connection.connection_pool
        pool.connection_kwargs["port"] = self.heir.port
        for connection in (*pool._available_connections, *pool._in_use_connections):
            connection.port = self.heir.port

    def close(self) -> None:
        for connection in self.connections:
            connection.close()


def is_linked(connection: Redis) -> bool:
    state: Any = connection.info("replication")
    return bool(state["master_link_status"] == "up")


@pytest.fixture
def replicated() -> Iterator[Replicated]:
    soon = "--repl-diskless-sync-delay", "0"
    with OpenRedis(*soon) as first, OpenRedis(*soon) as second, OpenRedis(*soon) as third:
        made = Replicated(first, second, third)
        yield made
        made.close()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a heartbeat, or to hear of what is late."""
    monkeypatch.setattr(rq_worker, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(confirmation, "LATE_SECONDS", 0.0)


def enqueue(redis: Redis, queue: str, **options: Any) -> Job:
    return Queue(queue, connection=redis, serializer=JSONSerializer).enqueue(TASK, "Once", max_new_tokens=20, **options)


def is_in(redis: Redis, job: Job, *states: str) -> bool:
    return redis.hget(job.key, "status") in [state.encode() for state in states]


def begin(turns: Turns, redis: Redis, queue: str, **options: Any) -> Job:
    """Have the worker start a job."""
    job = enqueue(redis, queue, **options)
    turns.until(lambda: len(turns.worker.batch), "the job to begin")
    return job


def ended_once(redis: Redis, job: Job) -> bool:
    found = Job.fetch(job.id, connection=redis, serializer=JSONSerializer)
    return [result.type for result in found.results()] == [Result.Type.SUCCESSFUL]


@pytest.mark.parametrize("durability", [MEMORY, REPLICA])
def test_a_result_that_a_failover_lost(
    engine: Engine, replicated: Replicated, queue_name: str, durability: str
) -> None:
    """It is written again if it was to be confirmed, and else the job runs again."""
    old, heir = replicated.connections[:2]
    with take_turns(engine, replicated.master, queue_name, durability) as turns:
        job = begin(turns, old, queue_name)
        wait_until(lambda: is_in(heir, job, "started"), "the heir to have the start")
        replicated.cut_off()
        turns.until(lambda: is_in(old, job, "finished"), "the job to finish")
        assert len(turns.worker.confirmation) == (durability == REPLICA)
        replicated.switch(turns)
        wait_until(lambda: take(turns) and is_in(heir, job, "finished"), "the result to be in the heir")
        wait_until(lambda: take(turns) and not len(turns.worker.confirmation), "the result to be confirmed")
        turns.worker.metrics.report()
    assert ended_once(heir, job)
    assert heir.hget(job.key, ATTEMPTS_FIELD) == (b"1" if durability == REPLICA else b"2")
    assert heir.hget(totals_key(queue_name), UNCONFIRMED) is None
    assert heir.keys("fastgpt2:taken:*") == []


def take(turns: Turns) -> bool:
    turns.take()
    return True


def test_what_was_given_back_or_retried_and_lost(engine: Engine, replicated: Replicated, queue_name: str) -> None:
    old, heir = replicated.connections[:2]
    with take_turns(engine, replicated.master, queue_name, REPLICA) as turns:
        returned = begin(turns, old, queue_name)
        retried = enqueue(old, queue_name, retry=Retry(1, 1000))
        turns.until(lambda: len(turns.worker.batch) == 2, "both to begin")
        refused = enqueue(old, queue_name, num_beams=4)
        wait_until(lambda: is_in(heir, retried, "started"), "the heir to have the starts")
        old.set("rq:suspended", 1)
        replicated.cut_off()
        one, other = turns.worker.batch
        turns.worker.outbox.give_back([one])
        turns.worker.outbox.fail(other, ValueError("as the test wants"))
        turns.until(lambda: is_in(old, retried, "scheduled"), "the second to be scheduled")
        assert is_in(old, returned, "queued")
        assert len(turns.worker.confirmation) == 2
        heir.delete("rq:suspended")
        replicated.switch(turns)
        wait_until(lambda: take(turns) and is_in(heir, retried, "scheduled"), "the retry to be in the heir")
        wait_until(lambda: take(turns) and is_in(heir, returned, "finished"), "the other to run again")
        wait_until(lambda: take(turns) and not len(turns.worker.confirmation), "all to be confirmed")
    assert heir.hget(returned.key, ATTEMPTS_FIELD) == b"2"
    assert is_in(heir, refused, "failed")


def test_without_a_replica_the_pool_goes_on(
    engine: Engine,
    redis_server: RedisServer,
    redis: Redis,
    queue_name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with take_turns(engine, redis_server, queue_name, REPLICA) as turns:
        jobs = [enqueue(redis, queue_name) for _ in range(6)]
        turns.until(lambda: all(is_in(redis, job, "finished") for job in jobs), "all to finish")
        held = turns.worker.confirmation
        assert len(held) == 6
        wait_until(lambda: "no replica has them; start one" in caplog.text, "the log to say what is missing")
        with monkeypatch.context() as patch:
            patch.setattr(confirmation, "CONFIRM_SECONDS", 0.0)
            wait_until(lambda: take(turns) and not len(held), "the ends to be let go of")
        monkeypatch.setattr(confirmation, "MOST_HELD", 2)
        jobs = [enqueue(redis, queue_name) for _ in range(4)]
        turns.until(lambda: all(is_in(redis, job, "finished") for job in jobs), "four more to finish")
        assert len(held) == 2
        turns.worker.metrics.report()
    assert redis.hget(totals_key(queue_name), UNCONFIRMED) == b"8"
    assert caplog.text.count("start one") == caplog.text.count("and no longer held") == 1


def test_a_worker_that_stops_waits_for_a_moment(
    engine: Engine, redis_server: RedisServer, redis: Redis, queue_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with take_turns(engine, redis_server, queue_name, REPLICA) as turns:
        worker = turns.worker
        begin(turns, redis, queue_name)
        worker.request_stop(0, None)
        assert not worker._turn(burst=False)
        worker.request_stop(0, None)
        assert not worker._turn(burst=False), "the job was given back, and that is not confirmed"
        wait_until(lambda: worker._turn(burst=False), "the worker to end")
        assert "the worker stops" in caplog.text
        redis.delete(f"rq:queue:{queue_name}")


def test_what_is_on_disk_is_confirmed(engine: Engine, redis_server: RedisServer, redis: Redis, queue_name: str) -> None:
    with take_turns(engine, redis_server, queue_name, DISK) as turns:
        turns.worker.confirmation.check()
        job = begin(turns, redis, queue_name)
        turns.until(lambda: is_in(redis, job, "finished"), "the job to finish")
        wait_until(lambda: take(turns) and not len(turns.worker.confirmation), "the result to be confirmed")
        turns.worker.metrics.report()
    assert redis.hget(totals_key(queue_name), UNCONFIRMED) is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--appendonly", "no"), "set `appendonly yes` there"),
        (("--rename-command", "WAITAOF", ""), "which Redis 7.2 and valkey have"),
    ],
)
def test_a_redis_that_cannot_confirm(options: tuple[str, ...], sentence: str) -> None:
    with OpenRedis(*options) as server, connect(server.url) as redis:
        with pytest.raises(RedisUnfit, match=sentence):
            Confirmation(redis, DISK, "w", lambda _number: None).check()
        Confirmation(redis, REPLICA, "w", lambda _number: None).check()
        Confirmation(redis, MEMORY, "w", lambda _number: None).check()
    Confirmation(redis, DISK, "w", lambda _number: None).check()  # it is away: nobody knows
