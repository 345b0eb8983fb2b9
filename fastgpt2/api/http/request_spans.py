"""The span of a request, for OpenTelemetry; the spans of what the request enqueues lie within it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastgpt2.api.http.request_metrics import METHODS
from fastgpt2.tracing import tracer

if TYPE_CHECKING:
    from opentelemetry.trace import Span
    from starlette.types import Scope

# A path is told up to here: it may be anything.
MAX_PATH_CHARACTERS = 200


@contextmanager
def request_span(scope: Scope, is_quiet: bool) -> Iterator[Span | None]:
    """Make what runs within the context the span of a request; it continues the trace that the request's headers name.

    Args:
        is_quiet: the request is one that probes and pages make all the time. Without a trace to continue, it has no
            span; and no request has one where this process sends no spans.
    """
    makes = tracer()
    headers = {} if makes is None else _headers_of(scope)
    if makes is None or (is_quiet and "traceparent" not in headers):
        yield None
        return
    from opentelemetry import propagate
    from opentelemetry.trace import SpanKind

    method = _method_of(scope)
    attributes: dict[str, Any] = {
        "http.request.method": method or "_OTHER",
        "url.scheme": scope.get("scheme", "http"),
        "url.path": scope["path"][:MAX_PATH_CHARACTERS],
    }
    with makes.start_as_current_span(
        method or "HTTP", context=propagate.extract(headers), kind=SpanKind.SERVER, attributes=attributes
    ) as span:
        yield span


def end_request_span(span: Span, scope: Scope, route: str, status: int, request_id: str) -> None:
    """Add to a request's span what is known at the end of its answer."""
    from opentelemetry.trace import StatusCode

    span.update_name(f"{_method_of(scope) or 'HTTP'} {route}")
    span.set_attributes({"http.route": route, "http.response.status_code": status, "fastgpt2.request_id": request_id})
    if status >= 500:
        span.set_status(StatusCode.ERROR)


def _method_of(scope: Scope) -> str | None:
    """Return the request's method; None for one that nobody knows, which names no span."""
    return scope["method"] if scope["method"] in METHODS else None


def trace_id_of(span: Span) -> str:
    """Return the id of a span's trace, as 32 hexadecimal digits."""
    return f"{span.get_span_context().trace_id:032x}"


def _headers_of(scope: Scope) -> dict[str, str]:
    """Return the request's headers; without those that stand there twice, of which nobody knows which is meant."""
    found: dict[str, str] = {}
    names = [name for name, _ in scope["headers"]]
    for name, value in scope["headers"]:
        if names.count(name) == 1:
            found[name.decode("latin-1")] = value.decode("latin-1")
    return found
