"""Tests of the request and the trace that a job's metadata name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from fastgpt2.api.client.enqueue import enqueue_command, plan_job
from fastgpt2.errors import BadRequest
from fastgpt2.protocol.request_context import HERE, RequestContext, parse_traceparent, take_from_environment

# The example of the standard, https://www.w3.org/TR/trace-context/#examples-of-http-traceparent-headers
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (TRACEPARENT, TRACEPARENT),
        (TRACEPARENT.replace("01", "00"), TRACEPARENT.replace("01", "00")),
        # A later version may have more, of which this one knows nothing.
        (f"cc{TRACEPARENT[2:]}", TRACEPARENT),
        (f"cc{TRACEPARENT[2:]}-what-comes-later", TRACEPARENT),
        (f"{TRACEPARENT}-more", ""),
        (f"ff{TRACEPARENT[2:]}", ""),
        (TRACEPARENT.upper(), ""),
        (TRACEPARENT.replace(TRACE_ID, "0" * 32), ""),
        (TRACEPARENT.replace("00f067aa0ba902b7", "0" * 16), ""),
        (TRACEPARENT[:-1], ""),
        (f"{TRACEPARENT}\n", ""),
        ("", ""),
        (None, ""),
        (7, ""),
        (f"cc{TRACEPARENT[2:]}-{'x' * 10_000}", ""),
    ],
)
def test_a_traceparent_is_read_as_the_standard_has_it(given: object, read: str) -> None:
    assert parse_traceparent(given) == read


def meta_of(**fields: Any) -> dict[str, Any]:
    """Return the metadata of the job that these fields make, as they go to Redis."""
    _, command = enqueue_command(plan_job("a", fields), "q", None)
    words = list(command.args)
    meta: dict[str, Any] = json.loads(words[words.index("meta") + 1]) if "meta" in words else {}
    return meta


def test_a_job_without_a_context_is_as_it_was() -> None:
    assert meta_of() == {}


def test_fields_of_a_job_go_into_its_metadata() -> None:
    given = {"request_id": "r-1", "traceparent": TRACEPARENT, "tracestate": "vendor=1"}
    assert meta_of(**given) == given
    assert RequestContext.from_meta(given) == RequestContext(**given)
    assert RequestContext.from_meta(given).log_fields == {"request_id": "r-1", "trace_id": TRACE_ID}
    # Other programs have such a field of any text.
    assert meta_of(request_id="any text, and so no word") == {}


@pytest.mark.parametrize("field", ["traceparent", "tracestate"])
@pytest.mark.parametrize("value", ["", "nonsense\n", 7, "x" * 600 + "\x00"])
def test_a_wrong_context_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=field):
        plan_job("a", {field: value})


@pytest.mark.parametrize(
    "meta",
    [
        None, [], "text", {"request_id": 7, "traceparent": {"a": 1}}, {"request_id": "two words", "traceparent": "x"},
        {"request_id": "x" * 129, "tracestate": "alone=1"}, {b"request_id": b"r"},
    ],
)  # fmt: skip
def test_nonsense_in_metadata_is_passed_over(meta: Any) -> None:
    assert RequestContext.from_meta(meta) == RequestContext()


def test_a_program_that_traces_passes_its_span_on() -> None:
    state = TraceState([("vendor", "1")])
    own = SpanContext(int(TRACE_ID, 16), 0x00F067AA0BA902B7, False, TraceFlags(1), state)
    with trace.use_span(NonRecordingSpan(own)):
        assert meta_of() == {"traceparent": TRACEPARENT, "tracestate": "vendor=1"}
        other = TRACEPARENT.replace("4bf9", "5bf9")
        assert meta_of(traceparent=other) == {"traceparent": other}
    assert meta_of() == {}


def test_the_context_of_a_request_and_of_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    token = HERE.set(RequestContext("r-2", TRACEPARENT))
    try:
        assert meta_of() == {"request_id": "r-2", "traceparent": TRACEPARENT}
        assert meta_of(request_id="r-3")["request_id"] == "r-3"
        monkeypatch.setenv("TRACEPARENT", TRACEPARENT)
        monkeypatch.setenv("TRACESTATE", "a=b")
        take_from_environment()
        assert meta_of() == {"traceparent": TRACEPARENT, "tracestate": "a=b"}
    finally:
        HERE.reset(token)
