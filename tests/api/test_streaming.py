"""A job's text as it comes: every character comes once, whatever happens to worker, stream or reader."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis import Redis
from rq import Queue, Retry
from rq.serializers import JSONSerializer
from starlette.responses import StreamingResponse
from support.running import GOLDEN, StartWorker, jobs_held, run_out_of_time, wait_until

from fastgpt2 import AsyncClient, Client, Piece
from fastgpt2.api.client.reader import Assembly
from fastgpt2.errors import BadRequest, JobCancelled, JobTimedOut, PromptTooLong, ResultTimeout, TextReplaced
from fastgpt2.protocol.keys import stream_key
from fastgpt2.protocol.messages import piece_to_entry
from fastgpt2.system.redis_server import RedisServer

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
ENTRY = ENTRIES[0]


def pieces_of(text: str, attempt: int, size: int = 3) -> list[Piece]:
    return [Piece(text[at : at + size], at, attempt) for at in range(0, len(text), size)]


def held(pieces: list[Piece]) -> str:
    """Return what a reader holds who does as `Piece` says."""
    text = ""
    for piece in pieces:
        assert piece.at <= len(text)
        text = text[: piece.at] + piece.text
    return text


class TestAssembly:
    def test_what_was_sent_twice_is_given_once(self) -> None:
        assembly = Assembly()
        first = [assembly.add(piece) for piece in pieces_of("abcdef", 1)]
        assert repr(first) == repr([Piece("abc", 0, 1), Piece("def", 3, 1)])
        again = [assembly.add(piece) for piece in pieces_of("abcdefgh", 2, size=4)]
        assert repr(again) == repr([None, Piece("gh", 6, 2)]), "the second overlaps: of it, only what is new"

    def test_what_differs_is_given_where_it_does(self) -> None:
        assembly = Assembly()
        assembly.add(Piece("abcdef", 0, 1))
        assert repr(assembly.add(Piece("abX", 0, 2))) == repr(Piece("X", 2, 2))
        assert assembly.text == "abX"
        assert repr(assembly.add(Piece("Y", 3, 2))) == repr(Piece("Y", 3, 2))

    def test_an_earlier_attempt_is_not_listened_to_any_more(self) -> None:
        """A worker that was thought dead goes on writing."""
        assembly = Assembly()
        assembly.add(Piece("ab", 0, 2))
        assert assembly.add(Piece("cd", 2, 1)) is None
        assert assembly.text == "ab"

    def test_a_gap_is_left_to_the_result(self) -> None:
        assembly = Assembly()
        assembly.add(Piece("ab", 0, 1))
        assert assembly.add(Piece("ef", 4, 1)) is None
        assert repr(assembly.complete("abcdef")) == repr(Piece("cdef", 2, 1))
        assert assembly.complete("abcdef") is None

    def test_the_result_has_the_last_word(self) -> None:
        assembly = Assembly()
        assembly.add(Piece("abcdef", 0, 1))
        assert repr(assembly.complete("abc")) == repr(Piece("", 3, 1))
        assert assembly.text == "abc"

    @pytest.mark.parametrize("seed", range(50))
    def test_any_losses_and_repetitions(self, seed: int) -> None:
        """Attempts break off, pieces are cut anyhow and get lost: the text is the result's, and given once if equal."""
        rng = random.Random(seed)
        text = ENTRIES[seed % len(ENTRIES)]["text"]
        assembly, given = Assembly(), []
        for attempt in range(1, 4):
            until = rng.randrange(len(text) + 1)
            for piece in pieces_of(text[:until], attempt, rng.randint(1, 9)):
                if rng.random() > 0.1:
                    given.append(assembly.add(piece))
        given.append(assembly.complete(text))
        pieces = [piece for piece in given if piece is not None]
        assert held(pieces) == text
        assert "".join(map(str, pieces)) == text


@pytest.mark.usefixtures("served")
def test_the_text_comes_in_pieces(client: Client) -> None:
    stream = client.stream(ENTRY["prompt"], max_new_tokens=100, ignore_eos=True)
    assert stream.result is None
    pieces = list(stream)
    assert "".join(map(str, pieces)) == ENTRY["text"]
    assert [piece.at for piece in pieces] == [sum(len(p.text) for p in pieces[:n]) for n in range(len(pieces))]
    assert {piece.attempt for piece in pieces} == {1}
    assert len(pieces) > 20
    assert stream.result is not None
    assert stream.result == stream.job.result(timeout=30)
    assert stream.result.text == ENTRY["text"]
    assert list(stream) == []


@pytest.mark.usefixtures("served")
def test_the_first_piece_comes_before_the_last_token(client: Client) -> None:
    with jobs_held(), client.stream(ENTRY["prompt"], max_new_tokens=480, ignore_eos=True) as stream:
        first = next(stream)
        assert ENTRY["text"].startswith(first.text)
        assert stream.job.status() == "started"


@pytest.mark.usefixtures("served")
def test_stop_strings_and_echo(client: Client) -> None:
    """Text that a stop string cuts is never given; an echo comes first."""
    stop = ENTRY["text"][30:36]
    stream = client.stream(ENTRIES[1]["prompt"], max_new_tokens=60, echo=True, ignore_eos=True)
    pieces = list(stream)
    assert "".join(map(str, pieces)).startswith(ENTRIES[1]["prompt"])
    stopped = list(client.stream(ENTRY["prompt"], max_new_tokens=60, stop=stop))
    assert "".join(map(str, stopped)) == ENTRY["text"][: ENTRY["text"].index(stop)]
    assert held(stopped) == "".join(map(str, stopped)), "nothing was taken back"


@pytest.mark.usefixtures("served")
def test_several_readers_and_late_ones(client: Client, redis: Redis) -> None:
    job = client.enqueue(ENTRY["prompt"], max_new_tokens=100, ignore_eos=True, stream=True)
    early = job.stream(timeout=30)
    first = next(early)
    middle = list(client.stream(job))
    assert "".join(map(str, [first, *early])) == ENTRY["text"] == "".join(map(str, middle))
    assert "".join(map(str, client.job(job.id).stream())) == ENTRY["text"], "from the beginning, at the end"
    redis.delete(stream_key(job.id))
    assert repr(list(job.stream())) == repr([Piece(ENTRY["text"], 0, 1)]), "without the stream, from the result"


@pytest.mark.usefixtures("served")
def test_a_job_that_does_not_stream(client: Client) -> None:
    job = client.enqueue(ENTRY["prompt"], max_new_tokens=100, ignore_eos=True)
    assert [piece.text for piece in job.stream(timeout=30)] == [ENTRY["text"]]


def test_strange_entries_are_passed_over(client: Client, redis: Redis, start_worker: StartWorker) -> None:
    job = client.enqueue(ENTRY["prompt"], max_new_tokens=10, ignore_eos=True, stream=True)
    redis.xadd(stream_key(job.id), {"attempt": "x", "at": 0, "text": "a"})
    redis.xadd(stream_key(job.id), {"what": "?"})
    start_worker()
    text = "".join(map(str, job.stream(timeout=30)))
    assert text == job.result(timeout=30).text
    assert ENTRY["text"].startswith(text)


def body_of(response: StreamingResponse) -> bytes:
    """Return what a web server gets to send of a response."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def serve() -> None:
        await response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)

    asyncio.run(serve())
    return b"".join(message.get("body", b"") for message in sent)


@pytest.mark.usefixtures("served")
def test_it_is_what_programs_take_that_take_strings(client: Client, redis_server: RedisServer) -> None:
    options: dict[str, Any] = {"max_new_tokens": 100, "ignore_eos": True}
    assert "".join(client.stream(ENTRY["prompt"], **options)) == ENTRY["text"]
    assert body_of(StreamingResponse(client.stream(ENTRY["prompt"], **options))).decode() == ENTRY["text"]

    async def pieces() -> AsyncIterator[str]:
        async with (
            AsyncClient(redis_server.url, client.queue_name) as other,
            await other.stream(ENTRY["prompt"], **options) as stream,
        ):
            async for piece in stream:
                yield piece

    assert body_of(StreamingResponse(pieces())).decode() == ENTRY["text"]


def test_what_replaces_text_is_an_error_unless_asked_for(
    client: Client, redis: Redis, redis_server: RedisServer
) -> None:
    """Who appends what comes would hold a wrong text. Of several texts, each is looked at by itself."""
    job = client.enqueue("a", n=2, temperature=1.0, stream=True)
    for piece in (
        Piece("abc", 0, 1), Piece("xy", 0, 1, choice_index=1), Piece("abcd", 0, 2), Piece("xz", 0, 2, choice_index=1),
    ):  # fmt: skip
        redis.xadd(stream_key(job.id), piece_to_entry(piece))
    expected = ["abc", "xy", "d"]
    stream = job.stream(timeout=30)
    assert [next(stream) for _ in expected] == expected
    with pytest.raises(TextReplaced, match="whose text differs from what has been given: ask again"):
        next(stream)
    assert list(stream) == []
    for replacing in (job.stream(30, replacements=True), client.stream(job, read_timeout=30, replacements=True)):
        pieces = [next(replacing) for _ in range(4)]
        assert pieces == [*expected, "z"]
        assert [piece.at for piece in pieces] == [0, 0, 3, 1]

    async def read(replacements: bool) -> list[str]:
        async with AsyncClient(redis_server.url, client.queue_name) as other:
            stream = other.job(job.id).stream(30, replacements)
            return [await anext(stream) for _ in range(4)]

    assert asyncio.run(read(replacements=True)) == [*expected, "z"]
    with pytest.raises(TextReplaced):
        asyncio.run(read(replacements=False))


class TestEarlyEnds:
    @pytest.mark.usefixtures("served")
    def test_closed_early_it_cancels_its_own_job(self, client: Client) -> None:
        with jobs_held():
            stream = client.stream(ENTRY["prompt"], max_new_tokens=480, ignore_eos=True)
            next(stream)
            stream.close()
        assert stream.job.status() == "canceled"

    def test_leaving_the_loop_does_too(self, client: Client, redis: Redis) -> None:
        """Without a worker: the job leaves the queue."""

        def leave() -> None:
            for _ in client.stream("a", read_timeout=0.01):
                pass

        with pytest.raises(ResultTimeout):
            leave()
        wait_until(lambda: redis.llen(f"rq:queue:{client.queue_name}") == 0, "the job to leave the queue")

    def test_it_cancels_no_job_that_was_given(self, client: Client) -> None:
        job = client.enqueue("a", stream=True)
        job.stream().close()
        assert job.status() == "queued"

    @pytest.mark.usefixtures("served")
    def test_a_stream_that_was_read_cancels_nothing(self, client: Client) -> None:
        with client.stream(ENTRY["prompt"], max_new_tokens=5) as stream:
            list(stream)
        assert stream.job.status() == "finished"


class TestErrors:
    @pytest.mark.usefixtures("served")
    def test_a_job_cancelled_elsewhere(self, client: Client) -> None:
        with jobs_held():
            stream = client.stream(ENTRY["prompt"], max_new_tokens=480, ignore_eos=True)
            pieces = [next(stream)]
            client.cancel(stream.job.id)
            with pytest.raises(JobCancelled) as caught:
                pieces.extend(stream)
        assert caught.value.partial is not None
        assert caught.value.partial.text.startswith(held(pieces))
        assert list(stream) == [], "it has ended"

    @pytest.mark.usefixtures("served")
    def test_time_is_up(self, client: Client) -> None:

        def attempt(seconds: float) -> JobTimedOut:
            with pytest.raises(JobTimedOut) as caught:
                list(client.stream(ENTRY["prompt"], max_new_tokens=480, ignore_eos=True, timeout=seconds))
            return caught.value

        assert run_out_of_time(attempt).partial is not None

    def test_a_refusal(self, client: Client, start_worker: StartWorker) -> None:
        stream = client.stream("the " * 600)
        start_worker()
        with pytest.raises(PromptTooLong):
            list(stream)
        with pytest.raises(BadRequest, match="max_new_tokens must be"):
            client.stream("a", max_new_tokens=-1)

    def test_nobody_works(self, client: Client) -> None:
        with pytest.raises(ResultTimeout, match=r"is queued, no result within 0\.1 s; no worker listens"):
            list(client.enqueue("a", stream=True).stream(timeout=0.1))


def test_a_killed_worker(client: Client, redis: Redis, start_worker: StartWorker) -> None:
    """RQ's own clean-up puts the job back; the text goes on where it stood, and comes out once."""
    queue = Queue(client.queue_name, connection=redis, serializer=JSONSerializer)
    first = start_worker()
    with jobs_held():
        stock = queue.enqueue(
            "fastgpt2.worker.tasks.generate",
            kwargs={"prompt": ENTRY["prompt"], "max_new_tokens": 480, "ignore_eos": True, "stream": True},
            retry=Retry(max=3),
            description="generate",
        )
        stream = client.job(stock.id).stream(timeout=60)
        pieces = [next(stream)]
        first.kill()
        first.wait()
    queue.started_job_registry.cleanup(timestamp=time.time() + 10**6)
    assert stock.get_status() == "queued"
    # A piece that a dead worker may have written once more.
    redis.xadd(stream_key(stock.id), piece_to_entry(pieces[0]))
    start_worker(wait=False)
    pieces += stream
    text = "".join(map(str, pieces))
    assert text == client.result(stock.id, timeout=30).text
    assert text.startswith(ENTRY["text"])
    assert held(pieces) == text
    assert {piece.attempt for piece in pieces} == {1, 2}
