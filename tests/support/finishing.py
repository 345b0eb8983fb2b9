"""A worker's part of a job, written by hand: where a test needs an end and no model."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

from redis import Redis

from fastgpt2 import GenerationResult
from fastgpt2.engine.decoding.records import Timings, Usage
from fastgpt2.protocol.keys import job_key, results_key, stream_key
from fastgpt2.protocol.messages import Piece, piece_to_entry, result_to_json


def finish(redis: Redis, job_id: str, text: str) -> None:
    """Write that a job has finished with a text."""
    result = GenerationResult(text, (1,), "length", Usage(1, 1), Timings(0.0, 0.0, 0.0), "demo")
    value = base64.b64encode(json.dumps(result_to_json(result, 0.0)).encode()).decode()
    with redis.pipeline() as pipeline:
        pipeline.hset(job_key(job_id), mapping={"status": "finished"})
        pipeline.xadd(results_key(job_id), {"type": "1", "return_value": value})
        pipeline.execute()


def abandon(redis: Redis, job_id: str) -> None:
    """Write what RQ's clean-up writes of a job whose worker has ended while it ran the job."""
    text = "Moved to FailedJobRegistry, due to AbandonedJobError, at 2026-01-02 03:04:05"
    reason = base64.b64encode(zlib.compress(text.encode())).decode()
    with redis.pipeline() as pipeline:
        pipeline.hset(job_key(job_id), mapping={"status": "failed"})
        pipeline.xadd(results_key(job_id), {"type": "2", "exc_string": reason})
        pipeline.execute()


def publish(redis: Redis, job_id: str, text: str, at: int, attempt: int = 1) -> None:
    """Write a piece of a job's text."""
    entry: Any = piece_to_entry(Piece(text, at, attempt))
    redis.xadd(stream_key(job_id), entry)


def queued(redis: Redis, queue: str) -> list[str]:
    """Return the ids of the jobs that wait in an RQ queue."""
    found: Any = redis.lrange(f"rq:queue:{queue}", 0, -1)
    return [job_id.decode() for job_id in found]
