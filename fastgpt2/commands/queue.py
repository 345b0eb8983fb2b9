"""What a person asks a running pool: `fastgpt2 status`, `enqueue`, `result`, `cancel`."""

from __future__ import annotations

import json
import sys
from typing import Any

from fastgpt2.commands.texts import print_pieces, print_result, request_of
from fastgpt2.errors import BadRequest


def status(values: dict[str, Any]) -> int:
    import asyncio

    from fastgpt2.api.status import read_status
    from fastgpt2.worker.connection import connect_async, redis_errors

    async def read() -> dict[str, Any]:
        connection = connect_async(values["redis_url"])
        try:
            return await read_status(connection, values["queue"])
        finally:
            await connection.aclose()

    with redis_errors(values["redis_url"]):
        status = asyncio.run(read())
    print(json.dumps(status, indent=2) if values["json"] else _status_text(status))
    return 0


def _status_text(status: dict[str, Any]) -> str:
    jobs = ", ".join(f"{count} {state}" for state, count in status["jobs"].items() if count) or "none"
    queue, rates = status["queue"], status["rates"]["1m"]
    wait = queue["oldest_wait_seconds"]
    waiting = f"{queue['depth']} waiting" + ("" if wait is None else f", the first for {wait:.1f} s")
    lines = [
        f"queue {queue['name']}: {waiting}; jobs: {jobs}",
        f"last minute: {rates['tokens_per_second']:.1f} tokens/s, {60 * rates['jobs_per_second']:.1f} jobs/min",
    ]
    for worker in status["workers"]:
        count = worker["in_hand"]
        at_work = f" on {count} of up to {worker['max_batch']} jobs" if count else ""
        usual = {"weights": "float32", "drafts": "auto"}
        otherwise = "".join(f", {name} {worker[name]}" for name in usual if worker[name] not in (None, usual[name]))
        lines.append(
            f"worker {worker['name']}: {worker['state']}{at_work}, model {worker['model']} ({worker['computes_by']})"
            f"{otherwise}, up {worker['age_seconds']} s, heard {worker['heartbeat_age_seconds']} s ago, "
            f"{worker['tokens_per_second'] or 0.0:.1f} tokens/s, "
            f"{worker['jobs_finished']} finished, {worker['jobs_failed']} failed"
        )
    if not status["workers"]:
        lines.append("no workers; start some with `fastgpt2 up` or `fastgpt2 worker`")
    return "\n".join(lines)


def enqueue(values: dict[str, Any]) -> int:
    from fastgpt2.api.client import Client
    from fastgpt2.worker.job import JobOptions

    if values["stream"] and values["json"]:
        raise BadRequest("--stream prints text, --json a whole result; leave one out")
    options = JobOptions(timeout=values["deadline"], stream=values["stream"])
    with Client(values["redis_url"], values["queue"], values["max_queue"]) as client:
        job = client.enqueue_request(request_of(values), options, priority=values["priority"])
        if values["stream"]:
            try:
                print_pieces(job.stream(values["timeout"]), values)
            except KeyboardInterrupt:
                if job.cancel():
                    print(f"\njob {job.id} is cancelled", file=sys.stderr)
                raise
        elif values["wait"]:
            print_result(job.result(values["timeout"]), values)
        else:
            print(job.id)
    return 0


def result(values: dict[str, Any]) -> int:
    from fastgpt2.api.client import Client

    with Client(values["redis_url"], values["queue"]) as client:
        print_result(client.result(values["job"], values["timeout"]), values)
    return 0


def cancel(values: dict[str, Any]) -> int:
    from fastgpt2.api.client import Client

    with Client(values["redis_url"], values["queue"]) as client:
        if client.cancel(values["job"]):
            print(f"job {values['job']} is cancelled")
        else:
            print(f"job {values['job']} had ended: {client.status(values['job'])}")
    return 0
