"""Tests of the HTTP endpoint, over real HTTP and with real workers behind it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.running import GOLDEN, jobs_held, wait_until

from fastgpt2 import Client
from fastgpt2.api.http.requests import MAX_BODY_BYTES
from fastgpt2.errors import JobCancelled
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.system.up import System

pytestmark = pytest.mark.processes

# It ignores any proxy that the environment names.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
ENTRY = ENTRIES[0]


def call(url: str, body: Any = None, method: str | None = None) -> tuple[int, str, Any]:
    """Return (status, content type, body); a JSON body is parsed."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    try:
        with OPENER.open(request, timeout=60) as answer:
            status, kind, content = answer.status, answer.headers["content-type"], answer.read()
    except urllib.error.HTTPError as error:
        status, kind, content = error.code, error.headers["content-type"], error.read()
    return status, kind, json.loads(content) if "json" in kind else content.decode()


def test_alive(system: System) -> None:
    assert call(f"{system.http_url}/") == (200, "text/plain; charset=utf-8", "Ok")
    assert call(f"{system.http_url}/health")[::2] == (200, {"status": "ok"})


def test_the_originals_route_goes_through_the_queue(system: System) -> None:
    body = {"inputs": ENTRY["prompt"], "parameters": {"max_new_tokens": 40, "ignore_eos": True}}
    status, _, answer = call(f"{system.http_url}/", body)
    (expected,) = [ENTRY["prompt"] + text_of(ENTRY["ids"][:40])]
    assert (status, answer) == (200, [{"generated_text": expected}])
    body["parameters"] |= {"return_full_text": False}
    assert call(f"{system.http_url}/", body)[2] == [{"generated_text": expected[len(ENTRY["prompt"]) :]}]


def text_of(ids: list[int]) -> str:
    from fastgpt2.engine.model.hub import DEMO_FOLDER
    from fastgpt2.engine.text.tokenizer import Tokenizer

    return Tokenizer.from_folder(DEMO_FOLDER).decode(ids)


def test_inputs_alone_suffice(system: System) -> None:
    status, _, answer = call(f"{system.http_url}/", {"inputs": ENTRY["prompt"]})
    assert status == 200
    assert answer[0]["generated_text"].startswith(ENTRY["prompt"])


def test_the_fields_of_a_job(system: System) -> None:
    url = f"{system.http_url}/"
    text = text_of(ENTRY["ids"][:9])
    parameters = {"max_new_tokens": 9, "ignore_eos": True, "min_new_tokens": 9, "logprobs": 1, "priority": "high"}
    (answer,) = call(url, {"inputs": ENTRY["prompt"], "parameters": parameters})[2]
    assert answer["generated_text"] == ENTRY["prompt"] + text
    assert [entry["token_id"] for entry in answer["logprobs"]] == ENTRY["ids"][:9]
    # With token ids as the prompt, the worker knows its text.
    parameters = {"max_new_tokens": 9, "ignore_eos": True}
    prompt = next(entry for entry in ENTRIES if entry["prompt"] == "My name is")
    own = text_of(prompt["ids"][:9])
    for full_text, expected in ((True, "My name is" + own), (False, own)):
        asked = {**parameters, "return_full_text": full_text}
        assert call(url, {"inputs": prompt["prompt_ids"], "parameters": asked})[2] == [{"generated_text": expected}]
    echoed = {**parameters, "echo": True}
    assert call(url, {"inputs": "My name is", "parameters": echoed})[2] == [{"generated_text": "My name is" + own}]


def test_time_is_up(system: System) -> None:
    parameters = {"max_new_tokens": 480, "ignore_eos": True, "timeout": 1e-6}
    status, _, answer = call(f"{system.http_url}/", {"inputs": "a", "parameters": parameters})
    assert (status, answer["error_type"]) == (504, "incomplete_generation")


def states(system: System) -> list[str]:
    return [worker["state"] for worker in call(f"{system.http_url}/status")[2]["workers"]]


def test_status_tells_queue_jobs_and_workers(system: System) -> None:
    with Client(system.redis_url) as client:
        client.enqueue("a", max_new_tokens=2).result(timeout=30)
        wait_until(lambda: states(system) == ["idle", "idle"], "both workers to be idle")
        status, _, before = call(f"{system.http_url}/status")
        assert status == 200
        by_priority = {"high": 0, "normal": 0, "low": 0}
        nobody_waits = {"name": "fastgpt2", "depth": 0, "by_priority": by_priority, "oldest_wait_seconds": None}
        assert before["queue"] == nobody_waits
        assert before["jobs"]["finished"] >= 1
        assert set(before["jobs"]) == {
            "queued", "started", "finished", "failed", "deferred", "scheduled", "canceled",
        }  # fmt: skip
        assert len(before["workers"]) == 2
        for worker in before["workers"]:
            assert (worker["state"], worker["model"]) == ("idle", "demo")
            assert (worker["in_hand"], worker["jobs"]) == (0, [])
            assert worker["age_seconds"] >= 0
            assert worker["heartbeat_age_seconds"] < 60
            assert Path(f"/proc/{worker['pid']}").exists()
        # These are more jobs than two workers decode at once.
        room = sum(worker["max_batch"] for worker in before["workers"])
        low: dict[str, Any] = {"priority": "low", "max_new_tokens": 480, "ignore_eos": True}
        with jobs_held():
            jobs = [client.enqueue("a", **low) for _ in range(room + 5)]
            status_url = f"{system.http_url}/status"
            wait_until(lambda: call(status_url)[2]["jobs"]["started"] == room, "both workers to be full")
            during = call(status_url)[2]
            assert during["queue"]["depth"] == during["jobs"]["queued"] == during["queue"]["by_priority"]["low"] == 5
            assert {w["state"] for w in during["workers"]} == {"busy"}
            for worker in during["workers"]:
                assert worker["in_hand"] == worker["max_batch"] == len(worker["jobs"])
                assert set(worker["jobs"]) <= {job.id for job in jobs}
            for job in jobs:
                job.cancel()
            for job in jobs:
                with pytest.raises(JobCancelled):
                    job.result(timeout=30)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body is not JSON"),
        (b"{", 400, "the body is not JSON"),
        (b"\xff", 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        ([], 400, "the body must be an object"),
        ({}, 400, "inputs is missing"),
        ({"inputs": 3}, 400, "inputs must be a string or a list of token ids, not 3"),
        ({"inputs": ["a"]}, 400, 'inputs, a list, must hold token ids, not the string "a"'),
        ({"inputs": "a\ud800"}, 400, "lone surrogate"),
        ({"inputs": "a", "input": "b"}, 400, "unknown field 'input'"),
        ({"inputs": "a", "parameters": [1]}, 400, "parameters must be an object"),
        ({"inputs": "a", "parameters": 0}, 400, "parameters must be an object"),
        ({"inputs": "a", "parameters": {"temperature": -1}}, 400, "temperature must be between 0 and 100, not -1"),
        ({"inputs": "a", "parameters": {"max_new_tokens": -1}}, 400, "max_new_tokens must be between 0"),
        ({"inputs": "a", "parameters": {"return_full_text": "yes"}}, 400, "return_full_text must be true or false"),
        ({"inputs": "a", "parameters": {"prompt": "b"}}, 400, "unknown field 'prompt'"),
        ({"inputs": "a", "parameters": {"stream": True}}, 400, "unknown field 'stream'"),
        ({"inputs": "a", "parameters": {"timeout": 0}}, 400, "timeout must be more than 0"),
        ({"inputs": "a", "parameters": {"priority": "urgent"}}, 400, "priority must be one of high, normal, low"),
        ({"inputs": "the " * 700}, 400, "over the model's 512 positions"),
        ({"inputs": "a", "parameters": {"max_new_tokens": 5000}}, 400, "ask for at most 511"),
        (b" " * (MAX_BODY_BYTES + 1), 413, f"bytes; the limit is {MAX_BODY_BYTES}: send less at once"),
    ],
)
def test_bad_requests_get_a_sentence(system: System, body: Any, status: int, message: str) -> None:
    got, kind, answer = call(f"{system.http_url}/", body)
    assert (got, kind) == (status, "application/json")
    assert message in answer["error"]
    assert answer["error_type"] == "validation"


def test_unknown_routes_and_methods(system: System) -> None:
    assert call(f"{system.http_url}/nothing")[::2] == (
        404,
        {"error": "GET /nothing: Not Found; /openapi.json tells which routes there are", "error_type": "unknown_url"},
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        OPENER.open(urllib.request.Request(f"{system.http_url}/health", method="DELETE"), timeout=60)
    assert caught.value.code == 405
    assert "GET" in caught.value.headers["allow"]


def test_a_page_of_another_site_is_refused(system: System) -> None:
    for origin, status in (("http://evil.example", 403), ("null", 403), (system.http_url, 200)):
        request = urllib.request.Request(f"{system.http_url}/", b'{"inputs": "a"}', {"origin": origin})
        try:
            got = OPENER.open(request, timeout=60).status
        except urllib.error.HTTPError as error:
            got = error.code
        assert got == status


def test_more_requests_wait_than_redis_py_allows_connections(system: System) -> None:
    """The library's own limit is 100 connections for a pool."""
    statuses: list[int] = []
    body = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
    threads = [
        threading.Thread(target=lambda: statuses.append(call(f"{system.http_url}/", body)[0])) for _ in range(130)
    ]
    for thread in threads:
        thread.start()
    assert call(f"{system.http_url}/status")[0] == 200
    for thread in threads:
        thread.join(60)
    assert statuses == [200] * 130


class TestAlone:
    """An endpoint without workers, on a Redis that goes away."""

    @pytest.fixture
    def endpoint(self, tmp_path: Path) -> Iterator[tuple[str, RedisServer]]:
        server = RedisServer().start()
        free = RedisServer()  # for its free port
        log = (tmp_path / "log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", "fastgpt2", "api", "--timeout", "0.5", "--port", str(free.port)],
            env={**os.environ, "FASTGPT2_REDIS_URL": server.url},
            stderr=log,
        )
        url = f"http://127.0.0.1:{free.port}"
        wait_until(lambda: answers(url), "the endpoint to answer")
        yield url, server
        process.terminate()
        assert process.wait(60) == 0
        log.close()
        server.stop()
        free.stop()
        assert "Traceback" not in (tmp_path / "log").read_text()

    def test_no_worker_and_then_no_redis(self, endpoint: tuple[str, RedisServer]) -> None:
        url, server = endpoint
        assert call(f"{url}/status")[2]["workers"] == []
        status, _, answer = call(f"{url}/", {"inputs": "a"})
        assert (status, answer["error_type"]) == (504, "incomplete_generation")
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as cut:
            cut.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nnot all of it")
        assert call(f"{url}/health")[0] == 200
        server.stop()
        assert call(f"{url}/health")[0] == 200
        for got in (call(f"{url}/status"), call(f"{url}/", {"inputs": "a"})):
            assert got[0] == 503
            assert "cannot be used" in got[2]["error"]

    def test_a_client_that_hangs_up_cancels_its_job(self) -> None:
        free = RedisServer()
        with RedisServer() as server, Client(server.url) as client:
            process = subprocess.Popen(
                [sys.executable, "-m", "fastgpt2", "api", "--port", str(free.port)],
                env={**os.environ, "FASTGPT2_REDIS_URL": server.url},
                stderr=subprocess.DEVNULL,
            )
            try:
                wait_until(lambda: answers(f"http://127.0.0.1:{free.port}"), "the endpoint to answer")
                with socket.create_connection(("127.0.0.1", free.port), timeout=60) as cut:
                    cut.sendall(b'POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 15\r\n\r\n{"inputs": "a"}')
                    wait_until(lambda: client.connection.llen("rq:queue:fastgpt2") == 1, "the job to be enqueued")
                    job: Any = client.connection.lindex("rq:queue:fastgpt2", 0)
                wait_until(lambda: client.status(job.decode()) == "canceled", "the job to be cancelled")
                assert client.connection.llen("rq:queue:fastgpt2") == 0
            finally:
                process.terminate()
                assert process.wait(60) == 0
                free.stop()

    def test_a_full_queue(self) -> None:
        free = RedisServer()
        with RedisServer() as server, Client(server.url) as client:
            process = subprocess.Popen(
                [sys.executable, "-m", "fastgpt2", "api", "--timeout", "0.1", "--port", str(free.port)],
                env={**os.environ, "FASTGPT2_REDIS_URL": server.url, "FASTGPT2_MAX_QUEUE": "1"},
                stderr=subprocess.DEVNULL,
            )
            try:
                url = f"http://127.0.0.1:{free.port}"
                wait_until(lambda: answers(url), "the endpoint to answer")
                client.enqueue("a")
                with pytest.raises(urllib.error.HTTPError) as caught:
                    OPENER.open(urllib.request.Request(f"{url}/", b'{"inputs": "a"}'), timeout=60)
                assert (caught.value.code, caught.value.headers["retry-after"]) == (429, "1")
                error = json.loads(caught.value.read())
                assert error["error_type"] == "overloaded"
                assert "1 job waits, the limit is 1" in error["error"]
                assert client.connection.llen("rq:queue:fastgpt2") == 1
            finally:
                process.terminate()
                assert process.wait(60) == 0
                free.stop()

    def test_a_restart_of_redis_is_survived(self, tmp_path: Path) -> None:
        server = RedisServer(folder=tmp_path / "redis").start()
        free = RedisServer()
        process = subprocess.Popen(
            [sys.executable, "-m", "fastgpt2", "api", "--port", str(free.port)],
            env={**os.environ, "FASTGPT2_REDIS_URL": server.url},
            stderr=subprocess.DEVNULL,
        )
        try:
            url = f"http://127.0.0.1:{free.port}"
            wait_until(lambda: answers(url), "the endpoint to answer")
            assert call(f"{url}/status")[0] == 200
            server.stop()
            server = RedisServer(server.port, tmp_path / "redis").start()
            assert call(f"{url}/status")[0] == 200, "the first request too"
        finally:
            process.terminate()
            assert process.wait(60) == 0
            server.stop()
            free.stop()


def answers(url: str) -> bool:
    try:
        return call(f"{url}/health")[0] == 200
    except OSError:
        return False


def test_a_taken_port_is_named(system: System) -> None:
    port = system.http_url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "fastgpt2", "api", "--port", port], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert "Traceback" not in done.stderr
