"""The faults of a worker's exchanges with Redis: how many in a row, when to try again, and when to try no more."""

from __future__ import annotations

import logging
import math
import time

from fastgpt2.errors import FastGPT2Error, RedisUnfit
from fastgpt2.protocol.connection import in_words
from fastgpt2.protocol.untrusted import is_of_service
from fastgpt2.worker.rq_worker import back_off

log = logging.getLogger("fastgpt2.worker")

# A worker whose exchanges fail for this long, and not because Redis is away, serves nobody: a fresh one may.
UNFORESEEN_SECONDS = 30.0

# A worker that is to stop tries this often to get rid of its jobs, if it is not Redis that fails.
LAST_TRIES = 3
STOPPING_SECONDS = 0.2

# How often the log says that Redis is still away: it is tried several times in this time.
SAY_SECONDS = 10.0


class Faults:
    """The faults since the last exchange that went well.

    While Redis is away, a worker waits for it, however long that takes. One that answers and will not serve this worker
    is not waited for, once that has lasted. Another fault may be one of an entry, and passes when the entry is set
    aside; one that does not pass is the worker's own.

    Args:
        redis_url: where Redis is, as it may be shown.

    Attributes:
        count: how many exchanges in a row have failed.
    """

    def __init__(self, worker_name: str, redis_url: str) -> None:
        self._name, self._redis_url = worker_name, redis_url
        self.count = 0
        self._not_before = 0.0
        self._said_at = -math.inf
        # Since when it is not an absent Redis that fails; since when it is not Redis at all.
        self._hopeless_since = self._unforeseen_since = math.inf
        self._last: Exception | None = None

    @property
    def is_due(self) -> bool:
        """Tell whether it is time to try again."""
        return time.monotonic() >= self._not_before

    @property
    def is_unforeseen(self) -> bool:
        """Tell whether it is not Redis that fails."""
        return self._unforeseen_since < math.inf

    @property
    def is_lasting(self) -> bool:
        """Tell whether a worker has served nobody for so long that it must end."""
        return time.monotonic() - self._hopeless_since > UNFORESEEN_SECONDS

    @property
    def is_last_try_over(self) -> bool:
        """Tell whether a worker that is to stop, and has nothing to finish, need not try again."""
        return self.is_unforeseen and self.count >= LAST_TRIES

    def clear(self) -> None:
        """Note that an exchange went well."""
        self.count = 0
        self._not_before = 0.0
        self._said_at = -math.inf
        self._hopeless_since = self._unforeseen_since = math.inf
        self._last = None

    def note(self, reason: Exception, stopping: bool) -> None:
        """Note that an exchange has failed, say so in the log now and then, and set the time of the next one."""
        now = time.monotonic()
        self.count += 1
        self._last = reason
        if is_of_service(reason) and not isinstance(in_words(self._redis_url, reason), RedisUnfit):
            self._hopeless_since = math.inf
        else:
            self._hopeless_since = min(self._hopeless_since, now)
        seconds = min(back_off(self.count), STOPPING_SECONDS if stopping else math.inf)
        self._not_before = now + seconds
        if is_of_service(reason):
            self._unforeseen_since = math.inf
            if now - self._said_at >= SAY_SECONDS:
                self._said_at = now
                log.warning("%s: Redis cannot be used (%s); trying again in %.1f s", self._name, reason, seconds)
        elif not self.is_unforeseen:
            self._unforeseen_since = now
            log.error("%s: unforeseen; going on", self._name, exc_info=reason)
        else:
            log.error("%s: again: %s: %.200s", self._name, type(reason).__name__, reason)

    def in_words(self) -> FastGPT2Error:
        """Return the error with which a worker ends that has served nobody for too long."""
        if self._last is not None and is_of_service(self._last):
            return in_words(self._redis_url, self._last)
        return FastGPT2Error(
            f"worker {self._name} could serve nothing for {UNFORESEEN_SECONDS:.0f} s ({type(self._last).__name__}: "
            f"{str(self._last)[:200]}; its log says more) and has ended, so that a fresh one takes its place; its jobs "
            "go back to their queues"
        )
