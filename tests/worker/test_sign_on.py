"""A worker's name: taken once, whatever breaks on the way; kept by who lives; free again after a death."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue, Worker
from rq.command import send_shutdown_command
from rq.utils import now as utc_now
from support.cutting_proxy import CuttingProxy
from support.redis_process import OpenRedis
from support.running import StartWorker, jobs_held, wait_until

from fastgpt2 import Client, Engine
from fastgpt2.errors import BadRequest
from fastgpt2.process import has_surely_ended, pid_space
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import (
    CRASHES_FIELD,
    INCARNATION_FIELD,
    LEASE_SECONDS,
    PID_SPACE_FIELD,
    claimed_key,
    leases_key,
    queues_of,
    workers_key,
)
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker import listener, registration, rq_worker
from fastgpt2.worker.worker import GenerationWorker

pytestmark = pytest.mark.processes

Make = Callable[..., GenerationWorker]

MAY_LIVE = "a worker of this name may still live; waiting until it surely does not"


@pytest.fixture
def make(engine: Engine, redis_server: RedisServer, queue_name: str) -> Iterator[Make]:
    """Make workers in this process, each with connections of its own; named for the queue unless told otherwise."""
    made: list[tuple[GenerationWorker, Redis]] = []

    def make(url: str = redis_server.url, name: str = queue_name) -> GenerationWorker:
        connection = connect(url)
        made.append((GenerationWorker(engine, connection, queue_name, name, drain_timeout=1000), connection))
        # A half of what a worker sends at first would be RQ's clean-up.
        made[-1][0].last_cleaned_at = utc_now()  # type: ignore[assignment]
        return made[-1][0]

    yield make
    for each, connection in made:
        each._claims.close_connections()
        each.lease.stop()
        each.unsubscribe()
        connection.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once, look for lost answers often, and do not wait for a dead worker's name for seconds."""
    monkeypatch.setattr(rq_worker, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(rq_worker, "MAX_RECONNECT_SECONDS", 0.005)
    monkeypatch.setattr(rq_worker, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(listener, "RETRY_SECONDS", 0.005)


def is_registered_once(redis: Redis, worker: GenerationWorker, queue_name: str) -> bool:
    return (
        redis.hget(worker.key, INCARNATION_FIELD) == worker.lease.incarnation.encode()
        and redis.smembers(workers_key(queue_name)) == {worker.key.encode()}
        and redis.zrange(leases_key(queue_name), 0, -1) == [worker.name.encode()]
    )


def die(worker: GenerationWorker, redis: Redis) -> None:
    """Renew the lease no more, as a worker whose process was killed on another machine."""
    worker.lease.stop()
    worker.unsubscribe()
    redis.hset(worker.key, PID_SPACE_FIELD, "another machine's")


def lapse(redis: Redis, name: str) -> None:
    redis.zadd(leases_key(name), {name: redis.time()[0] * 1000 - 1}, xx=True)


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.usefixtures("quick")
def test_a_cut_at_any_command_of_a_workers_life_does_no_harm(
    make: Make,
    redis: Redis,
    client: Client,
    redis_server: RedisServer,
    queue_name: str,
    answered: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Signing on, the first claim, the job, its end, signing off: each is done once, though a worker tries twice."""
    caplog.set_level("INFO", "fastgpt2.worker")
    with CuttingProxy(redis_server.url) as proxy:

        def live(at: int) -> tuple[int, int]:
            """Live a worker's life, with a cut; return how many commands there were up to signing on, and in all."""
            worker = make(proxy.url, f"{queue_name}-{at}")
            proxy.arm(at, answered=answered)
            assert worker.sign_on()
            signed_on = proxy.count
            assert is_registered_once(redis, worker, queue_name), at
            job = client.enqueue("My name is", max_new_tokens=2, ignore_eos=True)
            claimed = claimed_key(worker.name, queue_name)
            for _ in range(1000):
                worker._turn(burst=True)
                if job.status() == "finished" and not redis.exists(claimed):
                    break
            assert job.result(timeout=60).usage.completion_tokens == 2
            worker.sign_off()
            assert redis.zcard(leases_key(queue_name)) == redis.scard(workers_key(queue_name)) == 0, at
            assert redis.hexists(worker.key, "death"), at
            return signed_on, proxy.count

        signed_on, most = live(0)
        step = 2 if answered else 6
        # Each of the last commands of signing on, and some of all others: how many come then varies a little.
        commands = [
            *range(1, signed_on - 12, 10),
            *range(max(1, signed_on - 12), signed_on + 3, step // 2),
            *range(signed_on + 3, most, step),
        ]
        cuts = 0
        for at in commands:
            live(at)
            cuts += proxy.cuts
        assert cuts > len(commands) / 2, "most of them were sent"
    assert MAY_LIVE not in caplog.text, "a worker does not wait for itself"


def test_a_worker_hears_commands_from_the_moment_it_is_listed(
    make: Make, redis: Redis, queue_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make()
    take = worker._registration.take

    def take_and_be_told(entry: dict[str, Any], queues: list[str]) -> bool:
        taken = take(entry, queues)
        send_shutdown_command(redis, worker.name)
        return taken

    monkeypatch.setattr(worker._registration, "take", take_and_be_told)
    assert not worker.work()
    assert not redis.smembers(workers_key(queue_name))


def test_a_pool_outlives_a_cut_after_its_workers_registration(
    redis: Redis, redis_server: RedisServer, client: Client, queue_name: str, tmp_path: Path
) -> None:
    log, sign_on = tmp_path / "log", registration._SIGN_ON
    redis.script_load(sign_on.text)
    with CuttingProxy(redis_server.url) as proxy, log.open("w") as out:
        proxy.arm(holding=sign_on.digest.encode())
        pool = subprocess.Popen(
            [sys.executable, "-m", "fastgpt2", "pool", "--workers", "1", "--redis-url", proxy.url],
            env={**os.environ, "FASTGPT2_QUEUE": queue_name, "FASTGPT2_MODEL": "demo", "FASTGPT2_THREADS": "1"},
            stdout=out,
            stderr=out,
        )
        try:
            wait_until(lambda: "is ready: model" in log.read_text() or pool.poll() is not None, "the worker")
            assert proxy.cuts == 1
            assert client.enqueue("My name is", max_new_tokens=2).result(timeout=60).text
            pool.terminate()
            assert pool.wait(60) == 0, log.read_text()
        finally:
            pool.kill()
            pool.wait()
    assert "active worker" not in log.read_text()
    assert MAY_LIVE not in log.read_text()


class TestNames:
    """A name that another worker has, or had."""

    def test_a_live_worker_keeps_it(self, make: Make, redis: Redis, queue_name: str) -> None:
        """Also if its lease has lapsed at the moment, as all have when Redis's clock jumps."""
        first = make()
        assert first.sign_on()
        lapse(redis, first.name)
        with pytest.raises(BadRequest, match=f"active worker named '{queue_name}' already, process {os.getpid()} on "):
            make().sign_on()
        assert is_registered_once(redis, first, queue_name)

    def test_one_of_rqs_own_keeps_it(self, make: Make, redis: Redis, queue_name: str) -> None:
        stock = Worker([Queue("other", connection=redis)], name=queue_name, connection=redis)
        stock.register_birth()  # type: ignore[no-untyped-call]
        with pytest.raises(BadRequest, match="give each worker a name of its own"):
            make().sign_on()
        stock.register_death()  # type: ignore[no-untyped-call]
        assert make().sign_on()

    @pytest.mark.usefixtures("quick")
    @pytest.mark.parametrize("how", ["with a lease", "without a lease", "and was taken off the lists"])
    def test_a_dead_one_loses_it_with_its_jobs(
        self, make: Make, redis: Redis, client: Client, queue_name: str, how: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        first, second = make(), make()
        assert first.sign_on()
        job = client.enqueue("My name is", max_new_tokens=400, ignore_eos=True)
        while job.status() != "started":
            first._turn(burst=True)
        die(first, redis)
        lapse(redis, first.name)
        if how == "without a lease":
            redis.zrem(leases_key(queue_name), first.name)
        elif how != "with a lease":
            redis.delete(first.key, claimed_key(first.name, queue_name))
        caplog.set_level("INFO", "fastgpt2.worker")
        assert second.sign_on()
        assert is_registered_once(redis, second, queue_name)
        if how != "and was taken off the lists":
            assert job.status() == "queued"
            assert redis.hget(f"rq:job:{job.id}", CRASHES_FIELD) == b"1"
            assert caplog.text.count(MAY_LIVE) == 1
        for running in first.batch:
            first.batch.drop(running)

    @pytest.mark.usefixtures("quick")
    def test_who_lost_it_ends_and_disturbs_nobody(self, make: Make, redis: Redis, queue_name: str) -> None:
        """It was stopped, say, for so long that it was taken for dead."""
        first, second = make(), make()
        assert first.sign_on()
        die(first, redis)
        lapse(redis, first.name)
        assert second.sign_on()
        entry = redis.hgetall(second.key)
        first.lease.beat()
        assert (first.lease.is_taken, first.lease.is_valid) == (True, False)
        first.announce()
        assert {**redis.hgetall(second.key), b"last_heartbeat": b"", b"heard_at": b""} == {
            **entry, b"last_heartbeat": b"", b"heard_at": b"",
        }  # fmt: skip
        assert not first.stop_at_once
        first.keep_up()
        assert (first.stopping.is_set(), first.stop_at_once) == (True, True)
        first.sign_off()
        second.lease.beat()
        assert not second.lease.is_taken
        assert is_registered_once(redis, second, queue_name)

    def test_one_that_was_killed_here_leaves_it_at_once(
        self, start_worker: StartWorker, redis: Redis, client: Client, tmp_path: Path
    ) -> None:
        """Its process is known to be gone. The job that it ran runs again. Who loses the name ends, and says so."""
        first = start_worker(FASTGPT2_NAME="w1")
        with jobs_held():
            job = client.enqueue("My name is", max_new_tokens=400, ignore_eos=True)
            wait_until(lambda: job.status() == "started", "the job to start")
            first.kill()
            first.wait()
        second = start_worker(wait=False, FASTGPT2_NAME="w1")
        assert job.result(timeout=60).usage.completion_tokens == 400
        assert redis.hget(f"rq:job:{job.id}", CRASHES_FIELD) == b"1"
        log = tmp_path / "worker-1.log"
        assert MAY_LIVE not in log.read_text()
        redis.hset("rq:worker:w1", INCARNATION_FIELD, "another")
        assert second.wait(60) == 1, "a supervisor is to start it again"
        assert "worker w1 has lost its name to another; give each worker a name of its own" in log.read_text()
        assert redis.hget("rq:worker:w1", INCARNATION_FIELD) == b"another"
        redis.delete("rq:worker:w1")

    @pytest.mark.usefixtures("quick")
    def test_two_that_want_a_dead_ones_do_not_both_get_it(self, make: Make, redis: Redis, queue_name: str) -> None:
        dead, first, second = make(), make(), make()
        assert dead.sign_on()
        die(dead, redis)
        lapse(redis, dead.name)
        for one in (first, second):
            one.hostname, one.pid, one.birth_date, one.last_heartbeat = "here", 1, utc_now(), utc_now()
        while not first._registration.take(first._entry(), first.served.queues):
            assert not second._registration.take(second._entry(), second.served.queues)
        first.lease.beat()
        with pytest.raises(BadRequest, match="active worker"):
            second._registration.take(second._entry(), second.served.queues)
        assert is_registered_once(redis, first, queue_name)


def test_a_process_is_gone_only_if_that_is_sure() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pid, space = str(child.pid), pid_space()
    assert not has_surely_ended(pid, space)
    child.communicate(b"\n")
    assert has_surely_ended(pid, space) == (space != "")
    for other in ("", "0", "-1", "1 ", "x", "9" * 30):
        assert not has_surely_ended(other, space)
    assert not has_surely_ended(pid, "")
    assert not has_surely_ended(pid, space + "0"), "another name space of process ids"


@pytest.mark.parametrize("at", ["hash", "executions", "workers", "leases", "claimed"])
@pytest.mark.usefixtures("quick")
def test_what_has_no_business_under_a_workers_keys_keeps_it_from_nothing(
    make: Make, redis: Redis, queue_name: str, at: str
) -> None:
    worker = make()
    key = {
        "hash": worker.key,
        "executions": worker.executions_key,
        "workers": workers_key(queue_name),
        "leases": leases_key(queue_name),
        "claimed": claimed_key(worker.name, queue_name),
    }[at]
    redis.set(key, "junk")
    assert worker.sign_on()
    assert is_registered_once(redis, worker, queue_name)
    redis.set(key, "junk")
    worker.lease.beat()
    worker.announce()
    if at != "claimed":
        assert is_registered_once(redis, worker, queue_name)


def test_counts_that_are_none_are_mended(make: Make, redis: Redis) -> None:
    worker = make()
    assert worker.sign_on()
    redis.hset(
        worker.key, mapping={"successful_job_count": "x", "failed_job_count": "9" * 30, "total_working_time": "nan"}
    )
    worker.announce()
    redis.hincrby(worker.key, "successful_job_count", 1)
    redis.hincrby(worker.key, "failed_job_count", 1)
    redis.hincrbyfloat(worker.key, "total_working_time", 1.5)
    worker.announce()
    assert redis.hmget(worker.key, "successful_job_count", "failed_job_count", "total_working_time") == [
        b"1", b"1", b"1.5",
    ]  # fmt: skip


class TestThreads:
    """What runs beside the loop follows Redis, wherever that goes."""

    @pytest.mark.usefixtures("quick")
    def test_commands_are_heard_after_a_cut_and_after_a_silence(
        self, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listener, "SILENCE_SECONDS", 0.1)
        with OpenRedis(folder=tmp_path / "redis") as server, CuttingProxy(server.url) as proxy:
            worker = make(proxy.url)
            with server.administered() as admin:
                heard_by: set[str] = set()

                def is_heard_anew() -> bool:
                    """Tell whether the worker listens on a connection that was not there before, and on no other."""
                    now: Any = admin.client_list(_type="pubsub")
                    found = {each["id"] for each in now}
                    is_new = worker._listener._subscribed.is_set() and len(found) == 1 and not found & heard_by
                    heard_by.update(found if is_new else ())
                    return is_new

                assert worker.sign_on()
                wait_until(is_heard_anew, "the subscription")
                proxy.cut()
                wait_until(is_heard_anew, "a new subscription")
                with server.stopped():
                    wait_until(lambda: not worker._listener._subscribed.is_set(), "the silence to be noticed")
                wait_until(is_heard_anew, "another subscription")
                send_shutdown_command(admin, worker.name)
                wait_until(worker.stopping.is_set, "the command to be heard")
            worker.sign_off()

    @pytest.mark.usefixtures("quick")
    def test_a_master_that_became_a_replica_is_left(self, make: Make, tmp_path: Path, queue_name: str) -> None:
        """Its connections stay, and it answers; only new connections lead to the new master."""
        with (
            OpenRedis(folder=tmp_path / "old") as old,
            OpenRedis(folder=tmp_path / "new") as new,
            old.administered() as demoted,
            new.administered() as master,
            CuttingProxy(old.url) as proxy,
        ):
            worker = make(proxy.url)
            assert worker.sign_on()
            port = int(new.url.rpartition(":")[2].partition("/")[0])
            demoted.replicaof("127.0.0.1", str(port))
            proxy.lead_to(new.url)
            wait_until(lambda: master.zscore(leases_key(queue_name), worker.name), "the lease on the new master")
            with Client(new.url, queue_name) as client:
                job = client.enqueue("My name is", max_new_tokens=2, ignore_eos=True)
                for _ in range(1000):
                    worker._turn(burst=False)
                    if job.status() == "finished":
                        break
                assert job.result(timeout=60).usage.completion_tokens == 2
            assert is_registered_once(master, worker, queue_name)
            wait_until(lambda: dict(master.pubsub_numsub(worker.pubsub_channel_name)).popitem()[1], "a subscription")
            send_shutdown_command(master, worker.name)
            wait_until(worker.stopping.is_set, "the command to be heard")
            worker.sign_off()

    def test_a_thread_that_has_ended_is_started_again(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        worker = make()
        assert worker.sign_on()
        worker.lease._ending.set()
        assert worker.lease._thread is not None
        worker.lease._thread.join()
        worker.lease._ending.clear()
        worker.lease.note_turn()
        assert worker.lease._thread.is_alive()
        assert "the thread that renews the lease has ended" in caplog.text


def test_a_worker_of_many_queues_appears_in_each(make: Make, redis: Redis, queue_name: str) -> None:
    worker = make()
    assert worker.sign_on()
    for name in queues_of(queue_name):
        assert redis.smembers(workers_key(name)) == {worker.key.encode()}
    assert 0 < redis.ttl(worker.key) <= 90
    valid: Any = redis.zscore(leases_key(queue_name), worker.name)
    assert 0 < valid - redis.time()[0] * 1000 <= (LEASE_SECONDS + 1) * 1000
    worker.sign_off()
    worker.sign_off()
    for name in queues_of(queue_name):
        assert not redis.exists(workers_key(name))
