"""What raises while claims are handled, and workers that cannot serve: neighbours go on, and a signal ends all."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import (
    BusyLoadingError,
    DataError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import TimeoutError as NoAnswer
from rq import Queue
from rq.job import Job
from support.redis_process import OpenRedis
from support.running import GOLDEN, HOLDABLE, has_ended, jobs_held, wait_until
from support.turns import Turns

from fastgpt2 import Client
from fastgpt2.errors import FastGPT2Error, RedisAccessDenied
from fastgpt2.protocol import keys
from fastgpt2.protocol.untrusted import is_of_service
from fastgpt2.worker import faults
from fastgpt2.worker.claims import Claim
from fastgpt2.worker.reaper import Reaper

TASK = "fastgpt2.worker.tasks.generate"
ENTRY: dict[str, Any] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"][0]


class Panic(BaseException):
    """What a library that is written in Rust raises: no Exception."""


def enqueue(queue: Queue, *names: str) -> list[Job]:
    fields: Any = {"prompt": ENTRY["prompt"], "max_new_tokens": 3, "ignore_eos": True}
    return [queue.enqueue(TASK, kwargs=fields, job_id=f"{queue.name}-{name}") for name in names]


def ended(*jobs: Job) -> bool:
    return all(job.get_status().value in ("finished", "failed") for job in jobs)


@pytest.mark.parametrize("place", ["read", "start", "prepare", "panic", "begin"])
def test_a_claim_that_fails_keeps_none_waiting(
    turns: Turns, queue: Queue, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    worker = turns.worker
    one, bad, two, three = enqueue(queue, "one", "bad", "two", "three")

    def fails(of_claims: Callable[..., Any], named: Callable[..., list[str]]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if bad.id in named(*arguments):
                raise Panic("at the disco") if place == "panic" else RuntimeError("of this claim")
            return of_claims(*arguments)

        return wrapped

    def named(claims: list[Claim]) -> list[str]:
        return [job_id for _, job_id in claims]

    match place:
        case "read":
            monkeypatch.setattr(worker._ledger, "read", fails(worker._ledger.read, named))
        case "start":
            monkeypatch.setattr(worker._ledger, "start", fails(worker._ledger.start, lambda some: [a.id for a in some]))
        case "begin":
            monkeypatch.setattr(worker, "_begin", fails(worker._begin, lambda attempt: [attempt.id]))
        case _:
            known = worker.engine.decoder.prepare
            bad_prompt = "a prompt of its own"
            queue.connection.hset(bad.key, "data", json.dumps([TASK, None, [bad_prompt], {}]))
            named_by_prompt = fails(known, lambda request: [bad.id] if request.prompt == bad_prompt else [])
            monkeypatch.setattr(worker.engine.decoder, "prepare", named_by_prompt)
    turns.take(1)
    started = [job.get_status().value for job in (one, two, three)]
    assert set(started) <= {"started", "finished"}, started
    turns.until(lambda: ended(one, bad, two, three), "all jobs to end")
    assert [job.get_status().value for job in (one, bad, two, three)] == ["finished", "failed", "finished", "finished"]
    assert worker._faults.count == 0
    redis = queue.connection
    notes = [json.loads(note)["id"] for note in redis.lrange(keys.set_aside_key(queue.name), 0, -1)]
    assert notes == ([bad.id] if place in ("read", "start", "begin") else [])
    assert redis.zscore(f"rq:failed:{queue.name}", bad.id)
    result = bad.latest_result()
    assert result is not None
    assert re.search("of this claim|at the disco", result.exc_string or "")
    assert redis.llen(keys.claimed_key(worker.name, queue.name)) == 0


def test_a_worker_that_serves_nobody_for_long_ends(turns: Turns, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its supervisor starts a fresh one; the job that it had is for others."""
    monkeypatch.setattr(faults, "UNFORESEEN_SECONDS", 0.0)
    worker = turns.worker
    (job,) = enqueue(queue, "one")
    worker._claimed = worker._claims.claim(1) or []
    monkeypatch.setattr(worker, "sign_on", lambda: True)
    monkeypatch.setattr(worker, "keep_up", lambda: 1 // 0)
    told: list[Exception] = []

    def work() -> None:
        try:
            worker.work()
        except FastGPT2Error as error:
            told.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert "could serve nothing for" in str(told[0])
    assert "ZeroDivisionError" in str(told[0])
    assert queue.connection.lrange(keys.claimed_key(worker.name, queue.name), 0, -1) == [job.id.encode()]
    assert queue.connection.zscore(keys.leases_key(queue.name), worker.name) is not None


def test_a_worker_whose_redis_is_away_does_not_end(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "UNFORESEEN_SECONDS", 0.0)
    worker = turns.worker

    def fail() -> None:
        raise NoConnection("away")

    with monkeypatch.context() as patch:
        patch.setattr(worker.outbox, "write", fail)
        for count in (1, 2, 3):
            worker._faults._not_before = 0.0
            assert not worker._turn(burst=False)
            assert worker._faults.count == count
    assert not worker.stopping.is_set()


def test_a_worker_whose_redis_denies_access_for_long_ends_and_says_why(
    turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease may be renewed all the while; so nobody else would notice."""
    worker = turns.worker

    def fail() -> None:
        raise NoPermissionError("this user has no permissions to run the 'xadd' command")

    with monkeypatch.context() as patch:
        patch.setattr(worker.outbox, "write", fail)
        assert not worker._turn(burst=False)
        assert not worker._is_beyond_help
        patch.setattr(faults, "UNFORESEEN_SECONDS", 0.0)
        worker._faults._not_before = 0.0
        assert worker._turn(burst=False)
    assert worker._is_beyond_help
    assert isinstance(worker._faults.in_words(), RedisAccessDenied)


def test_a_stop_signal_ends_a_worker_whose_exchanges_fail(
    turns: Turns, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One signal, with claimed jobs that it cannot get rid of, and a fault that does not pass."""
    worker = turns.worker
    enqueue(queue, "one", "two")
    worker._claimed = worker._claims.claim(2) or []
    monkeypatch.setattr(worker, "keep_up", lambda: 1 // 0)
    worker.request_stop(signal.SIGTERM, None)
    turns.until(lambda: worker._turn(burst=False), "the last turn")
    assert queue.connection.llen(keys.claimed_key(worker.name, queue.name)) == 2


@pytest.mark.parametrize(
    ("error", "of_service"),
    [
        (NoConnection("away"), True),
        (NoAnswer("slow"), True),
        (BusyLoadingError("loading"), True),
        (ReadOnlyError("You can't write against a read only replica."), True),
        (OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), True),
        (NoPermissionError("this user has no permissions to run the 'set' command"), True),
        (ResponseError("MISCONF Redis is configured to save RDB snapshots"), True),
        (ResponseError("NOREPLICAS Not enough good replicas to write."), True),
        (ResponseError("BUSY Redis is busy running a script."), True),
        (ResponseError("Error running script (call to f_1): @user_script:1: -OOM command not allowed"), True),
        (BrokenPipeError(), True),
        (ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"), False),
        (ResponseError("hash value is not an integer"), False),
        (ResponseError("invalid expire time in 'expire' command"), False),
        (ResponseError("user_script:3: attempt to compare nil with number"), False),
        (DataError("Invalid input of type: 'NoneType'."), False),
        (ValueError("x"), False),
        (MemoryError(), False),
    ],
)
def test_what_redis_says_when_it_cannot_serve(error: Exception, of_service: bool) -> None:
    assert is_of_service(error) == of_service


# A dead worker's jobs.


def test_what_cannot_be_put_back_stays_claimed_until_it_can(redis: Redis, queue: Queue) -> None:
    """The key of one queue is no list; the jobs of the others go back, and later so do its own."""
    name = queue.name
    claimed, high = keys.claimed_key("gone", name), keys.claimed_key("gone", f"{name}-high")
    (job,) = enqueue(queue, "one")
    redis.lmove(queue.key, claimed, "LEFT", "RIGHT")
    redis.rpush(high, f"{name}-missing", b"\xff")
    redis.set(queue.key, "no list")
    redis.zadd(keys.leases_key(name), {"gone": 12345})
    reaper = Reaper(redis, name)
    recovery = reaper.reap("gone", "12345")
    assert recovery is not None
    assert recovery.put_back == []
    assert redis.lrange(claimed, 0, -1) == [job.id.encode()]
    assert not redis.exists(high)
    leased = redis.zscore(keys.leases_key(name), "gone")
    assert leased is not None
    redis.delete(queue.key)
    recovery = reaper.reap("gone", f"{leased:.0f}")
    assert recovery is not None
    assert recovery.put_back == [job.id]
    assert redis.lrange(queue.key, 0, -1) == [job.id.encode()]


def test_a_dead_workers_list_and_leases_of_another_kind_are_written_anew(redis: Redis, queue: Queue) -> None:
    redis.set(keys.claimed_key("gone", queue.name), "no list")
    redis.set(keys.leases_key(queue.name), "no sorted set")
    assert Reaper(redis, queue.name).reap("gone") is not None
    assert not redis.exists(keys.claimed_key("gone", queue.name), keys.leases_key(queue.name))


# Processes.


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OpenRedis]:
    with OpenRedis(folder=tmp_path / "redis") as made:
        yield made


def start(server: OpenRedis, log: Path, **environment: str) -> subprocess.Popen[str]:
    own = {"FASTGPT2_REDIS_URL": server.url, "FASTGPT2_MODEL": "demo", "FASTGPT2_THREADS": "1", **environment}
    with log.open("w") as out:
        process = subprocess.Popen([*HOLDABLE, "worker"], env={**os.environ, **own}, stderr=out, text=True)
    wait_until(lambda: "is ready" in log.read_text(), "the worker to be ready")
    return process


@pytest.mark.processes
@pytest.mark.parametrize("how", ["hangs", "is gone"])
def test_two_signals_end_a_worker_at_once_whose_redis_is_away(server: OpenRedis, tmp_path: Path, how: str) -> None:
    """It has jobs that run, jobs that have ended, and none of it can be told to anybody."""
    process = start(server, tmp_path / "worker.log", FASTGPT2_MAX_BATCH="2", FASTGPT2_DRAIN_TIMEOUT="3600")
    try:
        with jobs_held():
            with Client(server.url) as client:
                start_long_jobs(client, 3)
            os.kill(server.pid, signal.SIGSTOP if how == "hangs" else signal.SIGKILL)
            process.send_signal(signal.SIGTERM)
            said = "is told to stop"
            wait_until(lambda: said in (tmp_path / "worker.log").read_text(), "the first signal to be heard")
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        if how == "hangs":
            os.kill(server.pid, signal.SIGCONT)


@pytest.mark.processes
def test_a_worker_ends_by_itself_without_supervisor_and_redis(server: OpenRedis, tmp_path: Path) -> None:
    """Both are gone at once, while it runs jobs: it waits for neither."""
    code = (
        "import os, subprocess, sys; os.environ['FASTGPT2_SUPERVISOR_PID'] = str(os.getpid()); "
        f"p = subprocess.Popen({[*HOLDABLE, 'worker']}); print(p.pid, flush=True); p.wait()"
    )
    own = {"FASTGPT2_REDIS_URL": server.url, "FASTGPT2_MODEL": "demo", "FASTGPT2_DRAIN_TIMEOUT": "1"}
    log = tmp_path / "worker.log"
    with log.open("w") as out:
        command = [sys.executable, "-c", code]
        parent = subprocess.Popen(command, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=out, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    wait_until(lambda: "is ready" in log.read_text(), "the worker to be ready")
    with jobs_held():
        with Client(server.url) as client:
            start_long_jobs(client, 1)
        os.kill(server.pid, signal.SIGKILL)
        parent.kill()
        parent.wait()
        wait_until(lambda: "has stopped" in log.read_text(), "the worker to end")
        wait_until(lambda: has_ended(pid), "its process to end")


def start_long_jobs(client: Client, count: int) -> None:
    """Have jobs run that are long enough to be held."""
    jobs = [client.enqueue(ENTRY["prompt"], max_new_tokens=480, ignore_eos=True) for _ in range(count)]
    wait_until(lambda: jobs[0].status() == "started", "a job to start")
