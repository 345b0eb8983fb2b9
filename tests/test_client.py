"""The Python client: what it enqueues, what it waits for, and how it says what went wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN, StartWorker, wait_until
from redis import Redis
from rq.exceptions import NoSuchJobError
from rq.job import Job as RQJob
from rq.serializers import JSONSerializer

from fastgpt2 import Client, settings
from fastgpt2.errors import (
    BadRequest,
    JobFailed,
    JobNotFound,
    PromptTooLong,
    QueueUnavailable,
    RedisAccessDenied,
    ResultTimeout,
)
from fastgpt2.worker.connection import connect, without_password
from fastgpt2.worker.redis_server import RedisServer

UNREACHABLE = r"cannot be used .*start it, or mend FASTGPT2_REDIS_URL"
ENTRY: dict[str, Any] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"][0]


def test_enqueue_and_result(client: Client, start_worker: StartWorker) -> None:
    start_worker()
    job = client.enqueue(ENTRY["prompt"], max_new_tokens=100, ignore_eos=True)
    result = job.result(timeout=30)
    assert (result.text, list(result.token_ids)) == (ENTRY["text"], ENTRY["ids"])
    assert (result.finish_reason, result.model) == ("length", "demo")
    assert result.usage.total_tokens == len(ENTRY["prompt_ids"]) + 100
    assert result.timings.queue_seconds > 0
    assert result.timings.prefill_seconds > 0
    assert result.timings.decode_seconds > 0
    assert job.status() == "finished"
    # A handle made from the id alone, and asked again.
    assert client.job(job.id).result(timeout=1) == result


def test_stop_strings_and_unicode_go_through(client: Client, start_worker: StartWorker) -> None:
    start_worker()
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


def test_waiting_without_a_worker_says_so(client: Client) -> None:
    job = client.enqueue("a")
    started = time.monotonic()
    with pytest.raises(ResultTimeout, match=r"is queued, no result within 0\.3 s; no worker listens on"):
        job.result(timeout=0.3)
    assert time.monotonic() - started < 10
    assert isinstance(ResultTimeout("x"), TimeoutError)


def test_waiting_begins_before_the_worker(client: Client, start_worker: StartWorker) -> None:
    job = client.enqueue(ENTRY["prompt"], max_new_tokens=3, ignore_eos=True)
    found: list[Any] = []
    waiter = threading.Thread(target=lambda: found.append(job.result()))
    waiter.start()
    start_worker()
    waiter.join(30)
    assert list(found[0].token_ids) == ENTRY["ids"][:3]


def test_a_result_that_comes_between_two_reads_is_not_waited_for(
    client: Client, redis: Redis, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be found only when the blocking read, of two seconds, has passed in vain."""
    start_worker()
    blocked: list[Any] = []
    hget, xread = client.connection.hget, client.connection.xread

    def hget_then_finish(key: str, field: str) -> Any:
        status = hget(key, field)
        # Read before the job ended, acted upon after.
        wait_until(lambda: redis.exists(key.replace("rq:job:", "rq:results:")), "the job to end")
        return status if status != b"finished" else b"started"

    def recorded(streams: Any, **options: Any) -> Any:
        blocked.append(xread(streams, **options))
        return blocked[-1]

    monkeypatch.setattr(client.connection, "hget", hget_then_finish)
    monkeypatch.setattr(client.connection, "xread", recorded)
    job = client.enqueue(ENTRY["prompt"], max_new_tokens=100, ignore_eos=True)
    assert list(job.result(timeout=30).token_ids) == ENTRY["ids"]
    assert all(blocked), "every blocking read brought an entry"


def test_a_failure_is_raised_as_what_it_is(client: Client, start_worker: StartWorker, redis: Redis) -> None:
    start_worker()
    with pytest.raises(PromptTooLong, match=r"prompt tokens \d+, over the model's 512 positions"):
        client.enqueue("the " * 600).result(timeout=30)
    from rq import Queue

    other = Queue(client.queue_name, connection=redis, serializer=JSONSerializer).enqueue("os.getcwd")
    with pytest.raises(BadRequest, match=r"the job names the function 'os\.getcwd'"):
        client.job(other.id).result(timeout=30)


def test_a_defect_in_the_worker_is_a_failed_job(client: Client, redis: Redis) -> None:
    """As a stock worker records it: a traceback, of which the last line counts."""
    from rq.results import Result

    job = client.enqueue("a")
    stored = RQJob.fetch(job.id, connection=redis, serializer=JSONSerializer)
    Result.create_failure(stored, 60, "Traceback (most recent call last):\n  File x\nMemoryError: no more\n")
    with pytest.raises(JobFailed, match="no more") as caught:
        job.result(timeout=5)
    assert (caught.value.kind, caught.value.job_id) == ("MemoryError", job.id)


def test_a_cancelled_job(client: Client, redis: Redis) -> None:
    job = client.enqueue("a")
    RQJob.fetch(job.id, connection=redis, serializer=JSONSerializer).cancel()
    assert job.status() == "canceled"
    with pytest.raises(JobFailed, match="cancelled"):
        job.result(timeout=5)


def test_unknown_and_expired_jobs(client: Client, redis: Redis) -> None:
    with pytest.raises(JobNotFound, match="no job 'nonsense'"):
        client.job("nonsense").result(timeout=5)
    job = client.enqueue("a")
    RQJob.fetch(job.id, connection=redis, serializer=JSONSerializer).delete()
    with pytest.raises(NoSuchJobError):
        RQJob.fetch(job.id, connection=redis, serializer=JSONSerializer)
    with pytest.raises(JobNotFound):
        job.status()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be between 1"),
        ({"temperature": 0.8}, "temperature is refused: fastgpt2 decodes greedily"),
        ({"max_tokens": 5}, "unknown field 'max_tokens'"),
        ({"stop": 5}, "stop must be a string or a list of strings, not int"),
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


def test_many_threads_share_a_client(client: Client, start_worker: StartWorker) -> None:
    start_worker()
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
    """The client alone: no numpy, no tokenizer in the process that enqueues and waits."""
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
