"""Jobs that Redis loses while requests wait for them are enqueued again. One that somebody deleted is told by a 503."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from rq.job import Job as RQJob
from rq.serializers import JSONSerializer
from support.finishing import publish, queued
from support.forgetful import ForgetfulRedis, finish_all, wait_for_queue
from support.running import StartEndpoint, in_thread

pytestmark = pytest.mark.processes

PROMPT = {"inputs": "a", "parameters": {"max_new_tokens": 3}}


@pytest.fixture(scope="module")
def server() -> Iterator[ForgetfulRedis]:
    with ForgetfulRedis() as made:
        yield made


def post(url: str, body: Any) -> httpx.Response:
    return httpx.post(url, json=body, timeout=60, trust_env=False)


def test_requests_that_wait(server: ForgetfulRedis, queue_name: str, start_endpoint: StartEndpoint) -> None:
    url = start_endpoint(FASTGPT2_REDIS_URL=server.url).url
    completion = {"prompt": "a", "max_tokens": 3}
    plain = in_thread(lambda: post(f"{url}/generate", PROMPT))
    ids = wait_for_queue(server, queue_name, 1)
    streamed = in_thread(lambda: post(f"{url}/v1/completions", {**completion, "stream": True}))
    ids = wait_for_queue(server, queue_name, 2)
    with server.administered() as connection:
        publish(connection, ids[1], "text ", 0)
    server.restart()
    wait_for_queue(server, queue_name, ids)
    with server.administered() as connection:
        publish(connection, ids[1], "text of ", 0)
    finish_all(server, queue_name)
    assert plain.result(60).json()["generated_text"] == f"text of {ids[0]}"
    events = [
        line.removeprefix("data: ") for line in streamed.result(60).text.splitlines() if line.startswith("data: {")
    ]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == f"text of {ids[1]}"


def test_what_somebody_deleted(server: ForgetfulRedis, queue_name: str, start_endpoint: StartEndpoint) -> None:
    url = start_endpoint(FASTGPT2_REDIS_URL=server.url).url
    with server.administered() as connection:
        plain = in_thread(lambda: post(f"{url}/generate", PROMPT))
        (job_id,) = wait_for_queue(server, queue_name, 1)
        RQJob.fetch(job_id, connection=connection, serializer=JSONSerializer).delete()
        assert plain.result(60).status_code == 503
        assert plain.result().json()["error_type"] == "incomplete_generation"
        created = post(f"{url}/v1/jobs", {"prompt": "a"}).json()["id"]
        shown = in_thread(lambda: httpx.get(f"{url}/v1/jobs/{created}?wait=50", timeout=60, trust_env=False))
        wait_for_queue(server, queue_name, [created])
        # Whether the request waits by now or not, it is told that there is no such job.
        RQJob.fetch(created, connection=connection, serializer=JSONSerializer).delete()
        assert shown.result(60).status_code in (404, 503)
        assert queued(connection, queue_name) == []
        unknown = httpx.get(f"{url}/v1/jobs/{created}", timeout=60, trust_env=False)
        assert unknown.status_code == 404
