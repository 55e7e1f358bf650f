"""One OpenTelemetry span per request, sent to a collector in the background."""

import time
from collections.abc import Mapping
from typing import Any

from jllm import ConfigError

NANOSECONDS = 1_000_000_000


class Tracer:
    """Sends spans where an endpoint is given; else does nothing."""

    def __init__(self, endpoint: str | None, exporter: Any = None) -> None:
        """Prepares the exporter.

        Args:
            endpoint: URL that takes OTLP over HTTP, or None.
            exporter: Replaces the one for the endpoint.

        Raises:
            ConfigError: The packages are not installed.
        """
        self._provider: Any = None
        if endpoint is None and exporter is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
                OTLPSpanExporter,
            )
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                "otlp_traces_endpoint needs the extra otel: pip install 'jllm[otel]'"
            ) from error
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "jllm"})
        )
        exporter = exporter or OTLPSpanExporter(endpoint=endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("jllm.server")

    def record(
        self,
        name: str,
        seconds: float,
        attributes: Mapping[str, Any],
        headers: Mapping[str, str],
    ) -> None:
        """Sends a span that ends now; its parent is the one that the headers name."""
        if self._provider is None:
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import (
            TraceContextTextMapPropagator,
        )

        carrier = {key.lower(): value for key, value in headers.items()}
        parent = TraceContextTextMapPropagator().extract(carrier)
        end = time.time_ns()
        span = self._tracer.start_span(
            name,
            context=parent,
            kind=SpanKind.SERVER,
            attributes={k: v for k, v in attributes.items() if v is not None},
            start_time=end - int(seconds * NANOSECONDS),
        )
        span.end(end_time=end)

    def close(self) -> None:
        """Sends what is left."""
        if self._provider is not None:
            self._provider.shutdown()
