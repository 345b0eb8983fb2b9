"""The limits of a token: room for the jobs of a request is taken before they are enqueued, over all endpoints together.

What was taken is given back by `admit.lua`, as it finds that jobs have ended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastgpt2.api.client.enqueue import IdempotencyKey, JobPlan
from fastgpt2.api.client.flow import Command, Flow
from fastgpt2.errors import BadRequest, TokenLimitReached
from fastgpt2.plurals import counted
from fastgpt2.protocol.keys import account_jobs_key, account_key, usage_key
from fastgpt2.protocol.scripts import Script

_ADMIT = Script(__file__, "admit")
_RELEASE = Script(__file__, "release")

# A text of English has about four bytes a token. How many it has, only a worker can tell.
BYTES_PER_TOKEN = 4

# What a chat that names no number of new tokens is taken to use: all of GPT-2's positions.
CHAT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Room:
    """What a token's limits leave.

    Attributes:
        jobs: how many of its jobs wait or run.
        tokens: how many tokens still count against its minute: used ones that are not forgotten yet, and those that its
            jobs may use.
    """

    jobs: int
    tokens: float


class Admission:
    """The room of one request within the limits of its token.

    Args:
        queue: the pool's queue.
        token: the token's name.
        waiting, tokens_per_minute: its limits; None for none.

    Attributes:
        room: as Redis has told it; None before that, and if there is no limit.
    """

    def __init__(self, queue: str, token: str, waiting: int | None, tokens_per_minute: int | None) -> None:
        self.token = token
        self._waiting, self._per_minute = waiting, tokens_per_minute
        self._keys = account_key(queue, token), account_jobs_key(queue, token), usage_key(queue, token)
        self.room: Room | None = None

    def ask(
        self, job_ids: Sequence[str], plans: Sequence[JobPlan], keys: Sequence[IdempotencyKey] | None
    ) -> Flow[None]:
        """Take room for jobs that are about to be enqueued, for all or for none.

        Args:
            keys: see `Session.send_all`. Jobs that were enqueued before need no room: they have theirs.

        Raises:
            TokenLimitReached: there is none now.
            BadRequest: there never is.
        """
        if self._waiting is None and self._per_minute is None:
            return
        if self._waiting is not None and len(plans) > self._waiting:
            raise BadRequest(
                f"the request has {len(plans)} prompts, and the token {self.token} may have {self._waiting} waiting or "
                "running at once: send fewer in a request"
            )
        reserved = [part for one in zip(job_ids, map(_most_tokens, plans), strict=True) for part in one]
        known = [key.redis_key for key in keys or ()]
        arguments = *self._keys, self._waiting or 0, self._per_minute or 0, *reserved
        reply = yield Command("execute_command", _ADMIT.command(known, arguments))
        verdict, jobs, tokens, debt = (float(one) for one in reply)
        self.room = Room(int(jobs), tokens)
        if verdict == 1:
            token = f"the token {self.token}"
            raise TokenLimitReached(
                f"{counted(self.room.jobs, f'job of {token} waits or runs', f'jobs of {token} wait or run')}, and the "
                f"limit is {self._waiting}: try again when one has ended"
            )
        if verdict == 2:
            raise self._minute_error(debt)

    def _minute_error(self, debt: float) -> TokenLimitReached:
        """Return the error for a minute that is used up; `debt` are the tokens that have been used for sure."""
        assert self._per_minute is not None
        over = debt - self._per_minute
        if over < 0:
            return TokenLimitReached(
                f"the jobs of the token {self.token} that wait or run may use up its "
                f"{counted(self._per_minute, 'token')} a minute: try again when one has ended, or ask for "
                "fewer new tokens"
            )
        seconds = max(1, math.ceil((over + 1) * 60 / self._per_minute))
        return TokenLimitReached(
            f"the token {self.token} has used its {counted(self._per_minute, 'token')} a minute: try again in "
            f"{seconds} s",
            seconds,
        )

    def release(self, job_ids: Sequence[str]) -> Flow[None]:
        """Give room back that was taken for jobs which were not enqueued."""
        if self.room is not None and job_ids:
            yield Command("execute_command", _RELEASE.command((), [*self._keys[:2], *job_ids]))

    def headers(self) -> dict[str, str]:
        """Return OpenAI's headers for the limits; empty if nothing is known.

        `x-ratelimit-reset-requests` is not among them: nobody knows when a job will end.
        """
        if self.room is None:
            return {}
        headers = {}
        if self._waiting is not None:
            headers["x-ratelimit-limit-requests"] = str(self._waiting)
            headers["x-ratelimit-remaining-requests"] = str(max(0, self._waiting - self.room.jobs))
        if self._per_minute is not None:
            headers["x-ratelimit-limit-tokens"] = str(self._per_minute)
            headers["x-ratelimit-remaining-tokens"] = str(max(0, math.floor(self._per_minute - self.room.tokens)))
            headers["x-ratelimit-reset-tokens"] = _duration(self.room.tokens * 60 / self._per_minute)
        return headers


def _most_tokens(plan: JobPlan) -> int:
    """Return how many tokens a job may use: a guess for a prompt that is a text, and the most new ones of each text."""
    request = plan.request
    if request.messages is not None:
        # A template puts them into words. Without a number, a chat goes on as long as there is room.
        read = len(json.dumps(request.messages)) // BYTES_PER_TOKEN
        new = CHAT_TOKENS if request.max_new_tokens is None else request.max_new_tokens
        return read + new * request.texts
    prompt = request.prompt
    read = len(prompt) if not isinstance(prompt, str) else -(-len(prompt.encode()) // BYTES_PER_TOKEN)
    new = request.default_new_tokens if request.max_new_tokens is None else request.max_new_tokens
    return max(1, read) + new * request.texts


def _duration(seconds: float) -> str:
    """Return a time as OpenAI's headers have it: "250ms", "1.5s", "6m0s"."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{f'{hours}h' if hours else ''}{minutes}m{rest}s"
