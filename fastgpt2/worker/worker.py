"""An RQ worker that holds many jobs at once and decodes them together: between any two steps some come and some go."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict
from types import FrameType
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError
from rq.registry import CanceledJobRegistry
from rq.worker import WorkerStatus

from fastgpt2.errors import JobStopped, PromptTooLong
from fastgpt2.protocol.keys import SUSPECT_CRASHES, stream_key
from fastgpt2.protocol.messages import RUNNING_TTL_SECONDS, Piece, piece_to_entry
from fastgpt2.protocol.scripts import execute
from fastgpt2.protocol.untrusted import is_of_entry
from fastgpt2.worker.batch import Batch, Running, Started
from fastgpt2.worker.claims import Claim, Claims
from fastgpt2.worker.ledger import Ledger
from fastgpt2.worker.liveness import AliveFile
from fastgpt2.worker.outbox import Endings
from fastgpt2.worker.recycling import Recycling
from fastgpt2.worker.reporting import Description, Figures
from fastgpt2.worker.rq_worker import RQWorker, back_off

if TYPE_CHECKING:
    from redis import Redis
    from redis.client import Pipeline

    from fastgpt2.engine.decoding.records import GenerationRequest
    from fastgpt2.engine.engine import Engine

log = logging.getLogger("fastgpt2.worker")

# How long an idle worker may take to notice that it is an orphan, suspended, or due for a heartbeat or for upkeep; and
# one that has had nothing to do for a while: a thousand of them share one Redis. A job and a signal wake it.
IDLE_SECONDS = 1.0
QUIET_AFTER_SECONDS = 30.0
QUIET_SECONDS = 5.0

# Taken at one go: what is left may be another worker's, so that a burst of jobs spreads over all of them.
MOST_CLAIMS = 4


class GenerationWorker(RQWorker):
    """Takes jobs as long as there is room for them, steps all of them together, and writes each one's end.

    A stop signal makes it take no more, finish what it holds within `drain_timeout`, and give the rest back to the
    front of the queue; a second one makes it give back all at once.

    Args:
        engine: loaded and warmed up.
        connection: to Redis; see `fastgpt2.protocol.connection.connect`.
        queue: name of the queue; the more and the less urgent ones beside it are served too (`names.queues_of`).
        name: unique among the live workers; default host and process id.
        supervisor_pid: the process without which this one should not live on.
        drain_timeout: seconds.
        recycling: when to end although nobody asks for it.
        log_prompts: write what is asked into the log, where it would else not be found.
        restarts: how often the supervisor has started a worker in this one's place again.
        alive: the file that probes look at.
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
        self._redis_failures = 0
        self._no_redis_before = 0.0
        super().__init__(connection, queue, name, supervisor_pid)
        self._claims = Claims(connection, self.queues, self.name)
        self.figures = Figures(connection, queue, self.name, self.batch, engine.decoder)
        self._description = Description(engine, self.batch, self.figures, restarts)
        self._ledger = Ledger(self, self.figures.malformed)
        self.endings = Endings(self.batch, self._ledger, self.figures, self.name)

    def serialize(self) -> dict[str, Any]:
        """What Redis holds of this worker: RQ's fields, what clients need to know of the model, and how it is doing."""
        own = {"exchange_seconds": round(self._exchange_seconds, 6)}
        return {**super().serialize(), **self._description.fields(), **own}

    def announce(self) -> None:
        """Tell the pool's figures first: who reads a worker's own pace finds the same work among the pool's."""
        self.figures.tell()
        super().announce()

    def work(self, burst: bool = False, *other: Any, **others: Any) -> bool:
        """Take and run jobs until told to stop; with `burst`, until the queue is empty. Returns whether any was run.

        Raises:
            TypeError: an option of RQ's own `work` other than `burst` was given.
        """
        if other or others:
            raise TypeError(f"{type(self).__name__}.work() takes no option but burst")
        self._install_signal_handlers()
        if not self.sign_on():
            return False
        names = ", ".join(self.queue_names())
        log.info(
            "%s is ready: model %s, up to %d jobs at once, queues %s, process %d",
            *(self.name, self.engine.model, self.engine.max_batch, names, self.pid),
        )
        if self.recycling is not None:
            self.recycling.start()
        try:
            if self._alive is not None:
                self._alive.make()
            while not self._turn(burst):
                pass
        finally:
            if self._alive is not None:
                self._alive.remove()
            self._claims.close()
            self.figures.close()
            self.sign_off()
        return self._worked

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        super().request_stop(signum, frame)
        self._claims.wake()

    # One turn: all talk with Redis, then a step.

    def _turn(self, burst: bool) -> bool:
        """Whether this was the last one."""
        idle = self._empty_handed()
        self.lease.turned()
        if self._alive is not None:
            self._alive.turned()
        self._heed_stop()
        found = True
        if time.monotonic() >= self._no_redis_before:
            found = self._exchange_safely(burst, idle)
        elif not self.batch.running:
            time.sleep(0.02)
        if self._empty_handed() and (self.stopping.is_set() or (burst and not found)):
            return True
        if len(self.endings) and self.stop_at_once and self._redis_failures:
            log.error("%s: the ends of %d jobs could not be written", self.name, len(self.endings))
            return True
        self._end_overdue()
        self.batch.admit()
        self._step()
        return False

    def _empty_handed(self) -> bool:
        return not (len(self.batch) or self._claimed or len(self.endings))

    def _exchange_safely(self, burst: bool, idle: bool) -> bool:
        """Whether any job was found."""
        began = time.perf_counter()
        try:
            found = self._exchange(burst, idle)
            self.figures.tell_if_due()
            self._redis_failures = 0
            return found
        except RedisError as reason:
            self._redis_failures += 1
            seconds = min(back_off(self._redis_failures), 0.2 if self.stopping.is_set() else math.inf)
            log.warning("%s: Redis cannot be used (%s); trying again in %.1f s", self.name, reason, seconds)
            self._no_redis_before = time.monotonic() + seconds
            self._claims.close_connections()
        except Exception:
            # No entry in Redis, however strange, may end a worker.
            log.exception("%s: unforeseen; going on", self.name)
            self._redis_failures += 1
            self._no_redis_before = time.monotonic() + back_off(self._redis_failures)
        finally:
            if not idle:
                self._exchange_seconds += time.perf_counter() - began
        return True

    def _exchange(self, burst: bool, idle: bool) -> bool:
        self.endings.write()
        if self.keep_up() or self.lease.was_taken_from():
            self._compare_with_redis()
        if len(self.batch):
            self._pulse()
        elif not self.stopping.is_set() and not self._claimed and self.lease.held:
            self._claimed += self._idle(burst)
        if not self._claimed:
            return not idle
        self._start_claimed()
        return True

    def _compare_with_redis(self) -> None:
        """Keep alive what is in hand, let go of what is not this worker's any more, find what it never heard of."""
        lost = self._ledger.keep_alive([running.started for running in self.batch])
        for running in [running for running in self.batch if running.started in lost]:
            self.endings.cancel(running, "was cancelled, deleted or taken back")
        known = {job_id for _, job_id in self._claimed}
        known.update(running.id for running in (*self.batch, *self.endings))
        # The answer to a claim, or to the start of a job, was lost on the way.
        self._claimed += [claim for claim in self._claims.in_hand() if claim[1] not in known]

    def _start_claimed(self) -> None:
        read = self._ledger.read(self._claimed)
        suspect = next((at for at, each in enumerate(read) if each.crashes >= SUSPECT_CRASHES), len(read))
        if suspect == 0 and not len(self.batch):
            suspect = 1
        self._claims.put_back([(each.queue, each.id) for each in read[suspect:]])
        started = self._ledger.start(read[:suspect])
        self._claimed = []
        for each in started:
            self._take_up(each)

    def _idle(self, burst: bool) -> list[Claim]:
        if self.is_suspended():
            self.enter(WorkerStatus.SUSPENDED)
            if not burst:
                self.stopping.wait(IDLE_SECONDS)
            return []
        self.enter(WorkerStatus.IDLE)
        if burst:
            return self._claims.take(MOST_CLAIMS)
        quiet = time.monotonic() - self._worked_at > QUIET_AFTER_SECONDS
        return self._claims.wait(QUIET_SECONDS if quiet else IDLE_SECONDS)

    def _pulse(self) -> None:
        """One round trip between two steps: new text goes out, cancellations and new jobs come in."""
        with self.connection.pipeline(transaction=False) as pipeline:
            sent = self._add_pieces(pipeline)
            asked = self._add_cancellations(pipeline)
            wanted = 0 if self.stopping.is_set() or self._claimed else min(MOST_CLAIMS, self.batch.room())
            wanted *= self.lease.held
            if wanted:
                self._claims.ask(pipeline, wanted, len(self.batch))
            replies = execute(pipeline)
        pieces = {at for at, _, _ in sent}
        for at, reply in enumerate(replies):
            if isinstance(reply, RedisError) and not (at in pieces and is_of_entry(reply)):
                raise reply
        self._note_sent(sent, replies)
        if wanted:
            self._claimed += self._claims.answered(replies[-1])
        at = len(replies) - bool(wanted) - len(asked)
        for together, scores in zip(asked, replies[at : at + len(asked)], strict=True):
            for running, score in zip(together, scores, strict=True):
                if score is not None:
                    self.endings.cancel(running)

    def _note_sent(self, sent: list[tuple[int, Running, Piece]], replies: list[Any]) -> None:
        for at, running, piece in sent:
            running.sent.note(piece)
            if isinstance(replies[at], RedisError):
                log.warning("%s: the text of job %s cannot be streamed (%s)", self.name, running.id, replies[at])
                running.muted = True

    def _add_pieces(self, pipeline: Pipeline) -> list[tuple[int, Running, Piece]]:
        """The pieces, each with the number of its command and whose it is."""
        sent = []
        for running in self.batch.running:
            piece = running.unsent()
            if piece is not None:
                key = stream_key(running.id)
                # A bound for a stream that many attempts write to; one attempt has an entry a token at most.
                most = 4 * self.engine.config.n_positions
                sent.append((len(pipeline), running, piece))
                pipeline.xadd(key, piece_to_entry(piece), maxlen=most, approximate=True)
                if piece.at == 0:
                    pipeline.expire(key, RUNNING_TTL_SECONDS)
        return sent

    def _add_cancellations(self, pipeline: Pipeline) -> list[list[Running]]:
        """Ask which of the jobs in hand are among the cancelled, queue by queue."""
        by_queue: dict[str, list[Running]] = defaultdict(list)
        for running in self.batch:
            by_queue[running.started.queue.name].append(running)
        for name, together in by_queue.items():
            key = CanceledJobRegistry.key_template.format(name)
            pipeline.execute_command("ZMSCORE", key, *(running.id for running in together))
        return list(by_queue.values())

    # Jobs come.

    def _take_up(self, started: Started) -> None:
        self._worked = True
        self._worked_at = time.monotonic()
        try:
            request, options = started.job.asked()
            if self.log_prompts:
                log.info("%s: job %s: %.1000s", self.name, started.id, json.dumps(request.prompt))
            self._refuse_hopeless(request)
            prompt = self.engine.decoder.prepare(request)
        except Exception as error:
            self.endings.refuse(started, error)
            return
        self.batch.add(Running.begin(started, prompt, options, self.engine.model, time.monotonic()))

    def _refuse_hopeless(self, request: GenerationRequest) -> None:
        """A text of more bytes than all positions have room for is not tokenized: the others would wait for it."""
        prompt, n_positions = request.prompt, self.engine.config.n_positions
        least = -(-len(prompt.encode()) // self._description.longest_token_bytes) if isinstance(prompt, str) else 0
        if least + request.least_room > n_positions:
            raise PromptTooLong(
                f"prompt tokens {least} or more, over {request.positions_in_words(n_positions)}: shorten the prompt"
            )

    def _step(self) -> None:
        self.figures.look()
        try:
            ended = self.batch.step()
        except Exception as error:
            self._blame(self.batch.running, error)
            return
        for running in ended:
            self.endings.finish(running)

    def _blame(self, together: list[Running], error: Exception) -> None:
        """Whose fault it was cannot be told of jobs that went through a step together: each gets another chance."""
        if isinstance(error, MemoryError):
            log.error("%s: memory has run out; stopping, so that a fresh process takes its place", self.name)
            self.stopping.set()
        if len(together) == 1:
            self.endings.fail(together[0], error)
            return
        log.error("%s: a step with %d jobs failed", self.name, len(together), exc_info=error)
        self.endings.give_back(together, crashed=True)

    # Jobs go.

    def _end_overdue(self) -> None:
        """End what its own time, or a stop command, ends."""
        stopped = set(self.commanded_to_stop())
        now = time.monotonic()
        for running in self.batch:
            if running.id in stopped:
                self.endings.fail(running, JobStopped(running.id, "stopped on request"))
            elif (error := running.time_up(now)) is not None:
                self.endings.fail(running, error)

    # The end of all.

    def _heed_stop(self) -> None:
        if not self.stopping.is_set():
            if self.is_orphaned():
                log.warning("%s: the supervisor is gone; stopping", self.name)
            elif (reason := self._worn_out()) is not None:
                log.info("%s: %s; stopping", self.name, reason)
            else:
                return
            self.stopping.set()
        if self._drain_until == math.inf:
            self._drain_until = time.monotonic() + self.drain_timeout
            if len(self.batch):
                log.info(
                    "%s is told to stop: finishing %d jobs within %g s; a second signal gives them back",
                    *(self.name, len(self.batch.running), self.drain_timeout),
                )
            self.endings.give_back(self.batch.waiting)
        if self.stop_at_once or time.monotonic() > self._drain_until:
            self.endings.give_back(list(self.batch))

    def _worn_out(self) -> str | None:
        if self.recycling is None:
            return None
        decoder = self.engine.decoder
        # Shared with the helper processes, those of jobs in hand are not this process's own memory; kept ones are.
        kv_bytes = decoder.prefix_bytes + (decoder.kv_bytes_reserved if decoder.model.size == 1 else 0)
        return self.recycling.due(self.endings.written + len(self.batch), kv_bytes, time.monotonic())
