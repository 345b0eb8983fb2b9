"""Tracing by OpenTelemetry, an extra (`otel`): whether a process sends spans, and the spans that it makes.

Nothing of OpenTelemetry is imported unless the setting or one of OpenTelemetry's own variables asks for spans.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastgpt2.errors import BadRequest

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger("fastgpt2")

# How long a process that ends waits for its last spans to be sent.
CLOSE_SECONDS = 2.0

# A process for which one of these is set is meant to send spans.
_ASKING = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_EXPORTER")
_EXPORTERS = ("otlp", "console", "none")
_INSTALL = "pip install 'fastgpt2[otel]'"

_provider: TracerProvider | None = None
_tracer: Tracer | None = None


def set_up_tracing(service: str, endpoint: str | None, instance: str | None = None) -> None:
    """Send this process's spans from now on, if that is asked for.

    Args:
        service: the service's name, unless the environment gives one.
        endpoint: where to send them; None for where OpenTelemetry's variables say.
        instance: the name of this process among those of the service.

    Raises:
        BadRequest: an endpoint is given, and OpenTelemetry is not installed; or a variable cannot be followed.
    """
    names = _wanted_exporters(endpoint)
    if not names:
        return
    try:
        from fastgpt2.span_export import make_provider
    except ImportError as reason:
        missing = f"the package {reason.name} is not installed"
        if endpoint is not None:
            raise BadRequest(f"--otlp-traces-endpoint: {missing}; {_INSTALL}") from None
        # All programs of a machine may have the variable, and this one served without it so far.
        asking = next(name for name in _ASKING if os.environ.get(name))
        log.warning("%s is set, and %s: no spans are sent; %s", asking, missing, _INSTALL)
        return
    use_provider(make_provider(names, endpoint, service, instance))


def use_provider(provider: TracerProvider) -> None:
    """Make this process's spans by a provider."""
    global _provider, _tracer
    _provider, _tracer = provider, provider.get_tracer("fastgpt2")


def tracer() -> Tracer | None:
    """Return what makes spans; None if this process sends none."""
    return _tracer


def close_tracing() -> None:
    """Send the spans that are left, for `CLOSE_SECONDS` at most; make none from now on."""
    global _provider, _tracer
    if _provider is not None:
        thread = threading.Thread(target=_provider.shutdown, daemon=True, name="last spans")
        thread.start()
        thread.join(CLOSE_SECONDS)
    _provider = _tracer = None


@contextmanager
def span(name: str, attributes: Mapping[str, Any]) -> Iterator[Span | None]:
    """Make what runs within the context a span of the current one; give None if this process sends no spans."""
    if _tracer is None:
        yield None
        return
    with _tracer.start_as_current_span(name, attributes=dict(attributes)) as begun:
        yield begun


def _wanted_exporters(endpoint: str | None) -> list[str]:
    """Return the names of the exporters that are asked for.

    Raises:
        BadRequest: there is no such exporter.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    if endpoint is not None:
        return ["otlp"]
    if not any(os.environ.get(name) for name in _ASKING):
        return []
    names = [name.strip() for name in (os.environ.get("OTEL_TRACES_EXPORTER") or "otlp").split(",")]
    for name in names:
        if name not in _EXPORTERS:
            raise BadRequest(f"OTEL_TRACES_EXPORTER: {name[:100]!r} is not one of {', '.join(_EXPORTERS)}")
    return [name for name in names if name != "none"]
