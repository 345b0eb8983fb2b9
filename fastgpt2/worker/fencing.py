"""Commands that Redis carries out all together in one round trip, if a job is still in the hands it should be in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from fastgpt2.protocol.keys import EXECUTION_FIELD
from fastgpt2.protocol.untrusted import is_of_entry

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline


# A Lua function: what RQ keeps of a job's executions goes, whoever began them. `queue` is the name of its queue.
FORGET_EXECUTIONS = """
local function forget_executions(queue, id)
    for _, execution in ipairs(redis.call('ZRANGE', 'rq:executions:' .. id, 0, -1)) do
        local both = id .. ':' .. execution
        local worker = redis.call('HGET', 'rq:execution:' .. both, 'worker_name')
        if worker then redis.call('SREM', 'rq:worker:' .. worker .. ':executions', both) end
        redis.call('DEL', 'rq:execution:' .. both)
        redis.call('ZREM', 'rq:wip:' .. queue, both)
    end
    redis.call('DEL', 'rq:executions:' .. id)
end
"""
_CARRY_OUT = """
local reply = 0
while at <= #ARGV do
    local words = tonumber(ARGV[at])
    reply = redis.call(unpack(ARGV, at + 1, at + words))
    at = at + words + 1
end
return {1, reply}
"""

# KEYS: the job's hash and, if the job must have no dependents, their key. ARGV: the worker and the execution that must
# have the job as started; then each command: its number of words, and these.
_HELD = f"""
local known = redis.call('HMGET', KEYS[1], 'status', 'worker_name', '{EXECUTION_FIELD}')
if known[1] ~= 'started' or known[2] ~= ARGV[1] or known[3] ~= ARGV[2] then return {{0, 0}} end
if KEYS[2] and redis.call('EXISTS', KEYS[2]) == 1 then return {{2, 0}} end
local at = 3
{_CARRY_OUT}
"""

# KEYS: the job's hash, the list of what the worker has taken. ARGV: the worker, the job's id, its queue; the commands.
# One that this worker has as started is one whose start was written, but not heard of.
_TAKEN = f"""
{FORGET_EXECUTIONS}
local known = redis.call('HMGET', KEYS[1], 'status', 'worker_name')
if known[1] ~= 'queued' and not (known[1] == 'started' and known[2] == ARGV[1]) then return {{0, 0}} end
if not redis.call('LPOS', KEYS[2], ARGV[2]) then return {{0, 0}} end
forget_executions(ARGV[3], ARGV[2])
local at = 4
{_CARRY_OUT}
"""


class Verdict(IntEnum):
    """What became of guarded commands."""

    REFUSED = 0
    DONE = 1
    HAS_DEPENDENTS = 2
    MALFORMED = 3


@dataclass(frozen=True, slots=True)
class Held:
    """What is to be written of a job that a worker has started.

    Attributes:
        job_key: of its hash.
        worker: the name of the worker that must have it as started.
        execution: the id of the execution that it must have it under: one that was taken back and started again, even
            by the same worker, is another.
        write: adds the commands to the pipeline that it is given, reads nothing through it, and does not execute it.
        dependents_key: must not exist, if given.
    """

    job_key: str
    worker: str
    execution: str
    write: Callable[[Pipeline], None]
    dependents_key: str | None = None

    def script(self) -> tuple[str, list[str], list[str]]:
        keys = [key for key in (self.job_key, self.dependents_key) if key is not None]
        return _HELD, keys, [self.worker, self.execution]


@dataclass(frozen=True, slots=True)
class Taken:
    """What is to be written of a job that a worker has claimed and is about to start.

    Attributes:
        job_key: of its hash.
        claimed_key: the worker's list that must have the job: a worker that was taken for dead starts nothing.
    """

    job_key: str
    worker: str
    claimed_key: str
    job_id: str
    queue: str
    write: Callable[[Pipeline], None]

    def script(self) -> tuple[str, list[str], list[str]]:
        return _TAKEN, [self.job_key, self.claimed_key], [self.worker, self.job_id, self.queue]


def carry_out(connection: Redis, everything: Sequence[Held | Taken]) -> list[tuple[Verdict, Any]]:
    """Each job's commands as one script, all scripts in one round trip.

    A transaction that watches the job (WATCH, a look, MULTI, EXEC) would be four round trips a job.

    Returns:
        For each its verdict, and what its last command replied; where one of its keys is of the wrong kind, the error.

    Raises:
        RedisError: Redis cannot be reached, or takes no commands.
    """
    with connection.pipeline(transaction=False) as scripts:
        for guarded in everything:
            with connection.pipeline() as recorder:
                guarded.write(recorder)
                # redis-py keeps here what `execute` would send.
                commands = [words for words, _ in recorder.command_stack]
            script, keys, condition = guarded.script()
            words = [word for command in commands for word in (len(command), *command)]
            scripts.eval(script, len(keys), *keys, *condition, *words)
        replies = scripts.execute(raise_on_error=False)
    return [_verdict(reply) for reply in replies]


def _verdict(reply: Any) -> tuple[Verdict, Any]:
    if isinstance(reply, RedisError) and is_of_entry(reply):
        return Verdict.MALFORMED, reply
    if isinstance(reply, Exception):
        raise reply
    return Verdict(int(reply[0])), reply[1]
