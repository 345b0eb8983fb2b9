"""The commands for many jobs: `fastgpt2 jobs` lists them, `fastgpt2 requeue` runs them again."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fastgpt2.errors import BadRequest, FastGPT2Error, JobNotEnded, JobNotFound, QueueFull
from fastgpt2.plurals import counted

if TYPE_CHECKING:
    from fastgpt2.api.client.flow import Driver
    from fastgpt2.api.client.session import Session

# The most jobs of one page: what Redis is asked for at once.
PAGE = 100

# The columns of the lists: the words above them, and the fields.
_LATEST = {
    "JOB": "id", "STATE": "status", "PROMPT TOKENS": "prompt_tokens", "TOKENS": "completion_tokens",
    "WAITED": "queue_seconds", "ENDED": "ended_at", "WORKER": "worker", "WHY": "error",
}  # fmt: skip
_OF_STATE = {
    "JOB": "id", "STATE": "status", "ATTEMPTS": "attempts", "ENQUEUED": "enqueued_at", "ENDED": "ended_at",
    "WORKER": "worker", "WHY": "message",
}  # fmt: skip


def jobs(values: dict[str, Any]) -> int:
    """Print the latest jobs, or those in a state, as a table or as JSON.

    Raises:
        BadRequest: --failed is given with another state.
    """
    state = values["state"] or ("failed" if values["failed"] else None)
    if values["failed"] and state != "failed":
        raise BadRequest(f"--failed and --state {state} are both given; leave one out")
    found = asyncio.run(_read(values, state))
    if values["json"]:
        print(json.dumps({"object": "list", **found}, indent=2))
        return 0
    columns = _LATEST if state is None else _OF_STATE
    if values["show_prompts"]:
        columns = {**columns, "PROMPT": "prompt"}
    if found["data"]:
        _print_table(columns, found["data"])
    total, listed = found.get("total", 0), len(found["data"])
    if found.get("has_more"):
        print(f"{listed} of {counted(total, f'{state} job')}; --limit lists more")
    elif not listed:
        print(f"no {state} jobs" if state else "no jobs yet")
    return 0


async def _read(values: dict[str, Any], state: str | None) -> dict[str, Any]:
    from fastgpt2.api.client.async_client import AsyncClient
    from fastgpt2.api.pool.job_list import list_jobs
    from fastgpt2.api.pool.job_pages import list_state
    from fastgpt2.api.pool.status import read_status
    from fastgpt2.protocol.connection import redis_errors

    limit, show_prompts, url = values["limit"], values["show_prompts"], values["redis_url"]
    async with AsyncClient(url, values["queue"]) as client:
        if state is None:
            with redis_errors(url):
                status = await read_status(client.connection, client.queue_name)
            return {"data": await list_jobs(client, status["workers"], limit, show_prompts)}
        data: list[dict[str, Any]] = []
        after = None
        while True:
            most = min(PAGE, limit - len(data))
            page = await list_state(client.connection, url, client.queue_name, state, most, after, show_prompts)
            data += page.jobs
            after = page.next
            if after is None or len(data) >= limit:
                return {"data": data, "has_more": after is not None, "total": page.total}


def _print_table(columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    """Print jobs, one a line; the last column is as long as it is."""
    lines = [list(columns), *([_cell(name, row.get(name)) for name in columns.values()] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns) - 1)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        print("  ".join([*cells, line[-1]]).rstrip())


def _cell(name: str, value: Any) -> str:
    if value is None or value == "":
        return "-"
    if name.endswith("_at"):
        return datetime.fromtimestamp(value).strftime("%Y-%m-%d %H:%M:%S")
    return f"{value:.3f} s" if name.endswith("_seconds") else printable(str(value))


def printable(text: str) -> str:
    """Return a text in one line, with escapes for what a terminal would obey or not show."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def requeue(values: dict[str, Any]) -> int:
    """Run the named jobs again, or all that failed.

    Returns:
        0 if all of them run again, 1 if some do not: standard error says why.

    Raises:
        BadRequest: jobs are named beside --failed, or neither is given.
        QueueFull: as many jobs wait as may; standard output says how many were requeued before.
    """
    from fastgpt2.api.client.flow import Driver
    from fastgpt2.api.client.session import Session

    named, all_failed = values["job"], values["failed"]
    if named and all_failed:
        raise BadRequest("jobs are named beside --failed, which means all failed jobs; leave one out")
    if not named and not all_failed:
        raise BadRequest("name the jobs, as in fastgpt2 requeue JOB..., or give --failed for all that failed")
    session = Session(values["redis_url"], values["queue"], values["max_queue"], values["durability"])
    driver = Driver(session.redis_url)
    try:
        return _requeue_failed(driver, session) if all_failed else _requeue_named(driver, session, named)
    finally:
        driver.close()


def _requeue_named(driver: Driver, session: Session, job_ids: Iterable[str]) -> int:
    from fastgpt2.api.client.requeue import run_again

    status = 0
    for job_id in dict.fromkeys(job_ids):
        try:
            again = driver.run(run_again(session, job_id))
        except (BadRequest, JobNotEnded, JobNotFound) as error:
            print(f"fastgpt2 requeue: {printable(str(error))}", file=sys.stderr)
            status = FastGPT2Error.exit_code
            continue
        shown = printable(job_id)
        print(f"job {shown} runs again, as the new job {again.job_id}" if again.is_new else f"job {shown} is requeued")
    return status


def _requeue_failed(driver: Driver, session: Session) -> int:
    from fastgpt2.api.client.requeue import requeue as requeue_job
    from fastgpt2.api.pool.job_pages import read_failed_ids

    job_ids, total = asyncio.run(read_failed_ids(session.redis_url, session.queue))
    requeued, refusals = 0, 0
    try:
        for job_id in job_ids:
            try:
                requeued += driver.run(requeue_job(session, job_id))[0] == "requeued"
            except (BadRequest, JobNotEnded, JobNotFound) as error:
                refusals += 1
                print(f"fastgpt2 requeue: {printable(str(error))}", file=sys.stderr)
    except QueueFull:
        print(f"{requeued} of {total} failed jobs are requeued")
        raise
    if requeued or refusals:
        print(f"{requeued} of {total} failed jobs are requeued")
    else:
        print("no failed jobs")
    return FastGPT2Error.exit_code if refusals else 0
