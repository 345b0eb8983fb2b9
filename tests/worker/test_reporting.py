"""A pool counts its work, by real workers on a real Redis: each thing once, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.connection import Connection
from redis.exceptions import ConnectionError as NoConnection
from rq import Queue, Retry
from rq.command import send_stop_job_command
from rq.serializers import JSONSerializer
from support.redis_process import OpenRedis
from support.running import GOLDEN, HOLDABLE, StartWorker, jobs_held, wait_until

from fastgpt2 import Client, Engine
from fastgpt2.errors import BadRequest, JobCancelled, JobFailed, JobTimedOut, PromptTooLong, QueueFull
from fastgpt2.protocol.keys import HISTOGRAMS, OUTCOMES, Histogram, latest_key, recent_key, totals_key
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker import reporting
from fastgpt2.worker.batch import Batch
from fastgpt2.worker.reporting import Metrics, outcome_of

TASK = "fastgpt2.worker.tasks.generate"
ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
ENTRY = ENTRIES[1]
N_PROMPT = len(ENTRY["prompt_ids"])
LONG: dict[str, Any] = {"max_new_tokens": 480, "ignore_eos": True}


def totals(redis: Redis, queue: str) -> dict[str, float]:
    fields: Any = redis.hgetall(totals_key(queue))
    return {name.decode(): float(value) for name, value in fields.items()}


def ended(redis: Redis, queue: str) -> dict[str, int]:
    """Return how many jobs ended in which way, without the ways in which none did."""
    prefix = "ended:"
    return {name[len(prefix) :]: int(n) for name, n in totals(redis, queue).items() if name.startswith(prefix)}


def counted(redis: Redis, queue: str, histogram: Histogram) -> tuple[int, float]:
    found = totals(redis, queue)
    return int(sum(found.get(field, 0) for field in histogram.fields)), found.get(histogram.sum_field, 0.0)


def wait_for_ends(redis: Redis, queue: str, number: int) -> dict[str, int]:
    wait_until(lambda: sum(ended(redis, queue).values()) >= number, f"{number} ends to be counted")
    return ended(redis, queue)


def recent(redis: Redis, queue: str) -> dict[str, float]:
    """Return the sums over all hashes of ten seconds."""
    sums: dict[str, float] = {}
    for key in redis.scan_iter(recent_key(queue, "*")):
        fields: Any = redis.hgetall(key)
        for name, value in fields.items():
            sums[name.decode()] = sums.get(name.decode(), 0.0) + float(value)
    return sums


def test_jobs_one_after_the_other(redis: Redis, client: Client, queue_name: str, start_worker: StartWorker) -> None:
    start_worker(FASTGPT2_NAME=f"w-{queue_name}", FASTGPT2_DRAFTS="off")
    began = time.monotonic()
    results = [client.enqueue(ENTRY["prompt"], max_new_tokens=n, ignore_eos=True).result(60) for n in (1, 5, 7)]
    # The text of the fourth token ends it: it is generated, and cut.
    stop = client.enqueue(ENTRY["prompt_ids"], max_new_tokens=60, stop=results[2].text[-1]).result(60)
    elapsed = time.monotonic() - began
    assert stop.finish_reason == "stop"
    results.append(stop)
    assert wait_for_ends(redis, queue_name, 4) == {"finished:length": 3, "finished:stop": 1}
    found = totals(redis, queue_name)
    tokens = 1 + 5 + 7 + stop.usage.completion_tokens
    assert found["prompt_tokens"] == 4 * N_PROMPT
    assert found["generated_tokens"] == tokens
    by_name = {each.name: counted(redis, queue_name, each) for each in HISTOGRAMS}
    count, seconds = by_name["queue_seconds"]
    assert count == 4
    assert seconds == pytest.approx(sum(r.timings.queue_seconds for r in results), abs=1e-6)
    # A first token comes after the time in the queue and the prefill, and before the client has the result.
    both = sum(r.timings.queue_seconds + r.timings.prefill_seconds for r in results)
    count, seconds = by_name["first_token_seconds"]
    assert count == 4
    assert both <= seconds < elapsed
    per_token = [r.timings.decode_seconds / (r.usage.completion_tokens - 1) for r in results[1:]]
    count, seconds = by_name["token_seconds"]
    assert count == 3
    assert seconds == pytest.approx(sum(per_token), abs=1e-6)
    # Alone, with a short prompt, a sequence gets a token in each step.
    assert by_name["batch_size"] == (tokens, tokens)
    assert found["batch_size<=1"] == tokens
    count, used = by_name["kv_used"]
    assert count >= 1
    assert 0 <= used <= count
    # The same by ten seconds.
    lately = recent(redis, queue_name)
    assert (lately["tokens"], lately["jobs"], lately["steps"], lately["sequences"]) == (tokens, 4, tokens, tokens)
    assert lately["queue_seconds:count"] == lately["first_token_seconds:count"] == 4
    assert lately["token_seconds:count"] == 3
    assert "failed" not in lately


def test_steps_with_several_sequences(redis: Redis, client: Client, queue_name: str, start_worker: StartWorker) -> None:
    for _ in range(4):
        client.enqueue(ENTRY["prompt"], max_new_tokens=16, ignore_eos=True)
    start_worker(FASTGPT2_MAX_BATCH="4", FASTGPT2_BURST="1", FASTGPT2_DRAFTS="off", wait=False)
    assert wait_for_ends(redis, queue_name, 4) == {"finished:length": 4}
    found = totals(redis, queue_name)
    assert (found["batch_size<=4"], found["batch_size:sum"]) == (16, 64)
    lately = recent(redis, queue_name)
    assert (lately["steps"], lately["sequences"], lately["room"]) == (16, 64, 64)


def test_several_texts_are_one_job_with_the_tokens_of_all(
    redis: Redis, client: Client, queue_name: str, start_worker: StartWorker
) -> None:
    """The prompt counts once. The texts of a best_of that are not given were generated too."""
    start_worker(FASTGPT2_MAX_BATCH="4", FASTGPT2_DRAFTS="off")
    drawn: dict[str, Any] = {"ignore_eos": True, "temperature": 1.0, "max_new_tokens": 6}
    result = client.enqueue(ENTRY["prompt"], **drawn, n=6).result(60)
    best = client.enqueue(ENTRY["prompt"], **drawn, best_of=3).result(60)
    assert (len(result.alternatives), best.alternatives) == (5, ())
    assert wait_for_ends(redis, queue_name, 2) == {"finished:length": 2}
    found = totals(redis, queue_name)
    assert found["prompt_tokens"] == 2 * N_PROMPT
    assert found["generated_tokens"] == 9 * 6
    # The others have slots while the first reads the prompt.
    assert found["batch_size:sum"] >= 9 * 6
    for name in ("queue_seconds", "first_token_seconds", "token_seconds"):
        assert counted(redis, queue_name, next(each for each in HISTOGRAMS if each.name == name))[0] == 2
    records = [json.loads(one) for one in reversed(latest(redis, queue_name))]
    assert [record["completion_tokens"] for record in records] == [36, 18]
    assert [record["prompt_tokens"] for record in records] == [N_PROMPT] * 2
    assert [record["steps"] for record in records] == [6 * 5, 3 * 5]
    for record, text in zip(records, (result, best), strict=True):
        assert record["decode_seconds"] >= text.timings.decode_seconds


def latest(redis: Redis, queue: str) -> list[bytes]:
    found: Any = redis.lrange(latest_key(queue), 0, -1)
    return list(found)


def test_every_way_to_end(redis: Redis, client: Client, queue_name: str, start_worker: StartWorker) -> None:
    """A job that ends without a result gives no observation, and counts once, under its reason."""
    start_worker(FASTGPT2_MAX_BATCH="1")
    queue = Queue(queue_name, connection=redis, serializer=JSONSerializer)
    queue.enqueue(TASK, ENTRY["prompt"], num_beams=4)
    queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=100_000)
    queue.enqueue(TASK, ENTRY["prompt"], timeout=1e-6)
    queue.enqueue(TASK, ENTRY["prompt"], num_beams=4, retry=Retry(max=2))
    redis.hset("rq:job:odd-" + queue_name, "status", "queued")
    redis.hset("rq:job:odd-" + queue_name, "created_at", "yesterday")
    redis.rpush(f"rq:queue:{queue_name}", "odd-" + queue_name)
    wait_for_ends(redis, queue_name, 5)
    with jobs_held():
        running = client.enqueue(ENTRY["prompt"], **LONG)
        waiting = client.enqueue(ENTRY["prompt"], **LONG)
        wait_until(lambda: running.status() == "started", "the job to start")
        assert waiting.cancel()
        assert not waiting.cancel()
        assert running.cancel()
        with pytest.raises(JobCancelled):
            running.result(20)
        stopped = client.enqueue(ENTRY["prompt"], **LONG)
        wait_until(lambda: stopped.status() == "started", "the job to start")
        send_stop_job_command(redis, stopped.id, serializer=JSONSerializer)
        with pytest.raises(JobFailed):
            stopped.result(20)
    assert wait_for_ends(redis, queue_name, 8) == {
        "failed:bad_request": 2, "failed:prompt_too_long": 1, "failed:timeout": 1, "failed:malformed": 1,
        "canceled:on_request": 2, "stopped:on_request": 1,
    }  # fmt: skip
    assert totals(redis, queue_name)["retried"] == 2
    assert counted(redis, queue_name, HISTOGRAMS[0]) == (0, 0.0)
    assert recent(redis, queue_name)["failed"] == 5
    assert recent(redis, queue_name)["jobs"] == 6


def test_errors_are_of_few_kinds() -> None:
    errors = (BadRequest("a"), PromptTooLong("a"), JobTimedOut("a", "b"), RuntimeError("a"), MemoryError())
    assert {outcome_of(error) for error in errors} < set(OUTCOMES)


def test_a_cancellation_counts_for_the_pool_of_the_job(redis: Redis, redis_server: RedisServer, client: Client) -> None:
    jobs = [client.enqueue("a", priority=priority) for priority in ("high", "normal", "low")]
    for job in jobs[:2]:
        assert job.cancel()
    assert ended(redis, client.queue_name) == {"canceled:on_request": 2}
    with Client(redis_server.url, f"{client.queue_name}-other") as other:
        assert other.cancel(jobs[2].id)
    assert ended(redis, client.queue_name) == {"canceled:on_request": 2}
    assert not redis.exists(totals_key(f"{client.queue_name}-other"))


def test_a_refusal_is_counted(redis: Redis, redis_server: RedisServer, queue_name: str) -> None:
    with Client(redis_server.url, queue_name, max_queue=1) as client:
        client.enqueue("a")
        for _ in range(2):
            with pytest.raises(QueueFull):
                client.enqueue("a")
    assert totals(redis, queue_name) == {"refused": 2}


def test_what_is_kept_of_the_last_jobs(
    redis: Redis, client: Client, queue_name: str, start_worker: StartWorker
) -> None:
    start_worker(FASTGPT2_NAME=f"w-{queue_name}")
    result = client.enqueue(ENTRY["prompt"], max_new_tokens=5, ignore_eos=True).result(20)
    queue = Queue(queue_name, connection=redis, serializer=JSONSerializer)
    queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=100_000)
    wait_for_ends(redis, queue_name, 2)
    raw: Any = redis.lrange(latest_key(queue_name), 0, -1)
    records = [json.loads(each) for each in raw]
    finished = records[-1]
    assert (finished["status"], finished["finish_reason"], finished["worker"]) == (
        "finished",
        "length",
        f"w-{queue_name}",
    )
    assert (finished["prompt_tokens"], finished["completion_tokens"]) == (N_PROMPT, 5)
    assert [finished[name] for name in ("steps", "drafted", "accepted")] == [4, 0, 0]
    for name in ("queue_seconds", "prefill_seconds", "decode_seconds"):
        assert finished[name] == getattr(result.timings, name)
    assert records[0]["error"] == "prompt_too_long"
    for record in records:
        assert set(record) <= {
            "id", "status", "finish_reason", "error", "prompt_tokens", "cached_tokens", "completion_tokens", "steps",
            "drafted", "accepted", "queue_seconds", "prefill_seconds", "decode_seconds", "ended_at", "worker",
        }  # fmt: skip


def test_everything_expires(redis: Redis, client: Client, queue_name: str, start_worker: StartWorker) -> None:
    start_worker(FASTGPT2_NAME=f"w-{queue_name}")
    client.enqueue("a", max_new_tokens=2).result(20)
    wait_for_ends(redis, queue_name, 1)
    (bucket,) = list(redis.scan_iter(recent_key(queue_name, "*"))) or [b""]
    ttls = {totals_key(queue_name): 30 * 86400, bucket: 1200, latest_key(queue_name): 86400}
    for key, most in {**ttls, f"fastgpt2:told:w-{queue_name}": 3600}.items():
        ttl: Any = redis.ttl(key)
        assert most - 60 < ttl <= most, key


def test_what_a_worker_says_of_itself(redis: Redis, client: Client, queue_name: str, start_worker: StartWorker) -> None:
    process = start_worker(FASTGPT2_MAX_BATCH="2", FASTGPT2_RESTARTS="3", FASTGPT2_NAME=f"w-{queue_name}")
    key = f"rq:worker:w-{queue_name}"
    with jobs_held():
        jobs = [client.enqueue(ENTRY["prompt"], **LONG) for _ in range(2)]
        wait_until(lambda: all(job.status() == "started" for job in jobs), "both to run together")
    for job in jobs:
        job.result(60)
    wait_until(lambda: float(redis.hget(key, "tokens_per_second") or 0) > 0, "the pace to be told", 60)
    fields: Any = redis.hgetall(key)
    assert 1.0 < float(fields[b"batch_mean"]) <= 2.0
    assert fields[b"blas"].startswith((b"openblas", b"mkl", b"compiled-float32"))
    assert (fields[b"threads"], fields[b"restarts"]) == (b"1", b"3")
    assert (fields[b"weights"], fields[b"drafts"]) == (b"float32", b"auto")
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    if rollup.exists():
        # Other moments, the same process: not the same pages, but as many within a third.
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in rollup.read_text().splitlines()[1:]}
        assert int(fields[b"private_bytes"]) == pytest.approx(sizes["Private_Clean"] + sizes["Private_Dirty"], rel=0.33)
    else:
        assert fields[b"private_bytes"] == b""


# What must not be lost, nor counted twice.


@pytest.fixture
def metrics(redis: Redis, queue_name: str, engine: Engine) -> Metrics:
    return Metrics(redis, queue_name, f"w-{queue_name}", "demo", Batch(engine), engine.decoder)


def test_an_answer_that_was_lost_counts_once(
    redis: Redis, queue_name: str, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis.script_load(reporting._REPORT.text)  # else the lost answer might say that Redis does not know it yet
    metrics.count_malformed("first")
    read = Connection.read_response

    def lost(self: Connection, *args: Any, **kwargs: Any) -> Any:
        read(self, *args, **kwargs)  # it has been carried out
        raise NoConnection("lost")

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "read_response", lost)
        with pytest.raises(NoConnection):
            metrics.report_if_due()
    assert ended(redis, queue_name) == {"failed:malformed": 1}
    metrics.count_malformed("second")
    metrics.close()
    assert ended(redis, queue_name) == {"failed:malformed": 2}
    assert redis.llen(latest_key(queue_name)) == 2
    metrics.close()
    assert ended(redis, queue_name) == {"failed:malformed": 2}


def test_a_worker_of_the_same_name_is_another_one(redis: Redis, queue_name: str, engine: Engine) -> None:
    for _ in range(2):
        metrics = Metrics(redis, queue_name, "same", "demo", Batch(engine), engine.decoder)
        metrics.count_malformed("x")
        metrics.close()
    assert ended(redis, queue_name) == {"failed:malformed": 2}


def test_no_more_than_a_hundred_records_are_kept(redis: Redis, queue_name: str, metrics: Metrics) -> None:
    for n in range(150):
        metrics.count_malformed(f"{n}" * 300)
    metrics.close()
    raw: Any = redis.lrange(latest_key(queue_name), 0, -1)
    assert [json.loads(each)["id"] for each in raw] == [(f"{n}" * 300)[:200] for n in range(149, 49, -1)]
    assert ended(redis, queue_name) == {"failed:malformed": 150}


@pytest.mark.parametrize("kind", ["string", "text in a field", "huge", "list"])
def test_what_stands_there_disturbs_no_worker(
    redis: Redis, client: Client, queue_name: str, start_worker: StartWorker, kind: str
) -> None:
    key = totals_key(queue_name)
    plants: dict[str, Callable[[], object]] = {
        "string": lambda: redis.set(key, "x", ex=100),
        "text in a field": lambda: redis.hset(
            key, mapping={"ended:finished:length": "many", "queue_seconds:sum": "nan"}
        ),
        "huge": lambda: redis.hset(key, "ended:finished:length", 2**63 - 1),
        "list": lambda: redis.rpush(key, "x"),
    }
    plants[kind]()
    redis.set(latest_key(queue_name), "x", ex=100)
    start_worker()
    for _ in range(2):
        assert client.enqueue("a", max_new_tokens=2).result(20).usage.completion_tokens == 2
    with jobs_held():
        assert client.enqueue("a", priority="low", **LONG).cancel()
    if kind in ("text in a field", "huge"):
        # The one that was cancelled may have begun before.
        wait_until(lambda: int(redis.hget(key, "generated_tokens") or 0) >= 4, "the other fields to be counted")


@pytest.mark.processes
def test_a_redis_that_is_started_again_loses_nothing_that_was_not_told(tmp_path: Path) -> None:
    with OpenRedis(folder=tmp_path / "redis") as server:
        own = {"FASTGPT2_REDIS_URL": server.url, "FASTGPT2_MODEL": "demo", "FASTGPT2_MAX_BATCH": "4"}
        log = tmp_path / "worker.log"
        with log.open("w") as out:
            command = [*HOLDABLE, "worker"]
            worker = subprocess.Popen(command, env={**os.environ, **own}, stderr=out)
        try:
            wait_until(lambda: "is ready" in log.read_text(), "the worker to be ready")
            with Client(server.url) as client, server.administered() as admin:
                with jobs_held():
                    jobs = [client.enqueue(entry["prompt"], **LONG) for entry in ENTRIES[:4]]
                    wait_until(lambda: all(job.status() == "started" for job in jobs), "the jobs to start")
                    server.stop()
                # They are decoded to their ends meanwhile.
                wait_until(lambda: "cannot be used" in log.read_text(), "the worker to notice")
                server.start()
                for job in jobs:
                    assert job.result(60).usage.completion_tokens == 480
                assert wait_for_ends(admin, "fastgpt2", 4) == {"finished:length": 4}
                wait_until(lambda: totals(admin, "fastgpt2")["generated_tokens"] >= 4 * 480, "all tokens to be counted")
                found = totals(admin, "fastgpt2")
                # A sequence has a token of each step, and one of each guess that came true.
                accepted = found.get("accepted_tokens", 0)
                assert found["generated_tokens"] == found["batch_size:sum"] + accepted == 4 * 480
                assert recent(admin, "fastgpt2")["tokens"] == 4 * 480
                assert counted(admin, "fastgpt2", HISTOGRAMS[0])[0] == 4
        finally:
            worker.kill()
            worker.wait()


@pytest.fixture
def pool(
    redis_server: RedisServer, queue_name: str, tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start `fastgpt2 pool` with one worker."""
    started: list[subprocess.Popen[bytes]] = []

    def start(**environment: str) -> subprocess.Popen[bytes]:
        own = {"FASTGPT2_REDIS_URL": redis_server.url, "FASTGPT2_QUEUE": queue_name, "FASTGPT2_MODEL": "demo"}
        command = [*HOLDABLE, "pool", "--workers", "1"]
        with (tmp_path / "pool.log").open("w") as out:
            started.append(subprocess.Popen(command, env={**os.environ, **own, **environment}, stdout=out, stderr=out))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        assert process.wait(60) == 0


def test_a_worker_that_is_killed_counts_a_recovery_and_a_restart(
    redis: Redis, client: Client, queue_name: str, pool: Callable[..., subprocess.Popen[bytes]]
) -> None:
    pool()
    with jobs_held():
        jobs = [client.enqueue(entry["prompt"], **LONG) for entry in ENTRIES[:2]]
        wait_until(lambda: all(job.status() == "started" for job in jobs), "the jobs to start")
        (key,) = redis.smembers(f"rq:workers:{queue_name}")
        pid: Any = redis.hget(key, "pid")
        os.kill(int(pid), signal.SIGKILL)
    for job in jobs:
        assert job.result(30).usage.completion_tokens == 480
    assert wait_for_ends(redis, queue_name, 2) == {"finished:length": 2}
    found = totals(redis, queue_name)
    assert (found["recoveries"], found["restarts:died"]) == (2, 1)
    assert "restarts:ended" not in found
    (key,) = redis.smembers(f"rq:workers:{queue_name}")
    assert redis.hget(key, "restarts") == b"1"


def test_a_worker_that_has_done_its_share_is_no_death(
    redis: Redis, client: Client, queue_name: str, pool: Callable[..., subprocess.Popen[bytes]]
) -> None:
    pool(FASTGPT2_MAX_JOBS="1")
    for _ in range(2):
        client.enqueue("a", max_new_tokens=2).result(30)
    wait_until(lambda: totals(redis, queue_name).get("restarts:ended", 0) >= 1, "the restart to be counted")
    found = totals(redis, queue_name)
    assert "restarts:died" not in found
    assert "recoveries" not in found
    # Each worker told its job before it signed off.
    assert wait_for_ends(redis, queue_name, 2) == {"finished:length": 2}
