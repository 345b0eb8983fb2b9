"""Many prompts through the queue: so many at once, and their ends in the order of the prompts or as they come."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Self

from fastgpt2.api.client.enqueue import JobPlan, enqueue_call
from fastgpt2.api.client.flow import Call, Pause, Talk, Together, entries_by_key, read_streams
from fastgpt2.api.client.outcome import Awaited, Outcome
from fastgpt2.api.client.session import LOOK_SECONDS, WAIT_SLICE_SECONDS, Session, cancel_call
from fastgpt2.engine.decoding.records import GenerationResult
from fastgpt2.errors import BadRequest, FastGPT2Error

# As long as the reader of a stream of results may take between two of them.
RESULT_TTL_SECONDS = 3600

# Jobs sent in one round trip, and for how long prompts are gathered for it: they may come slowly.
SENT_AT_ONCE = 16
GATHER_SECONDS = 0.005

# Of the jobs in flight, so many are waited for, the oldest. More would make each answer dear.
WATCHED_AT_ONCE = 512
LONGEST_FULL_PAUSE_SECONDS = 0.5
MAX_IN_FLIGHT = 1_000_000

# A job to send, or what is wrong with it; None for: nothing yet.
Item = JobPlan | FastGPT2Error | None


class Flight:
    """The jobs of one `map`, from their plans to their ends.

    Args:
        items: read as there is room for them. An error takes the place of its job's outcome.
        in_flight: how many jobs may be in the queue at once, and if `ordered`, how many results may wait here.
        connection: any of the redis library's; see `enqueue_call`.

    Raises:
        BadRequest: `in_flight` is out of bounds.
    """

    def __init__(self, session: Session, items: Iterable[Item], in_flight: int, ordered: bool, connection: Any) -> None:
        if not isinstance(in_flight, int) or isinstance(in_flight, bool) or not 1 <= in_flight <= MAX_IN_FLIGHT:
            raise BadRequest(f"in_flight must be a whole number from 1 to {MAX_IN_FLIGHT}, not {str(in_flight)[:100]}")
        self._session = session
        self._items: Iterator[Item] | None = iter(items)
        self._in_flight = in_flight
        self._ordered = ordered
        self._connection = connection
        self._taken = self._given = 0
        # Refused by a full queue, before whatever is still to be read.
        self._refused: deque[tuple[int, JobPlan]] = deque()
        self._flying: dict[str, tuple[int, Awaited]] = {}
        self._ended: dict[int, Outcome] = {}
        self._starved = False
        self._look_at = 0.0
        self._full_until, self._full_pause = 0.0, LOOK_SECONDS
        self._burst = SENT_AT_ONCE

    def next(self) -> Talk[tuple[int, Outcome] | None]:
        """The next end: (number of the prompt from 0, result or error); None after the last.

        Raises:
            QueueUnavailable: Redis stays away. Errors that are one job's own are returned.
        """
        while True:
            yield from self._fill()
            # In a dict by age, the oldest first.
            number = self._given if self._ordered else next(iter(self._ended), -1)
            if number in self._ended:
                self._given += 1
                return number, self._ended.pop(number)
            if self._flying:
                yield from self._watch()
            elif self._items is None and not self._refused:
                return None
            else:
                yield Pause(max(LOOK_SECONDS, self._full_until - time.monotonic()))

    def cancel(self) -> Talk[None]:
        """Cancel what is in flight."""
        self._items = None
        self._refused.clear()
        while self._flying:
            ids = list(islice(self._flying, WATCHED_AT_ONCE))
            yield Together(tuple(cancel_call(job_id, self._session.queue) for job_id in ids))
            for job_id in ids:
                del self._flying[job_id]

    def _room(self, gathered: int) -> int:
        waiting = self._taken - self._given if self._ordered else len(self._flying) + gathered + len(self._ended)
        return self._in_flight - waiting

    def _fill(self) -> Talk[None]:
        """Send what there is room for."""
        while time.monotonic() >= self._full_until:
            plans = self._gather()
            if not plans:
                return
            contact = self._session.contact
            yield from self._patient_limits()
            calls: list[Call] = []
            sent: list[tuple[str, int, JobPlan]] = []
            for number, plan in plans:
                try:
                    self._session.check_limits(plan)
                except BadRequest as error:
                    self._ended[number] = error
                    continue
                job_id, script = enqueue_call(plan, self._session.queue, self._session.max_queue, self._connection)
                calls.append(script)
                sent.append((job_id, number, plan))
            if not calls:
                continue
            # Noted before they are sent: should that be interrupted, they are cancelled with the others.
            self._flying.update({job_id: (number, Awaited(job_id)) for job_id, number, _ in sent})
            answers = yield from contact.patiently(Together(tuple(calls)), math.inf)
            ends = [self._session.enqueued(job[0], answer) for job, answer in zip(sent, answers, strict=True)]
            self._note_refused(len(sent), [job for job, end in zip(sent, ends, strict=True) if end != job[0]])

    def _gather(self) -> list[tuple[int, JobPlan]]:
        plans: list[tuple[int, JobPlan]] = []
        started = time.monotonic()
        while self._refused and len(plans) < self._burst:
            plans.append(self._refused.popleft())
        while len(plans) < self._burst and self._items is not None and self._room(len(plans)) > 0:
            if plans and time.monotonic() - started > GATHER_SECONDS:
                break
            try:
                item = next(self._items)
            except StopIteration:
                self._items = None
                break
            self._starved = item is None
            if item is None:
                break
            number, self._taken = self._taken, self._taken + 1
            if isinstance(item, FastGPT2Error):
                self._ended[number] = item
            else:
                plans.append((number, item))
        return plans

    def _note_refused(self, sent: int, refused: list[tuple[str, int, JobPlan]]) -> None:
        """A full queue drains, of this client's jobs or of others'; until then, no more is tried than it has taken."""
        for job_id, number, plan in reversed(refused):
            del self._flying[job_id]
            self._refused.appendleft((number, plan))
        if len(refused) < sent:
            self._full_pause = LOOK_SECONDS
        if refused:
            self._burst = max(1, sent - len(refused))
            self._full_until = time.monotonic() + self._full_pause
            self._full_pause = min(2 * self._full_pause, LONGEST_FULL_PAUSE_SECONDS)
        else:
            self._burst = min(2 * self._burst, SENT_AT_ONCE)

    def _patient_limits(self) -> Talk[None]:
        """The models' limits are a courtesy: without Redis nobody refuses, and enqueueing waits for it."""
        from redis.exceptions import RedisError

        try:
            yield from self._session.refresh_limits()
        except RedisError:
            if not self._session.contact.made:
                raise

    def _watch(self) -> Talk[None]:
        """Wait for some ends, of the oldest jobs."""
        contact, now = self._session.contact, time.monotonic()
        watched = [awaited for _, awaited in islice(self._flying.values(), WATCHED_AT_ONCE)]
        if now >= self._look_at:
            yield from self._look(watched)
            self._look_at = time.monotonic() + WAIT_SLICE_SECONDS
            if self._ended:
                return
        letting_go = [awaited for awaited in watched if awaited.letting_go]
        seconds = max(0.0, self._look_at - now)
        if self._refused:
            seconds = min(seconds, max(0.0, self._full_until - now))
        if letting_go or self._starved:
            seconds = min(seconds, LOOK_SECONDS)
        read = read_streams({awaited.key: awaited.after for awaited in watched}, seconds)
        reply = entries_by_key((yield from contact.patiently(read, math.inf)))
        unclear = letting_go
        for awaited in watched:
            entries = reply.get(awaited.key, [])
            outcome = awaited.heard(entries)
            if outcome is not None:
                self._end(awaited, outcome)
            elif entries:
                unclear.append(awaited)
        if unclear:
            yield from self._look(unclear)

    def _look(self, jobs: list[Awaited]) -> Talk[None]:
        calls = tuple(one for awaited in jobs for one in awaited.look().calls)
        answers = yield from self._session.contact.patiently(Together(calls, at_once=True), math.inf)
        now = time.monotonic()
        for awaited, two in zip(jobs, zip(answers[::2], answers[1::2], strict=True), strict=True):
            outcome = awaited.seen(two, now)
            if outcome is not None:
                self._end(awaited, outcome)

    def _end(self, awaited: Awaited, outcome: Outcome) -> None:
        number, _ = self._flying.pop(awaited.id)
        self._ended[number] = outcome


# NOTE api.progress: A bar on standard error: how many jobs have ended, and tokens a second.


class Progress:
    """tqdm, imported when the first bar is made.

    Args:
        total: how many jobs there are, if that is known; without, no end is foretold.
        done: how many of them had ended before.
        shown: whether there is a bar at all.
    """

    def __init__(self, total: int | None, shown: bool, done: int = 0) -> None:
        self._bar: Any = None
        self._tokens = 0
        self._started = time.monotonic()
        if shown:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="job", dynamic_ncols=True)

    def add(self, outcome: Outcome) -> None:
        """One more has ended."""
        if self._bar is None:
            return
        if isinstance(outcome, GenerationResult):
            self._tokens += outcome.usage.completion_tokens
        rate = self._tokens / max(1e-3, time.monotonic() - self._started)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def length_of(prompts: object) -> int | None:
    """How many prompts there are, of a collection that knows."""
    try:
        return len(prompts)  # type: ignore[arg-type]
    except TypeError:
        return None
