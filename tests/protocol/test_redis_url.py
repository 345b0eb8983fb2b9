"""Redis URLs: which options may be used, and in which words the others are refused, by the library and by programs."""

from __future__ import annotations

import io
from typing import Any

import pytest
from redis.exceptions import ResponseError
from support.running import run

from fastgpt2 import AsyncClient, Client
from fastgpt2.cli import main
from fastgpt2.errors import BadRequest, RedisAccessDenied
from fastgpt2.protocol.connection import connect, connect_async, in_words
from fastgpt2.system.redis_server import RedisServer

REFUSED = [
    ("redis://h/0?decode_responses=true", "cannot have the option decode_responses: replies are read as bytes"),
    ("redis://h/0?decode_responses=", "cannot have the option decode_responses"),
    ("redis://h/0?encoding=latin-1", "cannot have the option encoding: text is UTF-8"),
    ("redis://h/0?retry_on_timeout=yes", "cannot have the option retry_on_timeout: a repeated command would take"),
    ("redis://h/0?retry_on_error=x", "cannot have the option retry_on_error"),
    ("redis://h/0?connection_class=SSLConnection", "connection_class: write rediss:// for TLS"),
    ("redis://h/0?protocol=4", "protocol=4, which cannot be: protocol takes 2 or 3"),
    ("redis://h/0?protocol=", "protocol takes 2 or 3"),
    (
        "rediss://h/0?ssl_cert_reqs=CERT_NONE",
        "ssl_cert_reqs takes none, optional or required",
    ),
    ("rediss+sentinel://h/m?ssl_cert_reqs=CERT_NONE", "ssl_cert_reqs takes none, optional or required"),
    ("rediss://h/0?ssl_ca_certs=/no/such", "ssl_ca_certs=/no/such, which cannot be: .* cannot be read"),
    ("rediss://h/0?ssl_min_version=TLSv1", "ssl_min_version takes 771 or 772"),
    ("redis://h/0?ssl_ca_certs=/ca.pem", "ssl_ca_certs, which is for TLS; write rediss://"),
    ("redis://h/0?ssl=true", "the option ssl: write rediss:// for TLS"),
    ("redis://h/0?max_connections=3", "max_connections=3, which cannot be: .* from 16"),
    ("redis://h/0?max_connections=0x20", "max_connections takes a whole number"),
    ("redis://h/0?socket_timeout=0.5", "socket_timeout takes a number from 3 to 600"),
    ("redis://h/0?socket_timeout=inf", "socket_timeout takes a number"),
    ("redis://h/0?socket_timeout=9" + "9" * 400, "socket_timeout takes a number"),
    ("redis://h/0?socket_connect_timeout=-1", "socket_connect_timeout takes a number"),
    ("redis://h/0?timeout=5", "the option timeout: write socket_timeout"),
    ("redis://h/0?health_check_interval=x", "health_check_interval takes a whole number"),
    ("redis://h/0?client_name=a%20b", "client_name takes 1 to 100 characters of ASCII"),
    ("redis://h/0?socket_keepalive=maybe", "socket_keepalive takes true, false"),
    ("unix:///r?socket_keepalive=yes", "an option that is not known"),
    ("redis://h/0?db=x", "db takes a whole number"),
    ("redis://h/0?db=-1", "db takes a whole number"),
    ("redis://h/1?db=2", "names two databases, 1 and db=2"),
    ("redis://h/0?db=1&db=1", "the option db twice"),
    ("redis://h/zero", "path that is no number of a database"),
    ("redis://h/1/2", "path that is no number of a database"),
    ("redis://h/-1", "path that is no number of a database"),
    ("redis://h/0?nonsense=1", "an option that is not known; known are db, "),
    ("redis://h/0?socket_timeoutt=5", "perhaps socket_timeout was meant, known are"),
    ("redis://h/0?socket_read_size=5", "cannot have the option socket_read_size"),
    ("redis://h/0?sentinel_password=secret", r"sentinel_password: write redis\+sentinel://"),
    ("redis://h/0?host=other", "the option host: write it before the path"),
    ("redis://:secret@h/0?password=secret", "more than one user or password"),
    ("redis://me@h/0?username=you", "more than one user or password"),
    ("redis://h1,h2/0", r"several hosts; for those of Sentinels write redis\+sentinel://"),
    ("redis://h:0/0", "cannot be used"),
    ("redis://h:70000/0", "cannot be used"),
    ("redis-sentinel://h/m", r"redis\+sentinel://"),
    ("localhost:6379", "write redis://"),
    # Passwords that were not percent-encoded: no part of them may be shown.
    ("redis://:x?secret=1@h/0", "cannot be used"),
    ("redis://:x/secret@h/0", "cannot be used"),
    ("redis://me:12/secret@h/0", "percent-encode the characters"),
    ("redis://me:12?secret@h/0", "option that is not known"),
    ("redis://me:12?db=secret@h/0", "db takes a whole number|option db, which"),
    ("redis://me:12#secret@h/0", "percent-encode the characters"),
    ("redis://me:[secret@h/0", "percent-encode the characters"),
]


@pytest.mark.parametrize(("url", "message"), REFUSED)
def test_what_cannot_be_used_is_refused_by_name(url: str, message: str) -> None:
    for make in (connect, connect_async, Client, AsyncClient):
        with pytest.raises(BadRequest, match=message) as caught:
            make(url)
        assert "secret" not in str(caught.value).replace("sentinel_password", "")
        assert len(str(caught.value).splitlines()) == 1


SAID = "the Redis URL cannot have the option decode_responses"


@pytest.mark.parametrize("command", ["enqueue a", "batch -", "status", "result x", "cancel x"])
def test_every_command_says_it_at_once(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTGPT2_REDIS_URL", "redis://h/0?decode_responses=true")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(command.split()) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"fastgpt2 {command.split()[0]}: {SAID}")


@pytest.mark.processes
@pytest.mark.parametrize("command", ["worker", "api"])  # and by the same way the pool and `up`
def test_every_program_says_it_at_once(command: str) -> None:
    done = run(command, FASTGPT2_REDIS_URL="redis://h/0?decode_responses=true", FASTGPT2_MODEL="demo")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"fastgpt2 {command}: {SAID}")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {}),
        ("?db=3", {"db": 3}),
        ("?protocol=2", {"protocol": 2}),
        ("?protocol=3", {"protocol": 3}),
        ("?max_connections=20", {}),
        ("?client_name=me", {"client_name": "me"}),
        ("?socket_timeout=4.5&socket_connect_timeout=1", {"socket_timeout": 4.5, "socket_connect_timeout": 1.0}),
        ("?socket_keepalive=yes&health_check_interval=0", {"socket_keepalive": True, "health_check_interval": 0}),
    ],
)
def test_what_can_be_used_works(redis_server: RedisServer, options: str, expected: dict[str, Any]) -> None:
    url = redis_server.url.removesuffix("/0") + options
    with Client(url, "nobody") as client:
        assert client.workers() == 0
        pool = client.connection.connection_pool
        assert {name: pool.connection_kwargs[name] for name in expected} == expected
        assert pool.max_connections == (20 if "max_connections" in options else 2000)


def test_paths_and_options_of_all_schemes() -> None:
    for url in (
        "redis://h",
        "redis://h/",
        "redis://h/0/",
        "redis://h/2?db=2",
        "redis://[::1]:7/0",
        "redis://h:6379?password=x",
        "rediss://h/0?ssl_cert_reqs=none&ssl_check_hostname=false",
        "unix:///run/redis.sock?db=1",
        "unix://me:word@/run/redis.sock",
    ):
        connect(url).close()
        connect_async(url)


def test_a_right_that_is_missing_within_a_script_is_called_so() -> None:
    """With the rights of an earlier release, a client may not look up who serves a model."""
    said = "ACL failure in script: No permissions to access a key script: on @user_script:27."
    error = in_words("redis://client:secret@h/0", ResponseError(said))
    assert isinstance(error, RedisAccessDenied)
    assert "the user's rights (deploy/redis.acl lists them)" in str(error)
