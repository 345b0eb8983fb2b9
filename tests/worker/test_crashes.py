"""Workers that die, stop, and come back: nothing is lost, and every job ends once."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.job import Dependency, Job
from rq.results import Result
from rq.serializers import JSONSerializer
from support.dying_worker import POISON
from support.running import GOLDEN, StartWorker, jobs_held, wait_until

from fastgpt2 import Client, Engine, Piece
from fastgpt2.errors import JobFailed, PoisonJob
from fastgpt2.protocol.keys import leases_key, queue_of, queues_of, totals_key
from fastgpt2.system.pool import Child, Pool
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker.liveness import BEAT_SECONDS, LOOKS, Lease
from fastgpt2.worker.reaper import BackgroundReaper, Reaper

TASK = "fastgpt2.worker.tasks.generate"
ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]

StartPool = Callable[..., Pool]


@pytest.fixture
def recovered() -> dict[str, bool]:
    """Each worker that the supervisor's reaper was done with, and whether it still had jobs then."""
    return {}


@pytest.fixture
def start_pool(
    redis_server: RedisServer, queue_name: str, tmp_path: Path, recovered: dict[str, bool]
) -> Iterator[StartPool]:
    """Start a supervisor, as `fastgpt2 pool` has one, with one worker that dies at a stage of a job."""
    made: list[tuple[Pool, BackgroundReaper]] = []

    def start(stage: str, once: bool = True, **environment: str) -> Pool:
        own = {
            "FASTGPT2_REDIS_URL": redis_server.url,
            "FASTGPT2_QUEUE": queue_name,
            "FASTGPT2_MODEL": "demo",
            "FASTGPT2_THREADS": "1",
            "FASTGPT2_MAX_BATCH": "4",
            "PYTHONPATH": str(Path(__file__).parent.parent),
            **environment,
        }
        command = [sys.executable, "-m", "support.dying_worker", stage, *([str(tmp_path / "died")] if once else [])]
        pool = Pool([Child("worker 1", command, own, is_worker=True)])

        def note_recovery(identity: str, had_jobs: bool, finished: int) -> None:
            recovered[identity] = had_jobs
            pool.note_recovery(identity, had_jobs, finished)

        reaper = BackgroundReaper(redis_server.url, queue_name, note_recovery)
        pool.reap, pool.count_restart = reaper.reap, reaper.count_restart
        made.append((pool, reaper))
        pool.start()
        return pool

    yield start
    for pool, reaper in made:
        pool.stop(5.0)
        reaper.close(5.0)


def wait_supervising(pool: Pool, condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    def checked() -> object:
        pool.check(time.monotonic())
        return condition()

    wait_until(checked, what, seconds)


def enqueue(redis: Redis, queue: str, entry: dict[str, Any], tokens: int, **more: Any) -> Job:
    rq = Queue(queue, connection=redis, serializer=JSONSerializer)
    return rq.enqueue(TASK, entry["prompt"], max_new_tokens=tokens, ignore_eos=True, **more)


def status(job: Job) -> str:
    return str(job.get_status().value)


def finished_once(job: Job, expected: list[int]) -> None:
    assert status(job) == "finished"
    ends = [result.type for result in job.results()]
    assert ends == [Result.Type.SUCCESSFUL], ends
    value: Any = job.return_value(refresh=True)
    assert value["token_ids"] == expected


def nothing_is_left(redis: Redis, queue: str) -> None:
    """Check that no running or claimed job is left, whatever became of the worker."""
    for name in queues_of(queue):
        assert redis.llen(f"rq:queue:{name}") == 0
        assert redis.zcard(f"rq:wip:{name}") == 0
        assert list(redis.scan_iter(f"fastgpt2:taken:*:{name}", count=1000)) == []


def executions_of(redis: Redis, jobs: list[Job]) -> list[bytes]:
    return [key for job in jobs for key in redis.scan_iter(f"rq:execution*:{job.id}*", count=1000)]


STAGES = [
    "after the claim",
    "claimed and read",
    "the start sent",
    "after the start",
    "mid-prefill",
    "mid-decode",
    "before the commit",
    "the commit sent",
    "after the commit",
    "before the dependents",
    "before the failure's dependents",
]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_stage_nothing_is_lost(
    start_pool: StartPool,
    recovered: dict[str, bool],
    redis: Redis,
    queue_name: str,
    tmp_path: Path,
    stage: str,
) -> None:
    """Jobs lie in several queues; some wait for others, one of which fails."""
    entries = ENTRIES[:3]
    jobs = [
        enqueue(redis, name, entry, 10 + 5 * n, stream=True)
        for n, (name, entry) in enumerate(zip(queues_of(queue_name), entries, strict=True))
    ]
    rq = Queue(queue_name, connection=redis, serializer=JSONSerializer)
    failing = rq.enqueue(TASK, "a", num_beams=4)
    after = [
        rq.enqueue(TASK, ENTRIES[3]["prompt"], max_new_tokens=3, ignore_eos=True, depends_on=jobs[0]),
        rq.enqueue(
            TASK,
            ENTRIES[4]["prompt"],
            max_new_tokens=4,
            ignore_eos=True,
            depends_on=Dependency(jobs=[failing], allow_failure=True),
        ),
    ]
    pool = start_pool(stage)
    identity = pool.children[0].identity
    everything = [*jobs, *after]
    wait_supervising(pool, (tmp_path / "died").exists, "the worker to die")
    wait_supervising(pool, lambda: all(status(job) == "finished" for job in everything), "all to finish")
    assert recovered[identity], "its supervisor took the jobs back, and did not wait for the lease to lapse"
    for n, (job, entry) in enumerate(zip(jobs, entries, strict=True)):
        finished_once(job, entry["ids"][: 10 + 5 * n])
    finished_once(after[0], ENTRIES[3]["ids"][:3])
    finished_once(after[1], ENTRIES[4]["ids"][:4])
    assert [result.type for result in failing.results()] == [Result.Type.FAILED]
    wait_supervising(pool, lambda: not executions_of(redis, [*everything, failing]), "executions to be tidied up")
    nothing_is_left(redis, queue_name)
    wait_supervising(pool, lambda: redis.zcard(leases_key(queue_name)) == 1, "the dead worker's lease to go")


@pytest.mark.parametrize("stage", ["mid-decode", "before the commit"])
@pytest.mark.parametrize(("texts", "slots"), [(1, "4"), (3, "2")])
def test_killed_in_mid_text_a_drawn_text_goes_on_where_it_stopped(
    start_pool: StartPool, client: Client, engine: Engine, tmp_path: Path, stage: str, texts: int, slots: str
) -> None:
    """Nobody gave a seed. Whoever follows the texts sees each character once, and nothing change."""
    options: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 1.0, "top_p": 0.95, "n": texts}
    stream = client.stream(ENTRIES[0]["prompt"], read_timeout=60, **options)
    pieces: list[Piece] = []
    follower = threading.Thread(target=pieces.extend, args=(stream,))
    follower.start()
    pool = start_pool(stage, FASTGPT2_MAX_BATCH=slots)
    wait_supervising(pool, (tmp_path / "died").exists, "the worker to die")
    wait_supervising(pool, lambda: not follower.is_alive(), "the texts to end")
    result = stream.result
    assert result is not None
    assert result.seed is not None
    assert {piece.attempt for piece in pieces} == {1, 2}
    expected = engine.generate(ENTRIES[0]["prompt"], seed=result.seed, **options)
    for text, known in zip((result, *result.alternatives), (expected, *expected.alternatives), strict=True):
        assert (text.token_ids, text.choice_index, text.seed) == (known.token_ids, known.choice_index, result.seed)
        own = [piece for piece in pieces if piece.choice_index == text.choice_index]
        assert "".join(map(str, own)) == text.text
        assert [piece.at for piece in own] == [sum(len(piece.text) for piece in own[:n]) for n in range(len(own))]


@pytest.mark.parametrize("stage", ["before the give-back", "the give-back sent"])
def test_killed_while_giving_back_nothing_is_lost(
    start_pool: StartPool, redis: Redis, queue_name: str, tmp_path: Path, stage: str
) -> None:
    pool = start_pool(stage)

    def hurried_to_death() -> bool:
        pool.children[0].signal(signal.SIGTERM)  # the second one has it give back; one sent at once is the same one
        return (tmp_path / "died").exists()

    with jobs_held():
        jobs = [enqueue(redis, queue_name, entry, 100) for entry in ENTRIES[:4]]
        wait_supervising(pool, lambda: all(status(job) == "started" for job in jobs), "the jobs to start")
        wait_supervising(pool, hurried_to_death, "the worker to die")
    wait_supervising(pool, lambda: all(status(job) == "finished" for job in jobs), "all to finish")
    for job, entry in zip(jobs, ENTRIES, strict=False):
        finished_once(job, entry["ids"][:100])
    nothing_is_left(redis, queue_name)


def test_a_job_that_kills_its_worker_is_given_up_and_the_others_finish(
    start_pool: StartPool, redis: Redis, redis_server: RedisServer, queue_name: str
) -> None:
    good = [enqueue(redis, queue_name, entry, 20) for entry in ENTRIES[:3]]
    poison = enqueue(redis, queue_name, {"prompt": POISON}, 20, stream=True)
    other = enqueue(redis, queue_of(queue_name, "high"), {"prompt": POISON}, 20)
    good += [enqueue(redis, queue_name, entry, 20) for entry in ENTRIES[3:6]]
    pool = start_pool("the poison", once=False)
    wait_supervising(
        pool, lambda: all(status(job) in ("finished", "failed") for job in (*good, poison, other)), "all to end", 60
    )
    for job, entry in zip(good, ENTRIES, strict=False):
        finished_once(job, entry["ids"][:20])
    with Client(redis_server.url, queue_name) as client:
        for job in (poison, other):
            with pytest.raises(PoisonJob, match="4 workers died while they ran it") as caught:
                client.job(job.id).result(timeout=30)
            assert isinstance(caught.value, JobFailed)
            assert job.id in job.failed_job_registry
        with pytest.raises(PoisonJob):
            list(client.job(poison.id).stream(timeout=30))
    assert pool.children[0].process is not None
    nothing_is_left(redis, queue_name)
    assert executions_of(redis, [*good, poison, other]) == []
    counted: Any = redis.hgetall(totals_key(queue_name))
    assert counted[b"ended:failed:poison"] == b"2"
    # Both are taken back three times before they are given up.
    assert int(counted[b"recoveries"]) >= 2 * 3
    assert int(counted[b"restarts:died"]) == pool.children[0].restarts


def test_memory_that_runs_out_is_the_fault_of_one_job_at_most(
    start_pool: StartPool, redis: Redis, queue_name: str
) -> None:
    """Each job goes back, and the process is replaced; the job that it happens to again and again fails alone."""
    good = [enqueue(redis, queue_name, entry, 20) for entry in ENTRIES[:3]]
    large = enqueue(redis, queue_name, {"prompt": POISON}, 20)
    pool = start_pool("out of memory", once=False)
    wait_supervising(pool, lambda: all(status(job) in ("finished", "failed") for job in (*good, large)), "all to end")
    for job, entry in zip(good, ENTRIES, strict=False):
        finished_once(job, entry["ids"][:20])
    result = large.latest_result()
    assert result is not None
    assert "Unable to allocate 1.00 GiB" in str(result.exc_string)


def test_a_silent_worker_loses_its_jobs_once_its_lease_is_over_and_comes_too_late(
    redis: Redis, start_worker: StartWorker, queue_name: str, tmp_path: Path
) -> None:
    """Nobody supervises here: one worker is killed, one is stopped and wakes up again, and a third one finds out."""
    first = start_worker(FASTGPT2_MAX_BATCH="2", FASTGPT2_NAME="killed")
    with jobs_held():
        jobs = [enqueue(redis, queue_name, entry, 100, stream=True) for entry in ENTRIES[:2]]
        wait_until(lambda: all(status(job) == "started" for job in jobs), "the first worker to take two")
        os.kill(first.pid, signal.SIGSTOP)
        second = start_worker(FASTGPT2_MAX_BATCH="2", FASTGPT2_NAME="stopped")
        more = [enqueue(redis, queue_name, entry, 100, stream=True) for entry in ENTRIES[2:4]]
        wait_until(lambda: all(status(job) == "started" for job in more), "the second worker to take two")
        os.kill(second.pid, signal.SIGSTOP)
        os.kill(first.pid, signal.SIGKILL)
    leases: Any = redis.zrange(leases_key(queue_name), 0, -1, withscores=True)
    assert {name for name, _ in leases} == {b"killed", b"stopped"}
    everything = [*jobs, *more]
    assert [status(job) for job in everything] == ["started"] * 4
    third = start_worker(FASTGPT2_MAX_BATCH="4")
    wait_until(lambda: any(status(job) != "started" for job in everything), "the lease to lapse", 60)
    # By Redis's clock, which the leases go by: the looks begin when a lease has lapsed, and half a second is for clocks
    # that do not run alike.
    seconds, microseconds = redis.time()
    assert seconds + microseconds / 1e6 > min(end for _, end in leases) / 1000 + (LOOKS - 1) * BEAT_SECONDS - 0.5
    wait_until(lambda: all(status(job) == "finished" for job in everything), "all to finish", 60)
    attempts = [redis.hget(job.key, "fastgpt2_attempts") for job in everything]
    os.kill(second.pid, signal.SIGCONT)
    log = tmp_path / "worker-1.log"
    wait_until(lambda: log.read_text().count("was cancelled, deleted or taken back") == 2, "the second to notice")
    late = enqueue(redis, queue_name, ENTRIES[4], 5)
    third.send_signal(signal.SIGTERM)
    assert third.wait(60) == 0
    wait_until(lambda: status(late) == "finished", "the one that woke up to go on")
    for job, entry in zip(everything, ENTRIES, strict=False):
        finished_once(job, entry["ids"][:100])
        assert redis.hget(job.key, "fastgpt2_crashes") == b"1"
    assert attempts == [b"2"] * 4
    assert "finished" not in re.sub(rf".*{late.id}.*", "", log.read_text())
    nothing_is_left(redis, queue_name)


def test_a_worker_is_dead_at_the_last_of_the_looks_that_find_its_lease_lapsed(redis: Redis, queue_name: str) -> None:
    """And not before; a lease that was renewed meanwhile, though to no good, is looked at anew."""
    dead: list[tuple[str, str]] = []
    lease = Lease(redis, queue_name, "living", lambda name, leased: dead.append((name, leased)))
    for score in (12345, 12346):
        redis.zadd(leases_key(queue_name), {"silent": score})
        for _ in range(LOOKS - 1):
            lease.beat()
        assert dead == []
    lease.beat()
    assert dead == [("silent", "12346")]


def test_only_one_reaper_takes_a_job_back(redis: Redis, queue_name: str) -> None:
    """And no reaper takes a job from a worker that was heard of since."""
    job = enqueue(redis, queue_name, ENTRIES[0], 5)
    redis.lmove(f"rq:queue:{queue_name}", f"fastgpt2:taken:gone:{queue_name}", "LEFT", "RIGHT")
    redis.zadd(leases_key(queue_name), {"gone": 12345})
    assert Reaper(redis, queue_name).reap("gone", "12344") is None
    first = Reaper(redis, queue_name).reap("gone", "12345")
    assert first is not None
    assert first.put_back == [job.id]
    assert Reaper(redis, queue_name).reap("gone", "12345") is None
    assert redis.lrange(f"rq:queue:{queue_name}", 0, -1) == [job.id.encode()]


def test_jobs_go_back_to_the_front_in_their_order(redis: Redis, queue_name: str) -> None:
    jobs = [enqueue(redis, queue_name, entry, 5) for entry in ENTRIES[:5]]
    for _ in range(3):
        redis.lmove(f"rq:queue:{queue_name}", f"fastgpt2:taken:gone:{queue_name}", "LEFT", "RIGHT")
    Reaper(redis, queue_name).reap("gone")
    assert redis.lrange(f"rq:queue:{queue_name}", 0, -1) == [job.id.encode() for job in jobs]


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_a_clock_that_jumps_costs_no_job(
    redis: Redis, start_worker: StartWorker, queue_name: str, tmp_path: Path, jump: int
) -> None:
    """Move all leases: to them a jump of Redis's clock is the same. Both workers live on."""
    for _ in range(2):
        start_worker(FASTGPT2_MAX_BATCH="2")
    leases = leases_key(queue_name)
    wait_until(lambda: redis.zcard(leases) == 2, "both leases")

    def standing() -> dict[Any, Any]:
        pairs: Any = redis.zrange(leases, 0, -1, withscores=True)
        return dict(pairs)

    for _ in range(10):  # more often than a worker is looked at before it counts as dead
        redis.zadd(leases, {name: score - jump * 1000 for name, score in standing().items()}, xx=True)
        jumped = standing()
        wait_until(lambda jumped=jumped: standing() != jumped, "a renewal", 60)  # type: ignore[misc]
    job = enqueue(redis, queue_name, ENTRIES[0], 5)
    wait_until(lambda: status(job) == "finished", "a job to finish")
    for n in range(2):
        assert "is dead" not in (tmp_path / f"worker-{n}.log").read_text()
