"""Many jobs in one worker: decoded together, each as if alone, and none in another's way."""

from __future__ import annotations

import json
import random
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ConnectionError as NoConnection
from rq import Queue, Worker
from rq.command import send_stop_job_command
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend
from rq.utils import as_text
from support.running import GOLDEN, StartWorker, wait_until
from support.turns import Turns

from fastgpt2 import Engine
from fastgpt2.engine.decoding.prompt_rows import PromptRows
from fastgpt2.engine.decoding.records import GenerationRequest
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.keys import PARTIAL_META, Priority, queue_of, stream_key
from fastgpt2.protocol.scripts import execute
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker import worker as generation_worker
from fastgpt2.worker.batch import MOST_UNREAD, Batch
from fastgpt2.worker.worker import GenerationWorker

TASK = "fastgpt2.worker.tasks.generate"
ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
ENTRY = ENTRIES[0]
SLOTS = 4


@pytest.fixture(scope="module")
def engine() -> Engine:
    made = Engine.load("demo", max_batch=SLOTS, threads=1, drafts="off")
    made.warm_up()
    return made


def status(job: Job) -> str:
    return str(job.get_status().value)


def begun(job: Job) -> bool:
    return status(job) in ("started", "finished")


def finished(*jobs: Job) -> bool:
    return all(status(job) == "finished" for job in jobs)


def ids_of(job: Job) -> list[int]:
    value: Any = job.return_value(refresh=True)
    ids: list[int] = value["token_ids"]
    return ids


def tokens_so_far(turns: Turns, job: Job) -> int:
    (running,) = [running for running in turns.worker.batch if running.id == job.id]
    return len(running.sequences[0].token_ids) if running.sequences else 0


def partial_of(job: Job) -> Any:
    return job.get_meta(refresh=True)[PARTIAL_META]


def test_random_arrivals_give_the_tokens_of_a_solo_run(
    queue: Queue, redis: Redis, start_worker: StartWorker, queue_name: str
) -> None:
    """Compare 48 jobs of all lengths, some with a stop string, in random bursts, with the solo runs of transformers."""
    start_worker()
    rng = random.Random(4)
    jobs: list[tuple[Job, dict[str, Any], int, str | None]] = []
    while len(jobs) < 48:
        for _ in range(rng.choice((1, 1, 2, 5, 9))):
            entry, length = rng.choice(ENTRIES), rng.randint(1, 100)
            at = rng.randrange(5, 60)
            stop = entry["text"][at : at + 3] if rng.random() < 0.3 else None
            options = {"stop": stop} if stop else {}
            job = queue.enqueue(TASK, entry["prompt"], max_new_tokens=length, ignore_eos=True, **options)
            jobs.append((job, entry, length, stop))
        waited_for = rng.choice(jobs)[0]
        wait_until(partial(begun, waited_for), "a job to start")
    for job, entry, length, stop in jobs:
        wait_until(partial(finished, job), "the job to finish")
        value: Any = job.return_value()
        assert value["token_ids"] == entry["ids"][: len(value["token_ids"])]
        if value["finish_reason"] == "length":
            assert len(value["token_ids"]) == length
            assert stop is None or stop not in value["text"]
        else:
            assert value["text"] == entry["text"][: entry["text"].index(stop)]
    (key,) = map(as_text, redis.smembers(f"rq:workers:{queue_name}"))
    wait_until(lambda: redis.scard(f"{key}:executions") == 0, "the executions to be cleaned up")


def test_jobs_are_decoded_together(turns: Turns, queue: Queue) -> None:
    jobs = [queue.enqueue(TASK, entry["prompt"], max_new_tokens=20, ignore_eos=True) for entry in ENTRIES[:SLOTS]]
    count = turns.until(lambda: finished(*jobs), "all to finish")
    assert count < 2 * 20, "one after the other it would be four times twenty"
    for job, entry in zip(jobs, ENTRIES, strict=False):
        assert ids_of(job) == entry["ids"][:20]


def test_one_comes_as_another_goes(turns: Turns, queue: Queue) -> None:
    long = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=90, ignore_eos=True)
    turns.until(lambda: len(turns.worker.batch) == 1, "the first to begin")
    for entry in ENTRIES[1:7]:
        short = queue.enqueue(TASK, entry["prompt"], max_new_tokens=3, ignore_eos=True)
        before = tokens_so_far(turns, long)
        assert turns.until(partial(finished, short), "the short one to finish") <= 6
        assert 0 < tokens_so_far(turns, long) - before <= 6
        assert ids_of(short) == entry["ids"][:3]
    turns.until(lambda: finished(long), "the long one to finish")
    assert ids_of(long) == ENTRY["ids"][:90]


def test_first_come_first_served(turns: Turns, queue: Queue) -> None:
    jobs = [queue.enqueue(TASK, "a", max_new_tokens=5, ignore_eos=True) for _ in range(3 * SLOTS)]
    started: list[str] = []
    while not finished(*jobs):
        turns.take()
        started += [running.id for running in turns.worker.batch if running.id not in started]
    assert started == [job.id for job in jobs]


def test_urgent_jobs_first_and_none_is_starved(turns: Turns, queue: Queue, redis: Redis) -> None:
    queues = {p: Queue(queue_of(queue.name, p), connection=redis, serializer=JSONSerializer) for p in ("high", "low")}
    queues["normal"] = queue
    urgency: dict[str, str] = {}
    for name in ("low", "normal", "high"):
        for _ in range(16):
            urgency[queues[name].enqueue(TASK, "a", max_new_tokens=3, ignore_eos=True).id] = name
    order: list[str] = []
    while len(order) < len(urgency):
        turns.take()
        order += [running.id for running in turns.worker.batch if running.id not in order]
    names = [urgency[job_id] for job_id in order]
    # By hand from the two numbers in claims.py: every 16th of the last queue, of the rest every 4th of the second.
    assert names[:16] == [*["high"] * 3, "normal"] * 3 + ["high"] * 3 + ["low"]
    assert names[16:20] == ["high", "high", "high", "normal"]
    assert max(i for i, name in enumerate(names) if name == "high") < 24


def test_of_claimed_prompts_the_urgent_and_the_short_ones_are_read_first(
    turns: Turns, queue: Queue, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: of 8 rows beside the job that decodes, the short normal prompt waits for the long urgent one's 20."""
    monkeypatch.setattr(turns.worker.engine.decoder, "prompt_rows", PromptRows(8, 8))
    urgent = Queue(queue_of(queue.name, "high"), connection=redis, serializer=JSONSerializer)
    decoding = queue.enqueue(TASK, "a", max_new_tokens=60, ignore_eos=True)
    turns.until(lambda: len(turns.worker.batch) and tokens_so_far(turns, decoding), "a job to decode")
    of_queues = (queue, 20), (queue, 6), (urgent, 20)
    jobs = [of.enqueue(TASK, [7] * tokens, max_new_tokens=30, ignore_eos=True) for of, tokens in of_queues]
    turns.until(lambda: len(turns.worker.batch) == 4, "all to be claimed")
    begun_in: list[int] = []
    while len(begun_in) < 3:
        begun_in += [n for n, job in enumerate(jobs) if n not in begun_in and tokens_so_far(turns, job)]
        turns.take()
    assert begun_in == [2, 1, 0]


def test_no_more_jobs_are_claimed_while_prompts_keep_the_worker_busy(turns: Turns, queue: Queue) -> None:
    long = [queue.enqueue(TASK, [7] * 400, max_new_tokens=2, ignore_eos=True) for _ in range(3)]
    batch, decoder = turns.worker.batch, turns.worker.engine.decoder
    seen = set[bool]()
    while not finished(*long):
        turns.take()
        unread = sum(len(sequence.pending) for sequence in decoder.running if not sequence.token_ids)
        assert batch.room() == (0 if unread > MOST_UNREAD else SLOTS - len(decoder.running))
        seen.add(unread > MOST_UNREAD)
    assert seen == {True, False}


def test_an_idle_worker_takes_from_every_queue_at_once(
    redis: Redis, start_worker: StartWorker, queue_name: str
) -> None:
    start_worker()
    order: tuple[tuple[Priority, str | None], ...] = (
        ("low", None), ("normal", None), ("high", None), ("normal", "demo"), ("high", "demo"), ("low", "demo"),
    )  # fmt: skip
    for priority, model in order:
        other = Queue(queue_of(queue_name, priority, model), connection=redis, serializer=JSONSerializer)
        wait_until(lambda: redis.client_list() and _blocked(redis) == 6, "the worker to wait for six queues")
        job = other.enqueue(TASK, ENTRY["prompt"], max_new_tokens=2, ignore_eos=True)
        wait_until(partial(finished, job), "the job to finish")
        assert other.intermediate_queue.get_job_ids() == []
        assert other.started_job_registry.get_job_ids() == []


def _blocked(redis: Redis) -> int:
    clients: Any = redis.client_list()
    return sum(client["cmd"] == "blmove" and "b" in client["flags"] for client in clients)


def test_a_running_job_is_cancelled_within_two_steps(turns: Turns, queue: Queue) -> None:
    job, neighbour = (queue.enqueue(TASK, e["prompt"], max_new_tokens=100, ignore_eos=True) for e in ENTRIES[:2])
    turns.until(lambda: len(turns.worker.batch) == 2 and tokens_so_far(turns, job) == 10, "ten tokens")
    job.cancel()  # as any user of RQ does
    assert turns.until(lambda: len(turns.worker.batch) == 1, "the job to be dropped") <= 2
    turns.until(lambda: finished(neighbour), "the neighbour to finish")
    assert status(job) == "canceled"
    assert job.id in queue.started_job_registry.get_queue().canceled_job_registry
    assert queue.started_job_registry.get_job_ids() == []
    assert job.return_value(refresh=True) is None
    partial = partial_of(job)
    assert partial["finish_reason"] == "cancelled"
    assert 10 <= len(partial["token_ids"]) <= 12
    assert partial["token_ids"] == ENTRY["ids"][: len(partial["token_ids"])]
    assert ids_of(neighbour) == ENTRIES[1]["ids"]


def test_a_cancellation_at_the_last_moment_is_not_overruled(turns: Turns, queue: Queue, redis: Redis) -> None:
    """The job has ended in the decoder, and its end is not written yet."""
    job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=3, ignore_eos=True)
    turns.until(lambda: len(turns.worker.outbox) == 1, "the end to be noted")
    job.cancel()
    turns.take()
    assert status(job) == "canceled"
    assert not redis.exists(f"rq:results:{job.id}")
    assert partial_of(job)["token_ids"] == ENTRY["ids"][:3]
    assert job.id not in queue.finished_job_registry


def test_a_job_that_was_cancelled_once_may_be_enqueued_again(turns: Turns, queue: Queue) -> None:
    """RQ leaves its id among the cancelled."""
    job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=5, ignore_eos=True)
    job.cancel()
    queue.enqueue_job(job)
    turns.until(lambda: finished(job), "the job to finish")
    assert ids_of(job) == ENTRY["ids"][:5]


def test_a_deleted_job_does_not_come_back(turns: Turns, queue: Queue, redis: Redis) -> None:
    job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=30, ignore_eos=True)
    turns.until(lambda: len(turns.worker.batch) == 1, "the job to begin")
    job.delete()
    turns.worker._last_heartbeat = 0.0
    turns.until(lambda: not len(turns.worker.batch) and not len(turns.worker.outbox), "the job to be gone")
    assert not redis.keys(f"*{job.id}*")


def test_a_stop_command_names_any_of_the_jobs(turns: Turns, queue: Queue, redis: Redis) -> None:
    jobs = [queue.enqueue(TASK, e["prompt"], max_new_tokens=100, ignore_eos=True) for e in ENTRIES[:3]]
    turns.until(lambda: len(turns.worker.batch) == 3, "all to begin")
    send_stop_job_command(redis, jobs[1].id, serializer=JSONSerializer)
    # The command comes by another thread; the jobs are to be running when it does.
    wait_until(lambda: not turns.worker._stop_commands.empty(), "the command to come")
    turns.take(2)
    assert status(jobs[1]) == "stopped"
    assert jobs[1].id in queue.failed_job_registry
    partial = partial_of(jobs[1])
    assert partial["token_ids"] == ENTRIES[1]["ids"][: len(partial["token_ids"])]
    turns.until(lambda: finished(jobs[0], jobs[2]), "the others to finish")
    assert [ids_of(jobs[0]), ids_of(jobs[2])] == [ENTRIES[0]["ids"], ENTRIES[2]["ids"]]


@pytest.mark.parametrize(
    ("job_timeout", "timeout", "reason"),
    [(1, None, r"1 s that it was given from its start"), (600, 1, r"1 s that it was given from being enqueued")],
)
def test_what_was_generated_of_a_job_out_of_time_is_kept(
    turns: Turns, queue: Queue, monkeypatch: pytest.MonkeyPatch, job_timeout: int, timeout: float | None, reason: str
) -> None:
    job = queue.enqueue(
        TASK, ENTRY["prompt"], max_new_tokens=100, ignore_eos=True, timeout=timeout, job_timeout=job_timeout
    )
    neighbour = queue.enqueue(TASK, ENTRIES[1]["prompt"], max_new_tokens=100, ignore_eos=True)
    turns.until(lambda: len(turns.worker.batch) == 2 and tokens_so_far(turns, job) == 7, "seven tokens")
    clock = time.monotonic
    with monkeypatch.context() as later:
        later.setattr(time, "monotonic", lambda: clock() + 1.5)
        turns.take()
    turns.take()
    assert status(job) == "failed"
    result: Any = job.latest_result()
    assert result.exc_string.startswith("fastgpt2.errors.JobTimedOut: took longer than the ")
    assert reason in result.exc_string
    partial = partial_of(job)
    assert partial["finish_reason"] == "timeout"
    assert 7 <= len(partial["token_ids"]) <= 8
    assert partial["token_ids"] == ENTRY["ids"][: len(partial["token_ids"])]
    turns.until(lambda: finished(neighbour), "the neighbour to finish")
    assert ids_of(neighbour) == ENTRIES[1]["ids"]


def test_a_job_that_waited_too_long_is_not_begun(turns: Turns, queue: Queue, redis: Redis) -> None:
    job = queue.enqueue(TASK, ENTRY["prompt"], timeout=5)
    redis.hset(job.key, "enqueued_at", "2026-01-01T00:00:00.000000Z")
    turns.take(3)
    assert status(job) == "failed"
    result: Any = job.latest_result()
    assert "s of them in the queue" in result.exc_string
    assert partial_of(job)["token_ids"] == []


def test_one_bad_entry_leaves_its_neighbours_alone(turns: Turns, queue: Queue, redis: Redis) -> None:
    good = [queue.enqueue(TASK, e["prompt"], max_new_tokens=30, ignore_eos=True) for e in ENTRIES[:2]]
    turns.until(lambda: len(turns.worker.batch) == 2, "two to begin")
    spoilt = []
    for field, value in [("data", b"\x80\x04nonsense"), ("created_at", b"?"), ("timeout", b"x"), ("meta", b"\xff")]:
        job = queue.enqueue(TASK, "a", num_beams=4)
        redis.hset(job.key, field, value)
        spoilt.append(job)
    redis.rpush(queue.key, "no-such-job", b"\xff\xfe", "spaces and\nlines")
    redis.set("rq:job:a-string", "x")
    redis.rpush(queue.key, "a-string")
    redis.hset("rq:job:huge", mapping={"data": b"x" * (65 << 20), "status": "queued"})
    redis.rpush(queue.key, "huge")
    third = queue.enqueue(TASK, ENTRIES[2]["prompt"], max_new_tokens=30, ignore_eos=True)
    turns.until(lambda: finished(*good, third), "the good ones to finish")
    for job, entry in zip([*good, third], ENTRIES, strict=False):
        assert ids_of(job) == entry["ids"][:30]
    assert [redis.hget(job.key, "status") for job in spoilt] == [b"failed"] * 4
    assert redis.hget("rq:job:huge", "status") == b"failed"
    assert redis.exists("rq:results:huge")
    redis.delete("rq:job:huge", "rq:job:a-string")


def test_running_jobs_are_what_rq_says(turns: Turns, queue: Queue) -> None:
    jobs = [queue.enqueue(TASK, e["prompt"], max_new_tokens=40, ignore_eos=True) for e in ENTRIES[:3]]
    turns.until(lambda: len(turns.worker.batch) == 3, "all to begin")
    (worker,) = Worker.all(queue=queue, serializer=JSONSerializer)
    assert worker.get_state() == "busy"
    assert {e.job_id for e in worker.get_current_executions()} == {job.id for job in jobs}
    assert set(queue.started_job_registry.get_job_ids()) == {job.id for job in jobs}
    assert queue.intermediate_queue.get_job_ids() == []
    for job in jobs:
        job.refresh()  # type: ignore[no-untyped-call]
        assert (status(job), job.worker_name) == ("started", turns.worker.name)
        (execution,) = job.get_executions()
        before = execution.last_heartbeat
    turns.worker._last_heartbeat = 0.0
    turns.take()
    (execution,) = job.get_executions()
    assert execution.last_heartbeat > before
    turns.until(lambda: finished(*jobs), "all to finish")
    turns.take()
    (worker,) = Worker.all(queue=queue, serializer=JSONSerializer)
    assert worker.get_current_executions(refresh=True) == []
    assert (worker.get_state(), worker.successful_job_count) == ("idle", 3)


def test_suspension_lets_running_jobs_finish(turns: Turns, queue: Queue, redis: Redis) -> None:
    job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=20, ignore_eos=True)
    turns.until(lambda: len(turns.worker.batch) == 1, "the job to begin")
    suspend(redis)
    try:
        waiting = queue.enqueue(TASK, "a", max_new_tokens=1)
        turns.until(lambda: finished(job), "the running job to finish")
        turns.take(3)
        assert status(waiting) == "queued"
        assert redis.hget(turns.worker.key, "state") == b"suspended"
    finally:
        resume(redis)
    turns.until(lambda: finished(waiting), "the other to finish")


def test_given_back_jobs_stand_in_front_in_their_order_with_nothing_spent(turns: Turns, queue: Queue) -> None:
    from rq import Retry

    jobs = [queue.enqueue(TASK, e["prompt"], max_new_tokens=50, retry=Retry(max=2)) for e in ENTRIES[:3]]
    turns.until(lambda: len(turns.worker.batch) == 3, "all to begin")
    later = queue.enqueue(TASK, "a")
    jobs[1].cancel()
    turns.worker.request_stop(0, None)
    turns.worker.request_stop(0, None)
    turns.take()
    assert queue.job_ids == [jobs[0].id, jobs[2].id, later.id]
    for job in (jobs[0], jobs[2]):
        job.refresh()  # type: ignore[no-untyped-call]
        assert (status(job), job.retries_left, job.get_executions()) == ("queued", 2, [])
    assert status(jobs[1]) == "canceled"
    assert queue.started_job_registry.get_job_ids() == []


def test_a_worker_without_work_for_a_while_asks_less_often(
    turns: Turns, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand of them share one Redis. A job still wakes it at once."""
    monkeypatch.setattr(generation_worker, "QUIET_SECONDS", 60.0)
    job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=2)
    turns.until(lambda: finished(job), "the job to be done")
    turns.worker._worked_at -= generation_worker.QUIET_AFTER_SECONDS
    jobs = []
    asked = threading.Event()

    def enqueue() -> None:
        asked.set()
        jobs.append(queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=2))

    timer = threading.Timer(2.0, enqueue)
    timer.start()
    turns.worker._turn(burst=False)
    assert asked.is_set(), "it waited until there was a job, for longer than a worker that was busy just now"
    assert len(turns.worker.batch) == 1, "the job woke it"
    timer.join()
    turns.until(lambda: finished(*jobs), "the job that woke it to be done")


def test_what_does_not_fit_into_the_memory_waits(redis_server: RedisServer, queue: Queue) -> None:
    """Keys and values of one full sequence: two of half a sequence fit, three do not."""
    engine = Engine.load("demo", max_batch=SLOTS, threads=1, drafts="off", kv_memory=_bytes_of_a_sequence())
    worker = GenerationWorker(engine, connect(redis_server.url), queue.name)
    assert worker.sign_on()
    turns = Turns(worker)
    half = engine.config.n_positions // 2 - 40
    jobs = [queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=half, ignore_eos=True) for _ in range(3)]
    seen = 0
    while not finished(*jobs):
        turns.take()
        seen = max(seen, len(worker.batch.decoding))
        assert engine.decoder.model.cache.bytes_reserved <= engine.decoder.model.cache.bytes_limit
    assert seen == 2
    assert {tuple(ids_of(job)[:100]) for job in jobs} == {tuple(ENTRY["ids"])}
    worker._claims.close()
    worker.sign_off()


def test_as_many_jobs_are_taken_as_are_decoded_together_now(engine: Engine) -> None:
    """How many pay is learnt while jobs run; those that run go on."""
    batch, cache = Batch(engine), engine.decoder.model.cache
    sequences = [engine.decoder.admit(engine.decoder.prepare(GenerationRequest("I"))) for _ in range(3)]
    try:
        cache.usable_slots = 2
        assert batch.room() == 2
        assert not cache.has_room(1), "three run"
        engine.decoder.finish(sequences.pop())
        assert not cache.has_room(1), "two run"
        engine.decoder.finish(sequences.pop())
        assert cache.has_room(1)
    finally:
        cache.usable_slots = SLOTS
        for sequence in sequences:
            engine.decoder.finish(sequence)


def test_what_a_workers_steps_have_taught_is_kept_when_it_ends(
    engine: Engine, redis_server: RedisServer, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = GenerationWorker(engine, connect(redis_server.url), queue.name)
    kept: list[int] = []
    monkeypatch.setattr(engine.learnt_times, "keep", lambda: kept.append(worker.batch.steps))
    queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=5)
    assert worker.work(burst=True)
    assert kept == [worker.batch.steps]
    assert kept[0] >= 5


def _bytes_of_a_sequence() -> int:
    config = Engine.load("demo", max_batch=1).config
    return 2 * 4 * config.n_layer * config.n_embd * config.n_positions


def test_text_streams_as_it_comes(turns: Turns, queue: Queue, redis: Redis) -> None:
    job = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=30, ignore_eos=True, stream=True)
    silent = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=30, ignore_eos=True)
    turns.until(lambda: len(turns.worker.batch) and tokens_so_far(turns, job) == 10, "ten tokens")
    entries: Any = redis.xrange(stream_key(job.id))
    assert len(entries) >= 5, "it does not wait for the end"
    turns.until(lambda: finished(job, silent), "both to finish")
    entries = redis.xrange(stream_key(job.id))
    fields = [fields for _, fields in entries]
    assert fields[-1] == {b"attempt": b"1", b"end": b"1"}
    text = b"".join(each[b"text"] for each in fields[:-1]).decode()
    value: Any = job.return_value()
    assert text == value["text"]
    position = 0
    for each in fields[:-1]:
        assert int(each[b"at"]) == position
        position += len(each[b"text"].decode())
    assert 0 < redis.ttl(stream_key(job.id)) <= 3600
    assert not redis.exists(stream_key(silent.id))


def test_dependents_and_retries_go_on_as_rq_has_them(turns: Turns, queue: Queue) -> None:
    from rq import Repeat, Retry

    first = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=2, ignore_eos=True)
    second = queue.enqueue(TASK, ENTRIES[1]["prompt"], max_new_tokens=2, ignore_eos=True, depends_on=first)
    failing = queue.enqueue(TASK, "a", num_beams=4, retry=Retry(max=2))
    repeated = queue.enqueue(TASK, ENTRIES[2]["prompt"], max_new_tokens=2, ignore_eos=True, repeat=Repeat(times=2))
    assert status(second) == "deferred"
    turns.until(lambda: finished(first, second) and status(failing) == "failed", "all to end")
    turns.until(lambda: not queue.job_ids and not len(turns.worker.batch), "the repeats")
    turns.take(3)
    assert failing.connection.hget(failing.key, "retries_left") == b"0"
    assert ids_of(second) == ENTRIES[1]["ids"][:2]
    assert len(repeated.results()) == 3


def test_an_end_that_is_written_again_spends_one_retry_and_one_repeat(
    turns: Turns, queue: Queue, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ counts them down while an end is recorded: once more for each time that Redis does not take the end."""
    from rq import Repeat, Retry

    repeat, retry = Repeat(times=3, interval=1000), Retry(max=3, interval=1000)
    repeated = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=3, ignore_eos=True, repeat=repeat)
    retried = queue.enqueue(TASK, ENTRY["prompt"], max_new_tokens=400, ignore_eos=True, retry=retry)
    turns.until(lambda: len(turns.worker.outbox) == 1, "the end of the first to be noted")
    (running,) = turns.worker.batch
    turns.worker.outbox.fail(running, RuntimeError("a defect"))
    tries = 0

    def execute_later(pipeline: Pipeline) -> list[Any]:
        nonlocal tries
        tries += 1
        if tries in (1, 2, 4):
            raise NoConnection("Redis is away")
        return execute(pipeline)

    monkeypatch.setattr("fastgpt2.worker.fencing.execute", execute_later)
    for left in (2, 2, 2, 1, 0):
        assert len(turns.worker.outbox) == left
        if left:
            with suppress(NoConnection):
                turns.worker.outbox.write()
    assert tries == 5
    assert redis.hget(repeated.key, "repeats_left") == b"2"
    assert redis.hget(retried.key, "retries_left") == b"2"
    assert {status(job) for job in (repeated, retried)} == {"scheduled"}


def test_burst_ends_with_the_queue(queue: Queue, start_worker: StartWorker) -> None:
    jobs = [queue.enqueue(TASK, "a", max_new_tokens=3) for _ in range(9)]
    process = start_worker(wait=False, FASTGPT2_BURST="1")
    assert process.wait(60) == 0
    assert finished(*jobs)
