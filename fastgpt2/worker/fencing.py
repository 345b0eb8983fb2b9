"""Commands that Redis runs all together, and only if a worker still has the job that they are about.

RQ writes a job's start and end through a pipeline of redis-py. To check first whether the job is still this worker's,
a transaction would watch it (WATCH, a look, MULTI, EXEC): four round trips a job. Here the commands that RQ would send
are only recorded, and become the arguments of one script, which checks and runs them in one round trip.

An example. RQ writes into a pipeline that is never executed, and redis-py keeps the commands:

    recorder = connection.pipeline()
    recorder.hset("rq:job:a", "status", "finished")
    recorder.expire("rq:job:a", 500)
    recorder.command_stack  # [(("HSET", "rq:job:a", "status", "finished"), {}), (("EXPIRE", "rq:job:a", 500), {})]

`run_fenced` with `IfRunning("rq:job:a", "worker-7", "execution-3", ...)` then sends `fence_running.lua`, the key that
it looks at, the worker and the execution that must stand there, and each command behind its number of words:

    EVALSHA <digest> 1 rq:job:a worker-7 execution-3 4 HSET rq:job:a status finished 3 EXPIRE rq:job:a 500

If the job is no longer started by this worker in this execution, nothing is run, and the verdict is REFUSED.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from fastgpt2.protocol.scripts import Script, execute
from fastgpt2.protocol.untrusted import is_of_entry
from fastgpt2.worker.unfit import tell

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

_FENCE_RUNNING = Script(__file__, "fence_running")
_FENCE_CLAIMED = Script(__file__, "fence_claimed")


class Verdict(IntEnum):
    """The fate of fenced commands. The scripts know the first three by their numbers."""

    REFUSED = 0
    DONE = 1
    HAS_DEPENDENTS = 2
    MALFORMED = 3


@dataclass(frozen=True, slots=True)
class IfRunning:
    """Commands about a job, to be run if a worker still runs the job.

    Attributes:
        job_key: the key of the job's hash.
        worker: the name of the worker that must have it as started.
        execution: the id of the execution under which the worker must have it: if the job was taken back and started
            again, even by the same worker, the execution is another.
        write: adds the commands to the pipeline that it is given; it reads nothing through it, and does not execute it.
        dependents_key: if given, the key of the jobs that wait for this one: there must be none.
    """

    job_key: str
    worker: str
    execution: str
    write: Callable[[Pipeline], None]
    dependents_key: str | None = None

    def fence(self) -> tuple[Script, list[str], list[str]]:
        """Return the script, its keys, and its arguments before the commands."""
        keys = [key for key in (self.job_key, self.dependents_key) if key is not None]
        return _FENCE_RUNNING, keys, [self.worker, self.execution]


@dataclass(frozen=True, slots=True)
class IfClaimed:
    """Commands that start a job, to be run if a worker still has the job as claimed.

    Attributes:
        claimed_key: the worker's list that must have the job: a worker that was taken for dead starts nothing.
    """

    job_key: str
    worker: str
    claimed_key: str
    job_id: str
    queue: str
    write: Callable[[Pipeline], None]

    def fence(self) -> tuple[Script, list[str], list[str]]:
        """Return the script, its keys, and its arguments before the commands."""
        return _FENCE_CLAIMED, [self.job_key, self.claimed_key], [self.worker, self.job_id, self.queue]


def run_fenced(connection: Redis, fenced: Sequence[IfRunning | IfClaimed]) -> list[tuple[Verdict, Any]]:
    """Run each job's commands as one script, all scripts in one round trip.

    Returns:
        For each its verdict, and what its last command replied; where one of its keys is of the wrong kind, the error.
    """
    with connection.pipeline(transaction=False) as scripts:
        for one in fenced:
            with connection.pipeline() as recorder:
                one.write(recorder)
                commands = [words for words, _ in recorder.command_stack]
            script, keys, condition = one.fence()
            words = [word for command in commands for word in (len(command), *command)]
            script.add(scripts, keys, [*condition, *words])
        verdicts: list[tuple[Verdict, Any]] = []
        for reply in execute(scripts):
            if isinstance(reply, RedisError) and is_of_entry(reply):
                verdicts.append((Verdict.MALFORMED, reply))
            elif isinstance(reply, Exception):
                raise reply
            else:
                for key, reason in zip(reply[2][::2], reply[2][1::2], strict=True):
                    tell(key.decode("utf-8", "replace"), reason.decode("utf-8", "replace"))
                verdicts.append((Verdict(int(reply[0])), reply[1]))
        return verdicts
