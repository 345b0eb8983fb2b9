"""Commands that Redis carries out all together in one round trip, if a job is still as it should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

# KEYS: the job's hash and, if the job must have no dependents, their key. ARGV: the worker that must have the job as
# started, or nothing where it need only not be cancelled; then each command: its number of words, and these.
_SCRIPT = """
local known = redis.call('HMGET', KEYS[1], 'status', 'worker_name')
if ARGV[1] == '' then
    if not known[1] or known[1] == 'canceled' then return {0, 0} end
elseif known[1] ~= 'started' or known[2] ~= ARGV[1] then return {0, 0} end
if KEYS[2] and redis.call('EXISTS', KEYS[2]) == 1 then return {2, 0} end
local at, reply = 2, 0
while at <= #ARGV do
    local words = tonumber(ARGV[at])
    reply = redis.call(unpack(ARGV, at + 1, at + words))
    at = at + words + 1
end
return {1, reply}
"""


class Verdict(IntEnum):
    """What became of guarded commands."""

    REFUSED = 0
    DONE = 1
    HAS_DEPENDENTS = 2


@dataclass(frozen=True, slots=True)
class Guarded:
    """What is to be written of one job.

    Attributes:
        job_key: of its hash.
        worker: the name of the worker that must have it as started; empty: it need only exist and not be cancelled.
        dependents_key: must not exist, if given.
        write: adds the commands to the pipeline that it is given, reads nothing through it, and does not execute it.
    """

    job_key: str
    worker: str
    write: Callable[[Pipeline], None]
    dependents_key: str | None = None


def carry_out(connection: Redis, everything: Sequence[Guarded]) -> list[tuple[Verdict, Any]]:
    """Each job's commands as one script, all scripts in one round trip.

    A transaction that watches the job (WATCH, a look, MULTI, EXEC) would be four round trips a job.

    Returns:
        For each its verdict, and what its last command replied.
    """
    with connection.pipeline(transaction=False) as scripts:
        for guarded in everything:
            with connection.pipeline() as recorder:
                guarded.write(recorder)
                # redis-py keeps here what `execute` would send.
                commands = [words for words, _ in recorder.command_stack]
            keys = [key for key in (guarded.job_key, guarded.dependents_key) if key is not None]
            words = [word for command in commands for word in (len(command), *command)]
            scripts.eval(_SCRIPT, len(keys), *keys, guarded.worker, *words)
        return [(Verdict(int(verdict)), reply) for verdict, reply in scripts.execute()]
