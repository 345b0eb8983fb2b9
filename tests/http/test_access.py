"""Tests of who may use the HTTP endpoint: real servers and real requests, which are written byte by byte."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis
from support.running import StartEndpoint, wait_until

from fastgpt2.api.http.access import is_loopback
from fastgpt2.api.http.serve import MAX_HEAD_BYTES
from fastgpt2.api.http.tokens import read_tokens
from fastgpt2.errors import BadRequest
from fastgpt2.system.redis_server import RedisServer

TOKEN = "correct-horse-battery-staple"
POSTED = ("/", "/health", "/ready")


def ask(port: int, path: str, *headers: tuple[str, bytes], method: str = "GET", body: bytes = b"") -> tuple[int, str]:
    """Return (status, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=any(name == "Host" for name, _ in headers))
    for name, value in headers:
        connection.putheader(name, value)
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    text = answer.read().decode()
    if answer.status == 401:
        # RFC 6750, 3.1: a wrong token is an error, and that there is none is not.
        is_wrong = "the token is not the one" in text
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert ('error="invalid_token"' in answer.headers["www-authenticate"]) is is_wrong
    connection.close()
    return answer.status, text


def bearer(token: str) -> tuple[str, bytes]:
    return "Authorization", f"Bearer {token}".encode("latin-1")


@pytest.mark.parametrize("source", ["variable", "file"])
def test_with_a_token_everything_but_the_probes_asks_for_it(
    start_endpoint: StartEndpoint, tmp_path: Path, source: str
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    given = {"FASTGPT2_TOKEN": TOKEN} if source == "variable" else {"FASTGPT2_TOKEN_FILE": str(file)}
    port = start_endpoint("--host", "0.0.0.0", **given).port
    assert ask(port, "/") == (200, "Ok")
    assert ask(port, "/health")[0] == 200
    status, text = ask(port, "/ready")
    assert status == 503
    assert json.loads(text)["error"].startswith("no worker that has loaded its model lives on this queue: ")
    assert ask(port, "/ready", method="HEAD") == (503, "")
    none, other = "asks for a token: send the header", "the token is not the one of this endpoint: send the one of its"
    scheme, several = "does not begin with Bearer: send", "has 2 Authorization headers; leave one"
    wrong: list[tuple[tuple[tuple[str, bytes], ...], str]] = [
        ((), none),
        ((("X-Authorization", b"Bearer " + TOKEN.encode()),), none),
        ((bearer(""),), "no token follows Bearer"),
        ((bearer(TOKEN), bearer(TOKEN)), several),
        ((bearer("wrong"), bearer(TOKEN)), several),
        ((("Authorization", b"Basic " + TOKEN.encode()),), scheme),
        ((("Authorization", b"Basic wrong"),), scheme),
        ((("Authorization", TOKEN.encode()),), scheme),
        ((("Authorization", b""),), scheme),
        ((("Authorization", b"Bearer" + TOKEN.encode()),), scheme),
        ((bearer("wrong"),), other),
        ((bearer(TOKEN[:-1]),), other),
        ((bearer(TOKEN + "x"),), other),
        ((bearer(TOKEN.upper()),), other),
        ((bearer(f"{TOKEN} x"),), other),
        ((("Authorization", b"Bearer \xff\xfe"),), other),
    ]
    for headers, sentence in wrong:
        for method, path in (
            *(("GET", path) for path in ("/status", "/nothing")),
            *(("POST", path) for path in POSTED),
        ):
            status, text = ask(port, path, *headers, method=method, body=b"{")
            code = "invalid_api_key" if sentence == other else "missing_api_key"
            assert (status, json.loads(text)["error_type"]) == (401, code), (headers, method, path)
            assert sentence in json.loads(text)["error"]
            assert TOKEN not in text
        assert json.loads(ask(port, "/v1/models", *headers)[1])["error"]["code"] == code
    assert ask(port, "/status", bearer(TOKEN))[0] == 200
    for written in (b"bearer  %s", b"BEARER %s", b"  Bearer %s  ", b"Bearer %s\t"):
        assert ask(port, "/status", ("Authorization", written % TOKEN.encode()))[0] == 200, written
    for path in ("/info", "/status/", "//status", "/v1/models/", "//v1//jobs/"):
        assert ask(port, path, bearer(TOKEN))[0] == (503 if path == "/info" else 200), path
        assert ask(port, path)[0] == 401, path
    assert [ask(port, path)[0] for path in ("//", "/health/", "//health")] == [200, 200, 200]
    assert ask(port, "/", bearer(TOKEN), method="POST", body=b"{")[0] == 400
    assert ask(port, "/nothing", bearer(TOKEN))[0] == 404
    assert ask(port, "/status", bearer(TOKEN), ("Host", b"elsewhere.example"))[0] == 200


def send_raw(port: int, sent: bytes) -> bytes:
    """Send bytes that need not be a whole request, and return the first line of the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(sent)
        with connection.makefile("rb") as answer:
            return answer.readline()


def test_nobody_is_waited_for_who_has_no_token(start_endpoint: StartEndpoint) -> None:
    port = start_endpoint(FASTGPT2_TOKEN=TOKEN).port
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
    assert send_raw(port, head + b"\r\n").startswith(b"HTTP/1.1 401 "), "of the body not a byte was sent"
    assert send_raw(port, head + b"X: " + b"x" * (MAX_HEAD_BYTES + 1)).startswith(b"HTTP/1.1 431 "), (
        "the head never ends"
    )
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
    asked = b"GET /status HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n"
    assert send_raw(port, asked).startswith(b"HTTP/1.1 401 ")


def test_without_a_token_only_requests_to_this_machine_by_name_are_served(start_endpoint: StartEndpoint) -> None:
    port = start_endpoint().port
    for host in ("127.0.0.1", f"127.0.0.1:{port}", "localhost", f"LOCALHOST:{port}", f"[::1]:{port}", "127.8.8.8"):
        assert ask(port, "/status", ("Host", host.encode()))[0] == 200, host
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "localhost.evil",
        "[x",
        "[::1].evil.example",
        "localhost:x",
        "",
    ):
        status, text = ask(port, "/status", ("Host", host.encode()))
        assert (status, json.loads(text)["error_type"]) == (403, "forbidden_origin"), host
        assert ask(port, "/health", ("Host", host.encode()))[0] == 200, "a probe comes by the address of its pod"
        assert ask(port, "/ready", ("Host", host.encode()))[0] == 503, "no worker, but no refusal"
    assert ask(port, "/status", ("Host", b"localhost"), ("Host", b"evil.example"))[0] == 400


@pytest.mark.processes
@pytest.mark.parametrize("command", ["api", "up"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_are_not_served_without_a_token_unless_told(command: str, host: str) -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "fastgpt2", command, "--host", host, "--port", "0"],
        env={**os.environ, "FASTGPT2_MODEL": "demo"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"fastgpt2 {command}: {host} can be reached from other machines, and there is no token")


def test_insecure_serves_everybody_and_says_so(start_endpoint: StartEndpoint, tmp_path: Path) -> None:
    port = start_endpoint("--host", "0.0.0.0", "--insecure").port
    assert ask(port, "/status", ("Host", b"anything.example"))[0] == 200
    named = start_endpoint("--host", "0.0.0.0", "--insecure", "--host-name", "pool").port
    for host in (b"pool:8000", b"POOL", b"localhost:1", b"127.0.0.1"):
        assert ask(named, "/status", ("Host", host))[0] == 200
    for host in (b"anything.example", b"pool.example", b"0.0.0.0", b"192.0.2.1"):
        status, text = ask(named, "/status", ("Host", host))
        assert status == 403
        assert "start it with a token or another --host-name" in text
    log = tmp_path / "api-0.log"
    wait_until(lambda: "everybody who can reach 0.0.0.0 may use this endpoint" in log.read_text(), "the warning")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("localhost", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.1.2.3", False),
        ("::ffff:10.1.2.3", False),
    ],
)
def test_what_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize("token", ["short", "a b" * 10, "é" * 20, "x" * 5000])
def test_a_token_that_is_none_is_refused_and_not_quoted(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(token, "utf-8")
    with pytest.raises(BadRequest, match="must be 16 to 1024 visible ASCII characters") as caught:
        read_tokens(str(file))
    assert token not in str(caught.value)
    monkeypatch.setenv("FASTGPT2_TOKEN", token)
    with pytest.raises(BadRequest, match="the token of FASTGPT2_TOKEN must be 16 to 1024") as caught:
        read_tokens(None)
    assert token not in str(caught.value)


def test_two_tokens_or_none_in_reach_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="cannot be read"):
        read_tokens(str(tmp_path / "missing"))
    assert read_tokens(None) is None
    monkeypatch.setenv("FASTGPT2_TOKEN", TOKEN)
    tokens = read_tokens(None)
    assert tokens is not None
    assert tokens.find(TOKEN.encode()) is not None
    with pytest.raises(BadRequest, match="both given"):
        read_tokens(str(tmp_path / "token"))


def test_the_token_is_in_no_argument_no_log_no_status_and_no_worker(
    redis: Redis, redis_server: RedisServer, queue_name: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    own = {
        "FASTGPT2_MODEL": "demo",
        "FASTGPT2_TOKEN": TOKEN,
        "FASTGPT2_REDIS_URL": redis_server.url,
        "FASTGPT2_QUEUE": queue_name,
        "FASTGPT2_LOG_LEVEL": "debug",
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastgpt2", "up", "--workers", "1", "--port", "0"],
            env={**os.environ, **own},
            stdout=out,
            stderr=out,
        )
    try:
        wait_until(lambda: "fastgpt2 is ready" in log.read_text(), "the system to be ready", 60)
        port = int(log.read_text().partition("endpoint  http://127.0.0.1:")[2].partition("/")[0])
        assert ask(port, "/status")[0] == 401
        status, text = ask(port, "/status", bearer(TOKEN))
        assert status == 200
        assert TOKEN not in text
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = 0
        for pid in [str(process.pid), *children]:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert TOKEN.encode() not in arguments
            if arguments.endswith(b"\x00worker\x00"):
                workers += 1
                assert TOKEN.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        assert (len(children), workers) == (2, 1)
        (worker,) = redis.smembers(f"rq:workers:{queue_name}")
        assert TOKEN not in str(redis.hgetall(worker))
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert TOKEN not in log.read_text()
