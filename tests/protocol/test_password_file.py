"""A password that stands in a file, with real Redis servers that want one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from support.redis_process import OpenRedis

from fastgpt2 import AsyncClient, Client
from fastgpt2.errors import BadRequest, RedisAccessDenied
from fastgpt2.protocol.connection import connect, without_password
from fastgpt2.protocol.password_file import without_password_file

PASSWORD = "a-password/with@odd:signs?"


class LockedRedis(OpenRedis):
    @property
    def url(self) -> str:
        return f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/0"


@pytest.fixture
def server(tmp_path: Path) -> OpenRedis:
    return LockedRedis("--requirepass", PASSWORD, folder=tmp_path / "redis")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "the password"
    path.write_text(f"{PASSWORD}\nwhat comes after the first line is not read\n")
    return path


def url(server: OpenRedis, file: Path, user: str = "") -> str:
    return f"redis://{user}127.0.0.1:{server.port}/3?password_file={str(file).replace(' ', '%20')}&socket_timeout=4"


@pytest.mark.processes
def test_it_is_read_by_all_that_connect(server: OpenRedis, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with server:
        address = url(server, file)
        with Client(address) as client:
            assert client.workers() == 0
            assert client.connection.connection_pool.connection_kwargs["db"] == 3
            assert client.connection.connection_pool.connection_kwargs["socket_timeout"] == 4
            assert PASSWORD not in repr(client.connection)

        async def workers() -> int:
            async with AsyncClient(address) as client:
                return await client.workers()

        assert asyncio.run(workers()) == 0
        assert caplog.text == "", "the library has nothing to complain of"
        shown = subprocess.run(
            [sys.executable, "-m", "fastgpt2", "status", "--redis-url", address], capture_output=True, text=True
        )
        assert shown.returncode == 0, shown.stderr
        assert str(file) not in without_password(address)


@pytest.mark.processes
def test_a_user_has_a_file_too(server: OpenRedis, file: Path) -> None:
    with server:
        with server.administered() as connection:
            connection.acl_setuser("reader", enabled=True, passwords=[f"+{PASSWORD}2"], commands=["+@all"])
        file.write_text(PASSWORD + "2")
        assert connect(url(server, file, "reader@")).acl_whoami() == "reader"
        with Client(url(server, file)) as client, pytest.raises(RedisAccessDenied, match="denied access"):
            client.workers()


@pytest.mark.processes
def test_another_password_is_taken_up_by_the_next_connection(server: OpenRedis, file: Path) -> None:
    with server:
        connection = connect(url(server, file))
        connection.config_set("requirepass", "another")
        connection.connection_pool.disconnect()
        file.write_text("another\n")
        assert connection.ping()
        file.unlink()  # and the last one holds as long as there is no file
        connection.connection_pool.disconnect()
        assert connection.ping()


def test_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadRequest, match="is no regular file"):
        connect(f"redis://localhost/0?password_file={tmp_path / 'pipe'}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(No such file or directory\)"),
        (b"", "first line of 0 or over 4096 characters"),
        (b"\nsecond", "first line of 0"),
        (b"x" * 5000, "over 4096 characters"),
        (b"\xff\xfe", "is no text in UTF-8"),
    ],
)
def test_a_file_that_has_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadRequest, match=f"the Redis password file {path}, named by password_file in the URL, .*"):
        connect(f"redis://localhost/0?password_file={path}")
    with pytest.raises(BadRequest, match=message):
        connect(f"redis://localhost/0?password_file={path}")


def test_one_password_is_enough(file: Path) -> None:
    for text, message in (
        (f"redis://:secret@localhost/0?password_file={file}", "more than one password"),
        (f"redis://h/0?password_file={file}&password_file=x", "the option password_file twice"),
    ):
        with pytest.raises(BadRequest, match=message) as caught:
            connect(text)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "bare"),
    [
        ("rediss://host:7/1?password_file={}&ssl_ca_certs=%2Fca.pem", "rediss://host:7/1?ssl_ca_certs=%2Fca.pem"),
        ("redis://[::1]:7/1?password_file={}", "redis://[::1]:7/1"),
        ("redis://me@host?password_file={}", "redis://host"),
        ("unix:///run/redis.sock?password_file={}&db=2", "unix:///run/redis.sock?db=2"),
        ("unix://me@/run/redis.sock?password_file={}", "unix:///run/redis.sock"),
    ],
)
def test_the_rest_of_the_url_stays(file: Path, given: str, bare: str) -> None:
    link = file.parent / "link"
    link.symlink_to(file)
    found, options = without_password_file(given.format(link))
    assert found == bare
    expected = ("me", PASSWORD) if "me@" in given else (PASSWORD,)
    assert options["credential_provider"].get_credentials() == expected
