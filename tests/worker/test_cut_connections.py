"""Whichever command of a worker's is the last one that reaches Redis, no key that should expire is left for ever.

All commands of some jobs, with all ways in which they end, are noted as they are sent. Then they are sent once more, to
an empty Redis, one after the other, a transaction as one; after each, what has no time to live is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from redis import Redis
from redis.connection import Connection
from rq import Queue, RateLimit, Retry
from rq.serializers import JSONSerializer
from rq.utils import as_text
from support.redis_process import OpenRedis
from support.turns import Turns, take_turns

from fastgpt2 import Client, Engine
from fastgpt2.protocol.connection import connect
from fastgpt2.protocol.durability import DISK
from fastgpt2.protocol.keys import CRASHES_FIELD
from fastgpt2.worker.reaper import MAX_CRASHES, Reaper

pytestmark = pytest.mark.processes

TASK = "fastgpt2.worker.tasks.generate"
QUEUE = "cut"
Command = tuple[Any, ...]

# What has no time to live by intention: what waits or runs, and what RQ keeps for ever.
FOR_EVER = re.compile(
    r"fastgpt2:(taken|leases):.*|rq:(queue|wip|finished|failed|canceled|deferred|scheduled|ready|rl):.*"
    r"|rq:(queues|workers|workers:.*|rl-keys)|rq:job::?[^:]*(:depende\w+)?"
)
ENDED = (b"finished", b"failed", b"stopped")
NOT_SENT_AGAIN = {
    "HELLO",
    "AUTH",
    "CLIENT",
    "PING",
    "SUBSCRIBE",
    "UNSUBSCRIBE",
    "WATCH",
    "UNWATCH",
    "SELECT",
    "WAITAOF",
}


@contextmanager
def noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Command]]]:
    """Note what is sent meanwhile: each command alone, but those of a transaction together."""
    units: list[list[Command]] = []
    open_ones: dict[int, list[Command]] = {}
    kind: Any = type(Connection()._command_packer)  # type: ignore[no-untyped-call]
    pack = kind.pack

    def packing(self: Any, *words: Any) -> Any:
        name = str(words[0]).split()[0].upper()
        if name == "MULTI":
            open_ones[id(self)] = []
        elif name == "EXEC":
            units.append(open_ones.pop(id(self)))
        elif id(self) in open_ones:
            open_ones[id(self)].append(words)
        elif name not in NOT_SENT_AGAIN:
            units.append([words])
        return pack(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "pack", packing)
        yield units


def send(redis: Redis, unit: list[Command]) -> None:
    with redis.pipeline(transaction=len(unit) > 1) as pipeline:
        for command in unit:
            pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
        pipeline.execute(raise_on_error=False)


def run_all_kinds(turns: Turns, redis: Redis, client: Client) -> None:
    """Run jobs that end in all ways, with their texts streamed."""
    queue = Queue(QUEUE, connection=redis, serializer=JSONSerializer)
    # Without a time to live of their own, RQ keeps the results of jobs that failed for ever.
    options: dict[str, Any] = {"stream": True, "max_new_tokens": 4, "ignore_eos": True, "failure_ttl": 1000}
    worker = turns.worker
    first = queue.enqueue(TASK, "Once", **options)
    queue.enqueue(TASK, "Once", depends_on=first, **options)
    refused: dict[str, Any] = {"num_beams": 4, "stream": True, "failure_ttl": 1000}
    queue.enqueue(TASK, "Once", **refused)
    queue.enqueue(TASK, "Once", retry=Retry(1), **refused)
    for _ in range(2):
        queue.enqueue(TASK, "Once", rate_limit=RateLimit("limit", 1), **options)
    turns.until(worker._has_no_jobs, "all to end")
    turns.until(lambda: not worker._exchange(burst=True, idle=True), "none to be left")
    options["max_new_tokens"] = 400
    for end in ("cancel", "cancel by RQ", "delete", "stop", "give back", "die", "poison"):
        job = queue.enqueue(TASK, "Once", **options)
        turns.until(lambda: any(each.sequences and each.sequences[0].token_ids for each in worker.batch), "a token")
        turns.take(2)
        (running,) = worker.batch
        match end:
            case "cancel":
                client.cancel(job.id)
            case "cancel by RQ":
                job.cancel()
            case "delete":
                job.delete()
                worker._last_heartbeat = 0.0
            case "stop":
                worker._stop_commands.put(job.id)
            case "give back":
                worker.outbox.give_back([running])
                job.delete()
            case _:
                redis.hset(job.key, CRASHES_FIELD, MAX_CRASHES - 1 if end == "poison" else 0)
                worker.batch.drop(running)
                Reaper(redis, QUEUE).reap(worker.name)
                if end == "die":
                    job.delete()
        turns.until(worker._has_no_jobs, f"the job to end by: {end}")


def test_nothing_is_left_for_ever(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpenRedis() as server, connect(server.url) as redis, Client(server.url, QUEUE) as client:
        with noted(monkeypatch) as units, take_turns(engine, server, QUEUE, DISK) as turns:
            run_all_kinds(turns, redis, client)
            turns.worker.metrics.report()
        sent = {str(command[0]) for unit in units for command in unit}
        assert {"EVALSHA", "SET", "HSET"} <= sent
        for expired in ("", f"rq:worker:{turns.worker.name}", "fastgpt2:stream:*"):
            seen = send_again(redis, units, expired)
            for kind in ("stream:X", "totals:cut", "latest:cut", "recent:cut:X", "asked:"):
                assert [key for key in seen if key.startswith(f"fastgpt2:{kind}")], kind


def send_again(redis: Redis, units: list[list[Command]], expired: str) -> set[str]:
    """Send it all to an empty Redis, and look after each unit; return which kinds of keys there were.

    Args:
        expired: a pattern of keys that have always just expired, as the hash of a worker that was silent for long.
    """
    redis.flushall()
    seen = set()
    for unit in units:
        for old in redis.keys(expired):
            redis.delete(old)
        send(redis, unit)
        for key in map(as_text, redis.keys()):
            seen.add(re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}|\d{6,}", "X", key))
            is_ended = re.fullmatch("rq:job:[^:]+", key) and redis.hget(key, "status") in ENDED
            if is_ended or not FOR_EVER.fullmatch(key):
                assert redis.ttl(key) != -1, f"{key} is left for ever after {[command[:3] for command in unit]}"
    return seen
