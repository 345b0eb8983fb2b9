"""What an enqueued job must have reached before its enqueueing counts: Redis's memory, its disk, or a replica too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastgpt2 import settings
from fastgpt2.api.client.flow import Command, Flow
from fastgpt2.errors import NotDurable
from fastgpt2.fields import refusal
from fastgpt2.plurals import counted
from fastgpt2.protocol.connection import without_password
from fastgpt2.protocol.durability import DISK, MEMORY, REPLICA, confirming, count_confirmed, why_unfit

# How long Redis may take to confirm. Shorter than `SOCKET_SECONDS`, after which Redis would count as away; longer than
# the second within which `appendfsync everysec` brings to disk what was written.
DURABILITY_SECONDS = 4.0

# How many ids of jobs a message lists.
MOST_SHOWN = 3


class Durability:
    """What jobs that one client enqueues must have reached.

    Args:
        how: None for the setting.

    Raises:
        BadRequest: there is no such durability.
    """

    def __init__(self, how: str | None, redis_url: str) -> None:
        if how is not None and how not in (MEMORY, DISK, REPLICA):
            raise refusal("durability", "one of memory, disk, replica", how, of_type=not isinstance(how, str))
        self.how = settings.DURABILITY.resolve() if how is None else how
        self._place = f"Redis at {without_password(redis_url)}"
        self._is_checked = self.how == MEMORY

    def check(self) -> Flow[None]:
        """Ask Redis once whether it can confirm at all, before anything is enqueued.

        Raises:
            RedisUnfit: it cannot.
        """
        if self._is_checked:
            return
        from redis.exceptions import ResponseError

        try:
            yield self._command(0.001)
        except ResponseError as error:
            if "replica instances" in str(error):
                return  # what is written next is refused with words that say it better
            raise self.in_words(error) from None
        self._is_checked = True

    def confirming(self) -> tuple[Command, ...]:
        """Return the command that is sent behind what is written; none if nothing is to be confirmed."""
        return () if self.how == MEMORY else (self._command(DURABILITY_SECONDS),)

    def _command(self, seconds: float) -> Command:
        return Command("execute_command", confirming(self.how, seconds))

    def is_confirmed(self, reply: Any) -> bool:
        """Tell whether Redis has confirmed, by its reply to what `confirming` returned."""
        return count_confirmed(reply) >= 1

    def shortfall(self, job_ids: Sequence[str], reply: Any) -> NotDurable:
        """Return the error to raise where Redis has not confirmed in time."""
        shown = ", ".join(job_ids[:MOST_SHOWN]) + (" and more" if len(job_ids) > MOST_SHOWN else "")
        jobs = counted(len(job_ids), "job is", "jobs are")
        return NotDurable(f"{jobs} enqueued and may run ({shown}), but {self.what_is_missing(reply)}", job_ids)

    def what_is_missing(self, reply: Any) -> str:
        """Return the rest of a sentence on what Redis has not confirmed, and on what helps."""
        if self.how == REPLICA:
            what = f"{count_confirmed(reply)} replicas of the 1 that is wanted have them; see to its replicas"
        else:
            what = "its disk does not have them; see whether that is slow or full"
        return f"{self._place} says after {DURABILITY_SECONDS:g} s that {what}, or ask for the durability memory"

    def in_words(self, error: Exception) -> Exception:
        """Return the error to raise for one of the library's: a RedisUnfit if Redis cannot confirm at all."""
        return why_unfit(self._place, self.how, error) or error
