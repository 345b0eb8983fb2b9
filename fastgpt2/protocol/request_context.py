"""The context of a job: the request that asked for it, and the trace (W3C Trace Context) that the job is a part of.

Both stand in the job's metadata, where programs that enqueue by RQ itself can put them too:

    queue.enqueue("fastgpt2.worker.tasks.generate", "My name is", meta={"request_id": "r-1", "traceparent": "00-..."})

Workers name them in their logs, and spans of the job continue the trace. Workers of earlier releases pass over them.
"""

from __future__ import annotations

import os
import re
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any

from fastgpt2.fields import Field, plain, refusal

# The keys of the metadata, which are the names of the headers of HTTP; RQ's users know "request_id" so.
REQUEST_ID_META = "request_id"
TRACEPARENT_META = "traceparent"
TRACESTATE_META = "tracestate"

# https://www.w3.org/TR/trace-context/: version, trace, span and flags. Later versions may have more behind them.
_TRACEPARENT = r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_LATER_TRACEPARENT = re.compile(rf"({_TRACEPARENT})(-.{{0,200}})?")
_TRACESTATE = r"[ -~]{1,512}"
_REQUEST_ID = r"[A-Za-z0-9._:-]{1,128}"


def _word(pattern: str, expected: str) -> Field:
    """Return a field that is a text of this pattern."""

    def check(name: str, value: Any) -> Any:
        value = plain(value)
        if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
            raise refusal(name, expected, value, of_type=not isinstance(value, str))
        return value

    return Field({"type": "string", "pattern": f"^{pattern}$"}, check)


Traceparent = Annotated[
    str, _word(_TRACEPARENT, "a W3C traceparent such as 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
]
Tracestate = Annotated[str, _word(_TRACESTATE, "a W3C tracestate of 1 to 512 visible characters")]


@dataclass(frozen=True, slots=True)
class RequestContext:
    """The context of a job, as far as it is known: what is not known is the empty text."""

    request_id: str = ""
    traceparent: str = ""
    tracestate: str = ""

    @classmethod
    def read(cls, request_id: object, traceparent: object, tracestate: object) -> RequestContext:
        """Return what there is of use in values that anybody may have written."""
        trace = parse_traceparent(traceparent)
        return cls(
            request_id if isinstance(request_id, str) and re.fullmatch(_REQUEST_ID, request_id) else "",
            trace,
            # Without the other, it says nothing.
            tracestate if trace and isinstance(tracestate, str) and re.fullmatch(_TRACESTATE, tracestate) else "",
        )

    @classmethod
    def from_meta(cls, meta: Any) -> RequestContext:
        """Return the context that a job's metadata tell of."""
        if not isinstance(meta, dict):
            return cls()
        return cls.read(meta.get(REQUEST_ID_META), meta.get(TRACEPARENT_META), meta.get(TRACESTATE_META))

    def to_meta(self) -> dict[str, str]:
        """Return the keys of a job's metadata: those that say something."""
        pairs = (
            (REQUEST_ID_META, self.request_id),
            (TRACEPARENT_META, self.traceparent),
            (TRACESTATE_META, self.tracestate),
        )
        return {key: value for key, value in pairs if value}

    @property
    def trace_id(self) -> str:
        """Return the id of the trace, as 32 hexadecimal digits; empty if there is none."""
        return self.traceparent[3:35]

    @property
    def log_fields(self) -> dict[str, str]:
        """Return the fields of an event of the log that tell of the context."""
        pairs = (("request_id", self.request_id), ("trace_id", self.trace_id))
        return {name: value for name, value in pairs if value}


# The context of what is enqueued here, as the endpoint sets it for each request.
HERE: ContextVar[RequestContext] = ContextVar("HERE", default=RequestContext())  # noqa: B039, it is frozen


def parse_traceparent(value: object) -> str:
    """Return a traceparent, also a later version's, as the version 00 has it; empty if it is none."""
    found = _LATER_TRACEPARENT.fullmatch(value) if isinstance(value, str) else None
    if found is None or (found[2] and found[1].startswith("00")):
        return ""
    return f"00{found[1][2:]}"


def current_context(request_id: str | None, traceparent: str | None, tracestate: str | None) -> RequestContext:
    """Return the context of a job that is enqueued now: as it is given, else of this program's span, else of `HERE`."""
    here = HERE.get()
    # Other programs call a request by any text: one that is no plain word is passed over.
    request_id = RequestContext.read(request_id, None, None).request_id or here.request_id
    if traceparent:
        return RequestContext(request_id, traceparent, tracestate or "")
    traced = _span_of_program()
    return RequestContext(request_id, *(traced or (here.traceparent, here.tracestate)))


def take_from_environment() -> None:
    """Have what this program enqueues continue the trace in its environment, as OpenTelemetry passes it to programs."""
    HERE.set(RequestContext.read(None, os.environ.get("TRACEPARENT"), os.environ.get("TRACESTATE")))


def _span_of_program() -> tuple[str, str] | None:
    """Return the context of the program's span, if the program uses OpenTelemetry; nothing is imported for that."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    state = context.trace_state.to_header() if context.trace_state else ""
    own = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
    return own, state if len(state) <= 512 else ""
