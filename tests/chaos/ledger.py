"""The accounts at the end: every job ended once and rightly, and nothing was left behind."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections import Counter
from typing import Any

from redis import Redis
from rq.results import Result

from chaos.cluster import QUEUE
from chaos.submission import Submitted
from fastgpt2.protocol.keys import queues_of

# What stays in Redis without an expiry although no job is left; each is bounded by what it lists.
_LASTING = [
    r"rq:queues",  # the names of all queues
    r"rq:(finished|failed|canceled|deferred|scheduled):soak.*",  # jobs until they expire, by RQ's upkeep or ours
    r"fastgpt2:leases:soak",  # who died within the last minute
]


def audit(redis: Redis, everything: list[Submitted]) -> tuple[Counter[str], list[str]]:
    """Return how many jobs ended in which way, and a sentence for everything that is not as it should be."""
    ends: Counter[str] = Counter()
    faults: list[str] = []
    for job in everything:
        end, complaints = account(redis, job)
        ends[end] += 1
        faults += [f"job {job.id} ({job.kind}): {complaint}" for complaint in complaints]
    return ends, faults + leftovers(redis)


def account(redis: Redis, job: Submitted) -> tuple[str, list[str]]:
    """Return how a job ended, and a sentence for each thing that is not as it should be."""
    status: Any = redis.hget(f"rq:job:{job.id}", "status")
    results: Any = redis.xrange(f"rq:results:{job.id}")
    kinds = [Result.Type(int(fields[b"type"])) for _, fields in results]
    if status is None:
        return "missing", ["it is gone"]
    if status == b"finished":
        return "finished", _check_result(job, kinds, results)
    if status == b"failed":
        reason = _reason(results)
        if kinds != [Result.Type.FAILED]:
            return "failed", [f"its results are {kinds}"]
        if "PoisonJob" in reason:
            return "poison", []
        return "failed", [] if job.may_fail and job.may_fail in reason else [f"failed: {reason}"]
    if status == b"canceled" and job.may_be_cancelled:
        return "canceled", [] if not kinds else [f"cancelled, and its results are {kinds}"]
    return "unended", [f"it is {status.decode()}"]


def _check_result(job: Submitted, kinds: list[Result.Type], results: Any) -> list[str]:
    if kinds != [Result.Type.SUCCESSFUL]:
        return [f"its results are {kinds}"]
    if job.expected is None:
        return ["it should have failed"]
    value = json.loads(base64.b64decode(results[0][1][b"return_value"]))
    texts = [value, *value.get("alternatives", ())]
    complaints = [] if [text["token_ids"] for text in texts] == job.expected else ["its tokens are wrong"]
    read = [text["text"] for text in texts]
    if job.read is not None and job.read != read:
        complaints.append(f"streamed as {job.read!r}, and it is {read!r}")
    return complaints


def _reason(results: Any) -> str:
    return zlib.decompress(base64.b64decode(results[-1][1][b"exc_string"])).decode() if results else "no reason"


def leftovers(redis: Redis) -> list[str]:
    """Return a sentence for each thing that stays although no job is left."""
    faults = []
    for name in queues_of(QUEUE):
        if redis.llen(f"rq:queue:{name}"):
            faults.append(f"jobs are left in the queue {name}")
        if redis.zcard(f"rq:wip:{name}"):
            faults.append(f"jobs are left as started in {name}: {redis.zrange(f'rq:wip:{name}', 0, 3)}")
    for raw in redis.scan_iter(count=1000):
        key = raw.decode()
        if key.startswith(("fastgpt2:taken:", "rq:execution")):
            faults.append(f"{key} is left behind")
        elif redis.ttl(raw) == -1 and not any(re.fullmatch(pattern, key) for pattern in _LASTING):
            faults.append(f"{key} never expires: {_content(redis, raw)}")
    return faults


def _content(redis: Redis, key: bytes) -> str:
    kind: Any = redis.type(key)
    if kind == b"set":
        return str(redis.smembers(key))[:300]
    return str(redis.hgetall(key))[:300] if kind == b"hash" else kind.decode()
