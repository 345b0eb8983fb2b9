"""Jobs of programs that know RQ only, and enqueue as its default has it: pickled. Everybody reads how they are."""

from __future__ import annotations

import base64
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.registry import FailedJobRegistry
from rq.results import Result
from support.running import StartEndpoint, StartWorker, jobs_held, run, wait_until

from fastgpt2 import Client
from fastgpt2.api.client.outcome import return_value
from fastgpt2.errors import FastGPT2Error, JobCancelled, JobTimedOut, PromptTooLong
from fastgpt2.protocol.messages import TASK
from fastgpt2.system.redis_server import RedisServer

pytestmark = pytest.mark.processes
LONG: dict[str, Any] = {"max_new_tokens": 500, "ignore_eos": True}


@pytest.fixture
def pickling(redis: Redis, queue_name: str) -> Queue:
    """The test's queue, with RQ's own serializer."""
    return Queue(queue_name, connection=redis)


@pytest.fixture
def web(start_endpoint: StartEndpoint) -> httpx.Client:
    return httpx.Client(base_url=start_endpoint().url, trust_env=False, timeout=60)


@pytest.mark.usefixtures("served")
def test_a_pickled_job_is_read_everywhere(
    pickling: Queue, web: httpx.Client, client: Client, redis_server: RedisServer
) -> None:
    expected = client.enqueue("My name is", max_new_tokens=5).result(timeout=60)
    job = pickling.enqueue(TASK, "My name is", max_new_tokens=5, stop=("~",), stream=True, logprobs=2)
    result = client.result(job.id, timeout=60)
    assert (result.text, result.token_ids) == (expected.text, expected.token_ids)
    assert result.logprobs is not None
    assert client.status(job.id) == "finished"
    # Whoever enqueued it reads it as RQ does.
    returned: Any = Job.fetch(job.id, connection=pickling.connection).return_value()
    assert returned["text"] == result.text

    shown = web.get(f"/v1/jobs/{job.id}").json()
    assert (shown["status"], shown["error"], shown["result"]["text"]) == ("finished", None, result.text)
    assert web.get(f"/v1/jobs/{job.id}?wait=5").json()["result"]["token_ids"] == list(result.token_ids)
    streamed = web.get(f"/v1/jobs/{job.id}/stream").text
    assert streamed.count("event: end") == 1
    assert "event: error" not in streamed
    listed = {each["id"]: each for each in web.get("/v1/jobs").json()["data"]}
    assert (listed[job.id]["status"], listed[job.id]["completion_tokens"]) == ("finished", 5)
    where = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": pickling.name}
    assert run("result", job.id, **where).stdout == result.text + "\n"
    assert run("result", "--json", job.id, **where).returncode == 0


@pytest.mark.usefixtures("served")
def test_one_that_fails_and_is_enqueued_again(pickling: Queue, web: httpx.Client, client: Client) -> None:
    job = pickling.enqueue(TASK, "the " * 5000)
    with pytest.raises(PromptTooLong):
        client.result(job.id, timeout=60)
    for _ in range(2):
        shown = web.get(f"/v1/jobs/{job.id}").json()
        assert (shown["status"], shown["error"]["code"]) == ("failed", "context_length_exceeded")
        assert "PromptTooLong" in str(Job.fetch(job.id, connection=pickling.connection).latest_result().exc_string)  # type: ignore[union-attr]
        FailedJobRegistry(queue=pickling).requeue(job.id)
        wait_until(lambda: client.status(job.id) == "failed", "the job to fail again")


def test_one_that_is_cut_short_keeps_what_there_is(
    pickling: Queue, web: httpx.Client, start_worker: StartWorker, client: Client
) -> None:
    job = pickling.enqueue(TASK, "a", meta={"mine": ("kept", 1)}, timeout=1e-6)
    assert web.get(f"/v1/jobs/{job.id}").json()["status"] == "queued"
    start_worker()
    with pytest.raises(JobTimedOut):
        client.result(job.id, timeout=60)
    with jobs_held():
        running = pickling.enqueue(TASK, "a", meta={"mine": ("kept", 1)}, stream=True, **LONG)
        with web.stream("GET", f"/v1/jobs/{running.id}/stream") as answer:
            lines = answer.iter_lines()
            next(line for line in lines if line.startswith("data: "))
            assert web.delete(f"/v1/jobs/{running.id}").json()["cancelled"]
            rest = list(lines)
    assert any("job_cancelled" in line for line in rest)
    with pytest.raises(JobCancelled) as caught:
        client.result(running.id, timeout=60)
    wait_until(lambda: web.get(f"/v1/jobs/{running.id}").json()["result"] is not None, "what there is to be written")
    assert caught.value.partial is None or caught.value.partial.finish_reason == "cancelled"
    shown = web.get(f"/v1/jobs/{running.id}").json()
    assert (shown["status"], shown["result"]["finish_reason"]) == ("canceled", "cancelled")
    assert Job.fetch(running.id, connection=pickling.connection).meta["mine"] == ("kept", 1)


def test_what_a_stock_worker_returns_is_read(
    pickling: Queue, client: Client, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGPT2_MODEL", "demo")
    job = pickling.enqueue(TASK, "My name is", max_new_tokens=3)
    stock = [str(Path(sys.executable).with_name("rq")), "worker", "--burst", "--url", redis_server.url, pickling.name]
    done = subprocess.run(stock, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert client.result(job.id, timeout=60).usage.completion_tokens == 3


class Trap:
    """What touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_no_result_is_unpickled_freely(pickling: Queue, client: Client, web: httpx.Client, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    job = pickling.enqueue(TASK, "a")
    job._result = Trap(trap)
    Result.create(job, Result.Type.SUCCESSFUL, ttl=60, return_value=Trap(trap))
    with pytest.raises(FastGPT2Error, match="neither JSON nor a pickle of plain values"):
        client.result(job.id, timeout=60)
    shown = web.get(f"/v1/jobs/{job.id}").json()
    assert shown["error"]["code"] == "internal_error"
    assert "enqueue with serializer=rq.serializers.JSONSerializer" in shown["error"]["message"]
    assert not trap.exists()


def test_a_result_is_bounded_before_it_is_loaded() -> None:
    many = pickle.dumps([[] for _ in range(1 << 20)])
    with pytest.raises(FastGPT2Error, match="a pickle of more than 1048576 opcodes"):
        return_value({b"return_value": base64.b64encode(many)})
    assert (
        return_value({b"return_value": base64.b64encode(pickle.dumps({"a": list(range(100_000))}))})["a"][-1] == 99_999
    )
