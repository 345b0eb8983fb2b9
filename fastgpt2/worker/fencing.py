"""Commands that Redis carries out all together in one round trip, if a job is still in the hands it should be in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from fastgpt2.protocol.scripts import Script, execute
from fastgpt2.protocol.untrusted import is_of_entry

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

_FENCE_RUNNING = Script(__file__, "fence_running")
_FENCE_CLAIMED = Script(__file__, "fence_claimed")


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

    def script(self) -> tuple[Script, list[str], list[str]]:
        keys = [key for key in (self.job_key, self.dependents_key) if key is not None]
        return _FENCE_RUNNING, keys, [self.worker, self.execution]


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

    def script(self) -> tuple[Script, list[str], list[str]]:
        return _FENCE_CLAIMED, [self.job_key, self.claimed_key], [self.worker, self.job_id, self.queue]


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
            script.add(scripts, keys, [*condition, *words])
        replies = execute(scripts)
    return [_verdict(reply) for reply in replies]


def _verdict(reply: Any) -> tuple[Verdict, Any]:
    if isinstance(reply, RedisError) and is_of_entry(reply):
        return Verdict.MALFORMED, reply
    if isinstance(reply, Exception):
        raise reply
    return Verdict(int(reply[0])), reply[1]
