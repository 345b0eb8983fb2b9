"""Clients in other processes: pickled, as process pools and joblib do, and inherited by a fork."""

from __future__ import annotations

import asyncio
import copy
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, cast

import pytest
from redis import Redis
from support.running import StartWorker, wait_until

from fastgpt2 import AsyncClient, Client, GenerationResult
from fastgpt2.api.client.client import Job
from fastgpt2.errors import BadRequest, JobCancelled
from fastgpt2.system.redis_server import RedisServer

pytestmark = pytest.mark.processes

ARGUMENTS = ("redis://:secret@127.0.0.1:7/2", "queue", 5, "disk")


def continue_prompt(client: Client, prompt: Any) -> GenerationResult:
    with client:
        return client.enqueue(prompt, max_new_tokens=3, ignore_eos=True).result(timeout=60)


def wait_for(job: Job) -> GenerationResult:
    return job.result(timeout=60)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_pickle_has_what_makes_the_client(kind: Any) -> None:
    client = kind(*ARGUMENTS)
    for again in (pickle.loads(pickle.dumps(client)), copy.copy(client), copy.deepcopy(client)):
        assert type(again) is kind
        assert again._session.arguments == ARGUMENTS
        assert again.connection is not client.connection
    first, second = pickle.loads(pickle.dumps([client.job("a"), client.job("b")]))
    assert (first.id, second.id) == ("a", "b")
    assert first._driver is second._driver, "one client for the jobs of one pickle"


def test_a_pickle_is_the_same_whatever_the_client_did(client: Client) -> None:
    """By the hash of a pickle, datasets finds what it has computed before."""
    before = pickle.dumps(client)
    client.enqueue("a")
    client.workers()
    assert pickle.dumps(client) == before
    assert pickle.dumps(pickle.loads(before)) == before


def test_the_settings_of_the_environment_go_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGPT2_REDIS_URL", ARGUMENTS[0])
    monkeypatch.setenv("FASTGPT2_QUEUE", "elsewhere")
    pickled = pickle.dumps(Client())
    monkeypatch.delenv("FASTGPT2_REDIS_URL")
    monkeypatch.delenv("FASTGPT2_QUEUE")
    again = pickle.loads(pickled)
    assert (again.redis_url, again.queue_name) == (ARGUMENTS[0], "elsewhere")


def test_a_pool_of_processes(client: Client, start_worker: StartWorker) -> None:
    """Clients and jobs go to processes that were started anew; results and errors come back."""
    start_worker()
    job = client.enqueue("b", max_new_tokens=3, ignore_eos=True)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(continue_prompt, [client] * 2, ["a", "b"]))
        assert pool.submit(wait_for, job).result(timeout=60) == job.result(timeout=60)
        assert results[1].token_ids == job.result(timeout=60).token_ids
        with pytest.raises(BadRequest, match="prompt must be a string"):
            pool.submit(continue_prompt, client, 2.5).result(timeout=60)


def in_child(call: Callable[[], None]) -> Callable[[], int]:
    """Call this in a child that is forked now. Return what waits for its exit status: 0 unless the call raised."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            call()
            status = 0
        finally:
            os._exit(status)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_fork_makes_connections_of_its_own(client: Client, redis: Redis) -> None:
    """Parent and child ask at once over the client that both have: each gets the answers to its own questions."""
    mine = client.enqueue("a")
    client.status(mine.id)

    def ask(kind: str) -> None:
        for number in range(100):
            assert client.connection.echo(f"{kind} {number}") == f"{kind} {number}".encode()
        assert client.status(mine.id) == "queued"

    before: Any = redis.info("clients")
    children = [in_child(lambda: ask("child")) for _ in range(2)]
    ask("parent")
    assert [wait() for wait in children] == [0, 0]
    assert client.status(mine.id) == "queued"
    after: Any = redis.info("clients")
    assert after["connected_clients"] <= before["connected_clients"]


def test_so_does_a_client_for_asyncio(redis_server: RedisServer, queue_name: str) -> None:
    async def echo(client: AsyncClient, kind: str) -> None:
        for number in range(100):
            assert await client.connection.echo(f"{kind} {number}") == f"{kind} {number}".encode()

    async def parent() -> None:
        async with AsyncClient(redis_server.url, queue_name) as client:
            await echo(client, "parent")
            wait = in_child(lambda: in_loop_of_its_own(echo(client, "child")))
            await echo(client, "parent")
            assert await asyncio.to_thread(wait) == 0
            await echo(client, "parent")

    asyncio.run(parent())


def in_loop_of_its_own(coroutine: Any) -> None:
    """Run this where a parent's loop runs already: a child's copy of that must not run."""
    asyncio._set_running_loop(None)
    asyncio.run(coroutine)


def test_a_fork_ends_nothing_of_its_parents(client: Client, redis: Redis) -> None:
    """A child that ends unwinds what its parent has begun: streams and runs that would cancel their jobs."""
    stream = client.stream("a")
    results = client.map(["b", "c"], return_exceptions=True)
    first: list[Any] = []
    reader = threading.Thread(target=lambda: first.append(next(results)))
    reader.start()
    queue: Any = f"rq:queue:{client.queue_name}"
    wait_until(lambda: redis.llen(queue) == 3, "the jobs to be in the queue")
    jobs = [job.decode() for job in cast(list[bytes], redis.lrange(queue, 0, -1))]
    assert jobs[0] == stream.job.id
    client.cancel(jobs[1])
    reader.join(30)
    assert isinstance(first[0], JobCancelled), "the run has begun, and waits for its second job"

    def unwind() -> None:
        stream.close()
        results.close()

    assert in_child(unwind)() == 0
    assert [client.status(job) for job in jobs] == ["queued", "canceled", "queued"]
    unwind()
    assert [client.status(job) for job in jobs] == ["canceled"] * 3
