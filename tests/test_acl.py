"""`deploy/redis.acl` on a real Redis: its users can do their part, and no more."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import ResponseError
from rq import Queue, RateLimit
from rq.command import send_stop_job_command
from rq.serializers import JSONSerializer
from support.redis_process import OpenRedis
from support.running import GOLDEN, HOLDABLE, jobs_held, wait_until

from fastgpt2 import Client
from fastgpt2.api.pool.job_list import read_latest, read_prompts
from fastgpt2.api.pool.job_pages import STATES
from fastgpt2.api.pool.prometheus import render_metrics
from fastgpt2.api.pool.status import check_readiness, read_status, record_depth
from fastgpt2.errors import JobCancelled, ModelUnknown, QueueFull, RedisAccessDenied
from fastgpt2.protocol.connection import connect

ENTRIES: list[dict[str, Any]] = json.loads((GOLDEN / "demo_continuations.json").read_text("utf-8"))["continuations"]
RULES = Path(__file__).parent.parent / "deploy" / "redis.acl"
TASK = "fastgpt2.worker.tasks.generate"
TOKEN = "correct-horse-battery-staple"


class GuardedRedis(OpenRedis):
    """A Redis with the file as shipped, but for the passwords, and an administrator who reads the log of denials."""

    def url_of(self, user: str) -> str:
        return f"redis://{user}:secret-{user}@127.0.0.1:{self.port}/0"

    @property
    def url(self) -> str:
        return self.url_of("admin")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedRedis]:
    file = tmp_path_factory.mktemp("acl") / "redis.acl"
    rules = re.sub(r">CHANGE-ME-(\w+)", r">secret-\1", RULES.read_text("utf-8"))
    # As in the documentation of Redis, comments are not part of the format.
    lines = [line for line in rules.splitlines() if line.startswith("user ")]
    assert [line.split()[1] for line in lines] == ["default", "worker", "client", "endpoint", "monitor"]
    file.write_text("\n".join([*lines, "user admin on >secret-admin ~* &* +@all", ""]))
    with GuardedRedis("--aclfile", str(file)) as made:
        yield made


@pytest.fixture(scope="module")
def admin(server: GuardedRedis) -> Iterator[Redis]:
    with server.administered() as connection:
        yield connection


@pytest.fixture(scope="module")
def system(server: GuardedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Start a supervised worker and the endpoint, each as its own user; return the one's log and the other's URL."""
    folder = tmp_path_factory.mktemp("system")
    logs = {name: folder / f"{name}.log" for name in ("pool", "api")}
    users = {"pool": "worker", "api": "endpoint"}
    tokens = folder / "tokens"
    tokens.write_text(f"alice:{TOKEN} waiting=20 tokens_per_minute=1000000")
    options = {"pool": ["--workers", "1"], "api": ["--port", "0", "--token-file", str(tokens)]}
    processes = []
    for name, log in logs.items():
        own = {"FASTGPT2_REDIS_URL": server.url_of(users[name]), "FASTGPT2_MODEL": "demo", "FASTGPT2_MAX_BATCH": "4"}
        with log.open("w") as out:
            command = [*HOLDABLE, name, *options[name]]
            processes.append(subprocess.Popen(command, env={**os.environ, **own}, stdout=out, stderr=out))
    wait_until(lambda: "is ready" in logs["pool"].read_text(), "the worker to be ready")
    wait_until(lambda: "endpoint on" in logs["api"].read_text(), "the endpoint to listen")
    yield logs["pool"], logs["api"].read_text().partition("endpoint on ")[2].split()[0]
    for process in processes:
        process.terminate()
        assert process.wait(30) == 0


@contextmanager
def suspended(admin: Redis) -> Iterator[None]:
    """Suspend the workers, so that nobody claims what waits. An idle one may claim a job before it looks again."""
    admin.set("rq:suspended", 1)
    workers: Any = admin.smembers("rq:workers")
    wait_until(lambda: {admin.hget(key, "state") for key in workers} == {b"suspended"}, "the workers to see it")
    yield
    admin.delete("rq:suspended")


def admin_queue(admin: Redis) -> Queue:
    return Queue("fastgpt2", connection=admin, serializer=JSONSerializer)


def denials(admin: Redis) -> list[str]:
    entries: Any = admin.acl_log()
    # What the library says of itself from Redis 7.2 on may be denied: it goes on.
    entries = [entry for entry in entries if entry["object"] != "client|setinfo"]
    return [f"{entry['username']}: {entry['reason']} {entry['object']} ({entry['context']})" for entry in entries]


@pytest.fixture
def nothing_denied(admin: Redis) -> Iterator[None]:
    admin.acl_log_reset()
    yield
    assert denials(admin) == []


@pytest.mark.usefixtures("nothing_denied", "system")
def test_a_client_and_a_worker_can_do_their_part(server: GuardedRedis, admin: Redis) -> None:
    entry = ENTRIES[0]
    with Client(server.url_of("client")) as client:
        assert client.workers() == 1
        for priority in ("high", "normal", "low"):
            job = client.enqueue(entry["prompt"], max_new_tokens=5, ignore_eos=True, priority=priority)
            assert list(job.result(timeout=20).token_ids) == entry["ids"][:5]
        with Client(server.url_of("client"), max_queue=100) as bounded:
            named = bounded.enqueue(entry["prompt"], max_new_tokens=5, ignore_eos=True, model="demo")
            assert list(named.result(timeout=20).token_ids) == entry["ids"][:5]
            with pytest.raises(ModelUnknown):
                bounded.enqueue(entry["prompt"], model="other")
        with client.stream(entry["prompt"], max_new_tokens=20, ignore_eos=True) as stream:
            text = "".join(piece.text for piece in stream)
        assert stream.result is not None
        assert text == stream.result.text
        assert len(list(client.map([e["prompt"] for e in ENTRIES], max_new_tokens=3))) == len(ENTRIES)
        refused = client.enqueue("a", max_new_tokens=3, logprobs=2, echo=True)
        assert refused.result(timeout=20).logprobs is not None
        with jobs_held():
            long = client.enqueue(entry["prompt"], max_new_tokens=480, ignore_eos=True)
            wait_until(lambda: long.status() == "started", "the job to start")
            assert long.cancel()
            with pytest.raises(JobCancelled):
                long.result(timeout=20)
    # What RQ's own users do, whose rights are their own affair; the worker's part of it is what is looked at.
    rq = admin_queue(admin)
    first = rq.enqueue(TASK, entry["prompt"], max_new_tokens=5)
    after = rq.enqueue(TASK, entry["prompt"], max_new_tokens=5, depends_on=first)
    strayed = rq.enqueue(TASK, entry["prompt"], max_new_tokens=5, model="nobody's")
    failing = rq.enqueue(TASK, entry["prompt"], num_beams=4)
    limited = [rq.enqueue(TASK, "Once", max_new_tokens=2, rate_limit=RateLimit("limit", 1)) for _ in range(2)]
    wait_until(lambda: limited[1].get_status().value == "finished", "the job that waited for a slot to finish")
    wait_until(lambda: after.get_status().value == "finished", "the dependent job to finish")
    wait_until(lambda: strayed.get_status().value == "failed", "the job of a model that nobody serves to fail")
    wait_until(lambda: failing.get_status().value == "failed", "the refused job to fail")
    with jobs_held():
        endless = rq.enqueue(TASK, entry["prompt"], max_new_tokens=480, ignore_eos=True)
        wait_until(lambda: endless.get_status().value == "started", "the long job to start")
        send_stop_job_command(admin, endless.id, serializer=JSONSerializer)
        wait_until(lambda: endless.get_status().value == "stopped", "the long job to stop")


@pytest.mark.usefixtures("nothing_denied")
def test_a_worker_that_dies_and_one_that_is_told_to_stop(
    server: GuardedRedis, admin: Redis, system: tuple[Path, str]
) -> None:
    """The supervisor, and the worker that comes next, are the user worker too."""
    log, _ = system
    for signum, said in ((signal.SIGKILL, "jobs put back"), (signal.SIGTERM, "told to stop")):
        (key,) = admin.smembers("rq:workers")
        pid: Any = admin.hget(key, "pid")
        with Client(server.url_of("client")) as client:
            with jobs_held():
                jobs = [client.enqueue(ENTRIES[0]["prompt"], max_new_tokens=400, ignore_eos=True) for _ in range(3)]
                wait_until(lambda jobs=jobs: all(job.status() == "started" for job in jobs), "the jobs to start")  # type: ignore[misc]
                os.kill(int(pid), signum)
                wait_until(lambda said=said: said in log.read_text(), said)  # type: ignore[misc]
            for job in jobs:
                assert job.result(timeout=30).usage.completion_tokens == 400
        wait_until(lambda key=key: admin.smembers("rq:workers") not in ({key}, set()), "the next worker")  # type: ignore[misc]


@pytest.mark.usefixtures("nothing_denied")
def test_the_endpoint_and_a_monitor_can_do_their_part(
    server: GuardedRedis, admin: Redis, system: tuple[Path, str]
) -> None:
    _, url = system
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.addheaders = [("Authorization", f"Bearer {TOKEN}")]
    with opener.open(f"{url}/status", timeout=20) as answer:
        assert json.loads(answer.read())["queue"]["name"] == "fastgpt2"
    body = json.dumps({"inputs": ENTRIES[0]["prompt"], "parameters": {"max_new_tokens": 3}}).encode()
    with opener.open(urllib.request.Request(url, body), timeout=20) as answer:
        assert answer.status == 200
    # Two at once, so that the second one wakes the reader of the first.
    completion = json.dumps({"prompt": ENTRIES[0]["prompt"], "max_tokens": 200, "stream": True}).encode()
    for _ in range(2):
        request = urllib.request.Request(f"{url}/v1/completions", completion, {"idempotency-key": "once"})
        with jobs_held():
            first = opener.open(urllib.request.Request(f"{url}/v1/completions", completion), timeout=20)
            second = opener.open(request, timeout=20)
        with first, second:
            assert first.read().endswith(b"data: [DONE]\n\n")
            assert second.read().endswith(b"data: [DONE]\n\n")
    job = json.dumps({"prompt": ENTRIES[0]["prompt"], "max_new_tokens": 480}).encode()
    with jobs_held():
        with opener.open(urllib.request.Request(f"{url}/v1/jobs", job), timeout=20) as answer:
            job_url = f"{url}/v1/jobs/{json.loads(answer.read())['id']}"
        with opener.open(urllib.request.Request(job_url, method="DELETE"), timeout=20) as answer:
            assert json.loads(answer.read())["status"] == "canceled"
    failing = admin_queue(admin).enqueue(TASK, ENTRIES[0]["prompt"], num_beams=4, rate_limit=RateLimit("again", 1))
    wait_until(lambda: failing.get_status().value == "failed", "the refused job to fail")
    for again in (job_url, f"{url}/v1/jobs/{failing.id}"):
        with opener.open(urllib.request.Request(f"{again}/requeue", method="POST"), timeout=20) as answer:
            assert answer.status == 202
    wait_until(lambda: failing.get_status().value == "failed", "the refused job to fail again")
    lists = [f"/v1/jobs?state={state}&limit=1" for state in STATES]
    details = f"/v1/jobs/{failing.id}?details=true"
    for path in ("/ready", "/metrics", "/status?history=true", "/v1/models", "/v1/jobs", details, *lists):
        with opener.open(f"{url}{path}", timeout=20) as answer:
            assert answer.status == 200

    async def look() -> dict[str, Any]:
        async with AsyncRedis.from_url(server.url_of("monitor")) as connection:
            assert b"fastgpt2_jobs_ended_total" in (await render_metrics(connection, "fastgpt2"))[1]
            return await read_status(connection, "fastgpt2", history=True)

    async def look_closely(ready: bool = True) -> None:
        async with AsyncRedis.from_url(server.url_of("endpoint")) as connection:
            assert (await check_readiness(connection, "fastgpt2") is None) is ready
            await record_depth(connection, "fastgpt2")
            assert (await read_status(connection, "fastgpt2", history=True))["totals"]["generated_tokens"] > 0
            assert b"fastgpt2_jobs_ended_total" in (await render_metrics(connection, "fastgpt2"))[1]
            latest = await read_latest(connection, "fastgpt2", 10)
            assert latest
            assert await read_prompts(connection, [latest[0]["id"]]) == {latest[0]["id"]: ENTRIES[0]["prompt"]}

    assert len(asyncio.run(look())["workers"]) == 1
    wait_until(lambda: admin.llen("fastgpt2:latest:fastgpt2"), "the worker to tell what it did")
    asyncio.run(look_closely())
    with Client(server.url_of("endpoint"), max_queue=1) as client, suspended(admin):
        waiting = client.enqueue(ENTRIES[0]["prompt"])
        asyncio.run(look_closely(ready=False))
        with pytest.raises(QueueFull):
            client.enqueue(ENTRIES[0]["prompt"])
        assert waiting.cancel()
    # The token of these requests has limits, of which the workers told what they used.
    used: Any = admin.hgetall("fastgpt2:token-totals:fastgpt2")
    assert int(used[b"alice:generated_tokens"]) > 400
    assert admin.exists("fastgpt2:account:state:fastgpt2:alice", "fastgpt2:account:usage:fastgpt2:alice") == 2
    totals: Any = admin.hgetall("fastgpt2:totals:fastgpt2")
    assert (totals[b"refused"], int(totals[b"ended:canceled:on_request"]) > 0) == (b"1", True)


@pytest.mark.usefixtures("system")
def test_a_monitor_cannot_tell_how_long_a_job_waits(server: GuardedRedis, admin: Redis) -> None:
    async def look() -> dict[str, Any]:
        async with AsyncRedis.from_url(server.url_of("monitor")) as connection:
            return await read_status(connection, "fastgpt2")

    with Client(server.url_of("client")) as client, suspended(admin):
        waiting = client.enqueue("a")
        queue = asyncio.run(look())["queue"]
        assert (queue["depth"], queue["oldest_wait_seconds"]) == (1, None)
        assert waiting.cancel()


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ("worker", "FLUSHALL"),
        ("worker", "CONFIG GET requirepass"),
        ("worker", "KEYS *"),
        ("worker", "GET elsewhere"),
        ("worker", "SCRIPT FLUSH"),
        ("worker", "ACL LIST"),
        ("client", "FLUSHALL"),
        ("client", "KEYS *"),
        ("client", "DEL rq:job:x"),
        ("client", "HSET rq:worker:x model y"),
        ("client", "SADD rq:workers:fastgpt2 x"),
        ("client", "LRANGE rq:queue:fastgpt2 0 -1"),
        ("client", "XADD fastgpt2:stream:x * a b"),
        ("client", "ZADD fastgpt2:leases:fastgpt2 1 x"),
        ("client", "PUBLISH rq:pubsub:x stop"),
        ("client", "HSET fastgpt2:totals:fastgpt2 refused 0"),
        ("client", "HMGET fastgpt2:totals:fastgpt2 refused"),
        ("client", "LRANGE fastgpt2:latest:fastgpt2 0 -1"),
        ("client", "EVAL return(redis.call('DEL','rq:job:x')) 0"),
        ("client", "EVAL return(redis.call('GET','elsewhere')) 0"),
        ("endpoint", "ZADD fastgpt2:leases:fastgpt2 1 x"),
        ("endpoint", "PUBLISH rq:pubsub:x stop"),
        ("endpoint", "HSET fastgpt2:totals:fastgpt2 refused 0"),
        ("endpoint", "LPUSH fastgpt2:latest:fastgpt2 x"),
        ("endpoint", "LRANGE rq:queue:fastgpt2 0 -1"),
        ("endpoint", "FLUSHDB"),
        ("endpoint", "HINCRBY fastgpt2:token-totals:fastgpt2 alice:prompt_tokens 1"),
        ("endpoint", "HDEL rq:job:x status"),
        ("client", "ZREM fastgpt2:account:jobs:fastgpt2:alice x"),
        ("client", "HGET fastgpt2:account:state:fastgpt2:alice debt"),
        ("monitor", "HGETALL rq:job:x"),
        ("monitor", "HMGET rq:job:x data"),
        ("monitor", "LRANGE fastgpt2:latest:fastgpt2 0 -1"),
        ("monitor", "HINCRBY fastgpt2:totals:fastgpt2 refused 1"),
        ("monitor", "XREVRANGE rq:results:x + -"),
        ("monitor", "RPUSH rq:queue:fastgpt2 x"),
        ("monitor", "EVAL return(1) 0"),
        ("monitor", "EVALSHA e0e1f9fabfc9d4800c877a703b823ac0578ff8db 0"),
    ],
)
def test_nobody_can_do_more(server: GuardedRedis, user: str, words: str) -> None:
    connection = connect(server.url_of(user))
    try:
        with pytest.raises(ResponseError, match=r"(?i)no permission|no perm|ACL failure|can't run this command"):
            connection.execute_command(*words.split())  # type: ignore[no-untyped-call]
    finally:
        connection.close()


def test_nobody_comes_in_without_a_name_or_with_a_wrong_password(server: GuardedRedis) -> None:
    for url in (f"redis://127.0.0.1:{server.port}/0", f"redis://client:wrong@127.0.0.1:{server.port}/0"):
        with Client(url) as client, pytest.raises(RedisAccessDenied, match="denied access") as caught:
            client.enqueue("a")
        assert "wrong" not in str(caught.value).replace("WRONGPASS", "")
