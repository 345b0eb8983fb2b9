"""Tests of the endpoint in trouble: bounds, deadlines, a full queue, no Redis, the same request again, its stop."""

from __future__ import annotations

import http.client
import json
import select
import signal
import socket
import threading
import time
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

import httpx2 as httpx
import pytest
from redis import Redis
from starlette.testclient import TestClient
from support.running import RunningEndpoint, StartEndpoint, StartWorker, hang_up, jobs_held, wait_until

from fastgpt2 import Client
from fastgpt2.api.http import service
from fastgpt2.api.http.app import create_app
from fastgpt2.api.http.middleware import MAX_PASSED_OVER_BYTES
from fastgpt2.api.http.models import Models
from fastgpt2.api.http.monitoring import STATUS_FRESH_SECONDS
from fastgpt2.api.http.requests import MAX_BODY_BYTES
from fastgpt2.errors import QueueUnavailable
from fastgpt2.protocol.keys import registry_key
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.system.up import System

LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}


def post(endpoint: RunningEndpoint | str, path: str, body: Any, **headers: str) -> httpx.Response:
    url = endpoint if isinstance(endpoint, str) else endpoint.url
    return httpx.post(f"{url}{path}", json=body, headers=headers, trust_env=False, timeout=60)


def error_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def send_raw(port: int, sent: bytes) -> tuple[int, str]:
    """Send bytes that need not be a whole request, and return the answer's status and text."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(sent)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, answer.read().decode()


def listens(port: int) -> bool:
    """Tell whether somebody takes connections."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=60):
        return True
    return False


def queued_ids(client: Client) -> list[str]:
    ids: Any = client.connection.lrange(f"rq:queue:{client.queue_name}", 0, -1)
    return [job_id.decode() for job_id in ids]


# Bodies.


def test_a_body_that_does_not_come_is_not_waited_for(start_endpoint: StartEndpoint) -> None:
    endpoint = start_endpoint("--body-timeout", "0.2")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    status, text = send_raw(endpoint.port, head + b'{"prompt":')
    assert status == 408
    assert "did not come within 0.2 s" in text
    assert "Traceback" not in endpoint.log.read_text()


def test_a_body_that_is_too_large(start_endpoint: StartEndpoint) -> None:
    endpoint = start_endpoint()
    # Most clients send the whole body before they read an answer.
    for size in (MAX_BODY_BYTES + 1, 3 * MAX_BODY_BYTES):
        answer = httpx.post(f"{endpoint.url}/v1/completions", content=b" " * size, trust_env=False, timeout=60)
        assert answer.status_code == 413
        assert f"the body has {size} bytes; the limit is {MAX_BODY_BYTES}" in answer.json()["error"]["message"]
    # A body too long to pass over is refused by its stated length.
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (1 << 40)
    assert send_raw(endpoint.port, head)[0] == 413
    # A body without a stated length is refused as soon as it is too large.
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=20) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        for _ in range(MAX_PASSED_OVER_BYTES // (1 << 20) - 1):
            connection.sendall(chunk)
        assert connection.recv(12) == b"HTTP/1.1 413"
    status = Path(f"/proc/{endpoint.process.pid}/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) << 10
    assert peak < MAX_PASSED_OVER_BYTES + (64 << 20), "what is passed over is not kept"


def test_an_answer_that_comes_before_the_request_was_read_reaches_its_client(start_endpoint: StartEndpoint) -> None:
    endpoint = start_endpoint(FASTGPT2_TOKEN="correct-horse-battery-staple")
    for size in (10, 1000, 100_000, 10_000_000):
        for path in ("/v1/completions", "/nothing"):
            # Many clients send head and body in two parts; the answer to the head must not break off the body.
            connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=20)
            connection.putrequest("POST", path)
            connection.putheader("Content-Length", str(size))
            connection.endheaders()
            assert select.select([connection.sock], [], [], 10)[0], "it is refused by its head"
            connection.send(b" " * size)
            answer = connection.getresponse()
            assert answer.status == 401
            assert b"asks for a token" in answer.read()
            connection.close()


@pytest.mark.parametrize("text", ["{", "[1]", '{"prompt": NaN}', '{"prompt": "a", "temperature": Infinity}', ""])
def test_what_is_no_json_object_is_refused(system: System, text: str) -> None:
    answer = httpx.post(f"{system.http_url}/v1/completions", content=text, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


# Request ids.


def test_each_request_has_an_id_in_its_answer_and_in_the_log(start_endpoint: StartEndpoint) -> None:
    endpoint = start_endpoint()
    for given, kept in (
        (None, False),
        ("trace-1.2:3_4", True),
        ("no good", False),
        ("x" * 200, False),
        (b"\xe9", False),
    ):
        headers: Any = {} if given is None else {"x-request-id": given}
        answer = httpx.get(f"{endpoint.url}/v1/nothing", headers=headers, trust_env=False)
        request_id = answer.headers["x-request-id"]
        assert (request_id == given) is kept
        wanted = f"request {request_id}"
        wait_until(lambda wanted=wanted: wanted in endpoint.log.read_text(), "the line of the request")  # type: ignore[misc]
        assert "GET /v1/nothing 404 in " in endpoint.log.read_text()


def test_a_path_cannot_write_lines_into_the_log(start_endpoint: StartEndpoint) -> None:
    endpoint = start_endpoint()
    httpx.get(f"{endpoint.url}/a%0A2026-01-01%20INFO%20forged%1b[31m", trust_env=False)
    wait_until(lambda: "forged" in endpoint.log.read_text(), "the line of the request")
    (line,) = [line for line in endpoint.log.read_text().splitlines() if "forged" in line]
    assert "\\n2026-01-01 INFO forged\\x1b" in line


# Refusals, and readiness.


def test_a_full_queue(start_endpoint: StartEndpoint, client: Client) -> None:
    endpoint = start_endpoint("--max-queue", "2", "--timeout", "0.2")
    jobs = [client.enqueue("a") for _ in range(2)]
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/v1/jobs", {"prompt": "a"}),
    ):
        answer = post(endpoint, path, body)
        assert error_of(answer) == (429, "queue_full")
        assert answer.headers["retry-after"] == "1"
    assert post(endpoint, "/generate", {"inputs": "a"}).json()["error_type"] == "overloaded"
    jobs[0].cancel()
    # If only one of two prompts has room, neither is enqueued.
    assert post(endpoint, "/v1/completions", {"prompt": ["a", "b"]}).status_code == 429
    assert client.connection.llen(f"rq:queue:{client.queue_name}") == 1
    jobs[1].cancel()


def test_too_much_waits(redis_server: RedisServer, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_WAITING", 1)
    app = create_app(redis_server.url, client.queue_name, service.Bounds(timeout=0.05), lambda: False)
    with TestClient(app, base_url="http://localhost") as web:
        for stream in (False, True):
            answer = web.post("/v1/completions", json={"prompt": ["a", "b"], "stream": stream})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "service_busy")
            assert answer.headers["retry-after"] == "1"
        assert queued_ids(client) == []
        assert web.post("/v1/completions", json={"prompt": "a"}).status_code == 504, "one may wait, if in vain"


def test_nothing_else_is_asked_once_a_job_is_enqueued(
    redis_server: RedisServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that waits outlives a Redis that goes away. Who failed for the model's name would cancel the job."""

    async def fail(_models: Models) -> NoReturn:
        raise QueueUnavailable("Redis is away")

    monkeypatch.setattr(Models, "read", fail)
    app = create_app(redis_server.url, client.queue_name, service.Bounds(timeout=0.05), lambda: False)
    with TestClient(app, base_url="http://localhost") as web:
        answer = web.post("/v1/completions", json={"prompt": "a", "stream": True})
        assert error_of(answer) == (503, "queue_unavailable")
    assert queued_ids(client) == []
    assert client.connection.zcard(registry_key("canceled", client.queue_name)) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_time_is_up_and_the_job_is_cancelled(start_endpoint: StartEndpoint, client: Client, stream: bool) -> None:
    endpoint = start_endpoint("--timeout", "0.3")
    answer = post(endpoint, "/v1/completions", {"prompt": "a", "stream": stream})
    assert error_of(answer) == (504, "result_timeout")
    assert "no worker listens" in answer.json()["error"]["message"]
    queue = f"rq:queue:{client.queue_name}"
    wait_until(lambda: client.connection.llen(queue) == 0, "the job to be taken out of the queue")


def test_time_is_up_in_the_midst_of_a_stream(
    start_endpoint: StartEndpoint, start_worker: StartWorker, client: Client
) -> None:
    """One in which there was no token yet is tried again with more time."""
    start_worker()
    body = {**LONG, "prompt": ["a"] * 4, "max_tokens": 505, "stream": True}
    with jobs_held():
        for seconds in (0.4, 2, 10, 50):
            answer = post(start_endpoint("--timeout", str(seconds)), "/v1/completions", body)
            if answer.status_code == 200:
                break
    *_, error, done = [line for line in answer.text.splitlines() if line]
    assert answer.status_code == 200
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "result_timeout"
    wait_until(lambda: not client.connection.zcard(f"rq:wip:{client.queue_name}"), "the worker to let go of them")


def test_ready(start_endpoint: StartEndpoint, start_worker: StartWorker) -> None:
    endpoint = start_endpoint()
    answer = httpx.get(f"{endpoint.url}/ready", trust_env=False)
    assert answer.status_code == 503
    assert "no worker" in answer.json()["error"]
    worker = start_worker()
    # The endpoint repeats what Redis said for half a second.
    time.sleep(STATUS_FRESH_SECONDS)
    assert httpx.get(f"{endpoint.url}/ready", trust_env=False).json() == {"status": "ready"}
    worker.terminate()
    worker.wait(60)
    time.sleep(STATUS_FRESH_SECONDS)
    assert httpx.get(f"{endpoint.url}/ready", trust_env=False).status_code == 503


ROUTES = [
    ("GET", "/status", None), ("GET", "/metrics", None), ("GET", "/v1/models", None),
    ("GET", "/v1/jobs", None), ("GET", "/v1/jobs/x", None), ("POST", "/v1/jobs", {"prompt": "a"}),
    ("POST", "/v1/completions", {"prompt": "a"}), ("POST", "/v1/completions", {"prompt": "a", "stream": True}),
    ("POST", "/", {"inputs": "a"}), ("POST", "/generate_stream", {"inputs": "a"}),
]  # fmt: skip


def test_a_redis_that_is_away(start_endpoint: StartEndpoint) -> None:
    with RedisServer() as server:
        endpoint = start_endpoint("--timeout", "5", FASTGPT2_REDIS_URL=server.url)
        server.stop()
        for method, path, body in ROUTES:
            answer = httpx.request(method, f"{endpoint.url}{path}", json=body, trust_env=False, timeout=20)
            assert answer.status_code == 503, path
            assert "start it, or mend or unset the variable" in answer.text
        assert httpx.get(f"{endpoint.url}/health", trust_env=False).status_code == 200
        answer = httpx.get(f"{endpoint.url}/ready", trust_env=False)
        assert (answer.status_code, answer.json()["error"]) == (503, "Redis cannot be used; /status says why")
    assert "Traceback" not in endpoint.log.read_text()


def reads_streams(client: Client) -> bool:
    """Tell whether some connection waits in a blocking read."""
    return any(other["cmd"] == "xread" and "b" in other["flags"] for other in client.connection.client_list())


def test_a_redis_that_goes_away_while_a_stream_waits(start_endpoint: StartEndpoint, tmp_path: Any) -> None:
    server = RedisServer(folder=tmp_path / "redis").start()
    endpoint = start_endpoint("--timeout", "20", FASTGPT2_REDIS_URL=server.url, FASTGPT2_QUEUE="q")
    answers: list[httpx.Response] = []
    asker = threading.Thread(
        target=lambda: answers.append(post(endpoint, "/v1/completions", {"prompt": "a", "stream": True}))
    )
    asker.start()
    with Client(server.url, "q") as client:
        wait_until(lambda: client.connection.llen("rq:queue:q") == 1, "the job to be enqueued")
        # Before that, the endpoint might not have heard that the job is enqueued, and would answer with an error.
        wait_until(lambda: reads_streams(client), "the endpoint to wait for what comes of it")
        server.stop()
        server = RedisServer(server.port, tmp_path / "redis").start()
        (job_id,) = queued_ids(client)
        client.cancel(job_id)
    asker.join(60)
    server.stop()
    assert "job_cancelled" in answers[0].text, "it was waited for, and the end was seen"


# The same request again.


def test_an_idempotent_completion_is_carried_out_once(
    start_endpoint: StartEndpoint, start_worker: StartWorker, redis: Redis, queue_name: str
) -> None:
    start_worker()
    first, second = start_endpoint(), start_endpoint()
    key, body = str(uuid.uuid4()), {"prompt": ["My name is", "It was"], "max_tokens": 6}
    answers = [post(one, "/v1/completions", body, **{"idempotency-key": key}) for one in (first, second, first)]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert all(answer.json()["choices"] == answers[0].json()["choices"] for answer in answers)
    assert redis.zcard(f"rq:finished:{queue_name}") == 2
    streamed = post(first, "/v1/completions", {**body, "stream": True}, **{"idempotency-key": key})
    assert error_of(streamed) == (422, "idempotency_mismatch")
    other = post(first, "/v1/completions", body, **{"idempotency-key": str(uuid.uuid4())})
    assert other.json()["id"] != answers[0].json()["id"]


def test_who_hung_up_may_ask_again(start_endpoint: StartEndpoint, start_worker: StartWorker, client: Client) -> None:
    endpoint, key = start_endpoint(), {"idempotency-key": "a/b c"}
    queue = f"rq:queue:{client.queue_name}"
    hang_up(endpoint.url, "/v1/completions", {"prompt": "a"}, lambda: client.connection.llen(queue) == 1, **key)
    wait_until(lambda: client.connection.llen(queue) == 0, "the job to be cancelled")
    start_worker()
    assert post(endpoint, "/v1/completions", {"prompt": "a"}, **key).status_code == 200


# The stop of the endpoint.


def test_streams_end_with_an_event_when_the_endpoint_stops(start_endpoint: StartEndpoint, client: Client) -> None:
    """SIGINT stops the endpoint here, SIGTERM in the next test."""
    endpoint = start_endpoint("--timeout", "60")
    answers: list[httpx.Response] = []
    asked: list[tuple[str, Any]] = [
        ("/v1/completions", {"prompt": "a", "stream": True}),
        ("/generate_stream", {"inputs": "a"}),
        ("/v1/completions", {"prompt": "a"}),
    ]
    askers = [threading.Thread(target=lambda one=one: answers.append(post(endpoint, *one))) for one in asked]
    for asker in askers:
        asker.start()
    queue = f"rq:queue:{client.queue_name}"
    wait_until(lambda: client.connection.llen(queue) == 3, "the jobs to be enqueued")
    endpoint.process.send_signal(signal.SIGINT)
    for asker in askers:
        asker.join(60)
    assert endpoint.process.wait(60) == 0
    assert len(answers) == 3
    for answer in answers:
        assert "the endpoint is being stopped; job" in answer.text
        if answer.status_code == 200:
            assert answer.headers["content-type"].startswith("text/event-stream")
        else:
            assert answer.status_code == 503
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503]
    assert client.connection.llen(queue) == 3, "the jobs go on"
    assert "endpoint has stopped" in endpoint.log.read_text()
    assert "Traceback" not in endpoint.log.read_text()
    for job_id in queued_ids(client):
        client.cancel(job_id)


def test_a_stream_that_can_finish_in_time_does(start_endpoint: StartEndpoint, start_worker: StartWorker) -> None:
    start_worker()
    endpoint = start_endpoint()
    url, body = f"{endpoint.url}/v1/completions", {**LONG, "max_tokens": 200, "stream": True}
    with ExitStack() as stack:
        with jobs_held():
            answer = stack.enter_context(httpx.stream("POST", url, json=body, trust_env=False))
            lines = answer.iter_lines()
            next(lines)
            endpoint.process.terminate()
            wait_until(lambda: not listens(endpoint.port), "the endpoint to see the signal")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert endpoint.process.wait(60) == 0


# Methods.


def test_what_is_refused_is_told_which_methods_are_not(system: System) -> None:
    for path, methods in (("/", {"GET", "HEAD", "POST"}), ("/v1/jobs/x", {"GET", "HEAD", "DELETE"})):
        answer = httpx.request("PATCH", f"{system.http_url}{path}", trust_env=False)
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == methods
    assert httpx.head(f"{system.http_url}/health", trust_env=False).status_code == 200


def test_a_browser_gets_the_page_and_a_program_ok(system: System) -> None:
    assert httpx.get(f"{system.http_url}/", trust_env=False).text == "Ok"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/jobs", "/health", "/ready", "/status", "/metrics", "/info", "/"])
def test_slashes_too_many_change_nothing(system: System, path: str) -> None:
    with httpx.Client(base_url=system.http_url, trust_env=False, timeout=60) as web:
        for method in ("GET", "HEAD", "OPTIONS"):
            plain = web.request(method, path)
            assert plain.status_code == (405 if method == "OPTIONS" else 200)
            for spelling in (f"{path}/", f"/{path}", f"/{path}//", path.replace("/v1/", "/v1//")):
                answer = web.request(method, f"{system.http_url}{spelling}?limit=1")
                assert (answer.status_code, answer.headers.get("allow")) == (
                    plain.status_code, plain.headers.get("allow"),
                ), spelling  # fmt: skip
                assert answer.headers["content-type"] == plain.headers["content-type"]


@pytest.mark.parametrize("path", ["/v1/completions/", "/v1//completions", "//v1/completions//"])
def test_a_body_is_not_lost_on_the_way(system: System, path: str) -> None:
    body = {"prompt": "My name", "max_tokens": 5, "ignore_eos": True}
    plain = httpx.post(f"{system.http_url}/v1/completions", json=body, trust_env=False, timeout=60)
    answer = httpx.post(f"{system.http_url}{path}", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["choices"] == plain.json()["choices"]
    generated = httpx.post(f"{system.http_url}/generate/", json={"inputs": "a"}, trust_env=False, timeout=60)
    assert generated.status_code == 200
    assert httpx.post(f"{system.http_url}{path}", content=b"{", trust_env=False).json()["error"]["param"] is None


def test_a_slash_that_is_part_of_a_name_stays(system: System) -> None:
    for name, status in (("demo", 200), ("demo%2F", 404), ("%2Fsrv%2Fdemo", 404), ("some%2F%2Fdemo", 404)):
        answer = httpx.get(f"{system.http_url}/v1/models/{name}/", trust_env=False)
        assert answer.status_code == status
        if status == 404:
            assert f"'{unquote(name)}'" in answer.json()["error"]["message"]


def test_a_model_of_an_earlier_releases_workers_is_asked_for_without_its_name(
    redis_server: RedisServer, client: Client
) -> None:
    """Such workers take no jobs from queues of models. So a name goes on only where nobody else would take the job."""
    connection, queue = client.connection, client.queue_name

    def register(worker: str, **fields: str) -> None:
        written: dict[Any, Any] = {"n_positions": 1024, "longest_token_bytes": 128, **fields}
        connection.hset(f"rq:worker:{worker}-{queue}", mapping=written)
        connection.sadd(f"rq:workers:{queue}", f"rq:worker:{worker}-{queue}")

    def ask() -> int:
        app = create_app(redis_server.url, queue, service.Bounds(timeout=0.1), lambda: False)
        with TestClient(app, base_url="http://localhost") as web:
            return web.post("/v1/completions", json={"model": "gpt2", "prompt": "a"}).status_code

    register("old", model="gpt2")
    assert ask() == 504, "it waited for a worker"
    assert connection.zcard(f"rq:canceled:{queue}") == 1
    register("new", model="small", models='["small"]', named_only="1")
    assert ask() == 504
    register("newer", model="other", models='["other"]')
    assert ask() == 404
    assert connection.zcard(f"rq:canceled:{queue}") == 2


def test_a_folder_is_a_model_by_its_path(redis_server: RedisServer, client: Client) -> None:
    worker = f"rq:worker:{client.queue_name}"
    client.connection.sadd(f"rq:workers:{client.queue_name}", worker)
    client.connection.hset(worker, mapping={"model": "/srv/models/mine", "birth": "2026-01-01T00:00:00Z"})
    app = create_app(redis_server.url, client.queue_name, service.Bounds(), lambda: False)
    with TestClient(app, base_url="http://localhost") as web:
        for path in ("%2Fsrv%2Fmodels%2Fmine", "/srv/models/mine", "/srv//models/mine/"):
            assert web.get(f"/v1/models/{path}").json()["id"] == "/srv/models/mine"
