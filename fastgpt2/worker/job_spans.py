"""The spans of a job, for OpenTelemetry: made of what is known at its end, so that the decode loop does not notice.

A job's span lasts from its enqueueing to the writing of its end, and has a span for each of its steps. It continues
the trace that the job's metadata name.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastgpt2.tracing import tracer

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

    from fastgpt2.engine.decoding.sequence import Sequence
    from fastgpt2.worker.batch import ActiveJob, Attempt

log = logging.getLogger("fastgpt2.worker")

MAX_REASON_CHARACTERS = 1000
_SECOND = 1_000_000_000


def record_job(attempt: Attempt, outcome: str, job: ActiveJob | None = None, error: Exception | None = None) -> None:
    """Make the spans of one run of a job that has left this worker; without tracing, do nothing.

    Args:
        outcome: how it left: the name of its `EndKind` in small letters, or "given_back".
        job: None if it could not begin.
    """
    makes = tracer()
    if makes is None:
        return
    try:
        _make_spans(makes, attempt, outcome, job, error)
    except Exception:  # no span is worth a job
        log.exception("the spans of job %s cannot be made", attempt.id, extra=attempt.log_extra)


def _make_spans(makes: Tracer, attempt: Attempt, outcome: str, job: ActiveJob | None, error: Exception | None) -> None:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    now = time.time_ns()
    started = now - int((time.monotonic() - attempt.began_at) * _SECOND)
    enqueued = started - int(attempt.waited_seconds * _SECOND)
    whole = makes.start_span(
        "job",
        context=TraceContextTextMapPropagator().extract(attempt.rq_job.request_context.to_meta()),
        kind=trace.SpanKind.CONSUMER,
        attributes=_attributes(attempt, outcome, job),
        start_time=enqueued,
    )
    if whole.is_recording():
        within = trace.set_span_in_context(whole)
        steps = _steps([] if job is None else job.sequences, started, now)
        for name, begin, end in (("queue", enqueued, started), *steps):
            makes.start_span(name, context=within, start_time=begin).end(end)
        if error is not None:
            whole.set_attribute("error.type", type(error).__qualname__)
            whole.set_status(trace.StatusCode.ERROR, attempt.rq_job.without_prompt(error)[:MAX_REASON_CHARACTERS])
    whole.end(now)


def _steps(sequences: list[Sequence], started: int, now: int) -> Iterator[tuple[str, int, int]]:
    """Yield the steps behind the queue, each with its begin and its end in nanoseconds since 1970.

    Of several texts, the first reads the prompt, and the decoding is that of all together.
    """
    if not sequences:
        yield "admission", started, now
        return
    behind = time.perf_counter()

    def moment(seconds: float) -> int:
        """Return a moment of the clock of sequences, `time.perf_counter`, as nanoseconds since 1970."""
        return min(now, max(started, now - int((behind - seconds) * _SECOND)))

    first = sequences[0]
    last = now if any(not one.finished for one in sequences) else moment(max(one.finished_at for one in sequences))
    yield "admission", started, moment(first.admitted_at)
    if not first.token_ids:
        yield "prefill", moment(first.admitted_at), last
    else:
        yield "prefill", moment(first.admitted_at), moment(first.first_token_at)
        yield "decode", moment(first.first_token_at), last
    yield "write", last, now


def _attributes(attempt: Attempt, outcome: str, job: ActiveJob | None) -> dict[str, Any]:
    """Return what a job's span tells, by OpenTelemetry's names where there are some; nothing of its texts."""
    told: dict[str, Any] = {
        "messaging.system": "rq",
        "messaging.operation.type": "process",
        "messaging.destination.name": attempt.queue.name,
        "messaging.message.id": attempt.id,
        "fastgpt2.attempt": attempt.number,
        "fastgpt2.outcome": outcome,
    }
    if request_id := attempt.rq_job.request_context.request_id:
        told["fastgpt2.request_id"] = request_id
    if job is None:
        return told
    reasons = [sequence.finish_reason for sequence in job.sequences if sequence.finish_reason is not None]
    told |= {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": job.model,
        "gen_ai.request.max_tokens": job.prompt.max_new_tokens,
        "gen_ai.usage.input_tokens": len(job.prompt.ids),
        "gen_ai.usage.output_tokens": sum(len(sequence.token_ids) for sequence in job.sequences),
    }
    if job.sequences:
        told["fastgpt2.cached_tokens"] = job.sequences[0].cached_tokens
    if reasons:
        told["gen_ai.response.finish_reasons"] = reasons
    return told
