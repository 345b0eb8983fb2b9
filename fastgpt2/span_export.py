"""The way of spans to a collector, by OpenTelemetry, which this module imports: `fastgpt2.tracing` imports it late.

Spans wait in a bounded queue, and a thread of OpenTelemetry's sends them. Where the collector is away or slow, spans
are lost, and neither a worker nor a request waits.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter, SpanExportResult

from fastgpt2 import __version__
from fastgpt2.errors import BadRequest

log = logging.getLogger("fastgpt2")

# How often the log tells that spans cannot be sent.
SAY_SECONDS = 60.0

# What these variables name, the first that is set.
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def make_provider(
    exporters: Iterable[str], endpoint: str | None, service: str, instance: str | None = None
) -> TracerProvider:
    """Return what makes spans and sends them; sampling, batches and headers are as OpenTelemetry's variables say.

    Args:
        exporters: "otlp" or "console", or both.
        endpoint, service, instance: as in `tracing.set_up_tracing`.

    Raises:
        BadRequest: a variable asks for a protocol that is not spoken here.
    """
    own: dict[str, str | int] = {"service.name": service, "service.version": __version__, "process.pid": os.getpid()}
    if instance:
        own["service.instance.id"] = instance
    # What the environment says of the service counts before.
    resource = Resource.create(own).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for name in exporters:
        provider.add_span_processor(BatchSpanProcessor(_make_exporter(name, endpoint)))
    # It logs each attempt that fails; `CarefulExporter` says once in a while that there are some.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    return provider


def _make_exporter(name: str, endpoint: str | None) -> SpanExporter:
    if name == "console":
        return ConsoleSpanExporter(formatter=lambda span: f"{span.to_json(indent=None)}\n")
    protocol = _first_of(_PROTOCOLS) or "http/protobuf"
    if endpoint is None and protocol != "http/protobuf":
        raise BadRequest(
            f"OTEL_EXPORTER_OTLP_PROTOCOL: {protocol[:100]!r} is not spoken here; set http/protobuf, and an endpoint "
            "for it (port 4318 of most collectors)"
        )
    if endpoint is not None and urlsplit(endpoint).path in ("", "/"):
        endpoint = f"{endpoint.rstrip('/')}/v1/traces"
    where = urlsplit(endpoint or _first_of(_ENDPOINTS) or "http://localhost:4318")
    # Without what a URL may have of a password.
    return CarefulExporter(OTLPSpanExporter(endpoint=endpoint), where.netloc.rpartition("@")[2])


def _first_of(variables: Iterable[str]) -> str | None:
    return next(filter(None, map(os.environ.get, variables)), None)


class CarefulExporter(SpanExporter):
    """An exporter that says now and then that spans could not be sent.

    Args:
        where: the collector's host and port, for the log.
    """

    def __init__(self, exporter: SpanExporter, where: str) -> None:
        self._exporter = exporter
        self._where = where
        self._lost = 0
        self._said_at = float("-inf")

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans; those that cannot be sent in time are lost."""
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._lost += len(spans)
            now = time.monotonic()
            if now - self._said_at >= SAY_SECONDS:
                self._said_at = now
                text = (
                    "spans cannot be sent to %s, and %d are lost so far: is a collector there that takes OTLP by HTTP?"
                )
                log.warning(text, self._where, self._lost)
        return result

    def shutdown(self) -> None:
        """Send no more."""
        self._exporter.shutdown()
