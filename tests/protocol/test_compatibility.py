"""Clients and workers of an earlier commit share a Redis with this one's: `golden/wire` has what that commit wrote.

`tools/record_wire.py` made the recordings, and runs here again with this commit; see its head for what they hold.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from support.running import GOLDEN

from fastgpt2 import Client, FastGPT2Error
from fastgpt2.api.client.reader import Assembly
from fastgpt2.errors import PromptTooLong
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import queues_of
from fastgpt2.protocol.messages import entry_to_piece
from fastgpt2.system.redis_server import RedisServer

ROOT = Path(__file__).resolve().parents[2]
QUEUE, WORKER = "wire", "recorded"
JOBS: dict[str, Any] = json.loads((GOLDEN / "wire" / "jobs.json").read_text("utf-8"))
POOL: dict[str, Any] = json.loads((GOLDEN / "wire" / "pool.json").read_text("utf-8"))

WAITED = [name for name in JOBS if "queued" in JOBS[name]]
# Their ends come at a time of their own, so how far they came differs from run to run.
ENDED_EARLY = [name for name in JOBS if name not in WAITED]
FINISHED = [name for name in JOBS if "text" in JOBS[name]["outcome"]]
STREAMED = [name for name in FINISHED if JOBS[name]["stream"]]

# What results have since got, beside what the earlier commit wrote.
ADDED = {"cumulative_logprob"}

# What differs from run to run; compressed bytes and, where a job says so itself, times.
VOLATILE = {
    "created_at", "enqueued_at", "started_at", "ended_at", "last_heartbeat", "fastgpt2_execution", "data", "meta",
    "execution_id", "execution_started_at", "execution_ended_at", "return_value", "exc_string",
}  # fmt: skip


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("FASTGPT2_")}


def steady(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a hash or an entry; None for the values of those that differ from run to run."""
    return {name: None if name in VOLATILE and value else value for name, value in fields.items()}


def result_of(text: str) -> Any:
    """A result as JSON, without its times and `ADDED`; log probabilities to the digits that all processors agree on."""
    value = json.loads(text, parse_float=lambda digits: round(float(digits), 3))
    kept = {name: part for name, part in value.items() if name not in ADDED}
    return {**kept, "timings": sorted(value["timings"])}


def of_entry(fields: dict[str, Any]) -> dict[str, Any]:
    """An entry of a text's stream, its log probabilities rounded."""
    if "logprobs" not in fields:
        return fields
    return {**fields, "logprobs": json.loads(fields["logprobs"], parse_float=lambda digits: round(float(digits), 3))}


# What this commit writes.


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same recordings, made with this commit: of jobs, and of the pool."""
    folder = tmp_path_factory.mktemp("wire")
    command = [sys.executable, str(ROOT / "tools" / "record_wire.py"), str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    jobs, pool = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("jobs", "pool"))
    return jobs, pool


@pytest.fixture(scope="module")
def jobs(recorded: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return recorded[0]


@pytest.fixture(scope="module")
def pool(recorded: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return recorded[1]


@pytest.mark.parametrize("name", WAITED)
def test_a_client_enqueues_what_it_enqueued_before(name: str, jobs: dict[str, Any]) -> None:
    assert steady(jobs[name]["queued"]) == steady(JOBS[name]["queued"])
    # The arguments of the task in the same order, too.
    (ours, theirs) = (zlib.decompress(base64.b64decode(of[name]["queued"]["data"]["base64"])) for of in (jobs, JOBS))
    assert ours == theirs


def test_queues_are_what_they_were(pool: dict[str, Any]) -> None:
    assert pool["queued"] == POOL["queued"]


@pytest.mark.parametrize("name", JOBS)
def test_a_worker_leaves_the_fields_that_it_left_before(name: str, jobs: dict[str, Any]) -> None:
    ours, theirs = jobs[name], JOBS[name]
    assert steady(ours["ended"]) == steady(theirs["ended"])
    assert [steady(fields) for _, fields in ours["results"]] == [steady(fields) for _, fields in theirs["results"]]
    for place, seconds in theirs["seconds_kept"].items():
        assert ours["seconds_kept"][place] == pytest.approx(seconds, abs=20), place


@pytest.mark.parametrize("name", FINISHED)
def test_a_worker_writes_the_results_that_it_wrote_before(name: str, jobs: dict[str, Any]) -> None:
    ours, theirs = (
        [result_of(base64.b64decode(fields["return_value"]).decode()) for _, fields in of[name]["results"]]
        for of in (jobs, JOBS)
    )
    assert ours == theirs
    assert jobs[name]["outcome"] == JOBS[name]["outcome"]


@pytest.mark.parametrize("name", STREAMED)
def test_a_worker_streams_the_entries_that_it_streamed_before(name: str, jobs: dict[str, Any]) -> None:
    ours, theirs = ([of_entry(fields) for _, fields in of[name]["stream"]] for of in (jobs, JOBS))
    assert ours == theirs


@pytest.mark.parametrize("name", ENDED_EARLY)
def test_a_job_that_is_ended_early_leaves_what_it_left_before(name: str, jobs: dict[str, Any]) -> None:
    kinds = [[sorted(fields) for _, fields in of[name]["stream"]] for of in (jobs, JOBS)]
    assert [ours[-1] for ours in kinds] == [["attempt", "end"]] * 2
    assert {tuple(fields) for ours in kinds for fields in ours[:-1]} == {("at", "attempt", "text")}
    ours, theirs = (json.loads(of[name]["ended"]["meta"])["partial"] for of in (jobs, JOBS))
    assert {key: type(value) for key, value in ours.items()} == {key: type(value) for key, value in theirs.items()}
    assert jobs[name]["outcome"]["error"] == JOBS[name]["outcome"]["error"]


def test_a_refused_job_names_the_same_error(jobs: dict[str, Any]) -> None:
    for of in (jobs, JOBS):
        ((_, fields),) = of["refused"]["results"]
        reason = zlib.decompress(base64.b64decode(fields["exc_string"])).decode()
        assert reason.splitlines()[-1].startswith("fastgpt2.errors.PromptTooLong: ")
    assert jobs["refused"]["outcome"] == JOBS["refused"]["outcome"]


def test_keys_and_their_types_are_what_they_were(pool: dict[str, Any]) -> None:
    # By the first, those who wait hear of cancellations; programs of earlier releases do not know it, and ask. The
    # others are of jobs that name a model.
    added = {"fastgpt2:cancelled:wire": "stream", "fastgpt2:models:wire": "zset", "fastgpt2:totals:wire@demo": "hash"}
    queues = queues_of(QUEUE, ["demo"])
    of_queues = {f"rq:workers:{name}": "set" for name in queues}
    locks = {f"rq:scheduler-lock:{name}": "string" for name in queues}
    assert pool["keys"] == {**POOL["keys"], **of_queues, **locks, **added}


def test_a_worker_announces_what_it_announced_before(pool: dict[str, Any]) -> None:
    added = {"notes", "heard_at", "fastgpt2_incarnation", "fastgpt2_pid_space", "models", "named_only", "chat"}
    assert set(pool["worker"]) == set(POOL["worker"]) | added
    assert pool["worker"]["queues"].split(",") == queues_of(QUEUE, ["demo"])
    for name in ("model", "weights", "drafts", "threads", "n_positions", "longest_token_bytes", "state"):
        assert pool["worker"][name] == POOL["worker"][name]


def test_figures_of_a_pool_stand_in_the_fields_in_which_they_stood(pool: dict[str, Any]) -> None:
    # In which bucket of a histogram an observation falls depends on the time that it took.
    ours, theirs = ({re.sub(r"(<=.*|>)$", "", name) for name in of["totals"]} for of in (pool, POOL))
    assert ours == theirs
    assert pool["latest"] == POOL["latest"]


# What this commit reads.


def raw(value: Any) -> bytes | str:
    """A value of a recording as it stood in Redis."""
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else value


def put_hash(redis: Redis, key: str, fields: dict[str, Any], **changed: str) -> None:
    """Write a recorded hash."""
    mapping = {name: raw(value) for name, value in {**fields, **changed}.items() if name != "data_json"}
    redis.hset(key, mapping=mapping)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def old_ends() -> Iterator[RedisServer]:
    """A Redis in which the earlier commit's jobs have ended, and its worker is still there."""
    with RedisServer() as server:
        redis = connect(server.url)
        for job in JOBS.values():
            put_hash(redis, f"rq:job:{job['id']}", job["ended"])
            for key, entries in ((f"rq:results:{job['id']}", "results"), (f"fastgpt2:stream:{job['id']}", "stream")):
                for entry_id, fields in job[entries]:
                    redis.xadd(key, fields, id=entry_id)
        put_hash(redis, f"rq:worker:{WORKER}", POOL["worker"])
        for key in ("rq:workers", *(f"rq:workers:{QUEUE}{suffix}" for suffix in ("", "-high", "-low"))):
            redis.sadd(key, f"rq:worker:{WORKER}")
        redis.close()
        yield server


@pytest.fixture
def reader(old_ends: RedisServer) -> Iterator[Client]:
    with Client(old_ends.url, QUEUE) as client:
        yield client


def scored(logprobs: Any) -> list[list[Any]] | None:
    """Scored tokens as recordings have them."""
    if logprobs is None:
        return None
    return [[one.token_id, one.token, one.text_offset, len(one.top)] for one in logprobs]


@pytest.mark.parametrize("name", FINISHED)
def test_a_client_reads_a_result_of_before(name: str, reader: Client) -> None:
    result, outcome = reader.result(JOBS[name]["id"], timeout=10), JOBS[name]["outcome"]
    assert (result.text, list(result.token_ids)) == (outcome["text"], outcome["token_ids"])
    assert (result.finish_reason, result.model) == (outcome["finish_reason"], outcome["model"])
    assert (scored(result.logprobs), scored(result.prompt_logprobs)) == (
        outcome["logprobs"],
        outcome["prompt_logprobs"],
    )
    assert result.timings.decode_seconds >= 0
    assert (result.seed, result.choice_index, result.cumulative_logprob, result.alternatives) == (None, 0, None, ())
    assert reader.status(JOBS[name]["id"]) == "finished"


@pytest.mark.parametrize("name", STREAMED)
def test_a_client_follows_a_stream_of_before_to_its_end(name: str, reader: Client, old_ends: RedisServer) -> None:
    """While the worker of before still runs the job: the entries come, then the end of the job."""
    job_id, redis = f"{JOBS[name]['id']}-running", connect(old_ends.url)
    put_hash(redis, f"rq:job:{job_id}", JOBS[name]["ended"], status="started")
    first, *others = [(entry_id, fields) for entry_id, fields in JOBS[name]["stream"]]
    redis.xadd(f"fastgpt2:stream:{job_id}", first[1], id=first[0])
    stream = reader.job(job_id).stream(timeout=30)
    pieces = [next(stream)]
    assert pieces[0].text == first[1]["text"]
    for entry_id, fields in JOBS[name]["results"]:
        redis.xadd(f"rq:results:{job_id}", fields, id=entry_id)
    put_hash(redis, f"rq:job:{job_id}", JOBS[name]["ended"])
    for entry_id, fields in others:
        redis.xadd(f"fastgpt2:stream:{job_id}", fields, id=entry_id)
    redis.close()
    pieces += stream
    assert "".join(piece.text for piece in pieces) == JOBS[name]["outcome"]["text"]
    tokens = [one for piece in pieces for one in piece.logprobs]
    assert scored(tokens) == (JOBS[name]["outcome"]["logprobs"] or [])


@pytest.mark.parametrize("name", [name for name in JOBS if name not in FINISHED])
def test_a_client_reads_an_end_of_before_that_is_no_result(name: str, reader: Client) -> None:
    outcome = JOBS[name]["outcome"]
    with pytest.raises(FastGPT2Error) as caught:
        reader.result(JOBS[name]["id"], timeout=10)
    assert type(caught.value).__name__ == outcome["error"]
    partial = getattr(caught.value, "partial", None)
    assert (partial and list(partial.token_ids)) == (outcome["partial"] and outcome["partial"]["token_ids"])


@pytest.mark.processes
def test_a_client_reads_what_a_worker_of_before_announced(reader: Client, old_ends: RedisServer) -> None:
    assert reader.workers() == 1
    with pytest.raises(PromptTooLong, match="512"):
        reader.enqueue([1] * 513)
    command = [sys.executable, "-m", "fastgpt2", "status", "--json", "--redis-url", old_ends.url, "--queue", QUEUE]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (worker,) = json.loads(done.stdout)["workers"]
    assert (worker["name"], worker["model"]) == (WORKER, "demo")


# A job of this commit beside those of the earlier one: its id, by its name.
NEW: dict[str, str] = {}


@pytest.fixture(scope="module")
def taken_over() -> Iterator[RedisServer]:
    """A Redis in which a worker of this commit has run the jobs of a client of the earlier one, and `NEW`."""
    with RedisServer() as server:
        redis, now = connect(server.url), datetime.now(UTC).isoformat().replace("+00:00", "Z")
        for name in WAITED:
            # The deadline of a job counts from when it was enqueued.
            put_hash(redis, f"rq:job:{JOBS[name]['id']}", JOBS[name]["queued"], created_at=now, enqueued_at=now)
        for key, members in POOL["queued"].items():
            if key == "rq:queues":
                redis.sadd(key, *members)
            else:
                redis.rpush(key, *(JOBS[name]["id"] for name in members))
        redis.close()
        with Client(server.url, QUEUE) as client:
            NEW["drawn"] = client.enqueue("My name is", temperature=1.0, seed=5, n=3, max_new_tokens=8, stream=True).id
        command = [sys.executable, "-m", "fastgpt2", "worker", "--burst", "--redis-url", server.url, "--queue", QUEUE]
        command += ["--model", "demo", "--threads", "1"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        yield server


@pytest.mark.parametrize("name", WAITED)
def test_a_worker_finishes_a_job_of_before(name: str, taken_over: RedisServer) -> None:
    outcome = JOBS[name]["outcome"]
    with Client(taken_over.url, QUEUE) as client:
        job = client.job(JOBS[name]["id"])
        if name == "refused":
            with pytest.raises(PromptTooLong):
                job.result(timeout=10)
        elif name in FINISHED:
            result = job.result(timeout=10)
            assert (result.text, list(result.token_ids)) == (outcome["text"], outcome["token_ids"])
            assert scored(result.logprobs) == outcome["logprobs"]
        else:
            assert job.result(timeout=10).usage.completion_tokens > 0  # it was cancelled only later
        if JOBS[name]["fields"].get("stream"):
            assert "".join(piece.text for piece in job.stream(timeout=10)) == outcome["text"]


def test_a_client_of_before_reads_the_first_of_several_texts(taken_over: RedisServer) -> None:
    """It takes the fields that it knows, by their names, and passes over the others."""
    redis: Any = connect(taken_over.url)
    ((_, found),) = redis.xrange(f"rq:results:{NEW['drawn']}")
    ours = json.loads(base64.b64decode(found[b"return_value"]))
    ((_, fields),) = JOBS["plain"]["results"]
    theirs = json.loads(base64.b64decode(fields["return_value"]))
    assert set(ours) - set(theirs) == {"seed", "alternatives"}
    assert {name: type(ours[name]) for name in theirs} == {name: type(value) for name, value in theirs.items()}
    # What it has of the stream is of all texts, and it cuts where they differ; the result has the last word.
    assembly, texts = Assembly(), set()
    for _, entry in redis.xrange(f"fastgpt2:stream:{NEW['drawn']}"):
        texts.add(entry.pop(b"choice_index", b"0"))
        piece = entry_to_piece(entry)
        if piece is not None:
            assert set(entry) == {b"attempt", b"at", b"text"}
            assembly.add(piece)
    assembly.complete(ours["text"])
    assert (assembly.text, texts) == (ours["text"], {b"0", b"1", b"2"})
    redis.close()


def test_a_client_of_now_reads_all_texts(taken_over: RedisServer) -> None:
    with Client(taken_over.url, QUEUE) as client:
        result = client.result(NEW["drawn"], timeout=10)
        assert [text.choice_index for text in (result, *result.alternatives)] == [0, 1, 2]
        assert len({text.text for text in (result, *result.alternatives)}) == 3
        streamed = ["", "", ""]
        for piece in client.job(NEW["drawn"]).stream(timeout=10):
            streamed[piece.choice_index] += piece.text
        assert streamed == [text.text for text in (result, *result.alternatives)]
