"""Many prompts through the queue: at most N at once, their ends in the order of the prompts or as they come."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Iterator, Mapping, Sized
from contextlib import closing, suppress
from enum import Enum
from functools import partial
from itertools import islice, starmap
from typing import Any, Self, TypeAlias, Unpack

from fastgpt2.api.client.enqueue import (
    JobFields,
    JobPlan,
    PromptLike,
    SentJob,
    enqueue_command,
    plan_job,
    plan_numbered,
    read_enqueue_reply,
)
from fastgpt2.api.client.flow import RECONNECT_SECONDS, AsyncDriver, Command, Driver, Flow, Pause, Pipeline
from fastgpt2.api.client.outcome import Outcome
from fastgpt2.api.client.prompt_feed import PromptFeed
from fastgpt2.api.client.reader import JobReader, ReadLoop
from fastgpt2.api.client.session import Session, cancel_command
from fastgpt2.engine.decoding.records import GenerationResult, list_stops
from fastgpt2.errors import BadRequest, FastGPT2Error, ModelUnknown, NotDurable
from fastgpt2.fields import refusal
from fastgpt2.foreign_fields import refuse_unknown
from fastgpt2.plurals import counted
from fastgpt2.prompt_lists import iterate_prompts
from fastgpt2.protocol.keys import job_key, results_key

DEFAULT_IN_FLIGHT = 64
MAX_IN_FLIGHT = 1_000_000

# How long the reader of a stream of results may take between two of them.
BULK_RESULT_TTL_SECONDS = 3600

# Jobs sent in one round trip, and for how long prompts are gathered for it: they may come slowly.
SENT_AT_ONCE = 16
GATHER_SECONDS = 0.005

# Of the jobs in the queue, at most this many are waited for, the oldest. More would make each reply dear.
WATCHED_AT_ONCE = 512

# How often prompts that come slowly are asked for, and a full queue is tried; the latter ever more rarely.
POLL_SECONDS = 0.03
LONGEST_FULL_PAUSE_SECONDS = 0.5

# A job to send, or what is wrong with it; None if there is nothing yet.
Item: TypeAlias = JobPlan | FastGPT2Error | None


class _Input(Enum):
    READY = "ready"
    SLOW = "slow"  # it had nothing when it was asked last
    EXHAUSTED = "exhausted"


def check_in_flight(in_flight: int) -> None:
    """Raise BadRequest if this is no number of jobs that may be in the queue at once."""
    if not isinstance(in_flight, int) or isinstance(in_flight, bool) or not 1 <= in_flight <= MAX_IN_FLIGHT:
        raise refusal("in_flight", f"a whole number from 1 to {MAX_IN_FLIGHT}", in_flight)


class BulkRun:
    """The jobs of one `map`, from their plans to their ends.

    Args:
        items: read as there is room for them. An error takes the place of its job's outcome.
        in_flight: at most this many jobs are in the queue at once; if `ordered`, results that wait here for an earlier
            one count too.
        call: what the caller called, by which an error's note tells of its prompt.
        forgets: delete each job once its end is here: nobody else can ask for it, and a long run must not fill Redis.

    Raises:
        BadRequest: `in_flight` is out of bounds.
    """

    def __init__(
        self,
        session: Session,
        items: Iterable[Item],
        in_flight: int,
        ordered: bool,
        call: str = "map",
        forgets: bool = False,
    ) -> None:
        check_in_flight(in_flight)
        self._session = session
        self._call = call
        self._items = iter(items)
        self._input = _Input.READY
        self._in_flight = in_flight
        self._ordered = ordered
        self._forgets = forgets
        # How many items were read, and how many outcomes were given to the caller.
        self._read = self._given = 0
        # What a full queue refused; it is sent before anything more is read.
        self._refused: deque[tuple[int, JobPlan]] = deque()
        # By the number of the item: the jobs in the queue, the oldest first, and the outcomes that wait here.
        self._readers: dict[int, JobReader] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._loop = ReadLoop(session.recovery)
        # Since when Redis has not confirmed that what was sent is as durable as asked for.
        self._unconfirmed_since = math.inf
        self._full_until, self._full_pause = 0.0, POLL_SECONDS
        self._burst = SENT_AT_ONCE

    def next(self) -> Flow[tuple[int, Outcome] | None]:
        """Return the next end: (number of the prompt from 0, result or error); None after the last.

        Raises:
            QueueUnavailable: Redis stays away. Errors that are one job's own are returned.
            NotDurable: Redis takes jobs, and has not confirmed for `RECONNECT_SECONDS` that they are durable. What it
                loses meanwhile is enqueued again, so that one late confirmation is no reason to break off a long run.
        """
        while True:
            yield from self._fill()
            yield from self._confirm()
            number = self._given if self._ordered else next(iter(self._outcomes), -1)
            if number in self._outcomes:
                self._given += 1
                return number, self._outcomes.pop(number)
            if self._readers:
                yield from self._wait()
            elif self._input is _Input.EXHAUSTED and not self._refused:
                return None
            else:
                yield Pause(max(POLL_SECONDS, self._full_until - time.monotonic()))

    def cancel(self) -> Flow[None]:
        """Cancel the jobs that are in the queue, and send no more."""
        self._input = _Input.EXHAUSTED
        self._refused.clear()
        while self._readers:
            some = dict(islice(self._readers.items(), WATCHED_AT_ONCE))
            yield Pipeline(tuple(cancel_command(reader.id, self._session.queue) for reader in some.values()))
            for number in some:
                del self._readers[number]

    async def stop_reading(self) -> None:
        """Read no more of prompts that come asynchronously."""
        if isinstance(self._items, PromptFeed):
            await self._items.aclose()

    def _fill(self) -> Flow[None]:
        """Send what there is room for."""
        while time.monotonic() >= self._full_until:
            plans = self._gather()
            if not plans:
                return
            yield from self._refresh_limits()
            yield from self._send(plans)

    def _gather(self) -> list[tuple[int, JobPlan]]:
        """Return the plans to send next, with their numbers."""
        plans: list[tuple[int, JobPlan]] = []
        began = time.monotonic()
        while self._refused and len(plans) < self._burst:
            plans.append(self._refused.popleft())
        while len(plans) < self._burst and self._input is not _Input.EXHAUSTED and self._has_room(len(plans)):
            if plans and time.monotonic() - began > GATHER_SECONDS:
                break
            try:
                item = next(self._items)
            except StopIteration:
                self._input = _Input.EXHAUSTED
                break
            if item is None:
                self._input = _Input.SLOW
                break
            self._input = _Input.READY
            number, self._read = self._read, self._read + 1
            if isinstance(item, FastGPT2Error):
                self._outcomes[number] = item
            else:
                plans.append((number, item))
        return plans

    def _has_room(self, gathered: int) -> bool:
        held = self._read - self._given if self._ordered else len(self._readers) + gathered + len(self._outcomes)
        return held < self._in_flight

    def _refresh_limits(self) -> Flow[None]:
        """Read the models' limits. Checking them is a courtesy: while Redis is away it is left out."""
        from redis.exceptions import RedisError

        try:
            yield from self._session.prepare()
        except RedisError:
            if not self._session.retries.answered:
                raise

    def _send(self, plans: list[tuple[int, JobPlan]]) -> Flow[None]:
        session = self._session
        sent: dict[int, JobPlan] = {}
        jobs: list[SentJob] = []
        for number, given in plans:
            plan = session.limits.adapt(given)
            try:
                session.limits.check(plan.request, plan.options.model)
            except BadRequest as error:
                error.name_prompt(number, plan.request.given, self._call)
                self._outcomes[number] = error
                continue
            job_id, command = enqueue_command(plan, session.queue, session.max_queue)
            sent[number] = plan
            jobs.append(SentJob(job_id, command, plan, session.recovery.history))
            # Noted before it is sent: should that be interrupted, the job is cancelled with the others.
            self._readers[number] = JobReader(job_id, new=True, sent=jobs[-1])
        if not jobs:
            return
        replies, confirmation = yield from session.send([job.command for job in jobs], again=True)
        self._note_confirmation(confirmation)
        refused = []
        for (number, plan), reply in zip(sent.items(), replies, strict=True):
            job_id = self._readers[number].id
            model = plan.options.model
            outcome = read_enqueue_reply(job_id, reply, session.queue, session.max_queue, model)
            if outcome == job_id:
                continue
            del self._readers[number]
            if isinstance(outcome, ModelUnknown):
                outcome.name_prompt(number, plan.request.prompt, self._call)
                self._outcomes[number] = outcome
            else:
                refused.append((number, plan))
        self._refused.extendleft(reversed(refused))
        self._adapt(len(sent), len(refused))

    def _confirm(self) -> Flow[None]:
        """Have what was sent confirmed, if Redis has not done so yet."""
        if self._unconfirmed_since == math.inf:
            return
        last = next((reader.sent for reader in reversed(self._readers.values()) if reader.sent is not None), None)
        if last is None:  # nothing is in the queue that could be lost
            self._unconfirmed_since = math.inf
            return
        # Redis confirms what the same connection has written, and all that was written before. Sent once more, this
        # command enqueues nothing, but writes.
        _, reply = yield from self._session.send([last.command_again()], again=True)
        self._note_confirmation(reply)
        if time.monotonic() - self._unconfirmed_since > RECONNECT_SECONDS:
            raise NotDurable(
                f"for {RECONNECT_SECONDS:g} s, what was enqueued has not become durable, so that the "
                f"{counted(len(self._readers), 'job in flight is', 'jobs in flight are')} cancelled: "
                f"{self._session.durability.what_is_missing(reply)}",
                [reader.id for reader in self._readers.values()],
            )

    def _note_confirmation(self, reply: Any) -> None:
        """Note what Redis says of what has been sent; None if it was not asked."""
        if reply is None or self._session.durability.is_confirmed(reply):
            self._unconfirmed_since = math.inf
        else:
            self._unconfirmed_since = min(self._unconfirmed_since, time.monotonic())

    def _adapt(self, sent: int, refused: int) -> None:
        """Set when and how much is sent next: to a full queue, no more than it has taken, after a pause.

        It drains of this client's jobs or of others'.
        """
        if refused < sent:
            self._full_pause = POLL_SECONDS
        if refused:
            self._burst = max(1, sent - refused)
            self._full_until = time.monotonic() + self._full_pause
            self._full_pause = min(2 * self._full_pause, LONGEST_FULL_PAUSE_SECONDS)
        else:
            self._burst = min(2 * self._burst, SENT_AT_ONCE)

    def _wait(self) -> Flow[None]:
        """Wait until something comes of the oldest jobs, or more can be sent."""
        watched = dict(islice(self._readers.items(), WATCHED_AT_ONCE))
        longest = self._full_until - time.monotonic() if self._refused else math.inf
        if self._input is _Input.SLOW:
            longest = min(longest, POLL_SECONDS)
        yield from self._loop.turn(watched.values(), longest)
        ended = []
        for number, reader in watched.items():
            if reader.outcome is not None:
                del self._readers[number]
                if isinstance(reader.outcome, FastGPT2Error) and reader.sent is not None:
                    reader.outcome.name_prompt(number, reader.sent.prompt, self._call)
                self._outcomes[number] = reader.outcome
                ended += [job_key(reader.id), results_key(reader.id)]
        if ended and self._forgets:
            yield from self._session.retries.ask(Command("unlink", tuple(ended)))


class BulkFields(JobFields, total=False):
    """The options of `map` and `as_completed`: the fields of every job, and how the jobs are sent.

    Attributes:
        in_flight: at most this many jobs are in the queue or, with `map`, have results that wait here for an earlier
            one; default 64. While others fill the queue up to `max_queue`, the run waits for room.
        progress: show a bar on standard error.
    """

    in_flight: int
    progress: bool


# What `map` and `as_completed` of the asyncio client take beside what can be iterated at once.
ManyPrompts: TypeAlias = Iterable[PromptLike] | AsyncIterable[PromptLike]


def plan_bulk(
    session: Session,
    prompts: ManyPrompts,
    call: str,
    is_async: bool,
    /,
    in_flight: int = DEFAULT_IN_FLIGHT,
    progress: bool = False,
    **fields: Unpack[JobFields],
) -> tuple[BulkRun, ProgressBar]:
    """Return the run for some prompts, and its bar. Results are kept for an hour, unless the fields say otherwise.

    Args:
        call: "map" for ends in the order of the prompts, "as_completed" for ends as they come.
        is_async: the client is one for asyncio, which can read an asynchronous iterable.

    Raises:
        BadRequest: these are no prompts, `in_flight` is out of bounds, or a field is wrong for every prompt.
    """
    check_in_flight(in_flight)
    of_all = list_stops({"result_ttl": BULK_RESULT_TTL_SECONDS, **fields})
    refuse_unknown(of_all, BulkFields.__annotations__)
    plan_job("", of_all)
    plan = partial(_plan_item, of_all, call)
    items: Iterator[Item]
    if is_async and isinstance(prompts, AsyncIterable):
        items = PromptFeed(prompts, plan, min(in_flight, SENT_AT_ONCE))
    else:
        items = starmap(plan, enumerate(iterate_prompts(prompts)))
    bulk = BulkRun(session, items, in_flight, ordered=call == "map", call=call)
    # To count a column of Dask means to compute it.
    total = len(prompts) if progress and isinstance(prompts, Sized) else None
    return bulk, ProgressBar(total, progress)


def _plan_item(fields: Mapping[str, Any], call: str, number: int, prompt: PromptLike) -> Item:
    return plan_numbered(number, prompt, fields, call)


def run_bulk(driver: Driver, bulk: BulkRun, bar: ProgressBar) -> Generator[tuple[int, Outcome], None, None]:
    """Yield the ends of a bulk run. Closed before its end, the generator cancels what is in the queue.

    Raises:
        QueueUnavailable: Redis stays away.
        NotDurable: Redis does not become as durable as was asked for.
    """
    process = os.getpid()
    try:
        with closing(bar.start()):
            while (end := driver.run(bulk.next())) is not None:
                bar.add(end[1])
                yield end
    except BaseException:
        if os.getpid() == process:  # a forked child leaves its parent's jobs alone
            # At the interpreter's end, some of what is needed is gone already, but what is sent counts.
            with suppress(Exception if sys.is_finalizing() else FastGPT2Error):
                driver.run(bulk.cancel())
        raise


async def run_bulk_async(
    driver: AsyncDriver, bulk: BulkRun, bar: ProgressBar
) -> AsyncGenerator[tuple[int, Outcome], None]:
    """See `run_bulk`."""
    try:
        with closing(bar.start()):
            while (end := await driver.run(bulk.next())) is not None:
                bar.add(end[1])
                yield end
    except BaseException:
        with suppress(FastGPT2Error):
            await driver.run_whole(bulk.cancel())
        raise
    finally:
        await bulk.stop_reading()


class ProgressBar:
    """A bar that tells how many jobs have ended, and tokens a second. tqdm is imported for the first bar.

    It stands on standard error, or in the notebook where the program runs.

    Args:
        total: how many jobs there are; None if that is not known, then the bar foretells no end.
        shown: whether there is a bar at all.
        done: how many of the jobs had ended before.
    """

    def __init__(self, total: int | None, shown: bool, done: int = 0) -> None:
        self._total, self._shown, self._done = total, shown, done
        self._bar: Any = None
        self._tokens = 0
        self._started = time.monotonic()

    def start(self) -> Self:
        """Show the bar, and count the time from now on."""
        self._started = time.monotonic()
        if self._shown:
            self._bar = _import_tqdm()(total=self._total, initial=self._done, unit="job", dynamic_ncols=True)
        return self

    def add(self, outcome: Outcome) -> None:
        """Count one more job that has ended."""
        if self._bar is None:
            return
        if isinstance(outcome, GenerationResult):
            self._tokens += sum(text.usage.completion_tokens for text in (outcome, *outcome.alternatives))
        rate = self._tokens / max(1e-3, time.monotonic() - self._started)
        self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _import_tqdm() -> Any:
    """Return the bar that fits where the program runs.

    In a notebook without ipywidgets that is the bar of a terminal, which a notebook shows too. tqdm warns of it as it
    is imported, which would stand above the bar.
    """
    from tqdm import TqdmWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmWarning)
        from tqdm.auto import tqdm
    return tqdm
