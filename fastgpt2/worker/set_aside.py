"""What stands in a queue and cannot be served: taken off it, and noted where a person finds it."""

from __future__ import annotations

import json
import logging
import time
from base64 import b64encode
from typing import TYPE_CHECKING

from redis.exceptions import RedisError
from rq import Queue

from fastgpt2.protocol import keys
from fastgpt2.protocol.scripts import Script
from fastgpt2.protocol.untrusted import is_of_entry

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger("fastgpt2.worker")
MAX_SHOWN_CHARACTERS = 200
MAX_REASON_CHARACTERS = 500

# Of a longer entry the beginning is noted.
MAX_NOTED_BYTES = 4096
_SET_ASIDE = Script(__file__, "set_aside")


def set_aside(queue: Queue, entry: bytes, reason: str, worker_name: str) -> None:
    """Note an entry of a queue among what was set aside, and take it off the worker's list of claimed jobs.

    An entry that is text is noted as `id`; the bytes of any other, or of a very long one, in Base64.
    """
    short = len(entry) <= MAX_NOTED_BYTES
    try:
        of_entry = {"id": entry.decode("utf-8")} if short else {}
    except UnicodeDecodeError:
        of_entry = {}
    if not of_entry:
        of_entry = {"base64": b64encode(entry[:MAX_NOTED_BYTES]).decode("ascii")}
    note = {**of_entry, "bytes": len(entry), "reason": reason[:MAX_REASON_CHARACTERS], "at": round(time.time(), 3)}
    key, claimed = keys.set_aside_key(queue.name), keys.claimed_key(worker_name, queue.name)
    words = json.dumps({**note, "worker": worker_name}), keys.MAX_SET_ASIDE, keys.SET_ASIDE_TTL_SECONDS, entry
    _SET_ASIDE.run(queue.connection, [key, claimed], words)
    log.warning("%s: %s of the queue %s is set aside: %s", worker_name, shown(entry), queue.name, reason[:500])


def unclaim(connection: Redis, claimed_key: str, job_id: str) -> None:
    """Take a job off a worker's list of claimed jobs; if that is no list, there is nothing to be done."""
    try:
        connection.lrem(claimed_key, 1, job_id)
    except RedisError as reason:
        if not is_of_entry(reason):
            raise


def shown(job_id: str | bytes) -> str:
    """Return an id as a log shows it: in one line, and not all of a long one."""
    most = MAX_SHOWN_CHARACTERS
    text = job_id[: 4 * most].decode("utf-8", "backslashreplace") if isinstance(job_id, bytes) else job_id[:most]
    text = text if text.isprintable() else text.encode("unicode_escape", "backslashreplace").decode("ascii")
    return f"{text[:most]}... ({len(job_id)} in all)" if len(job_id) > most else text or "the empty id"
