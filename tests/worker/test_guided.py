"""Guided jobs in a worker: others go on while grammars are compiled, and a bad grammar ends its own job alone."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jsonschema
import llguidance
import pytest
from rq import Queue
from rq.serializers import JSONSerializer
from support.stock_worker import run_by_stock
from support.turns import Turns

from fastgpt2 import Client, Engine
from fastgpt2.engine.decoding import grammar
from fastgpt2.engine.decoding.grammar_trial import Trial
from fastgpt2.errors import BadRequest, JobCancelled, JobTimedOut
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import CRASHES_FIELD, SUSPECT_CRASHES
from fastgpt2.system.redis_server import RedisServer

PROMPT = "Once upon a time"
SLOTS = 3
PLAIN: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
# Without a process of its own, it would be compiled for hours.
ENDLESS = {"type": "array", "items": {"anyOf": [{"type": "integer", "multipleOf": 900 + 7 * n} for n in range(8)]}}


@pytest.fixture(scope="module")
def engine() -> Engine:
    made = Engine.load("demo", max_batch=SLOTS, threads=1, drafts="off")
    made.warm_up()
    return made


class Gate:
    """Holds the trials of grammars until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._is_open = threading.Event()
        monkeypatch.setattr(Trial, "run", self._wait)

    def _wait(self, *_: object) -> str:
        assert self._is_open.wait(60)
        return ""

    def open(self) -> None:
        self._is_open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def ended(client: Client, *job_ids: str) -> bool:
    return all(client.status(job_id) in ("finished", "failed", "canceled") for job_id in job_ids)


def test_guided_jobs_beside_others_give_what_each_gives_alone(turns: Turns, client: Client, engine: Engine) -> None:
    guides: list[dict[str, Any]] = [
        {"choices": [" dog", " cat", " horse", " cat and dog"]},
        {"regex": r" [A-Z][a-z]{2,8}, [0-9]{2}"},
        {"json_schema": SCHEMA, "max_new_tokens": 60},
        {"json_schema": SCHEMA, "max_new_tokens": 60, "temperature": 1.5, "seed": 5, "n": 3},
        PLAIN,
    ]
    jobs = [client.enqueue(PROMPT, **guide) for guide in guides]
    turns.until(lambda: ended(client, *(job.id for job in jobs)), "all to end", most=5000)
    for job, guide in zip(jobs, guides, strict=True):
        result, alone = job.result(timeout=10), engine.generate(PROMPT, **guide)
        for text, same in zip((result, *result.alternatives), (alone, *alone.alternatives), strict=True):
            assert (text.text, text.token_ids, text.finish_reason) == (same.text, same.token_ids, same.finish_reason)
            assert text.cumulative_logprob == same.cumulative_logprob
            if "json_schema" in guide:
                jsonschema.validate(json.loads(text.text), SCHEMA)
    choice, regex = (job.result(timeout=10) for job in jobs[:2])
    assert choice.text in guides[0]["choices"]
    assert choice.cumulative_logprob is not None
    assert re.fullmatch(guides[1]["regex"], regex.text)
    assert {choice.finish_reason, regex.finish_reason} == {"stop"}


def test_others_get_past_a_job_whose_grammar_is_not_there_yet(turns: Turns, client: Client, gate: Gate) -> None:
    guided = [client.enqueue(PROMPT, regex=f" a{n}b") for n in range(SLOTS)]
    turns.until(lambda: len(turns.worker.batch) == SLOTS, "the guided jobs to be claimed")
    assert not turns.worker.batch.decoding
    assert len(turns.worker.batch.waiting) == SLOTS
    assert turns.worker.batch.room() == 0, "there are as many of such jobs as there may be"
    client.cancel(guided[-1].id)
    turns.until(lambda: turns.worker.batch.room() == SLOTS, "the cancelled one to go")
    others = [client.enqueue(PROMPT, **PLAIN) for _ in range(5)]
    turns.until(lambda: ended(client, *(job.id for job in others)), "the others to end")
    assert [client.status(job.id) for job in guided] == ["started", "started", "canceled"]
    gate.open()
    turns.until(lambda: ended(client, *(job.id for job in guided)), "the guided jobs to end")
    assert [job.result(timeout=10).text for job in guided[:-1]] == [" a0b", " a1b"]
    with pytest.raises(JobCancelled):
        guided[-1].result(timeout=10)


def test_a_grammar_that_would_never_end_fails_its_job_while_others_decode(turns: Turns, client: Client) -> None:
    others = [client.enqueue(PROMPT, max_new_tokens=60, ignore_eos=True) for _ in range(2)]
    turns.until(lambda: len(turns.worker.batch.decoding) == 2, "the others to decode")
    hostile = client.enqueue(PROMPT, json_schema=ENDLESS)
    turns.until(lambda: ended(client, *(job.id for job in others)), "the others to end")
    turns.until(lambda: ended(client, hostile.id), "the hostile job to end")
    sentence = "json_schema is too complex: it takes more than 2 s or 256 MB to compile; simplify it"
    with pytest.raises(BadRequest, match=sentence):
        hostile.result(timeout=10)
    assert len(turns.worker.batch) == 0


def test_a_grammar_that_cannot_be_used_fails_its_jobs_alone(turns: Turns, client: Client) -> None:
    bad = [client.enqueue(PROMPT, regex="(?=a)b"), client.enqueue(PROMPT, json_schema={"not": {}})]
    good = [client.enqueue(PROMPT, choices=["a"]), client.enqueue(PROMPT, **PLAIN)]
    turns.until(lambda: ended(client, *(job.id for job in bad + good)), "all to end")
    again = client.enqueue(PROMPT, regex="(?=a)b")
    turns.until(lambda: ended(client, again.id), "it to end")
    for job, name in zip([*bad, again], ("regex", "json_schema", "regex"), strict=True):
        with pytest.raises(BadRequest, match=f"{name} cannot be used: "):
            job.result(timeout=10)
    assert [job.result(timeout=10).finish_reason for job in good] == ["stop", "length"]


def test_a_limit_in_mid_text_fails_that_job_alone(
    turns: Turns, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = llguidance.LLParserLimits(max_lexer_states=200, verbose_errors=False)
    monkeypatch.setattr(grammar, "limits", lambda: limits)
    bad = client.enqueue(PROMPT, regex=" c.{0,60}[aeiou].{0,60}[^x]{3,9}y", max_new_tokens=30)
    good = client.enqueue(PROMPT, regex=" c[a-z ]{3,9}y", max_new_tokens=30)
    turns.until(lambda: ended(client, bad.id, good.id), "both to end")
    with pytest.raises(BadRequest, match="regex is too complex: simplify it"):
        bad.result(timeout=10)
    assert re.fullmatch(" c[a-z ]{3,9}y", good.result(timeout=10).text)


def test_a_job_may_be_cancelled_or_run_out_of_time_while_it_waits(turns: Turns, client: Client, gate: Gate) -> None:
    late = client.enqueue(PROMPT, regex="late", timeout=0.2)
    gone = client.enqueue(PROMPT, regex="gone")
    turns.until(lambda: len(turns.worker.batch) == 2 or ended(client, late.id), "both to be claimed")
    client.cancel(gone.id)
    turns.until(lambda: ended(client, late.id, gone.id), "both to end")
    with pytest.raises(JobTimedOut) as caught:
        late.result(timeout=10)
    assert caught.value.partial is not None
    assert caught.value.partial.text == ""
    with pytest.raises(JobCancelled):
        gone.result(timeout=10)
    # A cancelled job has ended at once; its worker lets go of it a step later.
    turns.until(lambda: len(turns.worker.batch) == 0, "the batch to be empty")
    gate.open()


def test_a_worker_that_stops_gives_back_what_waits_for_its_grammar(turns: Turns, client: Client, gate: Gate) -> None:
    job = client.enqueue(PROMPT, regex="abc")
    turns.until(lambda: len(turns.worker.batch) == 1, "the job to be claimed")
    turns.worker.stopping.set()
    turns.until(lambda: client.status(job.id) == "queued", "the job to be given back")
    assert len(turns.worker.batch) == 0
    gate.open()


def test_a_suspect_waits_for_its_grammar_alone(
    turns: Turns, client: Client, gate: Gate, redis_server: RedisServer
) -> None:
    job = client.enqueue(PROMPT, regex="abc")
    with connect(redis_server.url) as connection:
        connection.hset(f"rq:job:{job.id}", CRASHES_FIELD, SUSPECT_CRASHES)
    turns.until(lambda: len(turns.worker.batch) == 1, "the suspect to be claimed")
    assert turns.worker.batch.room() == 0
    gate.open()
    turns.until(lambda: ended(client, job.id), "it to end")
    assert job.result(timeout=10).text == "abc"


def test_without_the_library_a_guided_job_fails_and_others_are_served(
    turns: Turns, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    guided, other = client.enqueue(PROMPT, choices=["nothing has", "this choice"]), client.enqueue(PROMPT, **PLAIN)
    turns.until(lambda: ended(client, guided.id, other.id), "both to end")
    with pytest.raises(BadRequest, match=r"choices needs llguidance, .* pip install 'fastgpt2\[guided\]'"):
        guided.result(timeout=10)
    assert other.result(timeout=10).finish_reason == "length"


def test_a_stock_worker_waits_for_the_grammar(
    client: Client, queue_name: str, engine: Engine, redis_server: RedisServer
) -> None:
    with connect(redis_server.url) as connection:
        queue = Queue(queue_name, connection=connection, serializer=JSONSerializer)
        jobs = [client.enqueue(PROMPT, choices=[" cat", " dog"]), client.enqueue(PROMPT, regex="(?=a)b")]
        run_by_stock(queue, redis_server)
    assert jobs[0].result(timeout=10).text == engine.generate(PROMPT, choices=[" cat", " dog"]).text
    with pytest.raises(BadRequest, match="regex cannot be used"):
        jobs[1].result(timeout=10)
