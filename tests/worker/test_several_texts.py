"""Several texts of one prompt are one job: each text has a slot of its own, and none is in another's way."""

from __future__ import annotations

from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from support.stock_worker import run_by_stock
from support.turns import Turns, take_turns

from fastgpt2 import Client, Engine, GenerationResult, Piece
from fastgpt2.api.client.reader import JobReader
from fastgpt2.engine.decoding.sequence import Sequence
from fastgpt2.errors import BadRequest, JobCancelled, JobFailed, JobTimedOut
from fastgpt2.protocol.keys import CRASHES_FIELD, SUSPECT_CRASHES, stream_key
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker.batch import ActiveJob
from fastgpt2.worker.rq_job import seed_of

TASK = "fastgpt2.worker.tasks.generate"
PROMPT = "Once upon a time"
SLOTS = 4
SEED = 7
DRAWN: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True, "temperature": 1.0, "seed": SEED}


@pytest.fixture(scope="module")
def engine() -> Engine:
    made = Engine.load("demo", max_batch=SLOTS, threads=1, drafts="off")
    made.warm_up()
    return made


@pytest.fixture(scope="module")
def texts(engine: Engine) -> list[tuple[int, ...]]:
    """The tokens of ten texts of the prompt, each generated alone, by its index."""
    return [engine.generate(PROMPT, **DRAWN, choice_index=index).token_ids for index in range(10)]


def ids_of(result: GenerationResult) -> list[tuple[int, ...]]:
    return [text.token_ids for text in (result, *result.alternatives)]


def texts_that_were_begun(error: JobFailed) -> tuple[GenerationResult, ...]:
    """Return what there is of each text, in the order of their indices."""
    partial = error.partial
    assert partial is not None
    found = (partial, *partial.alternatives)
    assert [text.choice_index for text in found] == list(range(len(found)))
    return found


def running(turns: Turns, job_id: str) -> ActiveJob:
    (job,) = [job for job in turns.worker.batch if job.id == job_id]
    return job


def ended(client: Client, *job_ids: str) -> bool:
    return all(client.status(job_id) in ("finished", "failed", "canceled") for job_id in job_ids)


def streamed(redis: Redis, job_id: str) -> list[Piece]:
    """Return what a client gets of a job's stream that reads all of it before the job ends."""
    reader, key = JobReader(job_id, streamed=True), stream_key(job_id)
    entries: Any = redis.xrange(key)
    reader.on_entries({key: entries})
    return list(reader.pieces())


def assert_as_the_result(pieces: list[Piece], result: GenerationResult) -> None:
    """Check that each text came in pieces, in its order, each character once."""
    for text in (result, *result.alternatives):
        own = [piece for piece in pieces if piece.choice_index == text.choice_index]
        assert len(own) > 5
        assert "".join(map(str, own)) == text.text
        assert [piece.at for piece in own] == [sum(len(piece.text) for piece in own[:n]) for n in range(len(own))]
        told = [one for piece in own for one in piece.logprobs]
        assert told == [one for one in text.logprobs or () if one.text_offset < len(text.text)]
    order = [piece.choice_index for piece in pieces]
    assert set(order) == {text.choice_index for text in (result, *result.alternatives)}


def test_the_texts_of_a_job_are_those_of_as_many_jobs(
    turns: Turns, client: Client, texts: list[tuple[int, ...]]
) -> None:
    """They are decoded together, and beside others; of more texts than slots, some begin when others end."""
    assert len(set(texts)) == len(texts)
    several = client.enqueue(PROMPT, **DRAWN, n=10)
    alone = [client.enqueue(PROMPT, **DRAWN, choice_index=index) for index in range(3)]
    from_third = client.enqueue(PROMPT, **DRAWN, n=2, choice_index=3)
    turns.until(lambda: ended(client, several.id, from_third.id, *(job.id for job in alone)), "all to end")
    result = several.result(timeout=10)
    assert ids_of(result) == texts
    assert [text.choice_index for text in (result, *result.alternatives)] == list(range(10))
    assert {text.seed for text in (result, *result.alternatives)} == {SEED}
    assert [job.result(timeout=10).token_ids for job in alone] == texts[:3]
    assert ids_of(from_third.result(timeout=10)) == texts[3:5]


def test_one_slot_is_enough_for_many_texts(
    redis_server: RedisServer, client: Client, texts: list[tuple[int, ...]]
) -> None:
    engine = Engine.load("demo", max_batch=1, threads=1, drafts="off")
    with take_turns(engine, redis_server, client.queue_name) as turns:
        job = client.enqueue(PROMPT, **DRAWN, n=3)
        turns.until(lambda: ended(client, job.id), "the job to end")
    assert ids_of(job.result(timeout=10)) == texts[:3]


def test_slots_are_given_first_come_first_served(turns: Turns, client: Client) -> None:
    first = client.enqueue(PROMPT, **DRAWN, n=SLOTS + 2)
    second = client.enqueue(PROMPT, **DRAWN)
    turns.until(lambda: len(turns.worker.batch) == 2 or ended(client, first.id), "both to be there")
    large, small = running(turns, first.id), running(turns, second.id)
    while not small.sequences:
        assert len(turns.worker.batch.waiting) == 1, "the one of which nothing was begun"
        turns.take()
    assert large.has_begun_all, "its last text was begun before that of a later job"
    assert [sequence.choice_index for sequence in large.sequences] == list(range(SLOTS + 2))
    turns.until(lambda: ended(client, first.id, second.id), "both to end")


def test_a_worker_claims_as_long_as_slots_are_free(turns: Turns, client: Client) -> None:
    """A prompt that several texts share is read once, and so keeps the next step busy once."""
    job = client.enqueue("the " * 50, **DRAWN, n=2)
    turns.until(lambda: len(turns.worker.batch) and running(turns, job.id).has_begun_all, "both to begin")
    assert turns.worker.batch.room() == SLOTS - 2
    assert turns.worker.batch.sizes[2] >= 1
    more = client.enqueue(PROMPT, **DRAWN, n=4)
    turns.until(lambda: len(turns.worker.batch) == 2, "the other to be claimed")
    assert turns.worker.batch.room() == 0, "texts wait here already"
    turns.until(lambda: ended(client, job.id, more.id), "both to end")
    assert (len(turns.worker.batch), turns.worker.batch.room()) == (0, SLOTS)


def test_the_best_of_several_are_given_the_best_first(turns: Turns, client: Client, engine: Engine) -> None:
    job = client.enqueue(PROMPT, **DRAWN, n=2, best_of=6)
    turns.until(lambda: ended(client, job.id), "the job to end")
    known = engine.generate(PROMPT, **DRAWN, n=6, logprobs=0)
    by_mean = sorted(
        (known, *known.alternatives), key=lambda text: -sum(one.logprob or 0 for one in text.logprobs or ())
    )
    assert ids_of(job.result(timeout=10)) == [text.token_ids for text in by_mean[:2]]


def test_each_text_is_streamed_as_it_comes(turns: Turns, client: Client, redis: Redis) -> None:
    job = client.enqueue(PROMPT, **DRAWN, n=6, stream=True, logprobs=1)
    turns.until(lambda: ended(client, job.id), "the job to end")
    result, pieces = job.result(timeout=10), streamed(redis, job.id)
    assert_as_the_result(pieces, result)
    order = [piece.choice_index for piece in pieces]
    assert order != sorted(order), "they come mixed"
    late = list(job.stream(timeout=10))
    assert [(piece.text, piece.choice_index) for piece in late] == [
        (text.text, text.choice_index) for text in (result, *result.alternatives)
    ], "from the result"


def test_of_a_cancelled_job_there_is_what_each_text_had(
    turns: Turns, client: Client, engine: Engine, texts: list[tuple[int, ...]]
) -> None:
    """One had ended by itself; those that had no slot yet are left out."""
    stop = next(
        token_id for token_id in texts[1][3:8] if all(token_id not in ids[:12] for ids in (texts[0], *texts[2:4]))
    )
    job = client.enqueue(PROMPT, **DRAWN, n=SLOTS + 3, stop_token_ids=[stop])
    turns.until(lambda: turns.worker.batch.decoding and has_ended(running(turns, job.id).sequences, 1), "one to end")
    begun = len(running(turns, job.id).sequences)
    assert job.cancel()
    turns.until(lambda: not len(turns.worker.batch) and not len(turns.worker.outbox), "the job to be let go")
    with pytest.raises(JobCancelled) as caught:
        job.result(timeout=10)
    found = texts_that_were_begun(caught.value)
    assert begun <= len(found) < SLOTS + 3
    assert [text.finish_reason for text in found] == ["cancelled", "stop", *["cancelled"] * (len(found) - 2)]
    assert {text.seed for text in found} == {SEED}
    for text, ids in zip(found, texts, strict=False):
        assert text.token_ids == ids[: len(text.token_ids)]
    assert engine.decoder.running == []


def has_ended(sequences: list[Sequence], index: int) -> bool:
    return len(sequences) > index and sequences[index].finished


def test_a_job_that_never_had_a_slot_tells_its_seed(turns: Turns, client: Client, redis: Redis) -> None:
    job = client.enqueue(PROMPT, temperature=1.0, n=3, choice_index=2, timeout=5)
    redis.hset(f"rq:job:{job.id}", "enqueued_at", "2026-01-01T00:00:00.000000Z")
    turns.until(lambda: ended(client, job.id), "the job to end")
    with pytest.raises(JobTimedOut) as caught:
        job.result(timeout=10)
    partial = caught.value.partial
    assert partial is not None
    assert (partial.text, partial.token_ids, partial.choice_index, partial.alternatives) == ("", (), 2, ())
    assert partial.finish_reason == "timeout"
    assert partial.seed == Job.fetch(job.id, connection=redis, serializer=JSONSerializer).kwargs["seed"]


def test_a_text_that_fails_alone_fails_its_job_and_no_other(
    turns: Turns, client: Client, engine: Engine, monkeypatch: pytest.MonkeyPatch, texts: list[tuple[int, ...]]
) -> None:
    step = engine.decoder.step

    def fail_one() -> list[Sequence]:
        finished = step()
        for sequence in list(engine.decoder.running):
            if sequence.request.n == 5 and sequence.choice_index == 1 and len(sequence.token_ids) >= 3:
                sequence.error = BadRequest("the grammar of this text has grown beyond its limit")
                engine.decoder.finish(sequence)
                finished.append(sequence)
        return finished

    monkeypatch.setattr(engine.decoder, "step", fail_one)
    other = client.enqueue(PROMPT, **DRAWN)
    failing = client.enqueue(PROMPT, **DRAWN, n=5, stream=True)
    turns.until(lambda: ended(client, other.id, failing.id), "both to end")
    with pytest.raises(BadRequest, match="beyond its limit"):
        failing.result(timeout=10)
    with pytest.raises(BadRequest, match="beyond its limit"):
        list(failing.stream(timeout=10))
    assert other.result(timeout=10).token_ids == texts[0]
    assert (len(turns.worker.batch), engine.decoder.running) == (0, [])
    after = client.enqueue(PROMPT, **DRAWN, n=2)
    turns.until(lambda: ended(client, after.id), "another job to end")
    assert ids_of(after.result(timeout=10)) == texts[:2]


def test_a_worker_that_stops_finishes_the_texts_of_what_it_has_begun(
    turns: Turns, client: Client, queue: Queue, texts: list[tuple[int, ...]]
) -> None:
    begun = client.enqueue(PROMPT, **DRAWN, n=SLOTS + 2)
    waiting = client.enqueue(PROMPT, **DRAWN, n=2)
    turns.until(lambda: len(turns.worker.batch) == 2, "both to be there")
    turns.worker.request_stop(0, None)
    turns.until(lambda: ended(client, begun.id), "the first to end")
    assert ids_of(begun.result(timeout=10)) == texts[: SLOTS + 2]
    assert queue.job_ids == [waiting.id]


def test_a_job_is_given_back_with_all_its_texts(
    turns: Turns,
    client: Client,
    engine: Engine,
    redis: Redis,
    redis_server: RedisServer,
    texts: list[tuple[int, ...]],
) -> None:
    job = client.enqueue(PROMPT, **DRAWN, n=SLOTS + 2, stream=True)
    turns.until(lambda: len(turns.worker.batch) and len(running(turns, job.id).sequences[0].token_ids) > 5, "some text")
    turns.worker.request_stop(0, None)
    turns.worker.request_stop(0, None)
    turns.take()
    assert (job.status(), engine.decoder.running) == ("queued", [])
    with take_turns(engine, redis_server, client.queue_name) as again:
        again.until(lambda: ended(client, job.id), "another worker to end it")
    result, pieces = job.result(timeout=10), streamed(redis, job.id)
    assert ids_of(result) == texts[: SLOTS + 2]
    assert_as_the_result(pieces, result)
    assert {piece.attempt for piece in pieces} == {1, 2}


def test_the_texts_of_a_suspect_run_together_and_beside_no_others(
    turns: Turns, client: Client, redis: Redis, texts: list[tuple[int, ...]]
) -> None:
    suspect = client.enqueue(PROMPT, **DRAWN, n=SLOTS + 1)
    redis.hset(f"rq:job:{suspect.id}", CRASHES_FIELD, SUSPECT_CRASHES)
    other = client.enqueue(PROMPT, **DRAWN)
    sizes = set()
    while not ended(client, suspect.id, other.id):
        turns.take()
        decoding = turns.worker.batch.decoding
        assert len(decoding) <= 1
        if decoding and decoding[0].id == suspect.id:
            sizes.add(sum(not sequence.finished for sequence in decoding[0].sequences))
    assert max(sizes) == SLOTS
    assert ids_of(suspect.result(timeout=10)) == texts[: SLOTS + 1]


def test_a_job_that_came_without_a_seed_draws_the_same_each_time(turns: Turns, queue: Queue, engine: Engine) -> None:
    """Something else than a client of ours has enqueued it."""
    job = queue.enqueue(TASK, PROMPT, temperature=1.0, max_new_tokens=24, ignore_eos=True, n=2)
    other = queue.enqueue(TASK, PROMPT, temperature=1.0, max_new_tokens=24, ignore_eos=True)
    values: list[Any] = []
    for count in (1, 2):
        turns.until(lambda count=count: len(job.results()) == count and other.results(), "the job to end")  # type: ignore[misc]
        values.append(job.return_value(refresh=True))
        queue.enqueue_job(job)
    seed = values[0]["seed"]
    assert [value["seed"] for value in values] == [seed_of(job)] * 2
    assert 0 <= seed < 1 << 53
    assert len({tuple(value["token_ids"]) for value in values}) == 1
    again: Any = other.return_value(refresh=True)
    assert again["seed"] != seed
    known = engine.generate(PROMPT, max_new_tokens=24, ignore_eos=True, temperature=1.0, n=2, seed=seed)
    assert values[0]["token_ids"] == list(known.token_ids)
    assert values[0]["alternatives"][0]["token_ids"] == list(known.alternatives[0].token_ids)


def test_greedy_texts_have_no_seed(turns: Turns, client: Client) -> None:
    job = client.enqueue(PROMPT, max_new_tokens=8, n=2, temperature=0)
    turns.until(lambda: ended(client, job.id), "the job to end")
    result = job.result(timeout=10)
    assert result.seed is None
    assert [text.token_ids for text in result.alternatives] == [result.token_ids]


def test_a_stock_worker_takes_one_text_after_the_other(
    client: Client, redis: Redis, queue: Queue, redis_server: RedisServer, texts: list[tuple[int, ...]]
) -> None:
    job = client.enqueue(PROMPT, **DRAWN, n=3, stream=True)
    best = client.enqueue(PROMPT, **DRAWN, best_of=3)
    unseeded = queue.enqueue(TASK, PROMPT, temperature=1.0, max_new_tokens=2)
    run_by_stock(queue, redis_server)
    result = job.result(timeout=30)
    assert ids_of(result) == texts[:3]
    pieces = streamed(redis, job.id)
    assert_as_the_result(pieces, result)
    assert [piece.choice_index for piece in pieces] == sorted(piece.choice_index for piece in pieces)
    assert best.result(timeout=30).token_ids in texts[:3]
    value: Any = unseeded.return_value(refresh=True)
    assert value["seed"] == seed_of(unseeded)


def test_a_stock_worker_keeps_what_each_text_had(client: Client, queue: Queue, redis_server: RedisServer) -> None:
    job = client.enqueue(PROMPT, **{**DRAWN, "max_new_tokens": 480}, n=128, timeout=3)
    run_by_stock(queue, redis_server)
    with pytest.raises(JobTimedOut) as caught:
        job.result(timeout=30)
    found = texts_that_were_begun(caught.value)
    assert all(text.finish_reason == "length" for text in found[:-1])
