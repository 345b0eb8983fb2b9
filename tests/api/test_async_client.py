"""The asyncio client has the names and the behaviour of the blocking one, and the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from itertools import count
from typing import Any

import pytest
from redis import Redis
from starlette.responses import StreamingResponse
from support.running import GOLDEN, StartWorker, jobs_held, wait_until

from fastgpt2 import AsyncClient, Client, GenerationRequest, GenerationResult
from fastgpt2.api.client.async_client import AsyncJob, AsyncTextStream
from fastgpt2.api.client.client import Job, TextStream
from fastgpt2.api.client.enqueue import plan_job
from fastgpt2.api.client.flow import AsyncDriver
from fastgpt2.errors import (
    BadRequest,
    JobCancelled,
    JobNotFound,
    PromptTooLong,
    QueueFull,
    QueueUnavailable,
    ResultTimeout,
)
from fastgpt2.system.redis_server import RedisServer

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
ENTRY = ENTRIES[0]

Use = Callable[[Callable[[AsyncClient], Awaitable[Any]]], Any]


@pytest.fixture
def use(redis_server: RedisServer, queue_name: str) -> Use:
    """Return a function that runs a coroutine with a client of the test's queue."""

    def run(body: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            async with AsyncClient(redis_server.url, queue_name) as client:
                return await body(client)

        return asyncio.run(asyncio.wait_for(main(), 60))

    return run


@pytest.mark.parametrize(("blocking", "twin"), [(Client, AsyncClient), (Job, AsyncJob), (TextStream, AsyncTextStream)])
def test_the_same_names_and_parameters(blocking: type, twin: type) -> None:
    renamed = {"close": "aclose"}
    for name, member in vars(blocking).items():
        if name.startswith("_"):
            continue
        other = getattr(twin, renamed.get(name, name))
        if callable(member):
            assert list(inspect.signature(member).parameters) == list(inspect.signature(other).parameters), name


@pytest.mark.usefixtures("served")
def test_enqueue_result_status(use: Use, client: Client) -> None:

    async def body(other: AsyncClient) -> GenerationResult:
        job = await other.enqueue(ENTRY["prompt"], max_new_tokens=100, ignore_eos=True, priority="high")
        result = await job.result(timeout=30)
        assert await job.status() == await other.status(job.id) == "finished"
        assert await other.result(job.id, timeout=30) == result
        assert client.result(job.id, timeout=30) == result
        made = await other.enqueue_request(GenerationRequest(ENTRY["prompt"], 3, ignore_eos=True))
        assert (await made.result()).token_ids == tuple(ENTRY["ids"][:3])
        assert await other.workers() == 1
        return result

    assert use(body).text == ENTRY["text"]


@pytest.mark.usefixtures("served")
def test_many_wait_in_one_loop(use: Use) -> None:

    async def body(client: AsyncClient) -> None:
        jobs = [await client.enqueue(entry["prompt"], max_new_tokens=8, ignore_eos=True) for entry in ENTRIES]
        results = await asyncio.gather(*(job.result(30) for job in jobs))
        assert [list(result.token_ids) for result in results] == [entry["ids"][:8] for entry in ENTRIES]

    use(body)


@pytest.mark.usefixtures("served")
def test_one_event_loop_after_the_other(redis_server: RedisServer, queue_name: str) -> None:
    """A program may keep its client, and call `asyncio.run` again and again."""
    other = AsyncClient(redis_server.url, queue_name)

    async def body() -> list[str]:
        job = await other.enqueue("a", max_new_tokens=1)
        return [(await job.result(30)).text, *[one.text async for one in other.map(["a", "a"], max_new_tokens=1)]]

    first = asyncio.run(body())
    assert len(set(first)) == 1
    for _ in range(2):
        assert asyncio.run(body()) == first
    asyncio.run(other.aclose())


def test_refusals_and_errors(use: Use, redis_server: RedisServer, queue_name: str) -> None:
    async def body(client: AsyncClient) -> None:
        with pytest.raises(BadRequest, match="max_new_tokens must be"):
            await client.enqueue("a", max_new_tokens=-1)
        with pytest.raises(JobNotFound):
            await client.status("nonsense")
        with pytest.raises(JobNotFound):
            await client.job("nonsense").result()
        job = await client.enqueue("a")
        with pytest.raises(ResultTimeout, match=r"is queued, no result within 0\.1 s; no worker listens"):
            await job.result(0.1)
        async with AsyncClient(redis_server.url, queue_name, max_queue=1) as limited:
            with pytest.raises(QueueFull, match="1 job waits, the limit is 1"):
                await limited.enqueue("b")
        with pytest.raises(BadRequest, match="the Redis URL cannot be used"):
            AsyncClient("http://h")

    use(body)


def test_no_redis(queue_name: str) -> None:
    nowhere = RedisServer()

    async def body() -> None:
        async with AsyncClient(f"redis://:hunter2@127.0.0.1:{nowhere.port}/0", queue_name) as client:
            for call in (client.enqueue("a"), client.result("x", 5), client.status("x"), client.cancel("x")):
                with pytest.raises(QueueUnavailable, match="cannot be used") as caught:
                    await call
                assert "hunter2" not in str(caught.value)

    asyncio.run(body())
    nowhere.stop()


@pytest.mark.usefixtures("served")
def test_cancel(use: Use) -> None:

    async def body(client: AsyncClient) -> None:
        job = await client.enqueue(ENTRY["prompt"], max_new_tokens=480, ignore_eos=True)
        while await job.status() == "queued":
            await asyncio.sleep(0.01)
        assert await job.cancel()
        assert not await client.cancel(job.id)
        with pytest.raises(JobCancelled) as caught:
            await job.result(30)
        assert caught.value.partial is not None

    with jobs_held():
        use(body)


def test_scripts_that_redis_does_not_know_are_sent_once_more(use: Use, client: Client, redis: Redis) -> None:
    async def body(other: AsyncClient) -> list[str]:
        redis.script_flush()
        job = await other.enqueue("a")
        redis.script_flush()
        plans = [plan_job("b", {}), plan_job("c", {})]
        return [job.id, *await other._driver.run(other._session.enqueue_all(plans))]

    enqueued = use(body)
    assert redis.lrange(f"rq:queue:{client.queue_name}", 0, -1) == [job_id.encode() for job_id in enqueued]


@pytest.mark.usefixtures("served")
def test_stream(use: Use) -> None:

    async def body(client: AsyncClient) -> None:
        async with await client.stream(ENTRY["prompt"], max_new_tokens=100, ignore_eos=True) as stream:
            pieces = [piece async for piece in stream]
        assert "".join(map(str, pieces)) == ENTRY["text"]
        assert len(pieces) > 20
        assert stream.result is not None
        assert stream.result.text == ENTRY["text"]
        assert await stream.job.status() == "finished"
        again = [piece async for piece in stream.job.stream()]
        assert "".join(map(str, again)) == ENTRY["text"]

        with jobs_held():
            async with await client.stream(ENTRY["prompt"], max_new_tokens=480, ignore_eos=True) as broken_off:
                assert ENTRY["text"].startswith(str(await anext(broken_off)))
            assert await broken_off.job.status() == "canceled"

    use(body)


def test_a_loop_goes_on_while_something_is_waited_for(use: Use, start_worker: StartWorker) -> None:
    async def body(other: AsyncClient) -> None:
        job = await other.enqueue(ENTRY["prompt"], max_new_tokens=2)
        waiter = asyncio.create_task(job.result(30))
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert not waiter.done()
        start_worker(wait=False)
        assert (await waiter).usage.completion_tokens <= 2

    use(body)


async def reads_streams(client: AsyncClient) -> bool:
    """Tell whether some connection waits in a blocking read."""
    return any(one["cmd"] == "xread" and "b" in one["flags"] for one in await client.connection.client_list())


def test_a_waiter_that_is_cancelled_leaves_the_client_usable(use: Use) -> None:
    async def body(client: AsyncClient) -> None:
        job = await client.enqueue("a")
        waiter = asyncio.create_task(job.result())
        while not await reads_streams(client):
            await asyncio.sleep(0.01)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        assert await job.status() == "queued"

    use(body)


@pytest.mark.usefixtures("served")
def test_map_and_as_completed(use: Use) -> None:
    prompts = [entry["prompt"] for entry in ENTRIES]

    async def body(client: AsyncClient) -> None:
        results = [r async for r in client.map(prompts, max_new_tokens=6, ignore_eos=True, in_flight=9)]
        assert [list(result.token_ids) for result in results] == [entry["ids"][:6] for entry in ENTRIES]
        found = {n: r async for n, r in client.as_completed(prompts, max_new_tokens=2, ignore_eos=True)}
        assert {n: list(r.token_ids) for n, r in found.items()} == {n: e["ids"][:2] for n, e in enumerate(ENTRIES)}
        mixed = [r async for r in client.map(["a", "the " * 600], return_exceptions=True, max_new_tokens=1)]
        assert [type(r) for r in mixed] == [GenerationResult, PromptTooLong]
        with pytest.raises(PromptTooLong):
            _ = [r async for r in client.map(["the " * 600])]

    use(body)


def test_map_ended_early_cancels(use: Use, client: Client, redis: Redis, start_worker: StartWorker) -> None:
    start_worker()
    requests = (GenerationRequest("a", 1 if n == 0 else 480, ignore_eos=True) for n in count())

    async def body(other: AsyncClient) -> None:
        async with aclosing(other.map(requests, in_flight=20)) as results:
            async for result in results:
                assert len(result.token_ids) == 1
                break

    with jobs_held():
        use(body)
    assert redis.llen(f"rq:queue:{client.queue_name}") == 0
    assert 19 <= redis.zcard(f"rq:canceled:{client.queue_name}") <= 20


def test_a_cancelled_task_cancels_what_is_in_flight(use: Use, client: Client, redis: Redis) -> None:
    async def body(other: AsyncClient) -> None:
        async def consume() -> None:
            async with aclosing(other.map(["a"] * 5)) as results:
                async for _ in results:
                    pass

        task = asyncio.create_task(consume())
        while await asyncio.to_thread(redis.llen, f"rq:queue:{client.queue_name}") < 5:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    use(body)
    assert redis.zcard(f"rq:canceled:{client.queue_name}") == 5


def test_who_leaves_a_web_page_cancels_its_job(use: Use, client: Client) -> None:
    """Below a web server, what has been cancelled is cancelled again at each `await`."""
    jobs = []

    async def body(other: AsyncClient) -> None:
        async def pieces() -> AsyncIterator[str]:
            async with await other.stream("a") as stream:
                jobs.append(stream.job.id)
                async for piece in stream:
                    yield piece

        async def leave() -> dict[str, str]:
            while not await reads_streams(other):
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(_: object) -> None:
            pass

        response = StreamingResponse(pieces())
        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, leave, send)

    use(body)
    assert [client.status(job) for job in jobs] == ["canceled"]


def test_a_cancellation_that_the_redis_library_loses(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """`asyncio.wait_for` of Python 3.11 loses one that comes as what it waits for ends."""

    async def body(client: AsyncClient) -> None:
        waits = asyncio.Event()

        async def lose(_driver: AsyncDriver, _step: Any) -> int:
            waits.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return 0

        monkeypatch.setattr(AsyncDriver, "_take", lose)
        task = asyncio.create_task(client.enqueue("a"))
        await waits.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        monkeypatch.undo()

    use(body)


def test_a_restart_of_redis(
    tmp_path_factory: pytest.TempPathFactory, queue_name: str, start_worker: StartWorker
) -> None:
    folder = tmp_path_factory.mktemp("redis")

    @asynccontextmanager
    async def restarted(server: RedisServer) -> AsyncIterator[RedisServer]:
        await asyncio.to_thread(server.stop)
        again = await asyncio.to_thread(RedisServer(server.port, folder).start)
        yield again
        await asyncio.to_thread(again.stop)

    async def body() -> None:
        server = await asyncio.to_thread(RedisServer(folder=folder).start)
        async with AsyncClient(server.url, queue_name) as client:
            job = await client.enqueue(ENTRY["prompt"], max_new_tokens=5, ignore_eos=True, stream=True)
            waiter = asyncio.create_task(job.result(60))
            follower = asyncio.create_task(text_of(job))
            with Client(server.url, queue_name) as blocking:
                await asyncio.to_thread(wait_until, lambda: clients_blocked(blocking) == 2, "both to wait")
            async with restarted(server):
                start_worker(wait=False, FASTGPT2_REDIS_URL=server.url)
                assert (await waiter).token_ids == tuple(ENTRY["ids"][:5])
                assert await follower == (await waiter).text

    async def text_of(job: AsyncJob) -> str:
        return "".join([str(piece) async for piece in job.stream(60)])

    asyncio.run(asyncio.wait_for(body(), 90))


def clients_blocked(client: Client) -> int:
    return int(client.connection.info("clients")["blocked_clients"])
