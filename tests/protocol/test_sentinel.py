"""Redis URLs that name Sentinels, with real ones: whom clients reach, and how they follow a promotion."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import RedisError
from support.redis_process import OpenRedis
from support.running import wait_until
from support.sentinel import HOST, MASTER, SentinelSystem

from fastgpt2 import Client
from fastgpt2.errors import BadRequest, QueueUnavailable, RedisAccessDenied, RedisUnfit
from fastgpt2.protocol.connection import address_of, connect, connect_async, redis_errors, without_password
from fastgpt2.protocol.redis_url import read_url


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SentinelSystem]:
    with SentinelSystem(tmp_path_factory.mktemp("sentinel") / "system", replicas=1, sentinels=1) as made:
        yield made


def until_done(action: Callable[[], Any]) -> Any:
    """Do what follows a promotion, as all that serves does: by trying again while Redis is away."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return action()
        except (NoConnection, TimeoutError, RedisError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("url", "places", "master", "shown"),
    [
        ("redis+sentinel://a:1,b/m", (("a", 1), ("b", 26379)), "m", "redis+sentinel://a:1,b/m/0"),
        ("redis+sentinel://[::1]:1,[fe80::1%25eth0]/m/3", (("::1", 1), ("fe80::1%eth0", 26379)), "m", None),
        ("rediss+sentinel://u:p%40@a/my%20master/2?socket_timeout=4", (("a", 26379),), "my master", None),
        ("redis+sentinel://a,[::2]:7/m/", (("a", 26379), ("::2", 7)), "m", "redis+sentinel://a,[::2]:7/m/0"),
    ],
)
def test_what_a_url_says(url: str, places: Any, master: str, shown: str | None) -> None:
    arguments, group = read_url(url)
    assert group is not None
    assert (group.places, group.master) == (places, master)
    assert shown in (None, group.shown)
    assert not {"host", "port"} & set(arguments)
    if url.startswith("rediss"):
        assert (arguments["username"], arguments["password"], arguments["db"]) == ("u", "p@", 2)
        assert (arguments["ssl"], group.options) == (True, {"ssl": True})
        for text in (address_of(connect(url)), without_password(url)):
            assert "p%40" not in text
            assert "p@" not in text


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis+sentinel://a:1", r"write redis\+sentinel://"),
        ("redis+sentinel:///m", r"write redis\+sentinel://"),
        ("redis+sentinel://a/m/x", r"write redis\+sentinel://"),
        ("redis+sentinel://:secret@a:99999/m", "'a:99999', which is no host:port"),
        ("redis+sentinel://a,,b/m", "'', which is no host:port"),
        ("redis+sentinel://::1/m", "IPv6 address in brackets"),
        (f"redis+sentinel://{','.join('a' * 33)}/m", "33 Sentinels; the limit is 32"),
        ("redis+sentinel://a/m?sentinel_pass=secret", "unknown option sentinel_pass; write sentinel_user"),
        ("redis+sentinel://a/m?sentinel_user=x", "no password for it"),
        ("redis+sentinel://a/m?sentinel_password=secret&sentinel_password_file=/x", "two passwords"),
        ("redis+sentinel://a/m?sentinel_password_file=/no/such", "named by sentinel_password_file in the URL"),
        ("redis+sentinel://:secret@a/m?password_file=/x", "more than one password"),
        ("http://a/m", r"redis\+sentinel://"),
    ],
)
def test_what_no_url_says(url: str, message: str) -> None:
    for make in (connect, connect_async):
        with pytest.raises(BadRequest, match=message) as caught:
            make(url)
        assert "secret" not in str(caught.value)


def commands_of(connection: Redis) -> list[Any]:
    """Use Redis in the ways in which this package does, and return the replies."""
    with connection.pipeline(transaction=False) as pipeline:
        pipeline.rpush("list", "a")
        pipeline.eval("return redis.call('RPUSH', KEYS[1], 'b')", 1, "list")
        replies = pipeline.execute()
    with connection.pipeline(transaction=True) as pipeline:
        pipeline.delete("list")
        pipeline.xadd("stream", {"a": "1"})
        replies += pipeline.execute()[:1]
    return replies


@pytest.mark.processes
@pytest.mark.parametrize("fault", ["fail over", "kill", "stop"])
def test_clients_follow_a_promotion(system: SentinelSystem, fault: str) -> None:
    """Blocking reads, a subscription, scripts and pipelines, over the blocking library and asyncio's."""
    old = system.master()
    connection = connect(system.url)
    connection.flushall()
    subscription = connection.pubsub()  # type: ignore[no-untyped-call]
    subscription.subscribe("channel")
    assert subscription.get_message(timeout=60)["type"] == "subscribe"
    subscription.ignore_subscribe_messages = True
    idle = [connection.connection_pool.get_connection() for _ in range(5)]
    for one in idle:
        connection.connection_pool.release(one)
    found: dict[str, Any] = {}

    def read(name: str, action: Callable[[], Any]) -> None:
        while not found.get(name):
            found[name] = until_done(action)

    readers = [
        threading.Thread(target=read, args=("xread", lambda: connection.xread({"stream": "0"}, block=2000))),
        threading.Thread(target=read, args=("blmove", lambda: connection.blmove("from", "to", 2))),
        threading.Thread(target=read, args=("message", lambda: subscription.get_message(timeout=2))),
    ]
    for reader in readers:
        reader.start()

    async def follow() -> Any:
        client = connect_async(system.url)
        await client.ping()
        while True:
            try:
                if reply := await client.xread({"stream": "0"}, block=2000):
                    await client.aclose()
                    return reply
            except (RedisError, OSError):
                await asyncio.sleep(0.05)

    waiting = threading.Thread(target=lambda: found.update(follow=asyncio.run(follow())))
    waiting.start()
    wait_until(lambda: _blocked(old.connect()) >= 3, "the readers to wait")
    if fault == "fail over":
        system.fail_over()
    else:
        getattr(old, fault)()
        system.wait_for_promotion(old)
    began = time.monotonic()
    assert until_done(lambda: commands_of(connection))[0] >= 1
    took = time.monotonic() - began
    until_done(lambda: connection.rpush("from", "moved"))

    def all_have_read() -> bool:
        until_done(lambda: connection.publish("channel", "told"))
        return not any(reader.is_alive() for reader in readers)

    wait_until(all_have_read, "the readers to have what they wait for")
    waiting.join(60)
    assert found["xread"]
    assert found["follow"]
    assert found["blmove"] == b"moved"
    assert found["message"]["data"] == b"told"
    assert took < 30, "one timeout at most, however many connections were idle"
    assert address_of(connection) == system.url
    connection.close()
    if fault != "fail over":
        system.rejoin(old)


def _blocked(connection: Redis) -> int:
    with connection:
        return int(connection.info("clients")["blocked_clients"])


@pytest.mark.processes
def test_a_sentinel_that_hangs_or_is_away_costs_a_second(system: SentinelSystem, tmp_path: Path) -> None:
    with OpenRedis(folder=tmp_path / "hangs") as other, other.stopped():
        hosts = f"{HOST}:1,{HOST}:{other.port},{HOST}:{system.sentinels[0].port}"
        # A server itself may be silent for ten minutes by this URL, a Sentinel not.
        connection = connect(f"redis+sentinel://{hosts}/{MASTER}?socket_timeout=600&socket_connect_timeout=600")
        began = time.monotonic()
        assert connection.ping()
        assert time.monotonic() - began < 60, "a second to wait, and what a busy machine takes"
        connection.connection_pool.disconnect()
        pool: Any = connection.connection_pool
        first = pool.sentinel_manager.sentinels[0].connection_pool.connection_kwargs
        assert first["port"] == system.sentinels[0].port, "the one that answered is asked first"
        assert first["socket_timeout"] == first["socket_connect_timeout"] == 1.0
        connection.close()


@pytest.mark.processes
def test_what_sentinels_cannot_tell_is_said_in_words(system: SentinelSystem) -> None:
    port, redis_port = system.sentinels[0].port, system.master().port
    cases: list[tuple[str, type[Exception], str]] = [
        (f"{HOST}:{port}/other", RedisUnfit, f"know no master other: {HOST}:{port} knows {MASTER}.; write the name"),
        (f"{HOST}:{redis_port}/{MASTER}", RedisUnfit, f"{HOST}:{redis_port} is no Sentinel.; write redis://host:port"),
        (f"{HOST}:1,{HOST}:{port}/other", QueueUnavailable, f"{HOST}:1 does not answer .*; {HOST}:{port} knows"),
        (f"{HOST}:1/{MASTER}", QueueUnavailable, "start its servers and Sentinels"),
    ]
    for rest, kind, message in cases:
        url = f"redis+sentinel://{rest}"
        connection = connect(url)
        with pytest.raises(kind, match=message) as caught, redis_errors(url):
            connection.ping()
        assert type(caught.value) is kind
        with Client(url) as client, pytest.raises(kind, match=message):
            client.workers()


@pytest.mark.processes
def test_the_master_and_the_sentinels_have_passwords_of_their_own(tmp_path: Path) -> None:
    file, own = tmp_path / "master", tmp_path / "sentinel"
    file.write_text("masters/word\n")
    own.write_text("sentinels@word\n")
    locked = SentinelSystem(
        tmp_path / "system", replicas=0, password="masters/word", sentinel_password="sentinels@word"
    )
    with locked:
        place = f"{HOST}:{locked.sentinels[0].port}/{MASTER}/2"
        by_file = f"sentinel_password_file={own}"
        for url in (
            f"redis+sentinel://{place}?password_file={file}&sentinel_password_file={own}",
            f"redis+sentinel://:masters%2Fword@{place}?sentinel_password=sentinels%40word",
        ):
            connection = connect(url)
            assert connection.set("a", 1)
            assert connection.connection_pool.connection_kwargs["db"] == 2
            for text in (repr(connection), address_of(connection), without_password(url)):
                assert "word" not in text
            connection.close()
        with locked.sentinels[0].connect() as sentinel:
            rights = ["-@all", "+auth", "+sentinel|masters"]
            sentinel.acl_setuser("reader", enabled=True, passwords=["+sentinels@word"], commands=rights)
        connection = connect(f"redis+sentinel://{place}?password_file={file}&sentinel_user=reader&{by_file}")
        assert connection.ping()
        connection.close()
        for url, message in (
            (f"redis+sentinel://:masters%2Fword@{place}", "check sentinel_user and sentinel_password_file"),
            (f"redis+sentinel://{place}?sentinel_password_file={own}", "check the user and password"),
        ):
            with pytest.raises(RedisAccessDenied, match=message), Client(url) as client:
                client.workers()


@pytest.mark.processes
def test_a_sentinel_that_names_a_replica_is_asked_last(system: SentinelSystem, tmp_path: Path) -> None:
    """It was cut off from the others and has not heard of the promotion. Last, as the others may hear of it here."""
    replica = system.replicas()[0]
    with SentinelSystem(tmp_path / "stale", replicas=0, sentinels=1) as stale:
        with stale.sentinels[0].connect() as sentinel:
            sentinel.execute_command("SENTINEL", "REMOVE", MASTER)
            sentinel.execute_command("SENTINEL", "MONITOR", MASTER, HOST, replica.port, 1)
        hosts = f"{HOST}:{stale.sentinels[0].port},{HOST}:{system.sentinels[0].port}"
        connection = connect(f"redis+sentinel://{hosts}/{MASTER}")
        assert connection.role()[0] == b"master"
        connection.close()

        async def role() -> Any:
            client = connect_async(f"redis+sentinel://{hosts}/{MASTER}")
            reply: Any = await client.role()
            await client.aclose()
            return reply[0]

        assert asyncio.run(role()) == b"master"
