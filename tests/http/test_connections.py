"""Tests of the endpoint's connections: what is no request, who says nothing, more of them than there may be."""

from __future__ import annotations

import http.client
import os
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import httpx2 as httpx
import pytest
from support.running import RunningEndpoint, StartEndpoint, wait_until

from fastgpt2.api.http.connections import limit_connections
from fastgpt2.api.http.parser import MAX_FIELDS
from fastgpt2.api.http.serve import MAX_CONNECTIONS, MAX_HEAD_BYTES, bind, url_of
from fastgpt2.errors import BadRequest
from fastgpt2.system.redis_server import RedisServer

pytestmark = pytest.mark.processes

HOST = b"Host: localhost\r\n"
GET = b"GET /health HTTP/1.1\r\n" + HOST
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST
CHUNKED = b"Transfer-Encoding: chunked\r\n"
# What a smuggler hides behind the end of a body, as one of two readers sees it.
HIDDEN = b"GET /smuggled HTTP/1.1\r\n" + HOST + b"\r\n"


def exchange(port: int, sent: bytes) -> bytes:
    """Return all that comes back until the endpoint closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(sent)
        found = b""
        while part := connection.recv(1 << 16):
            found += part
        return found


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


def padded(size: int) -> bytes:
    """Return a request whose head has this many bytes."""
    begun = GET + b"Connection: close\r\nX: "
    return begun + b"x" * (size - len(begun) - 4) + b"\r\n\r\n"


# Where two readers may see two different requests, or one reader none.
REFUSED = {
    "both lengths": (400, POST + b"Content-Length: 6\r\n" + CHUNKED + b"\r\n0\r\n\r\n"),
    "both lengths, the other way round": (400, POST + CHUNKED + b"Content-Length: 6\r\n\r\n0\r\n\r\n"),
    "two lengths": (400, POST + b"Content-Length: 6\r\nContent-Length: 7\r\n\r\n{}"),
    "two lengths in one field": (400, POST + b"Content-Length: 6, 7\r\n\r\n{}"),
    "a length with a sign": (400, POST + b"Content-Length: +2\r\n\r\n{}"),
    "a length that is negative": (400, POST + b"Content-Length: -2\r\n\r\n{}"),
    "chunked twice": (501, POST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n"),
    "chunked twice in one field": (501, POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    "a compressed transfer": (501, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "an unknown transfer": (501, POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    "chunks in HTTP/1.0": (400, b"POST / HTTP/1.0\r\n" + HOST + CHUNKED + b"\r\n0\r\n\r\n"),
    "a space before a colon": (400, POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
    "a folded field": (400, POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n"),
    "a folded field of another name": (400, GET + b"X: a\r\n\tb\r\n\r\n"),
    "NUL in a value": (400, GET + b"X: a\x00b\r\n\r\n"),
    "CR in a value": (400, GET + b"X: a\rContent-Length: 5\r\n\r\n"),
    "no host": (400, b"GET /health HTTP/1.1\r\n\r\n"),
    "two hosts": (400, GET + HOST + b"\r\n"),
    "no number of bytes": (400, POST + CHUNKED + b"\r\nxyz\r\n{}\r\n0\r\n\r\n"),
    "a number with 0x": (400, POST + CHUNKED + b"\r\n0x2\r\n{}\r\n0\r\n\r\n"),
    "a negative number": (400, POST + CHUNKED + b"\r\n-2\r\n{}\r\n0\r\n\r\n"),
    "a chunk longer than it says": (400, POST + CHUNKED + b"\r\n2\r\n{}{}\r\n0\r\n\r\n"),
    "HTTP/2.0": (505, b"GET /health HTTP/2.0\r\n" + HOST + b"\r\n"),
    "no HTTP": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    "a head too long by a byte": (431, padded(MAX_HEAD_BYTES + 1)),
    "a head much too long": (431, padded(3 * MAX_HEAD_BYTES)),
    "a line too long": (431, b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    "spaces alone": (431, GET + b"X:" + b" " * MAX_HEAD_BYTES + b"a\r\n\r\n"),
    "a head without end": (431, GET + b"X: " + b"x" * (8 * MAX_HEAD_BYTES)),
    "fields too many": (431, GET + b"X: y\r\n" * MAX_FIELDS + b"\r\n"),
    "a trailer too long": (431, POST + CHUNKED + b"\r\n0\r\nX: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n"),
    "a trailer of too many fields": (431, POST + CHUNKED + b"\r\n0\r\n" + b"X: y\r\n" * (MAX_FIELDS + 1) + b"\r\n"),
}


def test_what_is_no_request_is_refused_and_nothing_behind_it_is_served(start_endpoint: StartEndpoint) -> None:
    endpoint = start_endpoint()
    for name, (status, sent) in REFUSED.items():
        for before, earlier in ((b"", []), (GET + b"\r\n", [200])):
            answers = exchange(endpoint.port, before + sent + HIDDEN)
            assert statuses(answers) == [*earlier, status], name
            assert answers.count(b"connection: close") == 1, name
    log = endpoint.log.read_text()
    assert "smuggled" not in log
    assert "Traceback" not in log


def test_what_is_a_request_is_served(start_endpoint: StartEndpoint) -> None:
    port = start_endpoint().port
    for sent in (
        padded(MAX_HEAD_BYTES),
        GET + b"X: y\r\n" * (MAX_FIELDS - 2) + b"Connection: close\r\n\r\n",
        b"GET /health HTTP/1.0\r\n\r\n",
        b"GET /health HTTP/1.1\nHost: localhost\nConnection: close\n\n",
        GET + b"Content-Length: 2\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",
    ):
        assert statuses(exchange(port, sent)) == [200], sent[:200]
    body = b'{"prompt": 1}'
    in_chunks = CHUNKED + b"Connection: close\r\n\r\n%x;ext=1\r\n" % len(body) + body + b"\r\n0\r\nX: trailer\r\n\r\n"
    answer = exchange(port, POST + in_chunks)
    assert statuses(answer) == [400]
    assert b"prompt must be" in answer, "it was read"


def test_the_endpoint_stops_in_order_while_refused_connections_linger(start_endpoint: StartEndpoint) -> None:
    endpoint = start_endpoint()
    with ExitStack() as stack:
        for name, (status, sent) in REFUSED.items():
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), timeout=60))
            connection.sendall(sent)
            assert statuses(connection.recv(1000)) == [status], name
        endpoint.process.terminate()
        assert endpoint.process.wait(60) == 0
    log = endpoint.log.read_text()
    assert "endpoint has stopped" in log
    assert "Traceback" not in log


def test_a_signal_between_the_first_line_and_the_first_request_stops_the_endpoint(tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    script = (
        "import os, signal, sys; from fastgpt2.api.http import connections; "
        "run = connections.BoundedServer.run; "
        "connections.BoundedServer.run = lambda *a, **k: (os.kill(os.getpid(), signal.SIGTERM), run(*a, **k)); "
        "from fastgpt2.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", script, "api", "--port", "0", "--redis-url", "redis://127.0.0.1:1/0"]
    with log.open("w") as out:
        assert subprocess.run(command, stderr=out, timeout=60).returncode == 0
    assert "endpoint has stopped" in log.read_text()


def test_a_compressed_body_is_refused_by_name(start_endpoint: StartEndpoint) -> None:
    endpoint = start_endpoint()
    paths = ("/", "/generate", "/generate_stream", "/v1/completions", "/v1/jobs", "/v1/completions")
    for path, coding in zip(paths, ("gzip", "deflate", "br", "zstd", "identity, gzip", "no-such"), strict=True):
        # Of the body not a byte is sent.
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: {coding}\r\nContent-Length: 2\r\n\r\n"
        with socket.create_connection(("127.0.0.1", endpoint.port), timeout=60) as connection:
            connection.sendall(head.encode())
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            connection.sendall(b"{}")
            assert (answer.status, answer.headers["accept-encoding"]) == (415, "identity")
            text = answer.read().decode()
            assert f"the content-encoding '{coding}'" in text
            assert "send plain JSON without that header" in text
    url = f"{endpoint.url}/v1/jobs"
    for coding in ("identity", "", "Identity, identity"):
        refused = httpx.post(url, json={}, headers={"content-encoding": coding}, trust_env=False)
        assert refused.status_code == 400
        assert "prompt is missing" in refused.text


# Both families.


def test_all_addresses_are_those_of_both_families() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with bind("::", 0) as bound:
        port = bound.getsockname()[1]
        assert url_of(bound) == f"http://[::1]:{port}"
        for address in ("127.0.0.1", "::1"):
            socket.create_connection((address, port), timeout=20).close()
    with bind("0.0.0.0", 0) as bound:
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}", "what may be asked without a token"


def test_where_there_is_no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(BadRequest, match=r"cannot listen on :: port 1 .*has no IPv6, listen on --host 0\.0\.0\.0"):
        bind("::", 1)


# Connections that say nothing, and too many of them.


@pytest.fixture
def start_bounded(redis_server: RedisServer, queue_name: str, tmp_path: Path) -> Iterator[StartEndpoint]:
    """Starts `fastgpt2 api` with a hard limit of open files, and below it a soft one; with other times."""
    started: list[RunningEndpoint] = []

    def start(files: int, head_seconds: float, *options: str) -> RunningEndpoint:
        log = tmp_path / f"bounded-{len(started)}.log"
        script = (
            "import sys; from fastgpt2.api.http import connections, middleware; "
            f"connections.HEAD_SECONDS = {head_seconds}; connections.WRITE_SECONDS = 0.3; "
            "middleware.LINGER_SECONDS = 0.2; "
            "from fastgpt2.cli import main; sys.exit(main())"
        )
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", script, "api", "--port", "0", *options],
                env={**os.environ, "FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": queue_name},
                stderr=out,
                text=True,
                preexec_fn=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (60, files)),
            )
        started.append(RunningEndpoint(process, log))
        wait_until(lambda: "endpoint on" in log.read_text(), "the endpoint to listen")
        return started[-1]

    yield start
    for endpoint in started:
        endpoint.process.kill()
        endpoint.process.wait()


def count_files(endpoint: RunningEndpoint) -> int:
    return sum(1 for _ in Path(f"/proc/{endpoint.process.pid}/fd").iterdir())


def is_closed(connection: socket.socket) -> bool:
    """Wait until the other side closes; what comes before is passed over."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize("files", [64, 128])
def test_more_connections_than_there_may_be_files(start_bounded: StartEndpoint, files: int) -> None:
    endpoint = start_bounded(files, 600.0)
    limit = limit_connections(MAX_CONNECTIONS, files)
    assert f"this process may have {files} files open: it holds {limit} connections at most" in endpoint.log.read_text()
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), 60)) for _ in range(300)]
        # As Redis is asked too, this needs two files.
        for path, status in (("/health", 200), ("/ready", 503), ("/status", 200)):
            assert httpx.get(f"{endpoint.url}{path}", trust_env=False, timeout=60).status_code == status
        assert all(is_closed(one) for one in silent[: 300 - limit]), "those that waited longest"
        assert count_files(endpoint) < files
    lines = endpoint.log.read_text().splitlines()
    assert sum("connections are open, as many as may be" in line for line in lines) == 1
    assert len(lines) < 8


def test_requests_beyond_their_bound_are_refused_and_probes_are_served(start_bounded: StartEndpoint) -> None:
    endpoint = start_bounded(64, 600.0)
    limit = limit_connections(MAX_CONNECTIONS, 64)
    served = limit - limit // 8
    body = b'{"prompt": "a"}'
    asked = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with ExitStack() as stack:
        for _ in range(served):
            stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), 60)).sendall(asked)

        def refused() -> bool:
            answer = httpx.get(f"{endpoint.url}/v1/nothing", trust_env=False, timeout=60)
            if answer.status_code == 404:
                return False
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert f"serves {served} requests at once, and no more" in answer.json()["error"]["message"]
            return True

        wait_until(refused, "all of them to be served")
        assert httpx.get(f"{endpoint.url}/health", trust_env=False, timeout=60).status_code == 200
    wait_until(lambda: not refused(), "the requests to end, as nobody waits for them")
    assert "Traceback" not in endpoint.log.read_text()


def test_who_takes_no_answer_is_hung_up_on(start_bounded: StartEndpoint) -> None:
    endpoint = start_bounded(1024, 600.0)
    with socket.create_connection(("127.0.0.1", endpoint.port), 60) as connection:
        # Megabytes: more than the system keeps for a client that does not read.
        connection.sendall((b"GET /openapi.json HTTP/1.1\r\n" + HOST + b"\r\n") * 300)
        wait_until(lambda: "took nothing of its answer for 0.3 s" in endpoint.log.read_text(), "it to be given up")
        found = b""
        while part := connection.recv(1 << 20):
            found += part
    assert 0 < found.count(b"HTTP/1.1 200 OK") < 300
    assert "Traceback" not in endpoint.log.read_text()


def test_out_of_files_is_said_once(start_bounded: StartEndpoint) -> None:
    """What else has files open, this process cannot know; here it is this test."""
    endpoint = start_bounded(64, 600.0)
    assert httpx.get(f"{endpoint.url}/status", trust_env=False, timeout=60).status_code == 200, "all is open by now"
    resource.prlimit(endpoint.process.pid, resource.RLIMIT_NOFILE, (count_files(endpoint), 64))
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), 60))
        wait_until(lambda: "no connection can be accepted" in endpoint.log.read_text(), "the warning")
        resource.prlimit(endpoint.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        assert httpx.get(f"{endpoint.url}/health", trust_env=False, timeout=60).status_code == 200
    log = endpoint.log.read_text()
    assert log.count("no connection can be accepted (Too many open files)") == 1
    assert "Traceback" not in log
    assert len(log.splitlines()) < 8


def test_who_sends_no_head_is_hung_up_on(start_bounded: StartEndpoint) -> None:
    endpoint = start_bounded(1024, 0.3, "--keep-alive", "600")
    begun = time.monotonic()
    with ExitStack() as stack:

        def connect(sent: bytes) -> socket.socket:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), 60))
            connection.sendall(sent)
            return connection

        nothing, part, second = connect(b""), connect(GET + b"X: "), connect(GET + b"\r\nGET /he")
        behind_a_body = connect(b"POST /nothing HTTP/1.1\r\n" + HOST + b"Content-Length: 10\r\n\r\n{")
        used = connect(GET + b"\r\n")
        assert nothing.recv(100) == b""
        assert part.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert is_closed(part)
        # One that trickles is given no more time.
        slow = connect(b"GET ")
        with suppress(ConnectionError):
            while True:
                slow.sendall(b"x")
                time.sleep(0.02)
        assert is_closed(second)
        assert time.monotonic() - begun < 60, "not after --keep-alive"
        assert is_closed(behind_a_body)
        assert used.recv(1000).startswith(b"HTTP/1.1 200 ")
        used.sendall(GET + b"\r\n")
        assert used.recv(1000).startswith(b"HTTP/1.1 200 "), "between two requests it may take its time"
    assert "Traceback" not in endpoint.log.read_text()


def test_a_connection_that_is_not_used_is_closed_when_its_time_is_over(start_endpoint: StartEndpoint) -> None:
    port = start_endpoint("--keep-alive", "0.2").port
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(GET + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert is_closed(connection)


def test_how_many_connections_there_may_be() -> None:
    assert limit_connections(4000, 1 << 20) == 4000
    assert limit_connections(4000, 1024) == 480
    assert limit_connections(4000, 20) == 8
