"""The Python client: what it enqueues, what it waits for, and how it says what went wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import uuid
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.command import send_stop_job_command
from rq.exceptions import NoSuchJobError
from rq.job import Job as RQJob
from rq.job import JobStatus
from rq.serializers import JSONSerializer
from support.running import GOLDEN, StartWorker, jobs_held, run_out_of_time, wait_until

from fastgpt2 import Client, Job, settings
from fastgpt2.api.client.enqueue import enqueue_command, plan_job
from fastgpt2.api.client.flow import Command, Flow
from fastgpt2.errors import (
    BadRequest,
    JobCancelled,
    JobFailed,
    JobNotFound,
    JobTimedOut,
    PromptTooLong,
    QueueFull,
    QueueUnavailable,
    RedisAccessDenied,
    ResultTimeout,
)
from fastgpt2.protocol.connection import connect, without_password
from fastgpt2.protocol.keys import PRIORITIES, totals_key
from fastgpt2.system.redis_server import RedisServer

UNREACHABLE = r"cannot be used .*start it, or name another one in FASTGPT2_REDIS_URL"
ENTRY: dict[str, Any] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"][0]


@pytest.mark.usefixtures("served")
def test_enqueue_and_result(client: Client) -> None:
    job = client.enqueue(ENTRY["prompt"], max_new_tokens=100, ignore_eos=True)
    result = job.result(timeout=30)
    assert (result.text, list(result.token_ids)) == (ENTRY["text"], ENTRY["ids"])
    assert (result.finish_reason, result.model) == ("length", "demo")
    assert result.usage.total_tokens == len(ENTRY["prompt_ids"]) + 100
    assert result.timings.queue_seconds > 0
    assert result.timings.prefill_seconds > 0
    assert result.timings.decode_seconds > 0
    assert job.status() == "finished"
    # The same by a handle that is made from the id alone.
    assert client.job(job.id).result(timeout=30) == result


@pytest.mark.usefixtures("served")
def test_stop_strings_and_unicode_go_through(client: Client) -> None:
    stop = ENTRY["text"][5:9]
    result = client.enqueue(ENTRY["prompt"], max_new_tokens=50, stop=(s for s in [stop, "🦜"])).result(timeout=30)
    assert (result.text, result.finish_reason) == (ENTRY["text"][: ENTRY["text"].index(stop)], "stop")
    unicode = client.enqueue("naïve “Holmes” — 🦜\u0000", max_new_tokens=3).result(timeout=30)
    assert unicode.usage.prompt_tokens > 10


def test_what_is_enqueued_is_plain_rq(client: Client, redis: Redis) -> None:
    job = client.enqueue("a secret", stop="x", job_timeout=77, result_ttl=99)
    stored = RQJob.fetch(job.id, connection=redis, serializer=JSONSerializer)
    assert stored.func_name == "fastgpt2.worker.tasks.generate"
    assert stored.kwargs == {"prompt": "a secret", "stop": ["x"]}
    assert (stored.timeout, stored.result_ttl, stored.failure_ttl) == (77, 99, 99)
    assert "secret" not in (stored.description or ""), "RQ shows descriptions in `rq info` and in logs"


def test_the_script_writes_what_rq_writes(client: Client, redis: Redis) -> None:
    queue = Queue(client.queue_name, connection=redis, serializer=JSONSerializer)
    stock = queue.enqueue(
        "fastgpt2.worker.tasks.generate",
        kwargs={"prompt": "a", "timeout": 5.0},
        job_timeout=77,
        result_ttl=99,
        failure_ttl=99,
        description="generate",
    )
    redis.srem("rq:queues", queue.key)
    ours = client.enqueue("a", timeout=5.0, job_timeout=77, result_ttl=99)
    expected: Any = redis.hgetall(stock.key)
    written: Any = redis.hgetall(f"rq:job:{ours.id}")
    moments = {b"created_at", b"enqueued_at"}
    assert written.keys() == expected.keys()
    assert {k: v for k, v in written.items() if k not in moments} == {
        k: v for k, v in expected.items() if k not in moments
    }
    for name in moments:
        assert abs(datetime.fromisoformat(written[name].decode()) - datetime.fromisoformat(expected[name].decode())) < (
            timedelta(seconds=60)
        )
    assert redis.lrange(queue.key, 0, -1) == [stock.id.encode(), ours.id.encode()]
    assert redis.sismember("rq:queues", queue.key)
    assert redis.ttl(f"rq:job:{ours.id}") == redis.ttl(stock.key) == -1
    assert queue.fetch_job(ours.id) in queue.get_jobs()


def test_priorities_are_queues_of_their_own(client: Client, redis: Redis) -> None:
    jobs = {priority: client.enqueue("a", priority=priority) for priority in PRIORITIES}
    for priority, job in jobs.items():
        name = client.queue_name + {"high": "-high", "normal": "", "low": "-low"}[priority]
        assert redis.lrange(f"rq:queue:{name}", 0, -1) == [job.id.encode()]
        assert RQJob.fetch(job.id, connection=redis, serializer=JSONSerializer).origin == name
    unknown: Any = "urgent"
    with pytest.raises(BadRequest, match="priority must be one of high, normal, low, not 'urgent'"):
        client.enqueue("a", priority=unknown)


class TestMaxQueue:
    @pytest.mark.processes
    def test_a_full_queue_refuses_and_writes_nothing_but_a_count(self, queue_name: str) -> None:
        """Waiting jobs of all priorities count, running jobs do not."""
        with RedisServer() as server, Client(server.url, queue_name, max_queue=3) as client:
            for priority in PRIORITIES:
                client.enqueue("a", priority=priority)
            before = set(client.connection.keys())
            with pytest.raises(QueueFull, match=r"is full: 3 jobs wait, the limit is 3; try again later") as caught:
                client.enqueue("a", priority="high")
            assert (caught.value.depth, caught.value.limit) == (3, 3)
            assert set(client.connection.keys()) - before == {totals_key(queue_name).encode()}
            client.connection.lpop(f"rq:queue:{queue_name}-low")
            client.enqueue("a")

    def test_the_limit_holds_for_many_at_once(self, redis_server: RedisServer, queue_name: str) -> None:
        with Client(redis_server.url, queue_name, max_queue=5) as client:
            outcomes: list[bool] = []

            def ask() -> None:
                try:
                    client.enqueue("a")
                    outcomes.append(True)
                except QueueFull:
                    outcomes.append(False)

            threads = [threading.Thread(target=ask) for _ in range(20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert sorted(outcomes) == [False] * 15 + [True] * 5
            assert client.connection.llen(f"rq:queue:{queue_name}") == 5

    def test_where_it_comes_from(self, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTGPT2_MAX_QUEUE", "1")
        with Client(redis_server.url, f"test-{uuid.uuid4()}") as client:
            client.enqueue("a")
            with pytest.raises(QueueFull):
                client.enqueue("a")
        bad: Any
        for bad in (0, -1, True, "5", 2.0):
            with pytest.raises(BadRequest, match="max_queue must be a whole number from 1"):
                Client(redis_server.url, max_queue=bad)


def send(command: Command) -> Flow[Any]:
    return (yield command)


def test_what_is_sent_twice_comes_in_once(client: Client, redis: Redis) -> None:
    """A client that did not hear the answer may ask again."""
    job_id, command = enqueue_command(plan_job("a", {}), client.queue_name, None)
    assert [client._driver.run(send(command)) for _ in range(2)] == [0, 0]
    assert redis.lrange(f"rq:queue:{client.queue_name}", 0, -1) == [job_id.encode()]


def test_scripts_that_redis_does_not_know_are_sent_once_more(client: Client, redis: Redis) -> None:
    """Alone and in a pipeline: a restart of Redis loses the scripts."""
    redis.script_flush()
    job = client.enqueue("a")
    redis.script_flush()
    more = client._driver.run(client._session.enqueue_all([plan_job("b", {}), plan_job("c", {})]))
    assert redis.lrange(f"rq:queue:{client.queue_name}", 0, -1) == [one.encode() for one in (job.id, *more)]
    redis.script_flush()
    assert job.cancel()


def test_waiting_without_a_worker_says_so(client: Client) -> None:
    job = client.enqueue("a")
    started = time.monotonic()
    with pytest.raises(ResultTimeout, match=r"is queued, no result within 0\.3 s; no worker listens on"):
        job.result(timeout=0.3)
    assert time.monotonic() - started < 60
    assert isinstance(ResultTimeout("x"), TimeoutError)


def test_waiting_begins_before_the_worker(client: Client, start_worker: StartWorker) -> None:
    job = client.enqueue(ENTRY["prompt"], max_new_tokens=3, ignore_eos=True)
    found: list[Any] = []
    waiter = threading.Thread(target=lambda: found.append(job.result()))
    waiter.start()
    start_worker()
    waiter.join(30)
    assert list(found[0].token_ids) == ENTRY["ids"][:3]


@pytest.mark.usefixtures("served")
def test_a_result_that_comes_between_two_reads_is_not_waited_for(
    client: Client, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the client would find it only after a blocking read of two seconds."""
    blocked: list[Any] = []
    xread = client.connection.xread

    def finish_first(streams: Any, *options: Any) -> Any:
        # The client queried the job's state before it ended; the blocking read comes after.
        wait_until(lambda: redis.exists(*streams), "the job to end")
        blocked.append(xread(streams, *options))
        return blocked[-1]

    monkeypatch.setattr(client.connection, "xread", finish_first)
    job = client.enqueue(ENTRY["prompt"], max_new_tokens=100, ignore_eos=True)
    assert list(job.result(timeout=30).token_ids) == ENTRY["ids"]
    assert all(blocked), "every blocking read brought an entry"


@pytest.mark.usefixtures("served")
def test_a_failure_is_raised_as_what_it_is(client: Client, redis: Redis) -> None:
    with pytest.raises(PromptTooLong, match=r"prompt tokens \d+, over the model's 512 positions"):
        client.enqueue("the " * 600).result(timeout=30)
    other = Queue(client.queue_name, connection=redis, serializer=JSONSerializer).enqueue("os.getcwd")
    with pytest.raises(BadRequest, match=r"the job names the function 'os\.getcwd'"):
        client.job(other.id).result(timeout=30)


def test_a_defect_in_the_worker_is_a_failed_job(client: Client, redis: Redis) -> None:
    """A stock worker records a traceback, of which the last line counts."""
    from rq.results import Result

    job = client.enqueue("a")
    stored = RQJob.fetch(job.id, connection=redis, serializer=JSONSerializer)
    stored.set_status(JobStatus.FAILED)
    Result.create_failure(stored, 60, "Traceback (most recent call last):\n  File x\nMemoryError: no more\n")
    with pytest.raises(JobFailed, match="no more") as caught:
        job.result(timeout=30)
    assert (caught.value.kind, caught.value.job_id) == ("MemoryError", job.id)


def test_a_job_cancelled_by_rq(client: Client, redis: Redis) -> None:
    job = client.enqueue("a")
    RQJob.fetch(job.id, connection=redis, serializer=JSONSerializer).cancel()
    assert job.status() == "canceled"
    with pytest.raises(JobCancelled, match="cancelled"):
        job.result(timeout=30)


class TestCancel:
    def test_a_job_that_waits(self, client: Client, redis: Redis, start_worker: StartWorker) -> None:
        jobs = [client.enqueue(ENTRY["prompt"], priority=priority) for priority in PRIORITIES for _ in range(2)]
        cancelled = jobs[1::2]
        assert all(job.cancel() for job in cancelled)
        assert not any(job.cancel() for job in cancelled), "they have ended"
        for job in cancelled:
            stored = RQJob.fetch(job.id, connection=redis, serializer=JSONSerializer)
            queue = Queue(stored.origin, connection=redis, serializer=JSONSerializer)
            assert (job.status(), stored.get_position()) == ("canceled", None)
            assert queue.canceled_job_registry.get_job_ids() == [job.id]
            assert 0 < redis.ttl(stored.key) <= 24 * 3600
            with pytest.raises(JobCancelled) as caught:
                job.result(timeout=30)
            assert caught.value.partial is None
        start_worker()
        for job in jobs[::2]:
            assert job.result(timeout=30).finish_reason in ("stop", "length")

    @pytest.mark.usefixtures("served")
    def test_a_job_that_runs(self, client: Client, redis: Redis) -> None:
        """The worker ends the job and keeps what was generated; its other jobs go on."""
        with jobs_held():
            job = client.enqueue(ENTRY["prompt"], max_new_tokens=480, ignore_eos=True, result_ttl=50)
            other = client.enqueue(ENTRY["prompt"], max_new_tokens=100, ignore_eos=True)
            wait_until(lambda: job.status() == "started", "the job to start")
            assert job.cancel()
            with pytest.raises(JobCancelled, match=f"job {job.id} was cancelled") as caught:
                job.result(timeout=30)
        kept = caught.value.partial
        assert kept is not None
        assert kept.finish_reason == "cancelled"
        shared = min(100, len(kept.token_ids))
        assert list(kept.token_ids)[:shared] == ENTRY["ids"][:shared]
        assert other.result(timeout=30).text == ENTRY["text"]
        assert not job.cancel()
        assert 0 < redis.ttl(f"rq:job:{job.id}") <= 50
        wait_until(lambda: not redis.zcard(f"rq:wip:{client.queue_name}"), "no job to count as started")

    @pytest.mark.usefixtures("served")
    def test_one_that_has_ended_keeps_its_end(self, client: Client) -> None:
        job = client.enqueue(ENTRY["prompt"], max_new_tokens=3, ignore_eos=True)
        result = job.result(timeout=30)
        assert not job.cancel()
        assert (job.status(), job.result(timeout=30)) == ("finished", result)
        with pytest.raises(JobNotFound):
            client.cancel("nonsense")

    @pytest.mark.usefixtures("served")
    def test_against_a_worker_that_finishes(self, client: Client) -> None:
        """Whoever comes first ends the job, never both, and `cancel` answers truly."""
        jobs = [client.enqueue(ENTRY["prompt"], max_new_tokens=1 + n % 7, ignore_eos=True) for n in range(60)]
        answers = []
        for n, job in enumerate(jobs):
            if n % 3:
                wait_until(partial(left_the_queue, job), "the job to start")
            answers.append(job.cancel())
        for job, cancelled in zip(jobs, answers, strict=True):
            if cancelled:
                with pytest.raises(JobCancelled):
                    job.result(timeout=30)
            else:
                assert job.result(timeout=30).finish_reason == "length"
            assert job.status() == ("canceled" if cancelled else "finished")

    def test_a_worker_that_died(self, client: Client, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody will write down what it had generated; the client waits for that only for a limited time."""
        monkeypatch.setattr("fastgpt2.api.client.reader.LETTING_GO_SECONDS", 0.2)
        job = client.enqueue("a")
        redis.hset(f"rq:job:{job.id}", mapping={"status": "started", "worker_name": "dead"})
        assert job.cancel()
        with pytest.raises(JobCancelled) as caught:
            job.result(timeout=30)
        assert caught.value.partial is None

    def test_what_expired_leaves_the_registry(self, client: Client, redis: Redis) -> None:
        key = f"rq:canceled:{client.queue_name}"
        stock = client.enqueue("a")
        RQJob.fetch(stock.id, connection=redis, serializer=JSONSerializer).cancel()
        redis.zadd(key, {"gone": 1})
        job = client.enqueue("a")
        job.cancel()
        left: Any = redis.zrange(key, 0, -1)
        assert set(left) == {stock.id.encode(), job.id.encode()}


@pytest.mark.usefixtures("served")
def test_a_job_whose_time_is_up(client: Client) -> None:
    jobs: list[Job] = []

    def attempt(seconds: float) -> JobTimedOut:
        jobs.append(client.enqueue(ENTRY["prompt"], max_new_tokens=480, ignore_eos=True, timeout=seconds))
        with pytest.raises(JobTimedOut) as caught:
            jobs[-1].result(timeout=60)
        return caught.value

    error = run_out_of_time(attempt)
    assert f"job {jobs[-1].id} ran out of time" in str(error)
    kept = error.partial
    assert kept is not None
    assert kept.finish_reason == "timeout"
    assert len(kept.token_ids) < 480
    with pytest.raises(JobTimedOut) as again:
        client.result(jobs[-1].id, timeout=30)
    assert again.value.partial == kept


@pytest.mark.usefixtures("served")
def test_a_job_that_rq_stops(client: Client, redis: Redis) -> None:
    with jobs_held():
        job = client.enqueue(ENTRY["prompt"], max_new_tokens=480, ignore_eos=True)
        wait_until(lambda: job.status() == "started", "the job to start")
        send_stop_job_command(redis, job.id, JSONSerializer)
        with pytest.raises(JobFailed, match="was stopped") as caught:
            job.result(timeout=30)
    assert caught.value.kind == "JobStopped"
    assert caught.value.partial is not None


@pytest.mark.usefixtures("served")
def test_new_fields_reach_the_model(client: Client) -> None:
    by_text = client.enqueue(ENTRY["prompt"], max_new_tokens=9, ignore_eos=True, logprobs=2, echo=True)
    by_ids = client.enqueue(ENTRY["prompt_ids"], max_new_tokens=9, min_new_tokens=9, ignore_eos=True)
    result = by_text.result(timeout=30)
    assert result.text.startswith(ENTRY["prompt"])
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == ENTRY["ids"][:9] == list(result.token_ids)
    assert all(entry.top[0].token_id == entry.token_id and len(entry.top) == 2 for entry in result.logprobs)
    assert list(by_ids.result(timeout=30).token_ids) == ENTRY["ids"][:9]


@pytest.mark.usefixtures("served")
def test_prompts_are_scored(client: Client) -> None:
    """Prompts are scored beside a job that decodes. The expected numbers are transformers'."""
    busy = client.enqueue(ENTRY["prompt"], max_new_tokens=400, ignore_eos=True)
    scores = json.loads((GOLDEN / "demo_prompt_scores.json").read_text("utf-8"))["scores"]
    jobs = [client.enqueue(entry["prompt"], max_new_tokens=0, prompt_logprobs=3, echo=True) for entry in scores]
    for entry, job in zip(scores, jobs, strict=True):
        result = job.result(timeout=30)
        assert (result.text, result.token_ids, result.finish_reason) == (entry["prompt"], (), "length")
        first, *others = result.prompt_logprobs or ()
        assert (first.token_id, first.logprob) == (entry["prompt_ids"][0], None)
        assert [one.token_id for one in others] == entry["prompt_ids"][1:]
        assert [one.logprob for one in others] == pytest.approx(entry["logprobs"], rel=0, abs=1e-4)
        for one, top in zip(others, entry["top"], strict=True):
            assert [other.token_id for other in one.top] == [token_id for token_id, _ in top]
    assert list(busy.result(timeout=30).token_ids[:100]) == ENTRY["ids"]


def test_unknown_and_expired_jobs(client: Client, redis: Redis) -> None:
    with pytest.raises(JobNotFound, match="no job 'nonsense'"):
        client.job("nonsense").result(timeout=30)
    job = client.enqueue("a")
    RQJob.fetch(job.id, connection=redis, serializer=JSONSerializer).delete()
    with pytest.raises(NoSuchJobError):
        RQJob.fetch(job.id, connection=redis, serializer=JSONSerializer)
    with pytest.raises(JobNotFound):
        job.status()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be between 0"),
        ({"num_beams": 4}, "num_beams is refused: no beams are searched here"),
        ({"temperature": -1}, "temperature must be between 0 and 100, not -1"),
        ({"best_of": 3, "stream": True}, "stream is refused beside a best_of of 3 and an n of 1"),
        ({"max_tokens": 5}, "unknown field 'max_tokens'"),
        ({"stop": 5}, "stop must be a string or a list of strings, not 5"),
    ],
)
def test_bad_options_are_refused_at_enqueue(client: Client, redis: Redis, options: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        client.enqueue("a", **options)
    assert redis.llen(f"rq:queue:{client.queue_name}") == 0


def test_what_surely_cannot_fit_is_refused_at_enqueue(client: Client, redis: Redis, start_worker: StartWorker) -> None:
    job = client.enqueue("x" * 500_000)  # nobody knows the model yet
    assert redis.llen(f"rq:queue:{client.queue_name}") == 1
    start_worker()
    with pytest.raises(PromptTooLong):
        job.result(timeout=30)
    with pytest.raises(PromptTooLong, match=r"500000 bytes, so at least .* tokens, over the model's 512 positions"):
        client.enqueue("x" * 500_000)
    with pytest.raises(PromptTooLong, match=r"max_new_tokens is 512; of the model's 512 positions .* at most 511"):
        client.enqueue("x", max_new_tokens=512)
    with pytest.raises(PromptTooLong, match=r"has 512 tokens, over the model's 512 positions"):
        client.enqueue([5] * 512)
    with pytest.raises(PromptTooLong, match=r"min_new_tokens is 13; .* this prompt needs 500: ask for at most 12"):
        client.enqueue([5] * 500, min_new_tokens=13)
    with pytest.raises(PromptTooLong, match=r"has 513 tokens, over the model's 512 positions: shorten it"):
        client.enqueue([5] * 513, max_new_tokens=0)
    full = client.enqueue([5] * 512, max_new_tokens=0).result(timeout=30)
    assert (full.token_ids, full.finish_reason, full.usage.prompt_tokens) == ((), "length", 512)
    assert redis.llen(f"rq:queue:{client.queue_name}") == 0


def test_no_redis(queue_name: str) -> None:
    nowhere = RedisServer()  # a free port, with nothing started on it
    with Client(f"redis://:hunter2@127.0.0.1:{nowhere.port}/0", queue_name) as client:
        for call in (lambda: client.enqueue("a"), lambda: client.job("x").result(5), lambda: client.job("x").status()):
            with pytest.raises(QueueUnavailable, match=UNREACHABLE) as caught:
                call()
            assert "hunter2" not in str(caught.value)
            assert f"redis://***@127.0.0.1:{nowhere.port}/0" in str(caught.value)
    nowhere.stop()


class TestRedisGoesAway:
    def test_a_restart_is_waited_for(self, tmp_path: Path, queue_name: str, start_worker: StartWorker) -> None:
        server = RedisServer(folder=tmp_path / "redis").start()
        try:
            with Client(server.url, queue_name) as client:
                job = client.enqueue(ENTRY["prompt"], max_new_tokens=5, ignore_eos=True)
                found: list[Any] = []
                waiter = threading.Thread(target=lambda: found.append(job.result(timeout=60)))
                waiter.start()
                wait_until(lambda: blocked(client), "the reader to wait")
                server.stop()
                server = RedisServer(server.port, tmp_path / "redis").start()
                start_worker(wait=False, FASTGPT2_REDIS_URL=server.url)
                waiter.join(60)
                assert list(found[0].token_ids) == ENTRY["ids"][:5]
        finally:
            server.stop()

    @pytest.mark.processes
    def test_not_for_ever(self, queue_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastgpt2.api.client.flow.RECONNECT_SECONDS", 0.3)
        with RedisServer() as server, Client(server.url, queue_name) as client:
            job = client.enqueue("a")
            server.stop()
            with pytest.raises(QueueUnavailable, match=UNREACHABLE):
                job.result()
            with pytest.raises(QueueUnavailable, match=UNREACHABLE):
                list(job.stream())


def blocked(client: Client) -> bool:
    return bool(client.connection.info("clients")["blocked_clients"] == 1)


def left_the_queue(job: Job) -> bool:
    return job.status() != "queued"


def test_a_password(redis_server: RedisServer, queue_name: str) -> None:
    admin = connect(redis_server.url)
    admin.acl_setuser("walker", enabled=True, passwords=["+right"], keys="*", channels="*", commands=["+@all"])
    try:
        host = f"127.0.0.1:{redis_server.port}/0"
        with Client(f"redis://walker:right@{host}", queue_name) as client:
            assert client.enqueue("a").status() == "queued"
        with (
            Client(f"redis://walker:wrong@{host}", queue_name) as client,
            pytest.raises(RedisAccessDenied, match=r"denied access .* check the user and password") as caught,
        ):
            client.enqueue("a")
        assert "wrong" not in str(caught.value).replace("WRONGPASS", "")
    finally:
        admin.acl_deluser("walker")
        admin.close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://:p%40w@h:1/0", "redis://***@h:1/0"),
        ("rediss://u:p@w@h:1/0?ssl_cert_reqs=none", "rediss://***@h:1/0"),
        ("unix:///tmp/s?password=x", "unix:///tmp/s"),
        ("redis://:12/et@pw@h:1/0", "redis://***@h:1/0"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_a_set_of_queues_that_is_none_keeps_no_job_out(client: Client, redis: Redis) -> None:
    before = redis.smembers("rq:queues")
    try:
        redis.set("rq:queues", "x")
        assert client.enqueue("a").status() == "queued"
    finally:
        redis.delete("rq:queues")
        if before:
            redis.sadd("rq:queues", *before)


@pytest.mark.parametrize(
    "url",
    ["localhost:6379", "redis://:s3cr/et@h:1/0", "redis://u:s3cr[et]@h:1/0", "redis://h:1/0?s3cret=1", "http://h"],
)
def test_not_a_redis_url(url: str) -> None:
    with pytest.raises(BadRequest, match="the Redis URL cannot be used") as caught:
        Client(url)
    assert "s3cr" not in str(caught.value)


@pytest.mark.parametrize("option", ["job_timeout", "result_ttl"])
@pytest.mark.parametrize("value", [0, -1, 0.5, "abc", True, 10**12, None])
def test_bad_times_are_refused(client: Client, option: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=f"{option} must be a whole number of seconds"):
        client.enqueue("a", **{option: value})


def test_environment_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (Client().redis_url, Client().queue_name) == ("redis://127.0.0.1:6379/0", "fastgpt2")
    monkeypatch.setenv("FASTGPT2_REDIS_URL", "redis://h:7/1")
    monkeypatch.setenv("FASTGPT2_QUEUE", "q")
    assert (Client().redis_url, Client().queue_name) == ("redis://h:7/1", "q")
    assert Client("redis://other/0").redis_url == "redis://other/0"
    assert settings.REDIS_URL.resolve("redis://given") == "redis://given"


@pytest.mark.usefixtures("served")
def test_many_threads_share_a_client(client: Client) -> None:
    results: dict[int, Any] = {}

    def ask(n: int) -> None:
        results[n] = client.enqueue(ENTRY["prompt"], max_new_tokens=n + 1, ignore_eos=True).result(timeout=60)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {n: list(r.token_ids) for n, r in results.items()} == {n: ENTRY["ids"][: n + 1] for n in range(8)}


def test_the_readme_example_in_a_fresh_process(redis_server: RedisServer, client: Client, tmp_path: Path) -> None:
    """The process that enqueues and waits imports no numpy and no tokenizer."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from fastgpt2 import Client\n"
        "from fastgpt2.errors import ResultTimeout\n"
        "job = Client().enqueue('My name is', max_new_tokens=20)\n"
        "try:\n    job.result(timeout=0.1)\nexcept ResultTimeout:\n    pass\n"
        "print([m for m in ('numpy', 'tokenizers', 'safetensors', 'huggingface_hub') if m in sys.modules])\n"
    )
    out = subprocess.run(
        [sys.executable, str(script)],
        env={"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": client.queue_name, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert out.stdout.strip() == "[]"
    wait_until(lambda: client.connection.llen(f"rq:queue:{client.queue_name}") == 1, "the job to be in the queue")
