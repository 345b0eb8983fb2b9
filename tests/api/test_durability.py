"""What an acknowledged job is worth: a disk or a replica confirms it, or a NotDurable says what is known."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis
from support.finishing import finish, queued
from support.redis_process import OpenRedis
from support.running import in_thread, wait_until

from fastgpt2 import AsyncClient, Client
from fastgpt2.api.client import bulk as bulk_module
from fastgpt2.api.client import durability as durability_module
from fastgpt2.api.client.enqueue import idempotency_keys, plan_job
from fastgpt2.cli import main
from fastgpt2.errors import BadRequest, NotDurable, RedisAccessDenied, RedisUnfit

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def master() -> Iterator[OpenRedis]:
    with OpenRedis("--appendonly", "no", "--repl-diskless-sync-delay", "0") as made:
        yield made


@pytest.fixture(scope="module")
def replica(master: OpenRedis) -> Iterator[OpenRedis]:
    with OpenRedis("--appendonly", "no", "--replicaof", "127.0.0.1", str(master.port)) as made:
        with made.administered() as connection:
            wait_until(lambda: connection.info("replication")["master_link_status"] == "up", "the replica to follow")
        yield made


@pytest.fixture
def admin(master: OpenRedis) -> Iterator[Redis]:
    with master.administered() as connection:
        yield connection


@pytest.fixture
def deaf_replica(replica: OpenRedis, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenRedis]:
    monkeypatch.setattr(durability_module, "DURABILITY_SECONDS", 0.2)
    with replica.stopped():
        yield replica


def waits(admin: Redis, command: str = "wait") -> int:
    """Return how often Redis was asked to wait for its replicas, or by `waitaof` for its disk."""
    calls: Any = admin.info("commandstats")
    return int(calls.get(f"cmdstat_{command}", {"calls": 0})["calls"])


class TestReplica:
    def test_it_has_what_is_acknowledged(
        self, master: OpenRedis, replica: OpenRedis, admin: Redis, queue_name: str
    ) -> None:
        """Also where the script has to be sent twice, alone and with others, and by the client for asyncio."""

        async def by_asyncio() -> str:
            async with AsyncClient(master.url, queue_name, durability="replica") as client:
                return (await client.enqueue("a")).id

        with Client(master.url, queue_name, durability="replica") as client, replica.administered() as other:
            job_ids = [client.enqueue("a").id]
            admin.script_flush()
            job_ids.append(client.enqueue("a").id)
            admin.script_flush()
            plans = [plan_job("a", {}), plan_job("b", {})]
            job_ids += client._driver.run(client._session.enqueue_all(plans))
            admin.script_flush()
            job_ids.append(asyncio.run(by_asyncio()))
            assert queued(other, queue_name) == job_ids
            assert queued(admin, queue_name) == job_ids

    @pytest.mark.usefixtures("deaf_replica")
    def test_one_that_hangs(self, master: OpenRedis, admin: Redis, queue_name: str) -> None:
        said = (
            r"1 job is enqueued and may run \(.*\), but Redis at redis://127\.0\.0\.1:\d+/0 says after 0\.2 s that 0 "
        )
        with Client(master.url, queue_name, durability="replica") as client:
            for count in range(1, 3):
                admin.script_flush()
                with pytest.raises(NotDurable, match=f"{said}replicas of the 1 that is wanted have them") as caught:
                    client.enqueue("a")
                assert list(caught.value.job_ids) == queued(admin, queue_name)[count - 1 :]
            with pytest.raises(NotDurable, match=r"5 jobs are enqueued and may run \(.* and more\)") as caught:
                client._driver.run(client._session.enqueue_all([plan_job("a", {})] * 5))
            assert list(caught.value.job_ids) == queued(admin, queue_name)[2:]

        async def by_asyncio() -> None:
            async with AsyncClient(master.url, queue_name, durability="replica") as client:
                with pytest.raises(NotDurable):
                    await client.enqueue("a")

        asyncio.run(by_asyncio())

    @pytest.mark.usefixtures("deaf_replica")
    def test_a_repetition_waits_too(self, master: OpenRedis, admin: Redis, queue_name: str) -> None:
        """It writes nothing new, and comes over a connection that has written nothing yet."""
        plan, keys = plan_job("a", {}), idempotency_keys("key", 1, "asked")
        for _ in range(2):
            with Client(master.url, queue_name, durability="replica") as client:
                with pytest.raises(NotDurable) as caught:
                    client._driver.run(client._session.send_all([plan], keys))
                assert list(caught.value.job_ids) == queued(admin, queue_name)
        with Client(master.url, queue_name, durability="replica") as client:
            (sent,) = client._driver.run(Client(master.url, queue_name)._session.send_all([plan_job("b", {})]))
            replies, confirmed = client._driver.run(client._session.send([sent.command_again()]))
            assert (replies, confirmed) == ([0], 0)

    @pytest.mark.usefixtures("deaf_replica")
    def test_without_it_nobody_waits(self, master: OpenRedis, queue_name: str) -> None:
        with Client(master.url, queue_name) as client:
            client.enqueue("a")

    @pytest.mark.usefixtures("deaf_replica")
    def test_a_command_says_so(self, master: OpenRedis, queue_name: str, capsys: pytest.CaptureFixture[str]) -> None:
        options = ["--redis-url", master.url, "--queue", queue_name, "--durability", "replica"]
        assert main(["enqueue", "a", *options]) == 4
        out, err = capsys.readouterr()
        assert out == ""
        assert "1 job is enqueued and may run" in err

    def test_a_bulk_run_waits_for_a_replica_that_comes_back(
        self, master: OpenRedis, replica: OpenRedis, admin: Redis, queue_name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(durability_module, "DURABILITY_SECONDS", 0.1)
        before = waits(admin)
        with Client(master.url, queue_name, durability="replica") as client:
            with replica.stopped():
                running = in_thread(lambda: list(client.map(["a", "b"], in_flight=1)))
                wait_until(lambda: waits(admin) >= before + 4, "the run to ask again and again")
                assert len(queued(admin, queue_name)) == 1

            def is_over() -> bool:
                for job_id in queued(admin, queue_name):
                    admin.lrem(f"rq:queue:{queue_name}", 1, job_id)
                    finish(admin, job_id, "text")
                return running.done()

            wait_until(is_over, "the run to end")
            assert [result.text for result in running.result()] == ["text", "text"]

    @pytest.mark.usefixtures("deaf_replica")
    def test_a_bulk_run_ends_if_it_stays_away(
        self, master: OpenRedis, admin: Redis, queue_name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bulk_module, "RECONNECT_SECONDS", 0.5)
        with (
            Client(master.url, queue_name, durability="replica") as client,
            pytest.raises(NotDurable, match=r"for 0\.5 s, what was enqueued .* the 3 jobs in flight are cancelled"),
        ):
            list(client.map(["a", "b", "c"]))
        assert queued(admin, queue_name) == []


class TestDisk:
    def test_it_has_what_is_acknowledged(self, queue_name: str) -> None:
        with OpenRedis("--appendfsync", "everysec") as server:
            with Client(server.url, queue_name, durability="disk") as client:
                job_ids = [client.enqueue("a").id for _ in range(2)]
            with server.administered() as connection:
                # What was written and is on no disk yet would outlast the process, too; not the machine's end.
                assert waits(connection, "waitaof") >= 3, "once whether there is a file, and once behind each job"
            server.restart()
            with server.administered() as connection:
                assert queued(connection, queue_name) == job_ids
                # As long as it is on, a disk that is slow is told of; here fsync is never asked for.
                connection.config_set("appendonly", "no")
            with (
                Client(server.url, queue_name, durability="disk") as client,
                pytest.raises(RedisUnfit, match=r"keeps no append-only file.* set `appendonly yes` there, or ask for"),
            ):
                client.enqueue("a")
            with server.administered() as connection:
                assert queued(connection, queue_name) == job_ids, "nothing was enqueued"

    def test_a_file_that_is_switched_off_later(self, queue_name: str) -> None:
        with (
            OpenRedis("--appendfsync", "always") as server,
            server.administered() as connection,
            Client(server.url, queue_name, durability="disk") as client,
        ):
            client.enqueue("a")
            connection.config_set("appendonly", "no")
            with pytest.raises(RedisUnfit, match="keeps no append-only file"):
                client.enqueue("b")
            assert len(queued(connection, queue_name)) == 1, "it is taken back"

    def test_a_redis_that_is_too_old(self, queue_name: str) -> None:
        with OpenRedis("--rename-command", "WAITAOF", "") as server:
            with Client(server.url, queue_name, durability="disk") as client, pytest.raises(RedisUnfit) as caught:
                client.enqueue("a")
            assert "does not know the command WAITAOF, which Redis 7.2 and valkey have" in str(caught.value)


def test_a_user_without_the_right(master: OpenRedis, admin: Redis, queue_name: str) -> None:
    admin.acl_setuser("weak", enabled=True, passwords=["+x"], keys=["*"], commands=["+@all", "-wait"])
    url = f"redis://weak:x@127.0.0.1:{master.port}/0"
    with Client(url, queue_name, durability="replica") as client, pytest.raises(RedisAccessDenied, match="ask WAIT,"):
        client.enqueue("a")
    assert queued(admin, queue_name) == []


@pytest.mark.parametrize("how", ["Disk", "", "both", 3, True])
def test_an_unknown_durability(how: Any) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(BadRequest, match="durability must be one of memory, disk, replica"):
            kind(durability=how)


def test_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGPT2_DURABILITY", "replica")
    with Client() as client:
        assert client._session.durability.how == "replica"
    with Client(durability="disk") as client:
        assert client._session.durability.how == "disk"
    monkeypatch.setenv("FASTGPT2_DURABILITY", "both")
    with pytest.raises(BadRequest, match="FASTGPT2_DURABILITY: 'both' is not one of memory, disk, replica"):
        Client()
