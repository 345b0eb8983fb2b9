"""Tests of all reports about guesses: by the engine, results, OpenAI's usage, counters, lists and the page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from playwright.sync_api import expect
from redis import Redis
from support.browser import Tabs, chromium
from support.running import GOLDEN, StartEndpoint, StartWorker, jobs_held, wait_until

from fastgpt2 import Client, Engine
from fastgpt2.engine.decoding.lookup import Lookup
from fastgpt2.engine.decoding.records import Drafting, GenerationResult
from fastgpt2.errors import JobCancelled
from fastgpt2.protocol.keys import totals_key
from fastgpt2.system.redis_server import RedisServer

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]


NEW = 100


def replay(prompt_ids: Sequence[int], ids: Sequence[int], most: int) -> Drafting:
    """Return how a known text of at most `NEW` tokens comes if a step verifies at most `most` guesses."""
    lookup, at = Lookup([*prompt_ids, ids[0]]), 1
    steps = drafted = accepted = 0
    while at < len(ids):
        guesses = lookup.draft(min(most, NEW - at - 1))
        steps, drafted = steps + 1, drafted + len(guesses)
        for guess in [*guesses, None]:
            token_id, at = ids[at], at + 1
            lookup.push(token_id)
            if token_id != guess or at == len(ids):
                break
            accepted += 1
    return Drafting(steps, drafted, accepted)


REPLAYED = [replay(entry["prompt_ids"], entry["ids"], 4) for entry in ENTRIES]
# The entries of whose guesses most came true, and some did not.
SOME = sorted(range(len(ENTRIES)), key=lambda n: REPLAYED[n].accepted, reverse=True)[:4]


def adds_up(result: GenerationResult) -> bool:
    told = result.drafting
    return told.steps + told.accepted == len(result.token_ids) - 1 and 0 <= told.accepted <= told.drafted


@contextmanager
def connect_to(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as web:
        yield web


def total_of(redis: Redis, queue_name: str, name: str) -> int:
    found: Any = redis.hget(totals_key(queue_name), name)
    return int(found or 0)


def test_the_engine_counts_what_it_did() -> None:
    assert all(0 < REPLAYED[n].accepted < REPLAYED[n].drafted for n in SOME), "or this file sees little"
    engine = Engine.load("demo", max_batch=1, drafts=4)
    assert (engine.weights, engine.drafts) == ("float32", 4)
    for n in SOME:
        entry = ENTRIES[n]
        result = engine.generate(entry["prompt"], max_new_tokens=NEW, ignore_eos=True)
        assert list(result.token_ids) == entry["ids"]
        assert result.drafting == REPLAYED[n]
        assert adds_up(result)
    # Counted by hand: the first token comes with the prompt, the last one without guesses.
    for new, steps in ((0, 0), (1, 0), (2, 1)):
        told = engine.generate(ENTRIES[SOME[0]]["prompt"], max_new_tokens=new, ignore_eos=True).drafting
        assert told == Drafting(steps=steps)


def test_a_token_a_step_where_nothing_is_guessed() -> None:
    engine = Engine.load("demo", max_batch=1, drafts="off")
    assert (engine.weights, engine.drafts) == ("float32", "off")
    entry = ENTRIES[SOME[0]]
    assert engine.generate(entry["prompt"], max_new_tokens=NEW, ignore_eos=True).drafting == Drafting(steps=NEW - 1)


def test_what_stands_behind_a_stop_was_not_accepted() -> None:
    engine = Engine.load("demo", max_batch=1, drafts=15)
    for n in SOME:
        prompt, prompt_ids, ids = (ENTRIES[n][name] for name in ("prompt", "prompt_ids", "ids"))
        for end in range(2, NEW, 7):
            stop = engine.tokenizer.decode(ids[:end])[-250:]
            result = engine.generate(prompt, max_new_tokens=NEW, ignore_eos=True, stop=stop)
            assert (result.finish_reason, list(result.token_ids)) == ("stop", ids[:end])
            assert result.drafting == replay(prompt_ids, result.token_ids, 15)
            assert adds_up(result)


def test_all_the_way(
    redis: Redis,
    redis_server: RedisServer,
    client: Client,
    queue_name: str,
    start_worker: StartWorker,
    start_endpoint: StartEndpoint,
    tmp_path: Path,
) -> None:
    from openai.types import CompletionUsage

    start_worker(FASTGPT2_DRAFTS="4", FASTGPT2_NAME=f"w-{queue_name}")
    asked: Any = {"max_new_tokens": NEW, "ignore_eos": True}
    expected: list[Drafting] = []
    # One at a time, as nothing is guessed beside the prompt of another.
    for n in SOME:
        result = client.enqueue(ENTRIES[n]["prompt"], **asked).result(60)
        assert list(result.token_ids) == ENTRIES[n]["ids"]
        expected.append(result.drafting)
    assert expected == [REPLAYED[n] for n in SOME]
    one, told = ENTRIES[SOME[0]], REPLAYED[SOME[0]]
    with connect_to(start_endpoint().url) as web:
        job = web.post("/v1/jobs", json={"prompt": one["prompt"], **asked}).json()["id"]
        record = web.get(f"/v1/jobs/{job}", params={"wait": 60}).json()
        assert record["result"]["drafting"] == {
            "steps": told.steps, "drafted": told.drafted, "accepted": told.accepted
        }  # fmt: skip
        body = {"prompt": one["prompt"], "max_tokens": NEW, "ignore_eos": True}
        details = {
            "accepted_prediction_tokens": told.accepted,
            "rejected_prediction_tokens": told.drafted - told.accepted,
        }
        usage = web.post("/v1/completions", json=body).json()["usage"]
        assert usage["completion_tokens_details"] == details
        understood = CompletionUsage.model_validate(usage, strict=True).completion_tokens_details
        assert understood is not None
        assert understood.accepted_prediction_tokens == told.accepted
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        events = web.post("/v1/completions", json=streamed).text.split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["usage"]["completion_tokens_details"] == details
        expected += [told] * 3
        # With two at once, the number of guesses depends on when the other's prompt is read.
        both = web.post("/v1/completions", json={**body, "prompt": [one["prompt"], ENTRIES[SOME[1]]["prompt"]]}).json()
        of_both = both["usage"]["completion_tokens_details"]
        accepted = sum(each.accepted for each in expected) + of_both["accepted_prediction_tokens"]
        drafted = sum(each.drafted for each in expected) + sum(of_both.values())
        wait_until(lambda: total_of(redis, queue_name, "drafted_tokens") == drafted, "all to be counted")
        listed = web.get("/v1/jobs").json()["data"]
        assert len(listed) == 9
        assert all(each["steps"] + each["accepted"] == NEW - 1 for each in listed)
        assert sum(each["drafted"] for each in listed) == drafted
        assert sum(each["accepted"] for each in listed) == accepted
        metrics = web.get("/metrics").text.splitlines()
        assert f"fastgpt2_drafted_tokens_total {drafted}.0" in metrics
        assert f"fastgpt2_accepted_tokens_total {accepted}.0" in metrics
        status = web.get("/status").json()
        assert (status["totals"]["drafted_tokens"], status["totals"]["accepted_tokens"]) == (drafted, accepted)
        (worker,) = status["workers"]
        assert (worker["weights"], worker["drafts"]) == ("float32", "4")
    log = (tmp_path / "worker-0.log").read_text()
    assert f"{told.steps} steps, {told.accepted} of {told.drafted} guesses came true; queue" in log
    where = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": queue_name}
    text = subprocess.run(
        [sys.executable, "-m", "fastgpt2", "status"],
        env={**os.environ, **where},
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert "1 process), drafts 4, up " in text


def test_of_a_job_that_is_cut_short(redis: Redis, client: Client, queue_name: str, start_worker: StartWorker) -> None:
    start_worker(FASTGPT2_DRAFTS="4")
    one = ENTRIES[SOME[0]]
    with jobs_held():
        job = client.enqueue(one["prompt"], max_new_tokens=480, ignore_eos=True, stream=True)
        pieces = job.stream(60)
        text = ""
        while len(text) < 100:
            text += next(pieces).text
        assert job.cancel()
        with pytest.raises(JobCancelled) as caught:
            job.result(60)
    partial = caught.value.partial
    assert partial is not None
    assert adds_up(partial)
    assert partial.drafting.steps > 0
    wait_until(lambda: redis.hexists(totals_key(queue_name), "prompt_tokens"), "it to be counted")
    assert total_of(redis, queue_name, "drafted_tokens") == partial.drafting.drafted
    assert total_of(redis, queue_name, "accepted_tokens") == partial.drafting.accepted


@pytest.mark.parametrize(("weights", "drafts"), [("float32", "int8"), ("int8", "4"), ("bfloat16", "auto")])
def test_other_weights(
    client: Client,
    queue_name: str,
    redis: Redis,
    start_worker: StartWorker,
    start_endpoint: StartEndpoint,
    weights: str,
    drafts: str,
) -> None:
    """With other weights, too, drafts change nothing but the number of steps."""
    start_worker(FASTGPT2_WEIGHTS=weights, FASTGPT2_DRAFTS=drafts)
    plain = Engine.load("demo", weights=weights, max_batch=1, drafts="off")
    jobs = [client.enqueue(ENTRIES[n]["prompt"], max_new_tokens=NEW, ignore_eos=True) for n in SOME]
    for n, job in zip(SOME, jobs, strict=True):
        result = job.result(60)
        assert result.token_ids == plain.generate(ENTRIES[n]["prompt"], max_new_tokens=NEW, ignore_eos=True).token_ids
        assert adds_up(result)
    drafted = sum(job.result(0).drafting.drafted for job in jobs)
    assert drafted > 0 or drafts != "4"
    with connect_to(start_endpoint().url) as web:
        wait_until(lambda: total_of(redis, queue_name, "drafted_tokens") == drafted, "all to be counted")
        assert f"fastgpt2_drafted_tokens_total {drafted}.0" in web.get("/metrics").text.splitlines()
        (worker,) = web.get("/status").json()["workers"]
        assert (worker["weights"], worker["drafts"]) == (weights, drafts)
        assert worker["blas"] == worker["computes_by"].split(" in ")[0]


def test_the_page(client: Client, start_worker: StartWorker, start_endpoint: StartEndpoint) -> None:
    start_worker(FASTGPT2_DRAFTS="4")
    one, told = ENTRIES[SOME[0]], REPLAYED[SOME[0]]
    job = client.enqueue(one["prompt"], max_new_tokens=NEW, ignore_eos=True)
    job.result(60)
    with chromium() as browser:
        tabs = Tabs(browser)
        page = tabs.open(start_endpoint().url)
        worker = page.locator("#workers tbody tr")
        expect(worker).to_contain_text(re.compile(r"drafts\s4"))
        share = round(100 * told.accepted / told.drafted)
        expect(page.locator("#pool")).to_contain_text(re.compile(rf"drafts taken\s*{share}\s%"))
        came_true = f"{told.accepted} of {told.drafted} guesses came true"
        expect(page.locator("#jobs tbody tr").locator(f"[title='{came_true}']")).to_have_count(1)
        page.get_by_role("textbox", name="Prompt").fill(one["prompt"])
        page.get_by_label("At most").fill(str(NEW))
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#answer-end")).to_contain_text(f"{told.accepted} guessed", timeout=30_000)
        tabs.close()
