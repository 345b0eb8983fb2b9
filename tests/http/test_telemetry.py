"""Tests of what an endpoint and a worker tell of a request: events of the log, metrics, and spans by OTLP."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse
from rq import Queue
from rq.serializers import JSONSerializer
from support.otlp_receiver import OTLPReceiver, ReceivedSpan, otlp_receiver
from support.running import HOLDABLE, hang_up, jobs_held, wait_until

from fastgpt2 import Client
from fastgpt2.protocol.messages import TASK
from fastgpt2.system.redis_server import RedisServer

pytestmark = pytest.mark.processes

QUEUE = "monitored"
TOKEN = "a-token-of-24-characters"
AUTHORIZATION = {"authorization": f"Bearer {TOKEN}"}
# Of the standard's own example.
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"


def traceparent(number: int) -> str:
    """Return the context of a trace of the test's own."""
    return f"00-{trace_id(number)}-{PARENT_ID}-01"


def trace_id(number: int) -> str:
    return f"{TRACE_ID[:-2]}{number:02x}"


class Monitored:
    """An endpoint and a worker, as processes, whose log is JSON and whose spans come here."""

    def __init__(self, redis_url: str, folder: Path, receiver: OTLPReceiver) -> None:
        self.redis_url, self.receiver = redis_url, receiver
        self._folder = folder
        variables = {
            "FASTGPT2_REDIS_URL": redis_url, "FASTGPT2_QUEUE": QUEUE, "FASTGPT2_LOG_FORMAT": "json",
            "FASTGPT2_OTLP_TRACES_ENDPOINT": receiver.url.removesuffix("/v1/traces"), "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_SERVICE_NAME": "",
        }  # fmt: skip
        own = {
            "api": {"FASTGPT2_PORT": "0", "FASTGPT2_TOKEN": TOKEN},
            "worker": {"FASTGPT2_MODEL": "demo", "FASTGPT2_THREADS": "1", "FASTGPT2_NAME": "monitored-worker"},
        }
        self.processes = []
        for program, more in own.items():
            with (folder / program).open("w") as log:
                command = [*HOLDABLE, program]
                environment = {**os.environ, **variables, **more}
                self.processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        wait_until(lambda: self.find("api", "endpoint on") and self.find("worker", "is ready"), "both to be ready")
        (started,) = self.find("api", "endpoint on")
        self.url: str = started["message"].removeprefix("endpoint on ")
        self.http = httpx.Client(base_url=self.url, headers=AUTHORIZATION, trust_env=False, timeout=60)

    def events(self, program: str) -> list[dict[str, Any]]:
        """Return all that a program has written: each whole line must be an event."""
        return [
            json.loads(line)
            for line in (self._folder / program).read_text().splitlines(keepends=True)
            if line[-1:] == "\n"
        ]

    def find(self, program: str, text: str) -> list[dict[str, Any]]:
        return [event for event in self.events(program) if text in event["message"]]

    def samples(self) -> dict[tuple[str, ...], float]:
        """Return the metrics of HTTP by name and labels' values."""
        body = self.http.get("/metrics").text
        found = [sample for family in parse(body) for sample in family.samples if "_http_" in sample.name]
        return {(one.name, *(one.labels[label] for label in sorted(one.labels))): one.value for one in found}

    def spans(self, trace: str, names: set[str]) -> dict[str, ReceivedSpan]:
        """Wait for the spans of a trace, and return them by name."""
        wait_until(lambda: names <= self.receiver.of_trace(trace).keys(), f"the spans {names}")
        return self.receiver.of_trace(trace)


@pytest.fixture(scope="module")
def monitored(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    with otlp_receiver() as receiver:
        monitored = Monitored(redis_server.url, tmp_path_factory.mktemp("monitored"), receiver)
        yield monitored
        monitored.http.close()
        for process in monitored.processes:
            process.terminate()
        for process in monitored.processes:
            process.wait(60)


STEPS = ["queue", "admission", "prefill", "decode", "write"]


def test_a_request_is_followed_through_logs_metrics_and_spans(monitored: Monitored) -> None:
    headers = {"x-request-id": "followed-1", "traceparent": traceparent(1), "tracestate": "vendor=1"}
    body = {"prompt": "Once upon a time", "max_tokens": 5, "stream": True, "ignore_eos": True}
    answer = monitored.http.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200
    job_id = answer.headers["x-job-id"]
    wait_until(lambda: monitored.find("api", "request followed-1"), "the request's line")
    (event,) = monitored.find("api", "request followed-1")
    assert (event["program"], event["method"], event["route"]) == ("api", "POST", "/v1/completions")
    assert (event["status"], event["job_id"], event["trace_id"]) == (200, job_id, trace_id(1))
    assert event["model"] == "demo"
    assert "cut_short" not in event
    wait_until(lambda: monitored.find("worker", "finished"), "the job's line")
    (event,) = monitored.find("worker", job_id)
    assert (event["program"], event["worker"], event["model"]) == ("worker", "monitored-worker", "demo")
    assert (event["job_id"], event["request_id"], event["trace_id"]) == (job_id, "followed-1", trace_id(1))
    assert (event["completion_tokens"], event["finish_reason"]) == (5, "length")
    assert f"job {job_id} of request followed-1 finished" in event["message"]

    found = monitored.spans(trace_id(1), {"POST /v1/completions", "enqueue", "job", *STEPS})
    request, enqueue, job = (found[name] for name in ("POST /v1/completions", "enqueue", "job"))
    assert (request.parent_id, enqueue.parent_id, job.parent_id) == (PARENT_ID, request.span_id, enqueue.span_id)
    assert (request.service, enqueue.service, job.service) == ("fastgpt2-api", "fastgpt2-api", "fastgpt2-worker")
    assert request.attributes["http.response.status_code"] == 200
    assert job.attributes["messaging.message.id"] == enqueue.attributes["messaging.message.id"] == job_id
    assert (job.attributes["gen_ai.usage.output_tokens"], job.attributes["fastgpt2.outcome"]) == (5, "finished")
    steps = [found[name] for name in STEPS]
    assert {step.parent_id for step in steps} == {job.span_id}
    edges = [job.start, *(step.start for step in steps[1:]), job.end]
    assert [step.start for step in steps] == edges[:-1], "one step follows the other, from the job's begin"
    assert [step.end for step in steps] == edges[1:]
    assert edges == sorted(edges)

    counts = monitored.samples()
    assert counts["fastgpt2_http_requests_total", "POST", "/v1/completions", "200"] == 1
    assert counts["fastgpt2_http_request_duration_seconds_count", "POST", "/v1/completions"] == 1
    assert counts["fastgpt2_http_request_duration_seconds_bucket", "+Inf", "POST", "/v1/completions"] == 1
    assert counts["fastgpt2_http_requests_in_flight",] == 1, "the request for the metrics"


def test_a_job_that_fails_and_one_of_rqs_own_program(monitored: Monitored) -> None:
    too_long = {"prompt": "a " * 1000, "request_id": "failing", "traceparent": traceparent(2)}
    job_id = monitored.http.post("/v1/jobs", json=too_long).json()["id"]
    found = monitored.spans(trace_id(2), {"job", "queue", "admission"})
    # It is the body that names the trace; the request's own is another.
    assert (found["job"].parent_id, found["job"].status) == (PARENT_ID, 2)
    assert found["job"].attributes["error.type"] == "PromptTooLong"
    (event,) = monitored.find("worker", job_id)
    assert (event["level"], event["error"]) == ("WARNING", "PromptTooLong")
    assert (event["request_id"], event["trace_id"]) == ("failing", trace_id(2))

    with Client(monitored.redis_url, QUEUE) as client:
        queue = Queue(QUEUE, connection=client.connection, serializer=JSONSerializer)
        by_rq = [
            queue.enqueue(TASK, "a", max_new_tokens=2, meta=meta).id
            for meta in (
                {"traceparent": traceparent(3), "mine": 1},
                {"traceparent": {"no": "text"}, "request_id": 7},
                {},
            )
        ]
        for each in by_rq:
            client.result(each, 60)
        list(client.map(["a", "b"], max_new_tokens=1, traceparent=traceparent(4), request_id="mapped"))
        assert queue.fetch_job(by_rq[0]).meta == {"traceparent": traceparent(3), "mine": 1}  # type: ignore[union-attr]
    assert monitored.spans(trace_id(3), {"job", "decode"})["job"].attributes["messaging.message.id"] == by_rq[0]
    wait_until(lambda: len(monitored.find("worker", "of request mapped finished")) == 2, "the lines of both jobs")
    assert "request_id" not in monitored.find("worker", by_rq[1])[0]

    def roots() -> list[ReceivedSpan]:
        return [span for span in monitored.receiver.spans if span.attributes.get("messaging.message.id") == by_rq[2]]

    wait_until(roots, "the span of a job that has no trace")
    assert roots()[0].parent_id == ""


def test_a_trace_that_is_not_sampled_has_no_spans_but_stands_in_the_log(monitored: Monitored) -> None:
    headers = {"traceparent": traceparent(5)[:-1] + "0", "x-request-id": "not-sampled"}
    assert monitored.http.post("/generate", json={"inputs": "a"}, headers=headers).status_code == 200
    wait_until(lambda: monitored.find("worker", "of request not-sampled finished"), "the job's line")
    assert monitored.find("worker", "of request not-sampled finished")[0]["trace_id"] == trace_id(5)
    # What is sent later has come, and so would have been what is sent before.
    headers = {"traceparent": traceparent(6)}
    assert monitored.http.get("/health", headers=headers).status_code == 200
    assert monitored.http.post("/generate", json={"inputs": "a"}, headers=headers).status_code == 200
    found = monitored.spans(trace_id(6), {"GET /health", "POST /generate", "job"})
    assert found["GET /health"].parent_id == PARENT_ID
    assert not monitored.receiver.of_trace(trace_id(5))


def test_strangers_make_no_labels(monitored: Monitored) -> None:
    for number in range(3):
        assert monitored.http.get(f"/secret/{number}").status_code == 404
        assert monitored.http.get(f"/v1/jobs/none-{number}").status_code == 404
        assert monitored.http.request(f"METHOD{number}", "/v1/models").status_code == 405
        assert httpx.get(f"{monitored.url}/v1/models", trust_env=False).status_code == 401
        assert httpx.get(f"{monitored.url}/nowhere/{number}", trust_env=False).status_code == 401
    before = monitored.samples()
    assert before["fastgpt2_http_requests_total", "GET", "other", "404"] == 3
    assert before["fastgpt2_http_requests_total", "GET", "/v1/jobs/{job_id}", "404"] == 3
    assert before["fastgpt2_http_requests_total", "other", "/v1/models", "405"] == 3
    assert before["fastgpt2_http_requests_total", "GET", "/v1/models", "401"] == 3
    assert before["fastgpt2_http_requests_total", "GET", "other", "401"] == 3
    with socket.create_connection((urlsplit(monitored.url).hostname, urlsplit(monitored.url).port)) as connection:
        connection.sendall(b"this is no request\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    assert monitored.samples()["fastgpt2_http_requests_total", "other", "other", "400"] == 1


def test_a_client_that_leaves_is_a_499(monitored: Monitored) -> None:
    body = {"inputs": "a", "parameters": {"max_new_tokens": 480, "ignore_eos": True}}

    def is_served() -> bool:
        return monitored.samples()["fastgpt2_http_requests_in_flight",] == 2

    with jobs_held():
        hang_up(monitored.url, "/generate", body, is_served, **AUTHORIZATION, **{"x-request-id": "left-1"})
        wait_until(lambda: monitored.find("api", "left-1"), "the request to have ended")
        headers = {"x-request-id": "left-2"}
        with monitored.http.stream("POST", "/generate_stream", json=body, headers=headers) as answer:
            assert next(answer.iter_lines())
        wait_until(lambda: monitored.find("api", "left-2"), "the stream to have ended")
    for path, request_id in (("/generate", "left-1"), ("/generate_stream", "left-2")):
        (event,) = monitored.find("api", request_id)
        assert (event["status"], event["route"]) == (499, path)
        assert monitored.samples()["fastgpt2_http_requests_total", "POST", path, "499"] == 1
    assert event["cut_short"], "the stream had begun"


def test_prometheus_finds_nothing_wrong(monitored: Monitored) -> None:
    body = monitored.http.get("/metrics").text
    for family in parse(body):
        if family.name == "fastgpt2_http_request_duration_seconds":
            assert family.type == "histogram"
    promtool = shutil.which("promtool")
    if promtool is None:
        if os.environ.get("CI") == "true":
            pytest.fail("promtool is not installed: apt-get install prometheus")
        pytest.skip("promtool is not installed")
    done = subprocess.run([promtool, "check", "metrics"], input=body, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_all_that_was_written_is_events(monitored: Monitored) -> None:
    for program in ("api", "worker"):
        assert {event["program"] for event in monitored.events(program)} == {program}
        assert not [event for event in monitored.events(program) if "traceback" in event]
