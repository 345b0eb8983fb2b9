"""The one task that a queue may name.

fastgpt2's own workers recognise the name and run the engine they hold; a stock `rq worker` imports and calls this.
"""

from __future__ import annotations

import math
import time
from functools import cache
from typing import TYPE_CHECKING, Any

from fastgpt2.engine.decoding.records import combine
from fastgpt2.errors import JobTimedOut, ModelUnknown
from fastgpt2.protocol.keys import ATTEMPTS_FIELD, PARTIAL_META, stream_key
from fastgpt2.protocol.messages import RUNNING_TTL_SECONDS, JobOptions, parse_job, piece_to_entry, result_to_json
from fastgpt2.protocol.untrusted import seconds_between
from fastgpt2.worker.batch import StreamPosition, join_partial
from fastgpt2.worker.rq_job import seed_of

if TYPE_CHECKING:
    from rq.job import Job

    from fastgpt2.engine.decoding.sequence import Sequence, TokenizedPrompt
    from fastgpt2.engine.engine import Engine


def generate(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Continue a prompt with the model that `FASTGPT2_MODEL` names.

    Takes the fields of `GenerationRequest` and, inside an RQ job, those of `JobOptions`.

    Returns:
        The result as a JSON object; `fastgpt2.protocol.messages.result_from_json` reads it.

    Raises:
        BadRequest: a field is unknown, ill-typed or out of bounds.
        ModelUnknown: the job names another model.
        ModelError: the model cannot be loaded.
        JobTimedOut: the job's `timeout` is over.
        FastGPT2Error: a text failed alone, as where its grammar has grown beyond a limit.
    """
    from rq import get_current_job

    request, options = parse_job(args, kwargs)
    engine, job = _engine(), get_current_job()
    if options.model not in (None, engine.model):
        raise ModelUnknown.among(str(options.model), [engine.model])
    if job is not None:
        request = request.with_seed(seed_of(job))
    run = _StockRun(job, options, engine.model) if job is not None else None
    prompt = engine.decoder.prepare(request)
    sequences: list[Sequence] = []
    # There is one slot: the texts come one after the other.
    for index in range(request.texts):
        sequences.append(engine.decoder.admit(prompt, index))
        try:
            while not sequences[-1].finished:
                engine.decoder.step()
                if run is not None:
                    run.follow_step(prompt, sequences)
        finally:
            engine.decoder.finish(sequences[-1])
        if (error := sequences[-1].error) is not None:
            raise error
    result = combine(prompt.request, [sequence.result(engine.model) for sequence in sequences])
    return result_to_json(result, run.waited_seconds if run is not None else 0.0)


class _StockRun:
    """A run by a stock worker: it keeps the job's deadline and writes its stream, which RQ does not do."""

    def __init__(self, job: Job, options: JobOptions, model: str) -> None:
        self._job, self._options, self._model = job, options, model
        self.waited_seconds = seconds_between(job.enqueued_at, job.started_at)
        self._deadline = math.inf
        if options.timeout is not None:
            self._deadline = time.monotonic() + options.timeout - self.waited_seconds
        self._attempt = job.connection.hincrby(job.key, ATTEMPTS_FIELD, 1)
        self._position = StreamPosition(options.stream_usage)

    def follow_step(self, prompt: TokenizedPrompt, sequences: list[Sequence]) -> None:
        """Stream what is new after a step.

        Raises:
            JobTimedOut: the job's time is up; what was generated is kept in its metadata.
        """
        pieces = self._position.next_pieces(sequences, self._attempt) if self._options.stream else []
        for piece in pieces:
            with self._job.connection.pipeline() as pipeline:
                pipeline.xadd(stream_key(self._job.id), piece_to_entry(piece))
                pipeline.expire(stream_key(self._job.id), RUNNING_TTL_SECONDS)
                pipeline.execute()
            self._position.advance(piece)
        has_ended = len(sequences) == prompt.request.texts and sequences[-1].finished
        if time.monotonic() > self._deadline and not has_ended:
            partial = join_partial(prompt, sequences, self._model, "timeout")
            self._job.meta[PARTIAL_META] = result_to_json(partial, self.waited_seconds)
            self._job.save_meta()
            raise JobTimedOut(
                self._job.id, f"took longer than the {self._options.timeout:g} s that it was given (timeout)"
            )


@cache
def _engine() -> Engine:
    """Return the engine of this process. A stock `rq worker` forks a process for each job, and so loads for each."""
    from fastgpt2 import settings
    from fastgpt2.engine.engine import Engine

    return Engine.load(
        settings.MODEL.resolve(),
        revision=settings.REVISION.resolve(),
        threads=settings.THREADS.resolve(),
        max_batch=1,
        prefix_memory=0,  # there is no second job
        blas=settings.BLAS.resolve(),
        weights=settings.WEIGHTS.resolve(),
        drafts=settings.DRAFTS.resolve(),
        tokenizer=settings.TOKENIZER.resolve(),
        generation_config=settings.GENERATION_CONFIG.resolve(),
        chat_template=settings.CHAT_TEMPLATE.resolve(),
    )
