"""The jobs that a worker runs: what is known of each, how it may end, and which are decoded together. No Redis here."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from rq import Queue
from rq.executions import Execution

from fastgpt2.engine.decoding.records import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    Timings,
    Usage,
    combine,
)
from fastgpt2.engine.network.gpt2 import DEFAULT_MAX_ROWS
from fastgpt2.errors import FastGPT2Error
from fastgpt2.events import about
from fastgpt2.protocol.keys import SUSPECT_CRASHES
from fastgpt2.protocol.messages import JobOptions, Piece, result_to_json
from fastgpt2.protocol.untrusted import seconds_between
from fastgpt2.worker.rq_job import GenerationJob

if TYPE_CHECKING:
    from fastgpt2.engine.decoding.sequence import Sequence, TokenizedPrompt
    from fastgpt2.engine.engine import Engine

# While more tokens of prompts than this wait to be read, no further jobs are taken: another worker might be free. They
# are the rows of a few steps, so that of the prompts that wait a short one can be read first.
MOST_UNREAD = DEFAULT_MAX_ROWS

# While nothing but grammars is missing, a worker looks this often whether there is something else to do.
GRAMMAR_WAIT_SECONDS = 0.02


@dataclass(slots=True)
class TextPosition:
    """The part of one text that was sent: a number of characters, and of log probabilities."""

    characters: int = 0
    logprobs: int = 0

    def next_piece(self, sequence: Sequence, attempt: int, tells_usage: bool) -> Piece | None:
        """Return what may be sent next; None if there is no further text that is sure to stay."""
        end = sequence.settled
        if end <= self.characters:
            return None
        text, at, index = sequence.text[self.characters : end], self.characters, sequence.choice_index
        usage = sequence.usage if tells_usage else None
        if not sequence.logprobs:
            return Piece(text, at, attempt, choice_index=index, usage=usage)
        unsent = sequence.logprobs[self.logprobs :]
        told = tuple(takewhile(lambda one: one.text_offset < end, unsent))
        return Piece(text, at, attempt, told, self.logprobs, index, usage)


class StreamPosition:
    """The part of a job's stream that was sent, of each of its texts.

    Args:
        tells_usage: each piece tells how many tokens there are.
    """

    def __init__(self, tells_usage: bool) -> None:
        self._tells_usage = tells_usage
        self._positions: defaultdict[int, TextPosition] = defaultdict(TextPosition)

    def next_pieces(self, sequences: Iterable[Sequence], attempt: int) -> list[Piece]:
        """Return what may be sent next of each text of which there is something."""
        found = (self._positions[each.choice_index].next_piece(each, attempt, self._tells_usage) for each in sequences)
        return [piece for piece in found if piece is not None]

    def advance(self, piece: Piece) -> None:
        """Note that a piece was sent."""
        position = self._positions[piece.choice_index]
        position.characters = piece.at + len(piece.text)
        position.logprobs = piece.token_at + len(piece.logprobs)


@dataclass(eq=False, slots=True)
class Attempt:
    """A job that this worker has claimed, and then one run of it: RQ calls the run an execution.

    Attributes:
        execution: RQ's record of the run; without an id until the job is started.
        began_at: when it began, on `time.monotonic`'s clock.
        number: how often the job has been started, this time included; 0 until it is started.
        error: why the job is to be refused once it is started, if that is known before.
    """

    id: str
    rq_job: GenerationJob
    queue: Queue
    execution: Execution
    began_at: float
    number: int = 0
    error: FastGPT2Error | None = None

    @property
    def waited_seconds(self) -> float:
        """The time from being enqueued until being started, by the clocks of two machines; never below zero."""
        return seconds_between(self.rq_job.enqueued_at, self.rq_job.started_at)

    @property
    def in_words(self) -> str:
        """Return how a line of the log calls the job."""
        request_id = self.rq_job.request_context.request_id
        return f"job {self.id} of request {request_id}" if request_id else f"job {self.id}"

    @property
    def log_extra(self) -> dict[str, Any]:
        """Return what an event of the log tells of the job beside its message, as the call's `extra`."""
        return about(job_id=self.id, **self.rq_job.request_context.log_fields)

    @property
    def is_suspect(self) -> bool:
        """True if workers have died of the job: then it runs with no other beside it."""
        return self.rq_job.crashes >= SUSPECT_CRASHES


@dataclass(eq=False, slots=True)
class ActiveJob:
    """A running job: its request is known to be good; it waits for a slot, or is decoded.

    Attributes:
        deadline: when its time is up, on `time.monotonic`'s clock; `deadline_reason` says why.
        sequences: those of its texts that were begun, in the order of their indices. None is begun before the job has
            a slot, and each further one when there is another slot.
        position: how far its stream has come.
        urgency: among the prompts that wait to be read, those of the more urgent jobs are read first.
        muted: no more is streamed: under the stream's key stands something else.
    """

    id: str
    attempt: Attempt
    prompt: TokenizedPrompt
    options: JobOptions
    model: str
    deadline: float
    deadline_reason: str
    position: StreamPosition
    urgency: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    muted: bool = False

    @classmethod
    def begin(
        cls, attempt: Attempt, prompt: TokenizedPrompt, options: JobOptions, model: str, now: float, urgency: int = 0
    ) -> ActiveJob:
        """Return the running job of an attempt, with the earlier of its two deadlines."""
        limit = attempt.rq_job.timeout or Queue.DEFAULT_TIMEOUT
        deadline = now + limit if limit > 0 else math.inf
        reason = f"took longer than the {limit} s that it was given from its start (job_timeout)"
        if options.timeout is not None:
            left = options.timeout - attempt.waited_seconds
            if now + left < deadline:
                deadline = now + left
                reason = (
                    f"took longer than the {options.timeout:g} s that it was given from being enqueued (timeout), "
                    f"{attempt.waited_seconds:.1f} s of them in the queue"
                )
        position = StreamPosition(options.stream_usage)
        return cls(attempt.id, attempt, prompt, options, model, deadline, reason, position, urgency)

    @property
    def request(self) -> GenerationRequest:
        return self.prompt.request

    @property
    def has_begun_all(self) -> bool:
        """Tell whether each of the job's texts has, or had, a slot."""
        return len(self.sequences) == self.request.texts

    @property
    def is_compiling(self) -> bool:
        """Tell whether the grammar of a guided job is not there yet, nor known to be a bad one."""
        return self.prompt.grammar is not None and not self.prompt.grammar.done()

    @property
    def error(self) -> Exception | None:
        """Return the error of the job's grammar, or of the first text that failed alone; the job fails with it."""
        grammar = self.prompt.grammar
        failure = grammar.exception() if grammar is not None and grammar.done() else None
        if isinstance(failure, Exception):
            return failure
        return next((sequence.error for sequence in self.sequences if sequence.error is not None), None)

    @property
    def has_ended(self) -> bool:
        """Tell whether the job has come to its end by itself: all its texts have, or one of them failed."""
        finished = self.has_begun_all and all(sequence.finished for sequence in self.sequences)
        return finished or self.error is not None

    @property
    def first_token_seconds(self) -> float:
        """The time from being enqueued to the first token: in the queue, waiting for a slot, reading the prompt.

        By two clocks: the time since the start, less the time since the first token.
        """
        since_start = time.monotonic() - self.attempt.began_at
        # It is of the first text, whose sequence reads the prompt.
        since_first_token = time.perf_counter() - self.sequences[0].first_token_at
        return self.attempt.waited_seconds + max(0.0, since_start - since_first_token)

    @property
    def usage(self) -> Usage:
        """The tokens that were read and generated for it, of all its texts; a prompt that was half read counts whole.

        Its texts share the prompt, which is read once.
        """
        if not self.sequences:
            return Usage(0, 0)
        return Usage(len(self.prompt.ids), sum(each.usage.completion_tokens for each in self.sequences))

    def next_pieces(self) -> list[Piece]:
        """Return the text that may be streamed and was not yet."""
        if not self.options.stream or self.muted:
            return []
        return self.position.next_pieces(self.sequences, self.attempt.number)

    def last_pieces(self) -> list[Piece] | None:
        """Return what the stream ends with, perhaps nothing; None if the job has no stream."""
        return self.next_pieces() if self.options.stream else None

    def result(self) -> dict[str, Any]:
        """Return the result of a job whose texts all ended by themselves, as JSON."""
        results = [sequence.result(self.model) for sequence in self.sequences]
        return result_to_json(combine(self.request, results), self.attempt.waited_seconds)

    def partial_result(self, reason: FinishReason) -> dict[str, Any]:
        """Return what has been generated so far, perhaps nothing, as the JSON of a result; see `join_partial`."""
        result = join_partial(self.prompt, self.sequences, self.model, reason)
        return result_to_json(result, self.attempt.waited_seconds)


def join_partial(
    prompt: TokenizedPrompt, sequences: Iterable[Sequence], model: str, reason: FinishReason
) -> GenerationResult:
    """Return what there is of each text that was begun, in the order of their indices.

    A text that had ended by itself keeps its reason. Texts that were not begun are left out; if none was, the result is
    one empty text. The best of several are not chosen: of texts cut short, nobody knows.
    """
    results = [sequence.result(model, reason) for sequence in sequences]
    if results:
        return replace(results[0], alternatives=tuple(results[1:]))
    request, usage = prompt.request, Usage(len(prompt.ids), 0)
    seed = request.seed if request.samples else None
    timings = Timings(0.0, 0.0, 0.0)
    return GenerationResult("", (), reason, usage, timings, model, seed=seed, choice_index=request.choice_index)


class EndKind(Enum):
    """The ways in which a job leaves a worker."""

    FINISHED = "it came to its end"
    FAILED = "an error ended it"
    RETRIED = "an error ended it, and it is to run again"
    STOPPED = "a stop command ended it"
    CANCELED = "somebody has cancelled it"
    LOST = "it is not this worker's to end: cancelled, deleted, or taken back"


@dataclass(frozen=True, slots=True)
class End:
    """An end of a job.

    Attributes:
        result: of a job that finished, as JSON.
        error: of a job that failed, is retried, or was stopped.
        partial: what had been generated of a job that was stopped or is out of time, as the JSON of a result.
        last_pieces: what its stream ends with, perhaps nothing; None if it has none.
        usage: what this attempt has used; None if it never ran.
    """

    attempt: Attempt
    kind: EndKind
    result: dict[str, Any] | None = None
    error: Exception | None = None
    partial: dict[str, Any] | None = None
    last_pieces: list[Piece] | None = None
    usage: Usage | None = None


class Batch:
    """The running jobs of a worker, and the sequences of their texts.

    Slots are given text by text, first come, first served: a text that must wait for memory lets nobody past, be it of
    another job. So a job of more texts than there are slots is decoded as slots become free. A guided job comes when
    its grammar does: while a thread compiles that, it lets everybody past.

    Attributes:
        steps, tokens: how many were taken and generated so far.
        sizes: how many of the steps had 0, 1, 2... sequences.
        step_seconds: the time that the steps took.
    """

    def __init__(self, engine: Engine) -> None:
        self._decoder = engine.decoder
        # In the order in which they came; and those that have texts which were not begun.
        self._jobs: dict[ActiveJob, None] = {}
        self._compiling: list[ActiveJob] = []
        self._waiting: deque[ActiveJob] = deque()
        self._decoding: dict[Sequence, ActiveJob] = {}
        self.steps = 0
        self.tokens = 0
        self.sizes = [0] * (engine.decoder.model.cache.n_slots + 1)
        self.step_seconds = 0.0

    def __iter__(self) -> Iterator[ActiveJob]:
        """Yield all jobs, in the order in which they came."""
        return iter(list(self._jobs))

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def _slots(self) -> int:
        """The most texts that are decoded together, which the decoder learns from its steps."""
        return self._decoder.model.cache.usable_slots

    @property
    def decoding(self) -> list[ActiveJob]:
        """The jobs that have a slot or several."""
        return list(dict.fromkeys(self._decoding.values()))

    @property
    def waiting(self) -> list[ActiveJob]:
        """The jobs of which nothing was begun: they wait for their first slot, or for their grammar."""
        return [*(job for job in self._waiting if not job.sequences), *self._compiling]

    def add(self, job: ActiveJob) -> None:
        self._jobs[job] = None
        if job.is_compiling:
            self._compiling.append(job)
        else:
            self._waiting.append(job)

    def admit(self) -> list[ActiveJob]:
        """Give slots to the texts that there is room for; they are decoded from the next step on.

        If only grammars are missing, this waits for one of them for a moment.

        Returns:
            The jobs whose grammars cannot be used, each with its `error`; the batch has them no more.
        """
        if self._compiling:
            self._look_for_grammars()
        refused = [job for job in self._waiting if not job.sequences and job.error is not None]
        for job in refused:
            self.drop(job)
        while self._waiting and self._may_join(self._waiting[0]):
            job = self._waiting[0]
            sequence = self._decoder.admit(job.prompt, len(job.sequences), job.urgency)
            job.sequences.append(sequence)
            self._decoding[sequence] = job
            if job.has_begun_all:
                self._waiting.popleft()
        return refused

    def _look_for_grammars(self) -> None:
        if not self._decoding and not self._waiting:
            grammars = [job.prompt.grammar for job in self._compiling if job.prompt.grammar is not None]
            wait(grammars, GRAMMAR_WAIT_SECONDS, FIRST_COMPLETED)
        compiled = [job for job in self._compiling if not job.is_compiling]
        self._waiting.extend(compiled)
        self._compiling = [job for job in self._compiling if job not in compiled]

    def _may_join(self, job: ActiveJob) -> bool:
        """Tell whether a text of a job may have a slot now. A suspect job's texts run together, and with no other's."""
        others = [other for other in self._decoding.values() if other is not job]
        if others and (job.attempt.is_suspect or self._decodes_suspect()):
            return False
        return len(self._decoding) < self._slots and self._decoder.has_room(job.prompt)

    def _decodes_suspect(self) -> bool:
        return any(job.attempt.is_suspect for job in self._decoding.values())

    def _compiles_suspect(self) -> bool:
        return any(job.attempt.is_suspect for job in self._compiling)

    def room(self) -> int:
        """Return how many more jobs could begin now, were each of one text.

        0 while prompts keep the next steps busy (`MOST_UNREAD`). A job that waits for its grammar holds no slot, so
        that others can begin; of such jobs, there are at most as many as slots.
        """
        if self._waiting or self._unread_tokens() > MOST_UNREAD:
            return 0
        if self._decodes_suspect() or self._compiles_suspect() or len(self._compiling) >= self._slots:
            return 0
        return max(0, self._slots - len(self._decoding))

    def _unread_tokens(self) -> int:
        """Return how many tokens of prompts are to be read; of a job's texts one reads, and the others take it over."""
        unread: dict[ActiveJob, int] = {}
        for sequence, job in self._decoding.items():
            if not sequence.token_ids:
                unread[job] = min(unread.get(job, len(sequence.pending)), len(sequence.pending))
        return sum(unread.values())

    def step(self) -> list[ActiveJob]:
        """Advance all texts that have a slot. Return the jobs that ended by themselves; the batch has them no more.

        One of them may have an `error`. Raises whatever the decoder raises; then none of those that decode can go on.
        """
        if not self._decoding:
            return []
        began = time.perf_counter()
        before = [len(sequence.token_ids) for sequence in self._decoding]
        finished = self._decoder.step()
        self.step_seconds += time.perf_counter() - began
        self.steps += 1
        self.sizes[len(before)] += 1
        self.tokens += sum(len(sequence.token_ids) for sequence in self._decoding) - sum(before)
        jobs = dict.fromkeys([self._decoding.pop(sequence) for sequence in finished])
        ended = [job for job in jobs if job.has_ended]
        for job in ended:
            self.drop(job)
        return ended

    def drop(self, job: ActiveJob) -> None:
        """Take a job out, if the batch has it; what was generated of it stays readable."""
        if job not in self._jobs:
            return
        del self._jobs[job]
        if job in self._waiting:
            self._waiting.remove(job)
        if job in self._compiling:
            self._compiling.remove(job)
        for sequence in job.sequences:
            if self._decoding.pop(sequence, None) is not None:
                self._decoder.finish(sequence)
