"""Several models on one queue: each job goes to a worker of the model that it names, and to no other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.job import Job as RQJob
from rq.serializers import JSONSerializer
from rq.utils import now as utc_now
from support.running import in_thread, wait_until
from support.turns import Turns, take_turns

from fastgpt2 import Client, Engine
from fastgpt2.api.client.enqueue import plan_job
from fastgpt2.api.client.model_limits import ModelLimits
from fastgpt2.errors import BadRequest, JobCancelled, ModelUnknown, PromptTooLong, QueueFull, ResultTimeout
from fastgpt2.protocol import keys
from fastgpt2.protocol.keys import PRIORITIES, Priority, claimed_key, models_key, queue_key, queue_of, queues_of
from fastgpt2.protocol.messages import TASK
from fastgpt2.system.redis_server import RedisServer
from fastgpt2.worker.claims import Claims
from fastgpt2.worker.reaper import Reaper
from fastgpt2.worker.served_names import ServedNames
from fastgpt2.worker.worker import GenerationWorker

pytestmark = pytest.mark.processes

Serve = Callable[..., ServedNames]


@pytest.fixture
def serve(redis: Redis, queue_name: str) -> Serve:
    """Tell the pool that names are served, as a worker does."""

    def serve(*names: str) -> ServedNames:
        served = ServedNames(redis, queue_name, names)
        served.renew()
        return served

    return serve


@pytest.fixture
def ours(engine: Engine, redis_server: RedisServer, queue_name: str) -> Iterator[Turns]:
    """A worker of the names "ours" and "alias", which takes the plain jobs."""
    with take_turns(engine, redis_server, queue_name, names=("ours", "alias")) as turns:
        yield turns


def now_ms(redis: Redis) -> int:
    seconds, microseconds = redis.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


def lapse(redis: Redis, queue_name: str, name: str, seconds: float) -> None:
    """Let a name be one that was served until some seconds ago."""
    redis.zadd(models_key(queue_name), {name: now_ms(redis) - int(1000 * seconds)})


def waiting(redis: Redis, queue_name: str) -> list[str]:
    found: Any = redis.lrange(queue_key(queue_name), 0, -1)
    return [job_id.decode() for job_id in found]


def served_now(redis: Redis, queue_name: str) -> set[bytes]:
    found: Any = redis.zrangebyscore(models_key(queue_name), now_ms(redis), "+inf")
    return set(found)


# The names of queues.


@pytest.mark.parametrize("model", ["demo", "org/name-high", "a@b", "-low", "ein Modell", "模型", "/models/x:1,2"])
def test_a_models_queues_stand_beside_the_plain_ones(model: str) -> None:
    assert queues_of("q", [model]) == ["q-high", f"q-high@{model}", "q", f"q@{model}", "q-low", f"q-low@{model}"]
    for name in queues_of("q", [model]):
        assert keys.is_queue_of("q", name)
        assert not keys.is_queue_of("other", name)
        assert keys.model_of(name) == (model if "@" in name else None)
    assert keys.plain_queue_of(f"q-low@{model}") == "q-low"
    assert keys.cancellations_key(f"q-low@{model}") == keys.cancellations_key("q-low")


def test_no_pool_has_a_queue_with_the_mark(redis_server: RedisServer) -> None:
    with pytest.raises(BadRequest, match="'a@b' has @ in its name"):
        Client(redis_server.url, "a@b")


# Who answers.


def test_a_job_goes_to_the_model_that_it_names(ours: Turns, client: Client, redis: Redis, serve: Serve) -> None:
    serve("theirs")
    fields: Any = {"max_new_tokens": 2}
    named = {name: client.enqueue("a", model=name, **fields) for name in ("ours", "alias", "theirs")}
    plain = client.enqueue("a", **fields)
    done = [plain, named["ours"], named["alias"]]
    ours.until(lambda: all(job.status() == "finished" for job in done), "the jobs of this worker to finish")
    assert [job.result(10).model for job in done] == ["ours", "ours", "alias"]
    ours.take(20)
    assert named["theirs"].status() == "queued"
    assert waiting(redis, f"{client.queue_name}@theirs") == [named["theirs"].id]
    raw = redis.hgetall(ours.worker.key)
    assert (raw[b"model"], json.loads(raw[b"models"]), raw[b"named_only"]) == (b"ours", ["ours", "alias"], b"")


def test_a_worker_for_named_jobs_only_leaves_the_others(
    engine: Engine, redis_server: RedisServer, client: Client, redis: Redis, queue_name: str
) -> None:
    with take_turns(engine, redis_server, queue_name, names=["second"], named_only=True) as turns:
        plain, named = client.enqueue("a"), client.enqueue("a", model="second", max_new_tokens=2)
        turns.until(lambda: named.status() == "finished", "the named job to finish")
        turns.take(20)
        assert plain.status() == "queued"
        assert redis.smembers(keys.workers_key(queue_name)) == {turns.worker.key.encode()}, "the pool's list has it"
        assert turns.worker.queue_names() == [queue_of(queue_name, each, "second") for each in PRIORITIES]
        assert redis.hget(turns.worker.key, "named_only") == b"1"
    assert not redis.smembers(keys.workers_key(queue_name))


def test_the_totals_of_a_model_are_its_workers_own(ours: Turns, client: Client, redis: Redis, queue_name: str) -> None:
    job = client.enqueue("a", model="alias", max_new_tokens=3)
    ours.until(lambda: job.status() == "finished", "the job to finish")
    ours.worker.metrics.report()
    of_pool, of_model = (redis.hgetall(keys.totals_key(name)) for name in (queue_name, f"{queue_name}@ours"))
    assert of_model == of_pool
    assert of_model[b"generated_tokens"] == b"3"


# Who is refused.


def test_a_model_that_nobody_serves_is_refused_at_once(client: Client, redis: Redis, serve: Serve) -> None:
    with pytest.raises(ModelUnknown, match=r"no worker serves the model 'x'; served are: none; first start a worker"):
        client.enqueue("a", model="x")
    serve("one", "two")
    with pytest.raises(ModelUnknown, match=r"the model 'x'; served are: one, two; name one of these, or start"):
        client.enqueue("a", model="x")
    found = list(client.map([{"prompt": "a", "model": "x"}, {"prompt": "b", "model": "y"}], return_exceptions=True))
    assert [type(error).__name__ for error in found] == ["ModelUnknown"] * 2
    with pytest.raises(ModelUnknown) as caught:
        list(client.map(["a"], model="x"))
    assert caught.value.index == 0
    assert not any(redis.exists(queue_key(name)) for name in queues_of(client.queue_name, ["x", "y", "one", "two"]))


@pytest.mark.parametrize("name", ["\0", "a\nb", "\ud800", "\u202e", "\x7f"])
def test_no_model_has_a_name_that_cannot_be_printed(client: Client, redis: Redis, name: str) -> None:
    with pytest.raises(ModelUnknown, match="names of models have printable characters only"):
        client.enqueue("a", model=name)
    with pytest.raises(BadRequest, match="give it one of 1 to 500 characters, all of them printable, by --served"):
        ServedNames(redis, "q", ["good", name])


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "1 to 500 characters"), ("x" * 501, "1 to 500 characters"), (5, "a string of 1 to 500 characters, not 5")],
)
def test_a_models_name_is_bounded(client: Client, redis: Redis, name: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        client.enqueue("a", model=name)
    if isinstance(name, str):
        with pytest.raises(BadRequest, match=f"which has {len(name)} characters"):
            ServedNames(redis, "q", [name])


def test_a_restart_of_the_last_worker_refuses_nobody(
    client: Client, redis: Redis, serve: Serve, queue_name: str
) -> None:
    serve("gone")
    lapse(redis, queue_name, "gone", 55)
    job = client.enqueue("a", model="gone")
    with pytest.raises(ResultTimeout, match="no worker listens on the queue"):
        job.result(0.05)
    redis.sadd(keys.workers_key(queue_name), "rq:worker:another")
    with pytest.raises(ResultTimeout, match="no worker serves the model 'gone' any more: start one that does"):
        job.result(0.05)
    lapse(redis, queue_name, "gone", 61)
    with pytest.raises(ModelUnknown):
        client.enqueue("a", model="gone")


def test_all_jobs_of_the_pool_count_towards_a_full_queue(
    redis_server: RedisServer, serve: Serve, queue_name: str
) -> None:
    serve("one", "two")
    with Client(redis_server.url, queue_name, max_queue=3) as client:
        client.enqueue("a")
        client.enqueue("a", model="one", priority="high")
        client.enqueue("a", model="two")
        for model in (None, "one"):
            with pytest.raises(QueueFull, match="3 jobs wait, the limit is 3"):
                client.enqueue("a", model=model)


def test_a_lost_job_is_enqueued_again_whatever_is_served(client: Client, redis: Redis, serve: Serve) -> None:
    serve("one")
    (sent,) = client._driver.run(client._session.send_all([plan_job("a", {"model": "one"})]))
    redis.delete(keys.job_key(sent.id), models_key(client.queue_name), queue_key(f"{client.queue_name}@one"))
    again = client._driver.run(client._session.send([sent.command_again()]))
    assert again == ([0], None)
    assert waiting(redis, f"{client.queue_name}@one") == [sent.id]


def test_what_surely_cannot_fit_is_told_by_the_models_own_limit(client: Client, redis: Redis, queue_name: str) -> None:
    limits = ModelLimits()
    workers: dict[str, dict[str, Any]] = {
        "small": {"n_positions": 8, "models": '["small"]', "named_only": ""},
        "large": {"n_positions": 64, "models": '["large", "both"]', "named_only": "1"},
        "other": {"n_positions": 16, "models": '["other", "both"]', "named_only": "1"},
        "stray": {"n_positions": 999, "models": "[1, {}", "named_only": "1"},
    }
    for name, fields in workers.items():
        redis.sadd(keys.workers_key(queue_name), f"rq:worker:{queue_name}-{name}")
        redis.hset(f"rq:worker:{queue_name}-{name}", "longest_token_bytes", "4", mapping=fields)  # type: ignore[arg-type]
    client._driver.run(limits.refresh(queue_name))
    for model, most in ((None, 8), ("small", 8), ("large", 64), ("other", 16), ("both", 64)):
        plan = plan_job([1] * (most - 1), {})
        limits.check(plan.request, model)
        with pytest.raises(PromptTooLong):
            limits.check(plan_job([1] * most, {}).request, model)
    limits.check(plan_job([1] * 5000, {}).request, "unknown")


def test_workers_of_an_earlier_release_get_the_jobs_of_their_model(
    client: Client, redis: Redis, queue_name: str
) -> None:
    """They register no names, and know no field `model`; the endpoint is often upgraded first."""
    worker = f"rq:worker:{queue_name}-old"
    redis.sadd(keys.workers_key(queue_name), worker)
    redis.hset(worker, mapping={"model": "demo", "n_positions": 512, "longest_token_bytes": 9})
    job = client.enqueue("a", model="demo")
    assert waiting(redis, queue_name) == [job.id]
    assert "model" not in RQJob.fetch(job.id, redis, JSONSerializer).kwargs
    with pytest.raises(ModelUnknown):
        client.enqueue("a", model="other")
    # Beside a worker of another model, which might take the job, it is refused rather than given to the wrong one.
    redis.sadd(keys.workers_key(queue_name), f"{worker}er")
    redis.hset(f"{worker}er", mapping={"model": "other", "n_positions": 512, "longest_token_bytes": 9})
    client._session.limits._fresh_until = 0.0
    with pytest.raises(ModelUnknown):
        client.enqueue("a", model="demo")


# Jobs that are put where they do not belong.


@pytest.mark.parametrize("priority", PRIORITIES)
def test_a_plain_rq_job_is_sent_on_to_the_model_that_it_names(
    ours: Turns, redis: Redis, serve: Serve, queue_name: str, priority: Priority
) -> None:
    serve("theirs")
    plain = Queue(queue_of(queue_name, priority), connection=redis, serializer=JSONSerializer)
    jobs = [plain.enqueue(TASK, f"{n}", model="theirs", max_new_tokens=2) for n in range(6)]
    own = plain.enqueue(TASK, "a", model="alias", max_new_tokens=2)
    ours.until(lambda: own.get_status() == "finished", "the worker's own to finish")
    own_result: Any = own.return_value(refresh=True)
    assert own_result["model"] == "alias"
    target = queue_of(queue_name, priority, "theirs")
    assert waiting(redis, target) == [job.id for job in jobs], "in their order"
    for job in jobs:
        fetched = RQJob.fetch(job.id, redis, JSONSerializer)
        assert (fetched.get_status(), fetched.origin) == ("queued", target)
    assert not redis.exists(claimed_key(ours.worker.name, plain.name))
    assert queue_key(target).encode() in redis.smembers("rq:queues")


def test_a_plain_rq_job_of_a_model_that_nobody_serves_fails(
    ours: Turns, redis: Redis, client: Client, queue: Queue
) -> None:
    job = queue.enqueue(TASK, "a", model="theirs", max_new_tokens=2)
    strange = [queue.enqueue(TASK, "a", model=model) for model in ("\n", 5, "", "x" * 501)]
    ours.until(lambda: all(each.get_status() == "failed" for each in (job, *strange)), "the jobs to be refused")
    with pytest.raises(ModelUnknown, match="no worker serves the model 'theirs'; served are: alias, ours"):
        client.result(job.id, 10)
    for each in strange:
        with pytest.raises(BadRequest, match="model"):
            client.result(each.id, 10)
    assert not redis.exists(queue_key(f"{queue.name}@theirs"))


@pytest.mark.parametrize("change", ["deleted", "started", "list"])
def test_a_job_that_is_sent_on_is_neither_lost_nor_half_there(
    ours: Turns, redis: Redis, serve: Serve, queue: Queue, change: str
) -> None:
    """It is deleted after it was read; or its start, to refuse it, was written and never heard of; or the list of what
    the worker has claimed is none."""
    job = queue.enqueue(TASK, "a", model="theirs", max_new_tokens=2)
    worker, claimed, target = ours.worker, claimed_key(ours.worker.name, queue.name), f"{queue.name}@theirs"
    claims = worker._claims.claim(1) or []
    attempts = worker._ledger.read(claims)
    match change:
        case "deleted":
            serve("theirs")
            redis.delete(job.key)
            assert worker._router.route(attempts) == []
            assert not redis.exists(job.key, claimed, queue_key(target))
        case "started":
            assert worker._router.route(attempts) == attempts
            worker._ledger.start(attempts)
            serve("theirs")
            assert worker._router.route(worker._ledger.read(claims)) == []
            assert (job.get_status(), job.get_meta(), waiting(redis, target)) == ("queued", {}, [job.id])
            assert not redis.exists(keys.registry_key("started", queue.name), f"{keys.EXECUTIONS_PREFIX}{job.id}")
        case "list":
            serve("theirs")
            redis.set(claimed, "junk")
            worker._claimed = claims
            ours.until(lambda: waiting(redis, target) == [job.id], "the job to be sent on")


def test_a_job_in_a_models_queue_need_not_name_it(ours: Turns, redis: Redis, queue_name: str) -> None:
    queue = Queue(f"{queue_name}@alias", connection=redis, serializer=JSONSerializer)
    job = queue.enqueue(TASK, "a", max_new_tokens=2)
    ours.until(lambda: job.get_status() == "finished", "the job to finish")
    result: Any = job.return_value(refresh=True)
    assert result["model"] == "alias"


# Whose turn it is.


def fill(redis: Redis, names: Sequence[str], each: int) -> None:
    for name in names:
        redis.rpush(queue_key(name), *(f"{name} {n}" for n in range(each)))


@pytest.fixture
def claims(redis: Redis, queue_name: str) -> Iterator[Claims]:
    queues = [Queue(name, connection=redis) for name in queues_of(queue_name, ["a", "b"])]
    with closing(Claims(redis, queues, f"w-{queue_name}", print)) as made:
        yield made


def test_the_queues_of_one_priority_take_turns(claims: Claims, redis: Redis, queue_name: str) -> None:
    names = queues_of(queue_name, ["a", "b"])
    fill(redis, names, 60)
    taken = [queue.name for _ in range(48) for queue, _ in claims.claim(2) or ()]
    # 12 of 16 claims are of the first priority, 3 of the second, 1 of the last: of 96, 72, 18 and 6.
    assert [taken.count(name) for name in names] == [24, 24, 24, 6, 6, 6, 2, 2, 2]
    urgent = [name for name in taken if name in names[:3]]
    assert urgent[:6] == [names[0], names[1], names[2]] * 2


def test_jobs_are_as_urgent_as_their_queue_whatever_its_model(claims: Claims, redis: Redis, queue_name: str) -> None:
    names = queues_of(queue_name, ["a", "b"])
    fill(redis, names, 1)
    urgency = {queue.name: claims.urgency(queue) for queue, _ in claims.claim(9) or ()}
    assert [urgency[name] for name in names] == [0, 0, 0, -1, -1, -1, -2, -2, -2]


def test_an_empty_queue_gives_no_other_two_turns(claims: Claims, redis: Redis, queue_name: str) -> None:
    fill(redis, [queue_name, f"{queue_name}@b"], 20)
    taken = [queue.name for queue, _ in claims.claim(20) or ()]
    assert taken == [queue_name, f"{queue_name}@b"] * 10


def test_a_worker_that_waits_takes_no_more_than_it_may(claims: Claims, redis: Redis, queue_name: str) -> None:
    names = queues_of(queue_name, ["a", "b"])
    waits = in_thread(lambda: claims.wait(30, 4))
    wait_until(lambda: _blocked(redis, [each.client_id for each in claims._waiting]) == len(names), "all to wait")
    with redis.pipeline() as together:  # which serves all that wait at the same moment
        for name in names:
            together.rpush(queue_key(name), name)
        together.execute()
    taken = [queue.name for queue, _ in waits.result(30)]
    assert taken == names[:4]
    assert [name for name in names if waiting(redis, name)] == names[4:], "the others are put back"
    assert [queue.name for queue, _ in claims.list_all([])] == taken


def _blocked(redis: Redis, ids: list[int]) -> int:
    clients: Any = redis.client_list()
    return sum(int(one["id"]) in ids and "b" in one["flags"] for one in clients)


# Workers that die, and models that go.


@pytest.mark.parametrize("is_known", [True, False])
def test_the_jobs_of_a_dead_worker_are_taken_back_whatever_it_served(
    redis: Redis, client: Client, serve: Serve, queue_name: str, is_known: bool
) -> None:
    serve("gone")
    job = client.enqueue("a", model="gone", priority="high")
    name = queue_of(queue_name, "high", "gone")
    redis.lmove(queue_key(name), claimed_key("dead", name), "LEFT", "RIGHT")
    lapse(redis, queue_name, "gone", 3 * 24 * 3600)
    if not is_known:  # only the worker's own hash tells of it
        redis.delete(models_key(queue_name))
        redis.hset("rq:worker:dead", "models", '["gone", "\\ud800", 5]')
    recovery = Reaper(redis, queue_name).reap("dead")
    assert recovery is not None
    assert recovery.put_back == [job.id]
    assert waiting(redis, name) == [job.id]


def test_a_worker_that_comes_back_with_another_model_takes_its_jobs_back(
    engine: Engine, redis: Redis, client: Client, serve: Serve, queue_name: str
) -> None:
    serve("old")
    job = client.enqueue("a", model="old")
    name = f"{queue_name}@old"
    redis.lmove(queue_key(name), claimed_key(f"w-{queue_name}", name), "LEFT", "RIGHT")
    redis.zadd(keys.leases_key(queue_name), {f"w-{queue_name}": now_ms(redis) - 60_000})
    redis.hset(f"rq:worker:w-{queue_name}", mapping={"birth": "x", keys.INCARNATION_FIELD: "before", "pid": "1"})
    made = GenerationWorker(engine, redis, queue_name, f"w-{queue_name}", names=["new"])
    made._registration._seen, made._registration._looks = str(now_ms(redis)), 0
    try:
        wait_until(lambda: _take(made), "the dead worker's name to be free", 60)
        assert waiting(redis, name) == [job.id]
        assert not redis.exists(claimed_key(made.name, name))
    finally:
        made._claims.close()
        made._registration.leave()


def _take(worker: GenerationWorker) -> bool:
    worker.served.renew()
    worker.hostname, worker.pid, worker.birth_date, worker.last_heartbeat = "here", 1, utc_now(), utc_now()
    return worker._registration.take(worker._entry(), worker.served.queues)


def test_jobs_of_a_model_that_is_gone_are_kept_up(ours: Turns, redis: Redis, serve: Serve, queue_name: str) -> None:
    """What is due is enqueued, and registries are cleaned, though no worker serves the model any more."""
    serve("gone")
    lapse(redis, queue_name, "gone", 3600)
    queue = Queue(f"{queue_name}@gone", connection=redis, serializer=JSONSerializer)
    job = queue.enqueue_at(utc_now(), TASK, "a", model="gone")
    stale = queue.create_job(TASK)
    stale.save()
    redis.zadd(queue.finished_job_registry.key, {stale.id: time.time() - 1})
    ours.worker._last_heartbeat = ours.worker._no_upkeep_before = 0.0
    ours.worker.last_cleaned_at = None
    redis.delete(queue.registry_cleaning_key)
    ours.until(lambda: waiting(redis, queue.name) == [job.id], "the job that is due to be enqueued")
    assert not redis.zcard(queue.finished_job_registry.key)
    ours.take(10)
    assert job.get_status() == "queued"


def test_a_job_in_a_models_queue_is_cancelled(
    ours: Turns, redis: Redis, client: Client, serve: Serve, queue_name: str
) -> None:
    serve("theirs")
    waits, runs = client.enqueue("a", model="theirs"), client.enqueue("a", model="ours", max_new_tokens=400)
    ours.until(lambda: runs.status() == "started", "the job to run")
    assert waits.cancel()
    assert runs.cancel()
    assert waiting(redis, f"{queue_name}@theirs") == []
    ours.until(ours.worker._has_no_jobs, "the worker to let go")
    for job in (waits, runs):
        with pytest.raises(JobCancelled):
            job.result(10)
    assert redis.hget(keys.totals_key(queue_name), keys.CANCELED_FIELD) == b"2"
    assert redis.xlen(keys.cancellations_key(queue_name)) == 2, "where those who wait read"


def test_names_lapse_when_their_last_worker_ends(
    engine: Engine, redis_server: RedisServer, redis: Redis, queue_name: str
) -> None:
    with take_turns(engine, redis_server, queue_name, names=["both", "first"], name=f"1-{queue_name}"):
        with take_turns(engine, redis_server, queue_name, names=["both", "second"], name=f"2-{queue_name}"):
            assert served_now(redis, queue_name) == {b"both", b"first", b"second"}
        assert served_now(redis, queue_name) == {b"both", b"first"}
    assert served_now(redis, queue_name) == set()
    assert redis.zcard(models_key(queue_name)) == 3, "they are remembered"


def test_names_are_told_again_once_redis_is_back(ours: Turns, redis: Redis, queue_name: str) -> None:
    """By the next beat, a second later at most: whoever asks for the model meanwhile is refused."""
    ours.worker.lease.beat()
    redis.delete(models_key(queue_name), keys.leases_key(queue_name))
    ours.worker.lease.beat()
    assert served_now(redis, queue_name) == {b"ours", b"alias"}
    assert redis.ttl(models_key(queue_name)) > 0
    for name in ("ours", "alias"):
        lapse(redis, queue_name, name, 600)
    redis.zadd(keys.leases_key(queue_name), {ours.worker.name: now_ms(redis) - 600_000})
    ours.worker.lease.beat()
    assert served_now(redis, queue_name) == {b"ours", b"alias"}


def test_a_name_is_forgotten_once_nobody_needs_it(redis: Redis, serve: Serve, queue_name: str) -> None:
    serve("waits", "results", "idle", "recent")
    redis.rpush(queue_key(f"{queue_name}-low@waits"), "x")
    redis.zadd(keys.registry_key("finished", f"{queue_name}@results"), {"x": time.time() + 100})
    redis.sadd("rq:queues", queue_key(f"{queue_name}@idle"))
    for name in ("waits", "results", "idle"):
        lapse(redis, queue_name, name, 8 * 24 * 3600)
    lapse(redis, queue_name, "recent", 6 * 24 * 3600)
    redis.zadd(keys.leases_key(queue_name), {"dead": 1})
    served = serve("own")
    assert {"waits", "results", "idle", "recent", "own"} == set(served._pool), "a dead worker may have its jobs"
    redis.delete(keys.leases_key(queue_name))
    served.renew()
    assert {"waits", "results", "recent", "own"} == set(served._pool)
    assert queue_key(f"{queue_name}@idle").encode() not in redis.smembers("rq:queues")


def test_a_pool_remembers_a_bounded_number_of_names(redis: Redis, serve: Serve, queue_name: str) -> None:
    with pytest.raises(BadRequest, match="17 names are given to one model by --served-model-name; the limit is 16"):
        serve(*map(str, range(17)))
    for start in range(0, 96, 16):
        serve(*(f"m{n}" for n in range(start, start + 16)))
    serve("m96", "m97", "m98", "m99")
    with pytest.raises(BadRequest, match="under 100 names, and 100 is the limit"):
        serve("one more")
    serve("m5")
    lapse(redis, queue_name, "m7", 61)
    serve("one more")
    assert redis.zscore(models_key(queue_name), "m7") is None


def test_what_else_stands_under_the_key_of_the_names_does_no_harm(
    redis: Redis, client: Client, serve: Serve, queue_name: str
) -> None:
    redis.set(models_key(queue_name), "x")
    assert client.enqueue("a").status() == "queued"
    with Client(client.redis_url, queue_name, max_queue=5) as bounded:
        assert bounded.enqueue("a").status() == "queued"
    assert Reaper(redis, queue_name).reap("nobody") is not None
    named = ServedNames(redis, queue_name, ["good"])
    redis.sadd(keys.workers_key(queue_name), "x")
    named.leave("y")
    serve("good")
    redis.zadd(models_key(queue_name), {b"\xff\n": 1e15, b"x" * 1000: 1e15})
    assert serve("good")._pool == {"good"}
    with pytest.raises(ModelUnknown, match=r"served are: good;"):
        client.enqueue("a", model="x")
