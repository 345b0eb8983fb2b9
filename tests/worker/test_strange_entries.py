"""Strange entries in every key that a worker reads or writes: the good jobs beside them are answered all the same.

One Redis and one worker process serve all tests here. `HYPOTHESIS_PROFILE=long` tries a hundred times as many examples.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis
from redis.exceptions import ResponseError
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import as_text
from support.redis_process import OpenRedis
from support.running import GOLDEN, HOLDABLE, jobs_held, wait_until

from fastgpt2 import Client
from fastgpt2.errors import BadRequest, JobCancelled
from fastgpt2.protocol import keys

pytestmark = pytest.mark.processes

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
TASK = "fastgpt2.worker.tasks.generate"
ENTRY: dict[str, Any] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"][0]
QUEUE = "strange"
# Long enough to be held.
LONG_JOB = {"max_new_tokens": 480}
IDS_OF_AN_OLDER_RQ = [
    "user:42",
    "a.b",
    "two words",
    "two\nlines",
    "Grüße-日本語-\U0001f600",
    "a:b:c:d",
    ":",
    "x" * 10_000,
    "{a}",
    "%s%n",
    "../../etc",
    "*",
    "\x00\x01",
    "",
]


class Bench:
    """A worker process, a client, and the Redis between them."""

    def __init__(self, server: OpenRedis, log: Path) -> None:
        self.server, self.log = server, log
        self.client = Client(server.url, QUEUE)
        self.redis: Redis = self.client.connection
        self.queue = Queue(QUEUE, connection=self.redis, serializer=JSONSerializer)
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        own = {"FASTGPT2_REDIS_URL": self.server.url, "FASTGPT2_QUEUE": QUEUE, "FASTGPT2_MODEL": "demo"}
        more = {"FASTGPT2_MAX_BATCH": "4", "FASTGPT2_THREADS": "1"}
        with self.log.open("a") as out:
            process = subprocess.Popen([*HOLDABLE, "worker"], env={**os.environ, **own, **more}, stderr=out, text=True)
        # The executions of a worker have a name that is longer.
        wait_until(lambda: self.redis.keys("rq:worker:*.*.*[^s]"), "the worker to register")
        (key,) = self.redis.keys("rq:worker:*.*.*[^s]")
        self.worker = as_text(key).removeprefix("rq:worker:")
        return process

    def fields(self, **options: Any) -> dict[Any, Any]:
        """Return the hash of a good job, as RQ writes it."""
        asked = {"prompt": ENTRY["prompt"], "max_new_tokens": 3, "ignore_eos": True, **options}
        job = Job.create(
            TASK, kwargs=asked, connection=self.redis, serializer=JSONSerializer, origin=QUEUE, timeout=180
        )
        job._status = "queued"  # type: ignore[assignment]
        job.enqueued_at = job.created_at
        return job.to_dict()

    def put(self, job_id: str | bytes, fields: dict[Any, Any]) -> None:
        """Enqueue a job as an older RQ does, under any id."""
        raw = job_id if isinstance(job_id, bytes) else job_id.encode()
        with self.redis.pipeline() as pipeline:
            if fields:
                pipeline.hset(b"rq:job:" + raw, mapping=fields)
            pipeline.rpush(f"rq:queue:{QUEUE}", raw)
            pipeline.execute()

    def answers(self) -> None:
        """A good job is answered."""
        job_id = uuid.uuid4().hex
        self.put(job_id, self.fields())
        assert list(self.client.result(job_id, timeout=60).token_ids) == ENTRY["ids"][:3]

    def lets_go(self) -> None:
        """Nothing stays with the worker."""
        wait_until(lambda: not self.redis.keys("fastgpt2:taken:*"), "the worker to let go of everything")
        assert self.process.poll() is None

    def has_ended(self, job_id: str) -> bool:
        """Tell whether a job has ended; one that is to run again in years is as good as that."""
        return self.redis.hget(f"rq:job:{job_id}", "status") in (b"finished", b"failed", b"scheduled", None)

    def set_aside(self) -> list[dict[str, Any]]:
        return [json.loads(note) for note in self.redis.lrange(keys.set_aside_key(QUEUE), 0, -1)]

    def outcomes(self, name: str) -> int:
        return int(self.redis.hget(keys.totals_key(QUEUE), name) or 0)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("strange")
    with OpenRedis(folder=folder / "redis") as server:
        made = Bench(server, folder / "worker.log")
        try:
            yield made
            # After all that, it still ends as it should.
            made.process.send_signal(signal.SIGTERM)
            assert made.process.wait(timeout=60) == 0
        finally:
            made.process.kill()
            made.process.wait()
            made.client.close()


# Ids.


@pytest.mark.parametrize("job_id", IDS_OF_AN_OLDER_RQ, ids=lambda one: repr(one[:20]))
def test_an_id_of_an_older_rq_is_served(bench: Bench, job_id: str) -> None:
    bench.put(job_id, bench.fields())
    wait_until(lambda: bench.redis.hget(f"rq:job:{job_id}", "status") == b"finished", "the job to be run")
    if job_id:
        assert list(bench.client.result(job_id, timeout=60).token_ids) == ENTRY["ids"][:3]
    bench.lets_go()
    assert bench.redis.zcard(f"rq:wip:{QUEUE}") == 0
    assert bench.redis.zscore(f"rq:finished:{QUEUE}", job_id) is not None
    assert not bench.redis.exists(f"rq:executions:{job_id}")
    assert bench.redis.scard(f"rq:worker:{bench.worker}:executions") == 0


def test_an_id_forges_no_line_of_the_log(bench: Bench) -> None:
    job_id = "evil\n2001-01-01 00:00:00,000 INFO all is well\x1b[31m" + "!" * 10_000
    bench.put(job_id, bench.fields())
    bench.put(job_id + "?", {**bench.fields(), "timeout": "soon"})
    wait_until(lambda: bench.redis.hget(f"rq:job:{job_id}?", "status") == b"failed", "the bad one to be failed")
    wait_until(lambda: bench.redis.hget(f"rq:job:{job_id}", "status") == b"finished", "the good one to be run")
    wait_until(lambda: bench.log.read_text().count("all is well") >= 2, "both to be told")
    assert not [line for line in bench.log.read_text().splitlines() if line.startswith("2001") or len(line) > 5000]
    assert "\x1b" not in bench.log.read_text()


@pytest.mark.parametrize("job_id", ["user:42:long", "a b\n:c"])
def test_a_job_with_an_id_of_an_older_rq_is_cancelled_while_it_runs(bench: Bench, job_id: str) -> None:
    with jobs_held():
        bench.put(job_id, bench.fields(**LONG_JOB))
        wait_until(lambda: bench.redis.hget(f"rq:job:{job_id}", "status") == b"started", "the job to start")
        assert bench.client.cancel(job_id)
        with pytest.raises(JobCancelled):
            bench.client.result(job_id, timeout=60)
    bench.lets_go()
    assert bench.redis.zcard(f"rq:wip:{QUEUE}") == 0


def test_what_waits_for_a_job_with_an_id_of_an_older_rq_is_run_after_it(bench: Bench) -> None:
    parent, child = "parent:1", "child:1 of\ntwo"
    redis = bench.redis
    redis.hset(f"rq:job:{child}", mapping={**bench.fields(), "status": "deferred", "dependency_ids": '["parent:1"]'})
    redis.sadd(f"rq:job:{parent}:dependents", child)
    redis.sadd(f"rq:job::{child}:dependencies", parent)
    redis.zadd(f"rq:deferred:{QUEUE}", {child: time.time()})
    bench.put(parent, bench.fields())
    for job_id in (parent, child):
        assert list(bench.client.result(job_id, timeout=60).token_ids) == ENTRY["ids"][:3]
    bench.lets_go()
    assert redis.zcard(f"rq:ready:{QUEUE}") == redis.zcard(f"rq:deferred:{QUEUE}") == 0


def test_a_job_with_an_id_of_an_older_rq_is_tried_again_later(bench: Bench) -> None:
    fields = {**bench.fields(unknown_option=1), "retries_left": 1, "retry_intervals": "[1]"}
    bench.put("again:1", fields)
    wait_until(lambda: bench.redis.hget("rq:job:again:1", "status") == b"failed", "the second attempt to fail")
    assert bench.redis.hget("rq:job:again:1", keys.ATTEMPTS_FIELD) == b"2"
    with pytest.raises(BadRequest, match="unknown_option"):
        bench.client.result("again:1", timeout=60)
    bench.lets_go()


def test_a_job_of_later_with_any_id_is_enqueued_and_what_cannot_be_read_is_failed(bench: Bench) -> None:
    redis, scheduled = bench.redis, f"rq:scheduled:{QUEUE}"
    redis.hset("rq:job:later:1", mapping={**bench.fields(), "status": "scheduled"})
    redis.hset("rq:job:later:2", mapping={**bench.fields(), "status": "scheduled", "created_at": "never"})
    redis.set("rq:job:later:3", "no hash")
    redis.zadd(scheduled, {"later:1": 1, "later:2": 1, "later:3": 1, "later:4": 1})
    redis.zadd(scheduled, {b"\xff": 1})
    assert list(bench.client.result("later:1", timeout=60).token_ids) == ENTRY["ids"][:3]
    wait_until(lambda: redis.zcard(scheduled) == 0, "the registry to be empty")
    with pytest.raises(BadRequest, match="malformed"):
        bench.client.result("later:2", timeout=60)
    assert redis.get("rq:job:later:3") == b"no hash"
    redis.delete("rq:job:later:3")


# What cannot be served.


@pytest.mark.parametrize(
    "raw", [b"\xff\xfe", b"\xed\xa0\x80", b"y" * (1 << 20) + b"z"], ids=["bytes", "surrogate", "long"]
)
def test_an_entry_that_can_be_no_id_is_set_aside(bench: Bench, raw: bytes) -> None:
    before = bench.outcomes("ended:failed:malformed")
    bench.redis.delete(keys.set_aside_key(QUEUE))
    bench.put(raw, {})
    wait_until(bench.set_aside, "the entry to be set aside")
    (note,) = bench.set_aside()
    assert note["bytes"] == len(raw)
    assert raw.startswith(base64.b64decode(note["base64"]))
    assert "can be no job's id" in note["reason"]
    assert abs(note["at"] - time.time()) < 60
    assert 0 < bench.redis.ttl(keys.set_aside_key(QUEUE)) <= keys.SET_ASIDE_TTL_SECONDS
    wait_until(lambda: bench.outcomes("ended:failed:malformed") > before, "the entry to be counted")
    bench.answers()
    bench.lets_go()


@pytest.mark.parametrize("kind", ["string", "list", "set", "zset", "stream"])
def test_an_id_whose_key_is_no_hash_is_failed_set_aside_and_left_as_it_is(bench: Bench, kind: str) -> None:
    job_id = f"of kind:{kind}"
    bench.redis.delete(keys.set_aside_key(QUEUE))
    write(bench.redis, f"rq:job:{job_id}", kind)
    bench.put(job_id, {})
    wait_until(bench.set_aside, "the entry to be set aside")
    bench.lets_go()
    (note,) = bench.set_aside()
    assert note["id"] == job_id
    assert f"it is a {kind}, no hash" in note["reason"]
    assert bench.redis.xlen(f"rq:results:{job_id}") == 1
    assert bench.redis.type(f"rq:job:{job_id}") == kind.encode()
    assert bench.redis.ttl(f"rq:job:{job_id}") == -1
    assert bench.redis.zscore(f"rq:failed:{QUEUE}", job_id)


def test_what_failed_goes_back_by_the_commands_of_the_documentation(bench: Bench) -> None:
    bench.redis.delete("rq:job:user:42", "rq:results:user:42")
    bench.put("user:42", {**bench.fields(), "timeout": "9" * 400})
    with pytest.raises(BadRequest, match="timeout has 400 characters; the limit is 10000000000"):
        bench.client.result("user:42", timeout=60)
    text = (Path(__file__).parent.parent.parent / "docs" / "worker.md").read_text("utf-8")
    commands = [line.split()[1:] for line in text.splitlines() if line.startswith("redis-cli ")]
    assert len(commands) == 7
    for words in commands:
        bench.redis.execute_command(*(word.replace(":fastgpt2", f":{QUEUE}") for word in words))  # type: ignore[no-untyped-call]
    assert list(bench.client.result("user:42", timeout=60).token_ids) == ENTRY["ids"][:3]


# Numbers.

NUMBERS = ["9" * 400, "9" * 5000, "9" * 19, "-" + "9" * 400, "NaN", "-inf", "1e400", "", "-5"]
LISTS = ("retry_intervals", "repeat_intervals", "dependency_ids", "meta")
FIELDS = [
    "timeout", "result_ttl", "failure_ttl", "ttl", "retries_left", "number_of_retries", "repeats_left",
    "retry_intervals", "repeat_intervals", "enqueue_at_front", "enqueue_at_front_on_retry",
    "allow_dependency_failures", "rate_limit_concurrency", "success_callback_timeout", "created_at", "enqueued_at",
    "started_at", "dependency_ids", "group_id", "meta", "fastgpt2_attempts", "fastgpt2_crashes",
]  # fmt: skip


def test_no_number_of_a_job_harms_another(bench: Bench) -> None:
    """Half of the jobs fail, and may be tried again; others are to be repeated."""
    job_ids: list[str] = []
    for at, (field, number) in enumerate(product(FIELDS, NUMBERS)):
        for value in (number, f"[{number}]") if field in LISTS else (number,):
            fields = bench.fields(**{"unknown_option": 1} if at % 2 else {"max_new_tokens": 1})
            more: dict[str, Any] = {"retries_left": 1} if at % 2 else {"repeats_left": 1, "result_ttl": 100}
            job_ids.append(f"number-{field}-{len(job_ids)}")
            bench.put(job_ids[-1], {**fields, **(more if at % 3 else {}), field: value})
    bench.answers()
    for job_id in job_ids:
        wait_until(partial(bench.has_ended, job_id), f"{job_id} to end")
    bench.lets_go()
    assert bench.redis.zcard(f"rq:wip:{QUEUE}") == 0


# Keys that many jobs share.


def write(redis: Redis, key: str | bytes, kind: str) -> None:
    """Write something of a kind under a key, at once: a worker may write there at any moment."""
    with redis.pipeline() as pipeline:
        pipeline.delete(key)
        match kind:
            case "string":
                pipeline.set(key, "junk")
            case "list":
                pipeline.rpush(key, "junk")
            case "set":
                pipeline.sadd(key, "junk")
            case "zset":
                pipeline.zadd(key, {"junk": 1})
            case "hash":
                pipeline.hset(key, "junk", "junk")
            case "stream":
                pipeline.xadd(key, {"junk": "junk"})
        pipeline.execute()


# Keys of RQ, which are left as they are; the job must be answered in spite of them.
SHARED = [
    "rq:wip:{queue}",
    "rq:canceled:{queue}",
    "rq:finished:{queue}",
    "rq:failed:{queue}",
    "rq:deferred:{queue}",
    "rq:scheduled:{queue}",
    "rq:ready:{queue}",
    "rq:queue:{queue}-high",
    "rq:queue:{queue}-low",
    "rq:queue:{queue}:intermediate",
    "rq:workers",
    "rq:workers:{queue}",
    "rq:queues",
    "rq:groups",
    "rq:rl-keys",
    "rq:scheduler-lock:{queue}",
    "rq:maintenance-lock:{queue}",
    "rq:clean_registries:{queue}",
    "rq:worker:{worker}",
    "rq:worker:{worker}:executions",
    "fastgpt2:taken:{worker}:{queue}",
    "fastgpt2:taken:{worker}:{queue}-high",
    "fastgpt2:leases:{queue}",
    "fastgpt2:totals:{queue}",
    "fastgpt2:latest:{queue}",
    "fastgpt2:told:{worker}",
    "fastgpt2:set-aside:{queue}",
    "fastgpt2:recent:{queue}:0",
    "fastgpt2:models:{queue}",
    "fastgpt2:totals:{queue}@demo",
]


@pytest.mark.parametrize("pattern", SHARED)
def test_a_shared_key_of_another_kind_fails_no_job(bench: Bench, pattern: str) -> None:
    """While there is junk under the key, one job is answered, one is cancelled while it runs, and one is failed."""
    key = pattern.format(queue=QUEUE, worker=bench.worker)
    kind = "hash" if bench.redis.type(key) == b"string" else "string"
    try:
        write(bench.redis, key, kind)
        bench.answers()
        running = uuid.uuid4().hex
        with jobs_held():
            bench.put(running, bench.fields(**LONG_JOB))
            wait_until(lambda: bench.client.status(running) == "started", "the job to start")
            bench.redis.hset(f"rq:job:{running}", "status", "canceled")
            with suppress(ResponseError):
                bench.redis.zadd(f"rq:canceled:{QUEUE}", {running: time.time() + 60})
            with pytest.raises(JobCancelled):
                bench.client.result(running, timeout=60)
        bench.put("refused", bench.fields(unknown_option=1))
        with pytest.raises(BadRequest, match="unknown_option"):
            bench.client.result("refused", timeout=60)
        assert bench.process.poll() is None
    finally:
        bench.redis.delete(key, "rq:job:refused", "rq:results:refused")
    wait_until(
        lambda: bench.redis.sismember(f"rq:workers:{QUEUE}", f"rq:worker:{bench.worker}"), "the worker to be known"
    )
    bench.lets_go()


def test_a_worker_starts_among_keys_of_another_kind(bench: Bench, tmp_path: Path) -> None:
    """All of them at once; and that lasts for a heartbeat, a lease and the upkeep at a worker's start."""
    names = [pattern.format(queue="started", worker="late") for pattern in SHARED]
    for key in names:
        write(bench.redis, key, "hash" if "lock" in key or "told" in key else "string")
    bench.redis.delete("rq:worker:late")  # a string there may be the mark of another's
    log = tmp_path / "late.log"
    own = {"FASTGPT2_REDIS_URL": bench.server.url, "FASTGPT2_QUEUE": "started", "FASTGPT2_MODEL": "demo"}
    with log.open("w") as out:
        command = [sys.executable, "-m", "fastgpt2", "worker", "--name", "late"]
        process = subprocess.Popen(command, env={**os.environ, **own}, stderr=out, text=True)
    try:
        with Client(bench.server.url, "started") as client:
            for _ in range(2):
                job_id = uuid.uuid4().hex
                bench.redis.hset(f"rq:job:{job_id}", mapping=bench.fields(max_new_tokens=3))
                bench.redis.rpush("rq:queue:started", job_id)
                assert list(client.result(job_id, timeout=60).token_ids) == ENTRY["ids"][:3]
                bench.redis.hdel("rq:worker:late", "last_heartbeat")
                wait_until(lambda: bench.redis.hexists("rq:worker:late", "last_heartbeat"), "a heartbeat")
        assert "Traceback" not in log.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        bench.redis.delete(*names)


# All of it at random.

raw_ids = st.one_of(
    st.binary(max_size=12),
    st.text(max_size=12).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from([b"user:42", b"", b":", b"a:dependents", b"\xff", b"z" * 3000, b"..", b"{x}"]),
)
numbers = st.one_of(
    st.integers(-(10**30), 10**30).map(str),
    st.integers(1, 5000).map(lambda count: "9" * count),
    st.floats().map(str),
    st.sampled_from(["", "-", "+1", " 7 ", "1e5", "0x7", "null", "[]", "{}", "[1e999]", "[[", "true"]),
)
junk = st.one_of(st.binary(max_size=40), numbers.map(str.encode))
kinds = st.sampled_from(["string", "list", "set", "zset", "hash", "stream"])
of_jobs = st.sampled_from(
    [
        b"rq:job:", b"rq:results:", b"rq:executions:", b"fastgpt2:stream:",
        b"rq:job::%s:dependencies", b"rq:job:%s:dependents",
    ]
)  # fmt: skip
more_fields = [
    *FIELDS,
    "data", "status", "worker_name", "origin", "dependency_id", "rate_limit_key", "webhooks", "exc_info",
]  # fmt: skip
actions = st.one_of(
    st.tuples(st.just("put"), raw_ids, st.dictionaries(st.sampled_from(more_fields), junk, max_size=3)),
    st.tuples(st.just("beside"), raw_ids, of_jobs, kinds),
    st.tuples(st.just("shared"), st.sampled_from(SHARED), kinds),
    st.tuples(
        st.just("worker"), st.sampled_from(["state", "successful_job_count", "total_working_time", "birth"]), junk
    ),
    st.tuples(st.just("listed"), st.sampled_from(["{queue}", "{queue}-high"]), raw_ids),
    st.tuples(
        st.just("registered"),
        st.sampled_from(["wip", "canceled", "finished", "failed", "deferred", "scheduled", "ready"]),
        raw_ids,
        st.floats(allow_nan=False),
    ),
)


def act(bench: Bench, action: tuple[Any, ...]) -> None:
    """Do one strange thing; Redis may refuse it, if an earlier one was in its way."""
    redis = bench.redis
    with suppress(ResponseError):
        match action:
            case ("put", raw, fields):
                bench.put(raw, {**bench.fields(max_new_tokens=1, stream=True), **fields})
            case ("beside", raw, prefix, kind):
                key = prefix % raw if b"%s" in prefix else prefix + raw
                write(redis, key, kind)
                bench.put(raw, {})
            case ("shared", pattern, kind):
                write(redis, pattern.format(queue=QUEUE, worker=bench.worker), kind)
            case ("worker", field, value):
                redis.hset(f"rq:worker:{bench.worker}", field, value)
            case ("listed", pattern, raw):
                redis.rpush(f"fastgpt2:taken:{bench.worker}:{pattern.format(queue=QUEUE)}", raw)
            case ("registered", registry, raw, score):
                redis.zadd(f"rq:{registry}:{QUEUE}", {raw: score})


@settings(
    max_examples=40 * (100 if LONG else 1),
    derandomize=not LONG,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(st.lists(actions, min_size=4, max_size=12))
def test_a_good_job_is_answered_whatever_stands_in_redis(bench: Bench, strange: list[tuple[Any, ...]]) -> None:
    for action in strange:
        act(bench, action)
    bench.answers()
    assert bench.process.poll() is None
