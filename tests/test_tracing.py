"""Tests of whether a process sends spans: by the option, by OpenTelemetry's variables, without the packages."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from fastgpt2 import span_export, tracing
from fastgpt2.errors import BadRequest
from fastgpt2.span_export import CarefulExporter, make_provider
from fastgpt2.tracing import close_tracing, set_up_tracing, tracer

# Nobody listens there.
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Send no spans after a test, and wait for none."""
    monkeypatch.setattr(tracing, "CLOSE_SECONDS", 0.0)
    yield
    close_tracing()


@pytest.mark.parametrize(
    ("option", "variables", "is_on"),
    [
        (None, {}, False),
        (NOWHERE, {}, True),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": NOWHERE}, True),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{NOWHERE}/v1/traces"}, True),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        (None, {"OTEL_TRACES_EXPORTER": "otlp, console"}, True),
        (None, {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": NOWHERE}, False),
        (None, {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": NOWHERE}, False),
        (NOWHERE, {"OTEL_SDK_DISABLED": "TRUE"}, False),
        # What says how spans are made does not say that any are wanted.
        (None, {"OTEL_SERVICE_NAME": "a", "OTEL_TRACES_SAMPLER": "always_on"}, False),
    ],
)
def test_when_spans_are_sent(
    monkeypatch: pytest.MonkeyPatch, option: str | None, variables: dict[str, str], is_on: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    set_up_tracing("fastgpt2-test", option)
    assert (tracer() is not None) == is_on
    with tracing.span("a", {}) as span:
        assert (span is not None) == is_on


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "OTEL_TRACES_EXPORTER: 'zipkin' is not one of otlp, console, none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "OTEL_EXPORTER_OTLP_PROTOCOL: 'grpc' is not spoken here"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", NOWHERE)
    monkeypatch.setenv(name, value)
    with pytest.raises(BadRequest, match=message):
        set_up_tracing("fastgpt2-test", None)


def test_without_the_packages_the_option_is_refused_and_a_variable_is_not_followed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "fastgpt2.span_export")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(BadRequest, match=r"is not installed; pip install 'fastgpt2\[otel\]'"):
        set_up_tracing("fastgpt2-test", NOWHERE)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", NOWHERE)
    set_up_tracing("fastgpt2-test", None)
    assert tracer() is None
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set, and the package" in caplog.text


def test_nobody_waits_for_a_collector_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans beyond the queue are lost; a process that ends waits for `CLOSE_SECONDS`, and not for an answer."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    # Longer than any test may take.
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")
    with socket.create_server(("127.0.0.1", 0)) as nobody_accepts:
        set_up_tracing("fastgpt2-test", f"http://127.0.0.1:{nobody_accepts.getsockname()[1]}")
        for _ in range(200):
            with tracing.span("a", {}):
                pass
        close_tracing()
    assert tracer() is None


class Away(SpanExporter):
    """An exporter whose collector is away."""

    def export(self, _spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.FAILURE


def test_lost_spans_are_told_once_in_a_while(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    exporter, lost = CarefulExporter(Away(), "collector:4318"), [TracerProvider().get_tracer("a").start_span("b")] * 3
    for _ in range(2):
        exporter.export(lost)  # type: ignore[arg-type]
    assert caplog.text.count("spans cannot be sent to collector:4318, and 3 are lost so far") == 1
    monkeypatch.setattr(span_export, "SAY_SECONDS", 0.0)
    exporter.export(lost)  # type: ignore[arg-type]
    assert "and 9 are lost so far" in caplog.text


def test_the_environment_may_name_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    named = make_provider((), None, "fastgpt2-worker", "w-1").resource.attributes
    assert (named["service.name"], named["service.instance.id"]) == ("fastgpt2-worker", "w-1")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    named = make_provider((), None, "fastgpt2-worker").resource.attributes
    assert (named["service.name"], named["deployment.environment"]) == ("mine", "test")
