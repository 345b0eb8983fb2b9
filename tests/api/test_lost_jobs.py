"""Redis loses jobs while somebody waits for them, or a person deletes them: who waits gets a result, or the truth."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from operator import itemgetter
from typing import Any

import pytest
from redis import Redis
from rq.job import Job as RQJob
from rq.serializers import JSONSerializer
from support.finishing import finish, publish, queued
from support.forgetful import ForgetfulRedis, finish_all, wait_for_queue
from support.running import in_thread, wait_until

from fastgpt2 import AsyncClient, Client, Job
from fastgpt2.api.client import enqueue as enqueue_module
from fastgpt2.api.client import flow as flow_module
from fastgpt2.api.client import reader as reader_module
from fastgpt2.api.client.enqueue import idempotency_keys, plan_job
from fastgpt2.api.client.reader import JobReader, ReadLoop
from fastgpt2.errors import JobCancelled, JobLost, JobNotFound
from fastgpt2.protocol.keys import job_key, once_key, results_key, stream_key

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "READ_SECONDS", 0.2)
    monkeypatch.setattr(flow_module, "LONGEST_PAUSE_SECONDS", 0.1)


@pytest.fixture(scope="module")
def server() -> Iterator[ForgetfulRedis]:
    """A Redis that forgets everything when it is started again."""
    with ForgetfulRedis() as made:
        yield made


@pytest.fixture
def forgetful(server: ForgetfulRedis, queue_name: str) -> Iterator[Client]:
    with Client(server.url, queue_name) as made:
        yield made


@pytest.fixture
def admin(server: ForgetfulRedis) -> Iterator[Redis]:
    with server.administered() as connection:
        yield connection


def is_waited_for(admin: Redis) -> bool:
    clients: Any = admin.client_list()
    return any(one["cmd"] == "xread" and "b" in one["flags"] for one in clients)


class TestRestart:
    @pytest.mark.parametrize("ordered", [True, False], ids=["map", "as_completed"])
    def test_a_bulk_run_enqueues_again(self, server: ForgetfulRedis, forgetful: Client, ordered: bool) -> None:
        prompts = [f"prompt {n}" for n in range(40)]
        call: Any = forgetful.map if ordered else forgetful.as_completed
        ends = call(prompts, in_flight=40, temperature=1.0)
        first = in_thread(lambda: next(ends))
        ids = wait_for_queue(server, forgetful.queue_name, 40)
        with server.administered() as connection:
            before = {job_id: connection.hgetall(job_key(job_id)) for job_id in ids}
            finish(connection, ids[0], f"text of {ids[0]}")
        outcomes = [first.result(60)]
        rest = in_thread(lambda: list(ends))
        for _ in range(2):
            server.restart()
            wait_for_queue(server, forgetful.queue_name, ids[1:])
        with server.administered() as connection:
            for job_id in ids[1:]:
                assert connection.hgetall(job_key(job_id)) == before[job_id], "with the same seed and times"
        finish_all(server, forgetful.queue_name)
        outcomes += rest.result(60)
        texts = (
            [one.text for one in outcomes] if ordered else [one.text for _, one in sorted(outcomes, key=itemgetter(0))]
        )
        assert texts == [f"text of {job_id}" for job_id in ids]

    def test_a_handle_that_waits(self, server: ForgetfulRedis, forgetful: Client, admin: Redis) -> None:
        job = forgetful.enqueue("a")
        waiting = in_thread(job.result)
        wait_until(lambda: is_waited_for(admin), "the client to wait")
        server.restart()
        wait_for_queue(server, forgetful.queue_name, [job.id])
        finish_all(server, forgetful.queue_name)
        assert waiting.result(60).text == f"text of {job.id}"

    def test_a_handle_that_comes_late(self, server: ForgetfulRedis, forgetful: Client) -> None:
        """It was lost while nobody waited."""
        job = forgetful.enqueue("a")
        server.restart()
        waiting = in_thread(job.result)
        wait_for_queue(server, forgetful.queue_name, [job.id])
        finish_all(server, forgetful.queue_name)
        assert waiting.result(60).text == f"text of {job.id}"

    def test_asyncio(self, server: ForgetfulRedis, queue_name: str) -> None:
        async def body() -> str:
            async with AsyncClient(server.url, queue_name) as client:
                return (await (await client.enqueue("a")).result(60)).text

        waiting = in_thread(lambda: asyncio.run(body()))
        ids = wait_for_queue(server, queue_name, 1)
        server.restart()
        wait_for_queue(server, queue_name, ids)
        finish_all(server, queue_name)
        assert waiting.result(60) == f"text of {ids[0]}"

    def test_a_stream_gives_each_character_once(self, server: ForgetfulRedis, forgetful: Client) -> None:
        with forgetful.stream("a", read_timeout=60) as stream:
            with server.administered() as connection:
                # It had been started twice.
                publish(connection, stream.job.id, "text ", 0, attempt=2)
            first = next(stream)
            assert (first.text, first.at) == ("text ", 0)
            rest = in_thread(lambda: list(stream))
            server.restart()
            wait_for_queue(server, forgetful.queue_name, [stream.job.id])
            with server.administered() as connection:
                publish(connection, stream.job.id, "te", 0)
                publish(connection, stream.job.id, "xt of ", 2)
                publish(connection, stream.job.id, stream.job.id[:5], 8)
                finish(connection, stream.job.id, f"text of {stream.job.id}")
            pieces = rest.result(60)
            at = len("text ")
            for piece in pieces:
                assert piece.at == at
                at += len(piece.text)
            assert "text " + "".join(piece.text for piece in pieces) == f"text of {stream.job.id}"

    def test_who_did_not_enqueue_it_is_told(self, server: ForgetfulRedis, forgetful: Client, admin: Redis) -> None:
        job_id = forgetful.enqueue("a").id
        waiting = in_thread(lambda: forgetful.result(job_id))
        wait_until(lambda: is_waited_for(admin), "the client to wait")
        server.restart()
        with pytest.raises(
            JobLost, match=r"is gone from Redis without an end: Redis was started again, or another took"
        ):
            waiting.result(60)

    def test_what_was_cancelled_is_not_enqueued_again(self, server: ForgetfulRedis, forgetful: Client) -> None:
        job = forgetful.enqueue("a")
        assert job.cancel()
        self.is_told_after_a_restart(server, job, JobLost)

    def test_what_had_ended_is_not_enqueued_again(
        self, server: ForgetfulRedis, forgetful: Client, admin: Redis
    ) -> None:
        job = forgetful.enqueue("a")
        finish(admin, job.id, "text")
        assert job.result(timeout=60).text == "text"
        self.is_told_after_a_restart(server, job, JobNotFound)

    def is_told_after_a_restart(self, server: ForgetfulRedis, job: Job, kind: type[JobNotFound]) -> None:
        """Who asks for the job gets this error, and nothing is enqueued again."""
        server.restart()
        with pytest.raises(kind):
            job.result(timeout=60)
        with server.administered() as connection:
            assert connection.keys("rq:*") == []

    def test_no_more_often_than_so(
        self, server: ForgetfulRedis, forgetful: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(enqueue_module, "LOST_TRIES", 1)
        job = forgetful.enqueue("a")
        waiting = in_thread(job.result)
        server.restart()
        wait_for_queue(server, forgetful.queue_name, [job.id])
        server.restart()
        with pytest.raises(JobLost, match=r"also after it was enqueued again .* times; see to Redis first"):
            waiting.result(60)

    def test_a_full_queue_takes_back_what_it_had(self, server: ForgetfulRedis, queue_name: str) -> None:
        """Others have filled the queue meanwhile."""
        with Client(server.url, queue_name, max_queue=1) as client:
            job = client.enqueue("a")
            server.restart()
            client.enqueue("b")
            waiting = in_thread(job.result)
            wait_for_queue(server, queue_name, 2)
            finish_all(server, queue_name)
            assert waiting.result(60).text == f"text of {job.id}"

    def test_a_field_that_somebody_wrote_after_the_loss_does_not_count_as_the_job(
        self, server: ForgetfulRedis, forgetful: Client
    ) -> None:
        job = forgetful.enqueue("a")
        server.restart()
        with server.administered() as connection:
            connection.hset(job_key(job.id), "last_heartbeat", "x")
        waiting = in_thread(job.result)
        wait_for_queue(server, forgetful.queue_name, [job.id])
        finish_all(server, forgetful.queue_name)
        assert waiting.result(60).text == f"text of {job.id}"

    def test_two_requests_with_one_idempotency_key_wait_for_one_job(
        self, server: ForgetfulRedis, forgetful: Client
    ) -> None:
        """Whichever of them comes first enqueues its own job; the other waits for that one."""
        session, driver = forgetful._session, forgetful._driver
        plan = plan_job("a", {"temperature": 1.0})
        keys = idempotency_keys("key", 1, plan)
        readers = []
        for _ in range(2):
            (sent,) = driver.run(session.send_all([plan], keys))
            readers.append(JobReader(sent.id, sent=sent))
        assert readers[0].id == readers[1].id
        server.restart()
        loop = ReadLoop(session.recovery)
        driver.run(loop.turn(readers[1:]))
        driver.run(loop.turn(readers))
        (job_id,) = wait_for_queue(server, forgetful.queue_name, 1)
        assert [reader.id for reader in readers] == [job_id] * 2
        finish_all(server, forgetful.queue_name)
        while not all(reader.outcome for reader in readers):
            driver.run(loop.turn(readers))
        with server.administered() as connection:
            assert connection.hget(once_key_of(keys), "job") == job_id.encode()


def once_key_of(keys: Any) -> str:
    key: str = keys[0].redis_key
    assert key.startswith(once_key(""))
    return key


def delete_by_rq(admin: Redis, job_id: str) -> None:
    RQJob.fetch(job_id, connection=admin, serializer=JSONSerializer).delete()


def flush(admin: Redis, _: str) -> None:
    admin.flushall()


class TestDeletion:
    @pytest.mark.parametrize("delete", [delete_by_rq, flush], ids=["by RQ", "by FLUSHALL"])
    @pytest.mark.parametrize("how", ["result", "by id", "stream", "map"])
    def test_who_waits_is_told(self, forgetful: Client, admin: Redis, delete: Any, how: str) -> None:
        """Nothing is enqueued again: a person wanted it gone."""
        if how == "map":
            waiting: Future[Any] = in_thread(lambda: list(forgetful.map(["a"])))
            wait_until(lambda: queued(admin, forgetful.queue_name), "the job to be in the queue")
            (job_id,) = queued(admin, forgetful.queue_name)
        else:
            job = forgetful.enqueue("a", stream=how == "stream")
            job_id = job.id
            by_id = partial(forgetful.result, job_id)
            calls: dict[str, Any] = {"result": job.result, "by id": by_id, "stream": lambda: list(job.stream())}
            waiting = in_thread(calls[how])
        wait_until(lambda: is_waited_for(admin), "the client to wait")
        delete(admin, job_id)
        with pytest.raises(JobLost, match="somebody deleted it"):
            waiting.result(60)
        assert queued(admin, forgetful.queue_name) == []

    def test_also_after_a_restart_that_lost_nothing_of_it(self, server: ForgetfulRedis, forgetful: Client) -> None:
        job = forgetful.enqueue("a")
        waiting = in_thread(job.result)
        server.restart()
        wait_for_queue(server, forgetful.queue_name, [job.id])
        with server.administered() as connection:
            wait_until(lambda: is_waited_for(connection), "the client to wait")
            delete_by_rq(connection, job.id)
        with pytest.raises(JobLost, match="somebody deleted it"):
            waiting.result(60)


def test_a_result_that_may_have_expired_is_not_lost(forgetful: Client, admin: Redis) -> None:
    job = forgetful.enqueue("a", result_ttl=1)
    admin.delete(job_key(job.id), f"rq:queue:{forgetful.queue_name}")
    assert job._sent is not None
    job._sent.sent_at -= 2  # as if two seconds had passed
    with pytest.raises(JobNotFound, match="never enqueued here, or its result has expired") as caught:
        job.result(timeout=60)
    assert not isinstance(caught.value, JobLost)


def test_a_job_of_rq_that_keeps_no_result_is_not_lost(forgetful: Client, admin: Redis) -> None:
    job_id = forgetful.enqueue("a").id
    admin.hset(job_key(job_id), "result_ttl", "0")
    waiting = in_thread(lambda: forgetful.result(job_id))
    wait_until(lambda: is_waited_for(admin), "the client to wait")
    delete_by_rq(admin, job_id)
    with pytest.raises(JobNotFound) as caught:
        waiting.result(60)
    assert not isinstance(caught.value, JobLost)


def test_a_user_who_may_not_ask_for_the_run_id(server: ForgetfulRedis, queue_name: str, admin: Redis) -> None:
    """Then nobody can tell whether Redis lost the job: nothing is enqueued again."""
    admin.acl_setuser("blind", enabled=True, passwords=["+x"], keys=["*"], commands=["+@all", "-info"])
    with Client(f"redis://blind:x@127.0.0.1:{server.port}/0", queue_name) as client:
        job = client.enqueue("a")
        waiting = in_thread(job.result)
        wait_until(lambda: is_waited_for(admin), "the client to wait")
        admin.flushall()
        with pytest.raises(JobLost, match="Redis lost it, or somebody deleted it"):
            waiting.result(60)


def test_another_redis_that_took_over_by_an_earlier_clock(forgetful: Client, admin: Redis) -> None:
    """Entries that it writes may have ids before those that were read: what was read is read again, and given once."""
    job = forgetful.enqueue("a", stream=True)
    reader, loop = JobReader(job.id, streamed=True, sent=job._sent), ReadLoop(forgetful._session.recovery)
    publish(admin, job.id, "one", 0)
    forgetful._driver.run(loop.turn([reader]))
    assert [piece.text for piece in reader.pieces()] == ["one"]
    admin.delete(stream_key(job.id))
    admin.xadd(stream_key(job.id), {"attempt": 1, "at": 3, "text": " two"}, id="1-1")
    reader.history = "the run id of the Redis before"
    loop._query_all_at = 0.0
    forgetful._driver.run(loop.turn([reader]))
    assert [piece.text for piece in reader.pieces()] == [" two"]
    assert results_key(job.id) in reader.positions


class TestCancellation:
    """Who waits hears of it at once: here the next query of the state would come after an hour."""

    @pytest.fixture(autouse=True)
    def _rare_queries(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fastgpt2.protocol import connection as connection_module

        monkeypatch.setattr(reader_module, "READ_SECONDS", 3600.0)
        monkeypatch.setitem(connection_module._OPTIONS, "socket_timeout", 7200.0)

    @pytest.mark.parametrize("priority", ["high", "normal", "low"])
    @pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "not streamed"])
    def test_is_heard_at_once(
        self, server: ForgetfulRedis, queue_name: str, admin: Redis, streamed: bool, priority: Any
    ) -> None:
        with Client(server.url, queue_name) as client, Client(server.url, "another") as canceller:
            others = [client.enqueue("b").cancel() for _ in range(3)]
            assert others == [True] * 3
            job = client.enqueue("a", stream=streamed, priority=priority)
            waiting = in_thread((lambda: list(job.stream())) if streamed else job.result)
            wait_until(lambda: is_waited_for(admin), "the client to wait")
            assert canceller.cancel(job.id), "whoever does it"
            with pytest.raises(JobCancelled):
                waiting.result(60)
            assert 0 < admin.ttl(f"fastgpt2:cancelled:{queue_name}") <= 60

    def test_by_users_without_the_rights(self, server: ForgetfulRedis, queue_name: str, admin: Redis) -> None:
        """The list of rights of an earlier release still does for cancelling and waiting."""
        admin.acl_setuser(
            "older", enabled=True, passwords=["+x"], keys=["rq:*", "fastgpt2:totals:*"], commands=["+@all"]
        )
        with Client(f"redis://older:x@127.0.0.1:{server.port}/0", queue_name) as client:
            job = client.enqueue("a")
            assert job.cancel()
            assert job.status() == "canceled"
            job = client.enqueue("a")
            waiting = in_thread(job.result)
            wait_until(lambda: is_waited_for(admin), "the client to wait")
            finish(admin, job.id, "text")
            assert waiting.result(60).text == "text"

    def test_a_key_of_another_type_disturbs_nobody(self, server: ForgetfulRedis, queue_name: str, admin: Redis) -> None:
        admin.set(f"fastgpt2:cancelled:{queue_name}", "x")
        with Client(server.url, queue_name) as client:
            job = client.enqueue("a")
            waiting = in_thread(job.result)
            wait_until(lambda: is_waited_for(admin), "the client to wait")
            finish(admin, job.id, "text")
            assert waiting.result(60).text == "text"
            assert client.enqueue("a").cancel()
