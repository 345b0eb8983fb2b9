"""Texts that are drawn, and several of a prompt, as clients ask for them and get them."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from typing import Any

import pytest
from redis import Redis
from rq.job import Job as RQJob
from rq.serializers import JSONSerializer
from support.running import GOLDEN

from fastgpt2 import (
    AsyncClient,
    Client,
    Engine,
    GenerationRequest,
    GenerationResult,
    Piece,
    Timings,
    TokenLogprob,
    Usage,
)
from fastgpt2.api.client.bulk import ProgressBar
from fastgpt2.api.client.enqueue import JobPlan, idempotency_keys, plan_job
from fastgpt2.api.client.reader import Assembly, JobReader
from fastgpt2.errors import BadRequest, IdempotencyMismatch
from fastgpt2.protocol.keys import stream_key
from fastgpt2.protocol.messages import JobOptions, piece_to_entry
from fastgpt2.system.redis_server import RedisServer

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
PROMPT = ENTRIES[0]["prompt"]
DRAWN: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 0.9, "top_k": 50}


def asked(redis: Redis, job_id: str) -> dict[str, Any]:
    """Return what a job in the queue asks for."""
    kwargs: dict[str, Any] = RQJob.fetch(job_id, connection=redis, serializer=JSONSerializer).kwargs
    return kwargs


def result_of(*texts: str) -> GenerationResult:
    """Return the result of a job of several texts, of four tokens each."""
    first, *others = [
        GenerationResult(text, (), "length", Usage(1, 4), Timings(0.0, 0.0, 0.0), "m", choice_index=index)
        for index, text in enumerate(texts)
    ]
    return replace(first, alternatives=tuple(others))


class TestSeeds:
    def test_a_job_that_draws_gets_a_seed_when_it_is_enqueued(self, client: Client, redis: Redis) -> None:
        seeds = [asked(redis, client.enqueue("a", temperature=1.0).id)["seed"] for _ in range(20)]
        assert len(set(seeds)) == 20
        assert all(isinstance(seed, int) and 0 <= seed < 1 << 53 for seed in seeds)
        assert max(seeds) >= 1 << 40

    def test_a_seed_that_is_given_stays_as_it_is(self, client: Client, redis: Redis) -> None:
        for seed in (0, 7, -1, (1 << 64) - 1):
            assert asked(redis, client.enqueue("a", do_sample=True, seed=seed).id)["seed"] == seed

    @pytest.mark.parametrize(
        "options", [{}, {"temperature": 0}, {"do_sample": False, "temperature": 1.0}, {"top_p": 0.5}]
    )
    def test_greedy_text_needs_none(self, client: Client, redis: Redis, options: dict[str, Any]) -> None:
        assert "seed" not in asked(redis, client.enqueue("a", **options).id)

    def test_each_job_of_many_gets_its_own(self, client: Client, redis: Redis) -> None:
        made = [GenerationRequest("a", temperature=1.0)] * 3
        ids = [client.enqueue_request(request).id for request in made]
        assert len({asked(redis, job_id)["seed"] for job_id in ids}) == 3

    def test_a_plan_has_none_as_plans_are_compared(self) -> None:
        plans = [plan_job("a", {"temperature": 1.0}) for _ in range(2)]
        assert plans[0] == plans[1]
        assert plans[0].request.seed is None

    def test_with_the_same_idempotency_key_the_job_is_the_same(self, client: Client, redis: Redis) -> None:
        def enqueue(fields: dict[str, Any]) -> str:
            plan = plan_job("a", fields)
            keys = idempotency_keys("one", 1, plan)
            (job_id,) = client._driver.run(client._session.enqueue_all([plan], keys))
            return job_id

        first = enqueue({"temperature": 1.0, "n": 2, "logit_bias": {5: 1}})
        seed = asked(redis, first)["seed"]
        assert enqueue({"temperature": 1.0, "n": 2, "logit_bias": {"5": 1.0}}) == first
        assert asked(redis, first)["seed"] == seed
        with pytest.raises(IdempotencyMismatch):
            enqueue({"temperature": 1.0, "n": 3, "logit_bias": {5: 1}})


def test_all_options_reach_the_worker(client: Client, redis: Redis) -> None:
    options: dict[str, Any] = {
        "do_sample": True, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "seed": 3,
        "n": 2, "best_of": 3, "choice_index": 1, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3,
        "presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {"7": 1.0}, "bad_words": ["x", [5, 6]],
        "suppress_tokens": [9],
    }  # fmt: skip
    given = asked(redis, client.enqueue("a", **options).id)
    assert given == {"prompt": "a", **options}


def test_the_best_of_several_texts_cannot_be_streamed(client: Client, redis: Redis) -> None:
    for plan in (
        lambda: client.stream("a", best_of=3),
        lambda: client.stream(GenerationRequest("a", n=2, best_of=3)),
        lambda: client.enqueue_request(GenerationRequest("a", n=2, best_of=3), JobOptions(stream=True)),
        lambda: JobPlan(GenerationRequest("a", n=2, best_of=3), JobOptions(stream=True)),
    ):
        with pytest.raises(BadRequest, match="which texts are the best is known only when all have ended"):
            plan()
    assert redis.llen(f"rq:queue:{client.queue_name}") == 0


@pytest.fixture
def expected(engine: Engine) -> list[GenerationResult]:
    """Three texts of the first prompt with the seed 5."""
    result = engine.generate(PROMPT, **DRAWN, seed=5, n=3)
    return [result, *result.alternatives]


def ids_of(result: GenerationResult) -> list[tuple[int, ...]]:
    return [text.token_ids for text in (result, *result.alternatives)]


@pytest.mark.usefixtures("served")
def test_every_way_to_ask_gives_the_same_texts(
    client: Client, redis_server: RedisServer, expected: list[GenerationResult]
) -> None:
    options: dict[str, Any] = {**DRAWN, "seed": 5, "n": 3}
    wanted = [text.token_ids for text in expected]
    assert ids_of(client.enqueue(PROMPT, **options).result(timeout=30)) == wanted
    assert ids_of(client.enqueue_request(GenerationRequest(PROMPT, **options)).result(timeout=30)) == wanted
    assert [ids_of(result) for result in client.map([PROMPT, PROMPT], **options)] == [wanted] * 2
    assert [ids_of(result) for _, result in client.as_completed([PROMPT], **options)] == [wanted]
    with client.stream(PROMPT, **options) as stream:
        texts = ["", "", ""]
        for piece in stream:
            assert piece.at == len(texts[piece.choice_index])
            texts[piece.choice_index] += piece.text
        assert texts == [text.text for text in expected]
        assert stream.result is not None
        assert ids_of(stream.result) == wanted

    async def ask() -> list[Any]:
        async with AsyncClient(redis_server.url, client.queue_name) as other:
            job = await other.enqueue(PROMPT, **options)
            streamed = ["", "", ""]
            async for piece in await other.stream(PROMPT, **options):
                streamed[piece.choice_index] += piece.text
            mapped = [ids_of(result) async for result in other.map([PROMPT], **options)]
            return [ids_of(await job.result(timeout=30)), *mapped, streamed]

    assert asyncio.run(ask()) == [wanted, wanted, [text.text for text in expected]]


@pytest.mark.usefixtures("served")
def test_a_seed_that_the_result_tells_gives_the_text_again(client: Client) -> None:
    first = client.enqueue(PROMPT, **DRAWN, n=2).result(timeout=30)
    assert first.seed is not None
    again = client.enqueue(PROMPT, **DRAWN, n=2, seed=first.seed).result(timeout=30)
    assert ids_of(again) == ids_of(first)
    second = client.enqueue(PROMPT, **DRAWN, seed=first.seed, choice_index=1).result(timeout=30)
    assert second.token_ids == first.alternatives[0].token_ids
    assert ids_of(client.enqueue(PROMPT, **DRAWN, n=2).result(timeout=30)) != ids_of(first)


class TestReading:
    """Several texts of one job: each is put together by itself."""

    def test_what_differs_is_cut_in_the_text_in_which_it_does(self) -> None:
        reader = JobReader("x", streamed=True)
        add(reader, Piece("abc", 0, 1), Piece("xyz", 0, 1, choice_index=1), Piece("abcd", 0, 2))
        add(reader, Piece("xY", 0, 2, choice_index=1), Piece("e", 4, 2))
        assert list(map(repr, reader.pieces())) == [
            repr(Piece("abc", 0, 1)),
            repr(Piece("xyz", 0, 1, choice_index=1)),
            repr(Piece("d", 3, 2)),
            repr(Piece("Y", 1, 2, choice_index=1)),
            repr(Piece("e", 4, 2)),
        ]

    def test_an_earlier_attempt_is_not_listened_to_about_a_text_that_is_new(self) -> None:
        """A worker that was thought dead goes on writing."""
        reader = JobReader("x", streamed=True)
        add(reader, Piece("abc", 0, 2), Piece("zzz", 0, 1, choice_index=1))
        assert repr(list(reader.pieces())) == repr([Piece("abc", 0, 2)])

    def test_the_result_completes_each_text(self) -> None:
        reader = JobReader("x", streamed=True)
        add(reader, Piece("abc", 0, 1), Piece("xy", 0, 1, choice_index=1))
        reader.end(result_of("ab", "xyz", "new"))
        assert list(map(repr, reader.pieces()))[2:] == [
            repr(Piece("", 2, 1)),
            repr(Piece("z", 2, 1, choice_index=1)),
            repr(Piece("new", 0, 1, choice_index=2)),
        ]

    @pytest.mark.parametrize("seed", range(30))
    def test_any_losses_and_repetitions(self, seed: int) -> None:
        """Attempts break off, pieces of three texts come mixed and get lost: each text is given once."""
        dice = random.Random(seed)
        texts = [entry["text"] for entry in dice.sample(ENTRIES, 3)]
        whole = [
            tuple(TokenLogprob(n, "?", -1.0, text_offset=n) for n in range(0, len(text), dice.randint(1, 5)))
            for text in texts
        ]
        reader = JobReader("x", streamed=True)
        for attempt in range(1, 4):
            positions = [0, 0, 0]
            for _ in range(dice.randrange(100)):
                index = dice.randrange(3)
                at, text, told = positions[index], texts[index], whole[index]
                end = min(at + dice.randint(1, 9), len(text))
                before = sum(one.text_offset < at for one in told)
                logprobs = tuple(one for one in told[before:] if one.text_offset < end)
                if end > at and dice.random() > 0.05:
                    add(reader, Piece(text[at:end], at, attempt, logprobs, before, index))
                positions[index] = end
        given = list(reader.pieces())
        for index, text in enumerate(texts):
            last = Assembly(index)
            for piece in given:
                if piece.choice_index == index:
                    assert last.add(piece) == piece, "nothing came twice, and nothing was cut"
            missing = last.complete(text, whole[index])
            given += [] if missing is None else [missing]
        for index, text in enumerate(texts):
            own = [piece for piece in given if piece.choice_index == index]
            assert "".join(map(str, own)) == text
            assert [one for piece in own for one in piece.logprobs] == list(whole[index])


def add(reader: JobReader, *pieces: Piece) -> None:
    entries = [
        (b"1-1", {name.encode(): str(value).encode() for name, value in piece_to_entry(piece).items()})
        for piece in pieces
    ]
    reader.on_entries({stream_key(reader.id): entries})


def test_a_bar_counts_the_tokens_of_all_texts() -> None:
    bar = ProgressBar(1, shown=False)
    bar._bar = Bar()
    bar.add(result_of("a", "b", "c"))
    assert bar._tokens == 12


class Bar:
    def set_postfix_str(self, *_: object, **__: object) -> None:
        return None

    def update(self) -> None:
        return None
