"""What a server that cannot be served from is told to be: each in one sentence, by every program, at its start."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ResponseError
from support.fake_redis_server import Answer, answer_as_redis_5, fake_redis, greeting_of
from support.redis_process import OpenRedis
from support.running import run, wait_until

from fastgpt2 import AsyncClient, Client
from fastgpt2.cli import main
from fastgpt2.errors import QueueUnavailable, RedisAccessDenied, RedisUnfit
from fastgpt2.protocol.connection import connect, in_words
from fastgpt2.protocol.server_check import _COMMANDS, Rights, check_server
from fastgpt2.system.redis_server import RedisServer

CLUSTER = "it is a Cluster, where the keys of one job would lie on several nodes: use a single Redis"


def check(url: str, rights: Rights = "worker") -> None:
    connection = connect(url)
    try:
        check_server(connection, url, rights)
    finally:
        connection.close()


async def count_workers(url: str) -> int:
    async with AsyncClient(url) as client:
        return await client.workers()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (greeting_of(version="6.0.16"), "it is version 6.0.16: Redis 6.2 or newer is needed, or valkey"),
        (greeting_of(version="5.0.7"), "it is version 5.0.7"),
        (answer_as_redis_5, "it is older than Redis 6: Redis 6.2 or newer is needed"),
        (greeting_of(mode="cluster"), CLUSTER),
        (greeting_of(mode="sentinel"), r"it is a Sentinel: write redis\+sentinel://host:26379/MASTER/0"),
    ],
)
@pytest.mark.parametrize("options", ["", "?protocol=2", "?password=secret"])
def test_a_server_that_cannot_be_served_from(answer: Answer, message: str, options: str) -> None:
    with fake_redis(answer) as url:
        if options != "?protocol=2":
            with Client(url + options) as client, pytest.raises(RedisUnfit, match=message) as caught:
                client.enqueue("a")
            assert "secret" not in str(caught.value)
            with pytest.raises(RedisUnfit, match=message):
                asyncio.run(count_workers(url + options))
        if answer is not answer_as_redis_5 or options != "?protocol=2":
            with pytest.raises(RedisUnfit, match=message) as caught:
                check(url + options)
            assert len(str(caught.value).splitlines()) == 1
            assert type(caught.value) is RedisUnfit


@pytest.mark.parametrize(
    "version", ["6.2.0", "7.0.15", "7.2.4", "8.0.1", "10.1", "255.255.255", "unknown", "", "df-v1.2"]
)
def test_a_server_that_can_be_served_from(version: str) -> None:
    with fake_redis(greeting_of(version=version)) as url:
        check(url)


class ClusterNode(OpenRedis):
    """A real node of a Cluster; when it has started nobody here may say, as nobody here connects to one."""

    def _wait_until_ready(self, _binary: Path) -> None:
        wait_until(self._listens, "the node to listen")

    def _listens(self) -> bool:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    # The port of its bus would be this one plus 10,000.
    with ClusterNode(
        "--cluster-enabled", "yes", "--cluster-port", str(RedisServer().port), folder=tmp_path_factory.mktemp("cluster")
    ) as node:
        yield node.url


@pytest.mark.processes
@pytest.mark.parametrize("command", ["enqueue a", "batch -", "status", "result x", "cancel x"])
def test_every_command_refuses_a_cluster(
    cluster: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTGPT2_REDIS_URL", cluster)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("My name is\n")
    assert main(command.replace("-", str(prompts)).split()) == 4
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"fastgpt2 {command.split()[0]}: Redis at {cluster} cannot serve: {CLUSTER}")


@pytest.mark.processes
@pytest.mark.parametrize("command", ["worker", "pool", "up", "api"])
def test_every_program_refuses_a_cluster(cluster: str, command: str) -> None:
    done = run(command, FASTGPT2_REDIS_URL=cluster, FASTGPT2_MODEL="demo", FASTGPT2_PORT="0")
    assert done.returncode == 4, done.stderr
    assert f"fastgpt2 {command}: Redis at {cluster} cannot serve: {CLUSTER}" in done.stderr.splitlines()[-1]


def test_a_cluster_behind_a_proxy_is_told_by_its_errors() -> None:
    for text in ("CROSSSLOT Keys in request don't hash to the same slot", "MOVED 3999 127.0.0.1:6381"):
        error = in_words("redis://h/0", ResponseError(text))
        assert type(error) is RedisUnfit
        assert CLUSTER in str(error)


@pytest.mark.processes
def test_a_database_that_does_not_exist() -> None:
    with OpenRedis("--databases", "4") as server:
        url = f"{server.url.removesuffix('/0')}/4"
        with Client(url) as client, pytest.raises(RedisUnfit, match="it has no database of this number: write a small"):
            client.enqueue("a")
        with pytest.raises(RedisUnfit, match="no database of this number"):
            check(url)
        check(f"{server.url.removesuffix('/0')}/3")


@pytest.mark.processes
def test_rights_that_are_missing_are_told_before_anything_is_done() -> None:
    with OpenRedis() as server, server.administered() as admin:
        everything: dict[str, Any] = {"enabled": True, "passwords": ["+word"], "channels": ["rq:pubsub:*"]}
        url = server.url.replace("//", "//user:word@")
        before = admin.info("keyspace")
        for rights in _COMMANDS:
            admin.acl_setuser("user", **everything, keys=["*"], commands=["+@all"])
            check(url, rights)
            named = dict.fromkeys(line.split()[0].lower() for line in _COMMANDS[rights].split("\n") if line.strip())
            for command in named:
                admin.acl_setuser("user", **everything, keys=["*"], commands=["+@all", f"-{command}"])
                with pytest.raises(
                    RedisAccessDenied, match=rf"(?i)may not .*{command}.*rights of the {rights}"
                ) as caught:
                    check(url, rights)
                assert "word" not in str(caught.value).replace("password", "")
        # A user who is confined to the keys of another queue.
        admin.acl_setuser("user", **everything, reset_keys=True, keys=["rq:*"], commands=["+@all"])
        with pytest.raises(RedisAccessDenied, match=r"may not HINCRBY fastgpt2:totals:fastgpt2, .* and \d+ more; give"):
            check(url)
        assert admin.info("keyspace") == before, "nothing was written"


@pytest.mark.processes
def test_a_program_tells_missing_rights_at_once() -> None:
    with OpenRedis() as server, server.administered() as admin:
        admin.acl_setuser("user", enabled=True, passwords=["+word"], keys=["*"], commands=["+@all", "-hset", "-blmove"])
        url = server.url.replace("//", "//user:word@")
        done = run("worker", FASTGPT2_REDIS_URL=url, FASTGPT2_MODEL="demo", FASTGPT2_PORT="0")
        assert done.returncode == 4, done.stderr
        assert "denied access: the user may not" in done.stderr.splitlines()[-1]
        assert admin.dbsize() == 0


def test_a_server_that_is_away_is_not_unfit() -> None:
    with pytest.raises(QueueUnavailable) as caught:
        check("redis://127.0.0.1:1/0")
    assert type(caught.value) is QueueUnavailable
