"""Tests of `rediss://`, with a certificate authority of their own."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from support.redis_process import OpenRedis
from support.running import wait_until

from fastgpt2 import AsyncClient, Client
from fastgpt2.errors import QueueUnavailable
from fastgpt2.system.redis_server import RedisServer, find_server

pytestmark = pytest.mark.processes


class TLSRedis(OpenRedis):
    """A Redis on a port that speaks TLS only."""

    def __init__(self, folder: Path, name: str) -> None:
        authority = trustme.CA()
        certificate = authority.issue_cert(name)
        self.authority = folder / "ca.pem"
        authority.cert_pem.write_to_path(self.authority)
        files = {"cert": folder / "cert.pem", "key": folder / "key.pem"}
        certificate.cert_chain_pems[0].write_to_path(files["cert"])
        certificate.private_key_pem.write_to_path(files["key"])
        super().__init__(folder=folder)
        self._more = (
            *("--port", "0"),
            *("--tls-port", str(self.port)),
            *("--tls-cert-file", str(files["cert"])),
            *("--tls-key-file", str(files["key"])),
            *("--tls-ca-cert-file", str(self.authority)),
            *("--tls-auth-clients", "no"),
        )

    def _wait_until_ready(self, _binary: Path) -> None:
        """Wait until the port is open; what Redis speaks there, and with which certificate, is for the tests."""
        deadline = time.monotonic() + 10
        while self.poll() is None and time.monotonic() < deadline:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.01)
        log = (self.folder / "redis.log").read_text()
        self.stop()
        raise QueueUnavailable(log)

    @property
    def plain_url(self) -> str:
        return f"rediss://127.0.0.1:{self.port}/0"

    @property
    def url(self) -> str:
        return f"{self.plain_url}?ssl_ca_certs={self.authority}"


def start_server(folder: Path, name: str) -> TLSRedis:
    server = TLSRedis(folder, name)
    try:
        server.start()
    except QueueUnavailable as error:
        if "tls" not in str(error).lower():
            raise
        reason = "a Redis that was built with TLS is needed: apt-get install redis-tools"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return server


@pytest.fixture(autouse=True)
def _debians_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use Debian's Redis, which has TLS; the bundled one has not. redis-tools has the program under another name."""
    program = shutil.which("redis-check-rdb")
    if program is not None:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "redis-server").symlink_to(program)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TLSRedis]:
    made = start_server(tmp_path, "127.0.0.1")
    yield made
    made.stop()


def test_a_worker_and_a_client_speak_tls(server: TLSRedis, tmp_path: Path) -> None:
    log = tmp_path / "log"
    own = {"FASTGPT2_REDIS_URL": server.url, "FASTGPT2_MODEL": "demo", "FASTGPT2_MAX_BATCH": "2"}
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "fastgpt2", "worker"], env={**os.environ, **own}, stderr=out)
    try:
        wait_until(lambda: "is ready" in log.read_text(), "the worker to be ready")
        with Client(server.url) as client, client.stream("My name is", max_new_tokens=5, ignore_eos=True) as stream:
            text = "".join(piece.text for piece in stream)
            assert stream.result is not None
            assert text == stream.result.text
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_an_unknown_authority_is_refused(server: TLSRedis) -> None:
    with Client(server.plain_url) as client, pytest.raises(QueueUnavailable, match="name its authority") as caught:
        client.enqueue("a")
    assert len(str(caught.value).splitlines()) == 1


def test_plain_words_to_a_port_that_speaks_tls_and_the_other_way_round(server: TLSRedis, tmp_path: Path) -> None:
    with Client(f"redis://127.0.0.1:{server.port}/0") as client, pytest.raises(QueueUnavailable):
        client.enqueue("a")
    with (
        OpenRedis(folder=tmp_path / "plain") as plain,
        Client(f"rediss://127.0.0.1:{plain.port}/0") as client,
        pytest.raises(QueueUnavailable, match="and whether it speaks TLS on that port"),
    ):
        client.enqueue("a")


def test_a_certificate_of_another_name_is_refused(tmp_path: Path) -> None:
    server = start_server(tmp_path, "elsewhere.example")
    try:
        with Client(server.url) as client, pytest.raises(QueueUnavailable, match="certificate is not valid for"):
            client.enqueue("a")
    finally:
        server.stop()


def test_sentinels_and_their_master_speak_tls(server: TLSRedis, tmp_path: Path) -> None:
    port = RedisServer().port
    more = iter(server._more)
    lines = [f"{name.removeprefix('--')} {value}" for name, value in zip(more, more, strict=True)]
    watched = f"sentinel monitor mymaster 127.0.0.1 {server.port} 1"
    configuration = tmp_path / "sentinel.conf"
    configuration.write_text("\n".join([*lines, f"tls-port {port}", "tls-replication yes", f"dir {tmp_path}", watched]))
    with (tmp_path / "sentinel.log").open("w") as log:
        sentinel = subprocess.Popen([str(find_server()), str(configuration), "--sentinel"], stdout=log, stderr=log)
    url = f"rediss+sentinel://127.0.0.1:{port}/mymaster/0?ssl_ca_certs={server.authority}"
    try:
        with Client(url) as client:
            wait_until(lambda: answers(client), "the Sentinel to know its master")
            assert asyncio.run(count_workers(url)) == 0
            with Client(url.partition("?")[0]) as stranger, pytest.raises(QueueUnavailable, match="name its authority"):
                stranger.workers()
    finally:
        sentinel.kill()
        sentinel.wait()


def answers(client: Client) -> bool:
    with suppress(QueueUnavailable):
        return client.workers() == 0
    return False


async def count_workers(url: str) -> int:
    async with AsyncClient(url) as client:
        return await client.workers()
