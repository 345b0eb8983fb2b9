"""What a client is told to ask again for: stock clients repeat by themselves whatever they take for a passing fault."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest
from redis import Redis
from rq.job import Job, JobStatus
from rq.results import Result
from rq.serializers import JSONSerializer
from support.redis_process import OpenRedis
from support.running import RunningEndpoint, StartEndpoint, wait_until

from fastgpt2 import Client, errors
from fastgpt2.api.http.responses import respond
from fastgpt2.errors import FastGPT2Error, JobLost, RedisAccessDenied

if TYPE_CHECKING:  # late: every process of a run collects this file, and most never need the second that it takes
    import openai

OPENAI_ROUTE = "/v1/completions"
# There are no workers here, hence no models.
ANY_MODEL = {"model": None}


def open_ai(endpoint: RunningEndpoint) -> openai.OpenAI:
    import openai

    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="x", http_client=httpx.Client(trust_env=False))


@pytest.fixture
def fail(client: Client, redis: Redis) -> Callable[..., None]:
    """Returns a function that ends a job as a worker does, with the last line of an exception."""

    def end(job_id: str, reason: str) -> None:
        job = Job.fetch(job_id, connection=redis, serializer=JSONSerializer)
        with redis.pipeline() as pipeline:
            pipeline.lrem(f"rq:queue:{client.queue_name}", 0, job_id)
            job.set_status(JobStatus.FAILED, pipeline)
            Result.create_failure(job, 60, f"Traceback (most recent call last):\n{reason}\n", pipeline=pipeline)
            pipeline.execute()

    return end


def end_all(client: Client, redis: Redis, asking: threading.Thread, end: Callable[[str], object]) -> int:
    """End each job that comes into the queue, until the asker has its answer. Returns how many there were."""
    ended: set[str] = set()
    asking.start()

    def work() -> bool:
        ids: Any = redis.lrange(f"rq:queue:{client.queue_name}", 0, -1)
        for job_id in {one.decode() for one in ids} - ended:
            ended.add(job_id)
            end(job_id)
        return not asking.is_alive()

    wait_until(work, "the answer")
    return len(ended)


REASONS = {
    "fastgpt2.errors.PoisonJob: 4 workers have died while they ran it": 502,
    "fastgpt2.errors.JobFailed: the model gave no number": 502,
    "fastgpt2.errors.JobStopped: by somebody": 502,
    "MemoryError: Unable to allocate 1.00 GiB": 502,
    "rq.timeouts.JobTimeoutException: took too long": 504,
    "fastgpt2.errors.JobTimedOut: took too long": 504,
    "fastgpt2.errors.PromptTooLong: too long": 400,
}


def test_stock_openai_clients_repeat_no_job_that_has_ended(
    start_endpoint: StartEndpoint, client: Client, redis: Redis, fail: Callable[..., None]
) -> None:
    import openai

    endpoint = start_endpoint()
    with open_ai(endpoint) as ai:
        assert ai.max_retries == 2
        ends: list[tuple[int, Callable[[str], object]]] = [
            (status, partial(fail, reason=reason)) for reason, status in REASONS.items()
        ]
        for at, (status, end) in enumerate([*ends, (409, client.cancel)]):
            found: list[openai.APIStatusError] = []

            def ask(at: int = at, found: list[openai.APIStatusError] = found) -> None:
                with pytest.raises(openai.APIStatusError) as caught:
                    ai.completions.create(model="", prompt="a", extra_body=ANY_MODEL, stream=at % 2 == 0)
                found.append(caught.value)

            assert end_all(client, redis, threading.Thread(target=ask), end) == 1, "it came once"
            assert found[0].status_code == status
            assert found[0].response.headers.get("x-should-retry") == (None if status == 400 else "false")


def ask_other_routes(endpoint: RunningEndpoint, client: Client, answers: list[httpx.Response]) -> None:
    with httpx.Client(base_url=endpoint.url, trust_env=False, timeout=60) as web:
        for path in ("/", "/generate", "/generate_stream"):
            answers.append(web.post(path, json={"inputs": "a"}))
        answers.append(web.get(f"/v1/jobs/{client.enqueue('a').id}/stream"))


def test_all_routes_say_so(
    start_endpoint: StartEndpoint, client: Client, redis: Redis, fail: Callable[..., None]
) -> None:
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=ask_other_routes, args=(start_endpoint(), client, answers))
    assert end_all(client, redis, asking, lambda job_id: fail(job_id, "fastgpt2.errors.PoisonJob: died")) == 4
    assert [(answer.status_code, answer.headers["x-should-retry"]) for answer in answers] == [(502, "false")] * 4


def test_time_that_is_up_is_not_given_thrice(start_endpoint: StartEndpoint) -> None:
    """The job was cancelled. Where the pool is too slow for what is asked, more of the same makes it slower."""
    import openai

    endpoint = start_endpoint("--timeout", "0.2")
    with open_ai(endpoint) as ai, pytest.raises(openai.APIStatusError) as caught:
        ai.completions.create(model="", prompt="a", extra_body=ANY_MODEL)
    assert caught.value.status_code == 504
    wait_until(lambda: endpoint.log.read_text().count(f"POST {OPENAI_ROUTE} 504") >= 1, "the log to tell of it")
    assert endpoint.log.read_text().count(f"POST {OPENAI_ROUTE} 504") == 1


def test_what_passes_is_tried_again(start_endpoint: StartEndpoint, client: Client) -> None:
    import openai

    endpoint = start_endpoint("--max-queue", "1")
    waiting = client.enqueue("a")
    with open_ai(endpoint) as ai, pytest.raises(openai.RateLimitError):
        ai.with_options(max_retries=1).completions.create(model="", prompt="a", extra_body=ANY_MODEL)
    wait_until(lambda: endpoint.log.read_text().count(f"POST {OPENAI_ROUTE} 429") >= 2, "the log to tell of it")
    assert endpoint.log.read_text().count(f"POST {OPENAI_ROUTE} 429") == 2
    waiting.cancel()


def test_a_durability_that_redis_cannot_give_is_for_good(start_endpoint: StartEndpoint) -> None:
    with OpenRedis("--appendonly", "no") as server:
        endpoint = start_endpoint("--durability", "disk", FASTGPT2_REDIS_URL=server.url)
        for path, body in (("/v1/jobs", {"prompt": "a"}), ("/generate", {"inputs": "a"})):
            answer = httpx.post(f"{endpoint.url}{path}", json=body, trust_env=False, timeout=60)
            assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false")
            assert "appendonly yes" in answer.text


def make(kind: type[FastGPT2Error]) -> FastGPT2Error:
    if issubclass(kind, errors.JobFailed):
        return kind("id", "reason")
    return kind("q", 1, 1) if issubclass(kind, errors.QueueFull) else kind("a sentence")


def test_each_error_of_a_server_is_either_for_now_or_for_good() -> None:
    for kind in [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, FastGPT2Error)]:
        for path in ("/generate", "/v1/completions"):
            headers = respond(make(kind), {"type": "http", "path": path}).headers
            assert not ("retry-after" in headers and "x-should-retry" in headers), kind
            if kind.http_status >= 500 or kind.http_status in (409, 429):
                assert "retry-after" in headers or headers.get("x-should-retry") == "false", kind


def test_a_job_that_redis_lost_is_no_fault_of_the_callers() -> None:
    answer = respond(JobLost("gone"), {"type": "http", "path": "/v1/completions"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert b'"type":"server_error"' in bytes(answer.body)
    denied = respond(RedisAccessDenied("no"), {"type": "http", "path": "/v1/completions"})
    assert (denied.status_code, denied.headers["x-should-retry"]) == (503, "false")
