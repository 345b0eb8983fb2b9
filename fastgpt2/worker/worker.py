"""An RQ worker that runs many jobs at once and decodes them together: between any two steps some come and some go."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Sequence
from contextvars import Token
from types import FrameType
from typing import TYPE_CHECKING, Any

from rq import Queue
from rq.worker import WorkerStatus

from fastgpt2.errors import FastGPT2Error, JobStopped, JobTimedOut, PromptTooLong
from fastgpt2.events import about, describe_process
from fastgpt2.plurals import counted
from fastgpt2.process import on_stop_signals
from fastgpt2.protocol.connection import ANSWER_BY, address_of
from fastgpt2.protocol.keys import model_of
from fastgpt2.protocol.untrusted import is_of_service
from fastgpt2.worker.batch import ActiveJob, Attempt, Batch
from fastgpt2.worker.between_steps import BetweenSteps
from fastgpt2.worker.claims import Claim, Claims
from fastgpt2.worker.confirmation import Confirmation
from fastgpt2.worker.faults import Faults
from fastgpt2.worker.ledger import Ledger
from fastgpt2.worker.liveness import AliveFile
from fastgpt2.worker.outbox import Outbox
from fastgpt2.worker.recycling import Recycling
from fastgpt2.worker.reporting import Metrics, WorkerInfo
from fastgpt2.worker.router import Router
from fastgpt2.worker.rq_worker import RQWorker
from fastgpt2.worker.set_aside import set_aside, shown

if TYPE_CHECKING:
    from redis import Redis

    from fastgpt2.engine.decoding.records import GenerationRequest
    from fastgpt2.engine.engine import Engine

log = logging.getLogger("fastgpt2.worker")

# How long an idle worker may take to notice that it is an orphan, suspended, or due for a heartbeat or for upkeep; and
# a worker that has had nothing to do for a while: a thousand of them share one Redis. A job and a signal wake it.
IDLE_SECONDS = 1.0
QUIET_AFTER_SECONDS = 30.0
QUIET_SECONDS = 5.0

# For how long after its last job a worker that is to stop goes on trying to tell a Redis that is away. Nothing is lost
# then: what it holds is found by its lists.
LAST_TRIES_SECONDS = 10.0

# How many jobs to claim at one go: the rest may be another worker's, so that a burst of jobs spreads over all of them.
MOST_CLAIMS = 4

# How long a worker that is to stop at once waits for Redis.
AT_ONCE_SECONDS = 5.0


class GenerationWorker(RQWorker):
    """A worker that claims jobs as long as there is room, steps all of them together, and writes each one's end.

    A stop signal makes it claim no more, finish what it runs within `drain_timeout`, and give the rest back to the
    front of the queue; a second one makes it give back all at once.

    Args:
        engine: loaded and warmed up.
        connection, queue, name, supervisor_pid, named_only: as `RQWorker` takes them.
        names: the names under which the model is served, its own first; without any, the one by which it was loaded.
        drain_timeout: in seconds.
        recycling: when to end although nobody asks for it.
        log_prompts: write the prompts into the log, where they would else not be found.
        restarts: how often the supervisor has started a worker in this one's place again.
        alive: the file that probes look at.
        durability: what an end must have reached before it is let go of: memory, disk or replica (`--durability`).
    """

    def __init__(
        self,
        engine: Engine,
        connection: Redis,
        queue: str,
        name: str | None = None,
        supervisor_pid: int | None = None,
        drain_timeout: float = 30.0,
        recycling: Recycling | None = None,
        log_prompts: bool = False,
        restarts: int = 0,
        alive: AliveFile | None = None,
        durability: str = "memory",
        names: Sequence[str] = (),
        named_only: bool = False,
    ) -> None:
        self.engine = engine
        self.drain_timeout = drain_timeout
        self.recycling = recycling
        self.log_prompts = log_prompts
        self._alive = alive
        self.batch = Batch(engine)
        self._claimed: list[Claim] = []
        self._worked = False
        self._worked_at = time.monotonic()
        self._exchange_seconds = 0.0
        self._drain_until = math.inf
        self._is_beyond_help = False
        super().__init__(connection, queue, names or (engine.model,), name, supervisor_pid, named_only)
        self._router = Router(connection, queue, self.name, self.served.own)
        self.metrics = Metrics(connection, queue, self.name, self.served.first, self.batch, engine.decoder)
        self._claims = Claims(connection, self.queues, self.name, self.metrics.count_malformed)
        self._info = WorkerInfo(engine, self.batch, self.metrics, restarts, self.served.own, named_only)
        self._faults = Faults(self.name, address_of(connection))
        self._ledger = Ledger(self, queue, self.metrics.count_malformed)
        self.confirmation = Confirmation(connection, durability, self.name, self.metrics.count_unconfirmed)
        self.outbox = Outbox(self.batch, self._ledger, self.metrics, self.confirmation, self.name)
        positions = engine.config.n_positions
        self._between_steps = BetweenSteps(connection, self.batch, self._claims, self.outbox, self.name, positions)

    def serialize(self) -> dict[str, Any]:
        """Return what Redis holds of this worker: RQ's fields, and those of `WorkerInfo`."""
        return {**super().serialize(), **self._info.fields(), "exchange_seconds": round(self._exchange_seconds, 6)}

    def announce(self) -> None:
        """Report the pool's figures first: who reads a worker's own rate finds the same work among the pool's."""
        self.metrics.report()
        super().announce()

    def work(self, burst: bool = False, *other: Any, **others: Any) -> bool:
        """Claim and run jobs until told to stop; with `burst`, until the queue is empty.

        Returns:
            Whether any job was run.

        Raises:
            TypeError: an option of RQ's own `work` other than `burst` was given.
            FastGPT2Error: for some time, nothing could be exchanged with a Redis that is there; or another worker
                has this one's name by now.
        """
        if other or others:
            raise TypeError(f"{type(self).__name__}.work() takes no option but burst")
        if threading.current_thread() is threading.main_thread():
            on_stop_signals(self.request_stop)
        answer_by: Token[float] | None = None
        try:
            if not self.sign_on():
                return False
            self.confirmation.check()
            describe_process(worker=self.name, model=self.served.first)
            what = f"model {' or '.join(self.served.own)}, up to {counted(self.engine.max_batch, 'job')} at once"
            log.info("%s is ready: %s, queues %s, process %d", self.name, what, ", ".join(self.queue_names()), self.pid)
            if self.recycling is not None:
                self.recycling.start()
            if self._alive is not None:
                self._alive.create()
            while not self._turn(burst):
                if self.stop_at_once and answer_by is None:
                    # What a Redis that hangs does not take until then is left to whoever finds it.
                    answer_by = ANSWER_BY.set(time.monotonic() + AT_ONCE_SECONDS)
        finally:
            if self._alive is not None:
                self._alive.remove()
            try:
                self._claims.close()
                self.confirmation.close()
                self.metrics.close()
                self.engine.learnt_times.keep()
                self.engine.decoder.close()
            finally:
                self.sign_off()
                if answer_by is not None:
                    ANSWER_BY.reset(answer_by)
        if self._is_beyond_help:
            raise self._faults.in_words()
        if self.lease.is_taken:
            raise FastGPT2Error(f"worker {self.name} has lost its name to another; give each worker a name of its own")
        return self._worked

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        super().request_stop(signum, frame)
        self._claims.wake()

    # One turn of the loop: all talk with Redis, then a step.

    def _turn(self, burst: bool) -> bool:
        """Take one turn. Return whether it was the last one."""
        idle = self._has_no_jobs()
        self.lease.note_turn()
        if self._alive is not None:
            self._alive.note_turn()
        self._check_for_stop()
        found = True
        if self._faults.is_due:
            found = self._try_exchange(burst, idle)
        elif not self.batch.decoding:
            time.sleep(0.02)
        if self._has_no_jobs() and (self.stopping.is_set() or (burst and not found)):
            if not len(self.confirmation):
                return True
            self.confirmation.wait(IDLE_SECONDS)
        if self._faults.count and self._should_give_up():
            log.error("%s: %s", self.name, self._describe_rest())
            return True
        self._end_overdue()
        for job in self.batch.admit():
            self._end(job)
        self._step()
        self.engine.learnt_times.keep_if_due()
        return False

    def _has_no_jobs(self) -> bool:
        return not (len(self.batch) or self._claimed or len(self.outbox))

    def _try_exchange(self, burst: bool, idle: bool) -> bool:
        """Exchange with Redis what there is; if that fails, go on without Redis for a while.

        Returns:
            Whether any job was found, or the worker had some before; True if that is not known.
        """
        began = time.perf_counter()
        try:
            found = self._exchange(burst, idle)
            self.metrics.report_if_due()
            self._faults.clear()
            return found
        except Exception as reason:
            self._faults.note(reason, self.stopping.is_set())
            self._claims.close_connections()
            if self._faults.is_unforeseen:
                self._mend()
            if self._faults.is_lasting:
                # A fresh worker may serve, or be told at its start why it cannot.
                self._is_beyond_help = self.stop_at_once = True
                self.stopping.set()
        finally:
            if not idle:
                self._exchange_seconds += time.perf_counter() - began
        return True

    def _mend(self) -> None:
        """Mend what is this worker's own in Redis."""
        try:
            super().announce()
            self._claims.mend(self._held())
        except Exception as reason:
            log.warning("%s: it cannot be mended (%s: %.200s)", self.name, type(reason).__name__, reason)

    def count_malformed(self, job_id: str) -> None:
        self.metrics.count_malformed(job_id)

    def _held(self) -> list[Claim]:
        """Return all jobs that this worker has claimed, and those whose ends are not written yet."""
        attempts = [*(job.attempt for job in self.batch), *self.outbox]
        return [*self._claimed, *((attempt.queue, attempt.id) for attempt in attempts)]

    def _exchange(self, burst: bool, idle: bool) -> bool:
        """Write ends, keep up, then claim and start jobs. Return whether there were any jobs."""
        self.outbox.write()
        if self.keep_up() or self.lease.consume_loss():
            self._compare_with_redis()
        if len(self.batch):
            may_claim = self.lease.is_valid and not (self.stopping.is_set() or self._claimed)
            self._claimed += self._between_steps.exchange(min(MOST_CLAIMS, self.batch.room()) if may_claim else 0)
        elif not self.stopping.is_set() and not self._claimed and self.lease.is_valid:
            self._claimed += self._wait_for_jobs(burst)
        if not self._claimed:
            return not idle
        self._start_claimed()
        return True

    def _compare_with_redis(self) -> None:
        """Keep running jobs alive, let go of what is not this worker's any more, find what it never heard of."""
        lost = self._ledger.keep_alive([job.attempt for job in self.batch])
        for job in [job for job in self.batch if job.attempt in lost]:
            self.outbox.cancel(job, "was cancelled, deleted or taken back")
        held = self._held()
        known = {job_id for _, job_id in held}
        # The answer to a claim, or to the start of a job, was lost on the way.
        self._claimed += [claim for claim in self._claims.list_all(held) if claim[1] not in known]

    def _start_claimed(self) -> None:
        """Start the claimed jobs; if that fails for another reason than Redis, one by one."""
        try:
            self._start(self._claimed)
            self._claimed = []
        except Exception as reason:
            begun = {job.id for job in (*self.batch, *self.outbox)}
            self._claimed = [claim for claim in self._claimed if claim[1] not in begun]
            if is_of_service(reason) or isinstance(reason, MemoryError):
                raise
            message = "%s: %s cannot be started together (%s: %.200s); trying one by one"
            log.warning(message, self.name, counted(len(self._claimed), "job"), type(reason).__name__, reason)
            self._claims.mend(self._held())
            self._start_one_by_one()

    def _start_one_by_one(self) -> None:
        """Start the claimed jobs; one that fails here, so for the second time, is set aside. No other waits for it."""
        while self._claimed:
            try:
                self._start(self._claimed[:1])
            except Exception as reason:
                if is_of_service(reason) or isinstance(reason, MemoryError):
                    raise
                self._set_aside(*self._claimed[0], reason)
            del self._claimed[0]

    def _set_aside(self, queue: Queue, job_id: str, reason: Exception) -> None:
        """Fail a claimed job that cannot be handled, and note it among what was set aside."""
        extra = about(job_id=job_id)
        log.error("%s: job %s cannot be handled", self.name, shown(job_id), exc_info=reason, extra=extra)
        try:
            self._ledger.fail_malformed(queue, job_id, reason)
        except Exception as other:
            if is_of_service(other):
                raise
            self.metrics.count_malformed(job_id)
        set_aside(queue, job_id.encode(), f"{type(reason).__name__}: {reason}", self.name)

    def _start(self, claims: list[Claim]) -> None:
        """Start claimed jobs; from the first suspect on they go back, unless the suspect can run alone."""
        attempts = self._router.route(self._ledger.read(claims))
        count = next((at for at, attempt in enumerate(attempts) if attempt.is_suspect), len(attempts))
        if count == 0 and not len(self.batch):
            count = 1
        self._claims.put_back([(attempt.queue, attempt.id) for attempt in attempts[count:]])
        for attempt in self._ledger.start(attempts[:count]):
            self._begin(attempt)

    def _wait_for_jobs(self, burst: bool) -> list[Claim]:
        if self.get_state() != WorkerStatus.SUSPENDED:
            self.enter(WorkerStatus.IDLE)  # first: what comes meanwhile is found without a wait
        # One at a time, so that the queues take turns and a burst spreads over the pool.
        found = self._claims.claim(MOST_CLAIMS if burst else 1)
        if found is None:
            self.enter(WorkerStatus.SUSPENDED)
            if not burst:
                self.stopping.wait(IDLE_SECONDS)
            return []
        self.enter(WorkerStatus.IDLE)
        if found or burst:
            return found
        quiet = time.monotonic() - self._worked_at > QUIET_AFTER_SECONDS
        return self._claims.wait(QUIET_SECONDS if quiet else IDLE_SECONDS, MOST_CLAIMS)

    # Jobs begin, are decoded, and end.

    def _begin(self, attempt: Attempt) -> None:
        """Put a started job into the batch, or fail it if its request cannot be served."""
        self._worked = True
        self._worked_at = time.monotonic()
        try:
            request, options = attempt.rq_job.parse()
            if attempt.error is not None:
                raise attempt.error
            if self.log_prompts:
                prompt = json.dumps(request.given)
                log.info("%s: job %s: %.1000s", self.name, attempt.id, prompt, extra=attempt.log_extra)
            self._refuse_hopeless(request)
            tokenized = self.engine.decoder.prepare(request)
            model = options.model or model_of(attempt.queue.name) or self.served.first
            urgency = self._claims.urgency(attempt.queue)
            job = ActiveJob.begin(attempt, tokenized, options, model, time.monotonic(), urgency)
        except BaseException as error:
            self.outbox.refuse(attempt, _of_job(error))
            return
        self.batch.add(job)

    def _refuse_hopeless(self, request: GenerationRequest) -> None:
        """Raise PromptTooLong for a text that has too many bytes; the other jobs would wait while it is tokenized."""
        prompt, n_positions = request.prompt, self.engine.config.n_positions
        least = -(-len(prompt.encode()) // self._info.longest_token_bytes) if isinstance(prompt, str) else 0
        if least + request.least_room > n_positions:
            limit = request.describe_positions(n_positions)
            raise PromptTooLong(f"prompt tokens {least} or more, over {limit}: shorten the prompt")

    def _step(self) -> None:
        self.metrics.sample()
        try:
            ended = self.batch.step()
        except BaseException as error:
            self._blame(self.batch.decoding, _of_job(error))
            return
        for job in ended:
            self._end(job)

    def _end(self, job: ActiveJob) -> None:
        """Note the end of a job that came to it by itself, or that failed alone."""
        if job.error is None:
            self.outbox.finish(job)
        else:
            self.outbox.fail(job, job.error)

    def _blame(self, jobs: list[ActiveJob], error: Exception) -> None:
        """End what a failed step leaves. Of several jobs nobody knows whose fault it was: each gets another chance."""
        if isinstance(error, MemoryError):
            log.error("%s: memory has run out; stopping, so that a fresh process takes its place", self.name)
            self.stopping.set()
        if len(jobs) == 1:
            self.outbox.fail(jobs[0], error)
        else:
            log.error("%s: a step with %d jobs failed", self.name, len(jobs), exc_info=error)
            self.outbox.give_back(jobs, crashed=True)

    def _end_overdue(self) -> None:
        """End the jobs whose time is up, or that a stop command names."""
        stopped = set(self.take_stop_commands())
        now = time.monotonic()
        for job in self.batch:
            if job.id in stopped:
                self.outbox.fail(job, JobStopped(job.id, "stopped on request"))
            elif now > job.deadline:
                self.outbox.fail(job, JobTimedOut(job.id, job.deadline_reason))

    # The worker ends.

    def _check_for_stop(self) -> None:
        """If this worker is to stop, finish what it runs within `drain_timeout` and give the rest back."""
        if not self.stopping.is_set():
            if self.is_orphaned():
                log.warning("%s: the supervisor is gone; stopping", self.name)
            elif (reason := self._reason_to_recycle()) is not None:
                log.info("%s: %s; stopping", self.name, reason)
            else:
                return
            self.stopping.set()
        if self._drain_until == math.inf:
            self._drain_until = time.monotonic() + self.drain_timeout
            if len(self.batch):
                running = f"{counted(len(self.batch.decoding), 'job')} within {self.drain_timeout:g} s"
                log.info("%s is told to stop: finishing %s; a second signal gives back all", self.name, running)
            self.outbox.give_back(self.batch.waiting)
        if self.stop_at_once or time.monotonic() > self._drain_until:
            self.outbox.give_back(list(self.batch))
            self.confirmation.hurry()

    def _should_give_up(self) -> bool:
        """Tell whether a worker that is to stop has tried for long enough to tell Redis, or is hurried."""
        hurried = (self.stop_at_once or self._faults.is_last_try_over) and not len(self.batch)
        return self.stopping.is_set() and (hurried or time.monotonic() > self._drain_until + LAST_TRIES_SECONDS)

    def _describe_rest(self) -> str:
        """Return what a worker that gives Redis up has not got rid of: only what there is."""
        parts = []
        if len(self.outbox):
            parts.append(f"{counted(len(self.outbox), 'job has', 'jobs have')} ended, which could not be written")
        if self._claimed:
            claimed = counted(len(self._claimed), "job that was claimed", "jobs that were claimed")
            parts.append(f"{claimed} could not be put back")
        if parts:
            parts.append("whoever serves the queue next finds them")
        if len(self.confirmation):
            written = counted(len(self.confirmation), "job is", "jobs are")
            parts.append(f"{written} written, and nobody has confirmed that this lasts")
        return "; ".join(parts)

    def _reason_to_recycle(self) -> str | None:
        if self.recycling is None:
            return None
        decoder = self.engine.decoder
        # Shared with the helper processes, those of running jobs are not this process's own memory; kept ones are.
        kv_bytes = decoder.prefix_bytes + (decoder.model.cache.bytes_reserved if decoder.model.size == 1 else 0)
        return self.recycling.due(self.outbox.written + len(self.batch), kv_bytes, time.monotonic())


def _of_job(error: BaseException) -> Exception:
    """Return what ended the work on a job; a panic of a library that is written in Rust is no Exception in Python.

    Raises:
        BaseException: the error, if it is to end the process.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        raise error
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
