"""Server options: one frozen dataclass, validated before anything is loaded."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from jllm import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """All options of the server; the flags of `jllm serve` are made from the fields."""

    host: str = _option("127.0.0.1", "address to listen on")
    port: int = _option(8000, "port to listen on; 0 takes a free one")
    reuse_port: bool = _option(
        False,
        "share the port with the server that this one takes over from: listen once the "
        "model is loaded, and no more after SIGTERM",
    )
    served_model_name: Sequence[str] | None = _option(
        None, "name that requests use; may be repeated; none is the model's own"
    )
    default_model: bool = _option(False, "accept requests that name no model")
    api_key: Sequence[str] | None = _option(
        None, "key that requests must bear; may be repeated; none lets everybody in"
    )
    api_key_file: str | None = _option(None, "file with one key per line")
    isolate_keys: bool = _option(
        False, "requests share cached prompt starts only under the same key"
    )
    allowed_hosts: Sequence[str] | None = _option(
        None,
        "name that the Host header may hold, besides loopback's; may be repeated; "
        "checked where no key protects a server on loopback",
    )
    allowed_origins: Sequence[str] | None = _option(
        None, "origin that browsers may call from, or *; may be repeated; none is none"
    )
    ssl_certfile: str | None = _option(None, "certificate; makes the server speak TLS")
    ssl_keyfile: str | None = _option(None, "private key of the certificate")
    ssl_ca_certs: str | None = _option(
        None, "authorities whose certificate every client must show"
    )
    max_num_queued_reqs: int = _option(
        1024, "most sequences that wait for their first token; more get 429"
    )
    max_num_queued_tokens: int = _option(
        4_194_304, "most prompt tokens that wait for their first token; more get 429"
    )
    max_body_bytes: int | None = _option(
        None, "longest request body; none is 16 per token of context, 8 MiB at least"
    )
    request_timeout: float | None = _option(
        1800.0, "seconds a request may take in all; none is no bound"
    )
    queue_timeout: float | None = _option(
        None, "seconds a request may wait for its first token; none is no bound"
    )
    body_timeout: float = _option(30.0, "seconds for a request body to arrive")
    write_timeout: float = _option(
        30.0, "seconds a stream waits for a reader whose buffer is full"
    )
    max_buffered_bytes: int = _option(
        65536, "bytes held for a reader that is slower than its stream"
    )
    stream_interval: int = _option(
        1, "tokens that a chunk of a stream holds; more cost the server less"
    )
    keep_alive_interval: float = _option(
        15.0, "seconds without output after which a stream gets a comment line"
    )
    shutdown_timeout: float = _option(
        45.0, "seconds that open requests get to end after SIGTERM"
    )
    stall_timeout: float = _option(
        60.0, "seconds without a step, with work to do, until /health says 503"
    )
    strict_fields: bool = _option(False, "refuse requests with unknown fields")
    trust_request_chat_template: bool = _option(
        False, "render chat templates that requests bring"
    )
    enable_auto_tool_choice: bool = _option(
        False, "let the model decide to call tools; needs a tool call parser"
    )
    tool_call_parser: str | None = _option(
        "auto", "how the model writes tool calls; auto takes it from its template"
    )
    reasoning_parser: str | None = _option(
        "auto", "how the model marks its reasoning; auto takes it from its template"
    )
    max_stored_responses: int = _option(
        256, "responses kept in memory for retrieval; 0 keeps none"
    )
    max_stored_bytes: int = _option(67_108_864, "bytes of all responses kept")
    enable_page: bool = _option(True, "serve a page to try the model at /")
    profiler_dir: str | None = _option(
        None, "folder for profiles; enables /start_profile and /stop_profile"
    )
    otlp_traces_endpoint: str | None = _option(
        None, "URL of an OpenTelemetry collector that gets a trace per request"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _option(
        "info", "least severe messages that are logged"
    )

    def __post_init__(self) -> None:
        """Checks types and ranges; raises `ConfigError` naming field and bound."""
        self._check_integer("port", 0, 65535)
        self._check_integer("max_num_queued_reqs", 1)
        self._check_integer("max_num_queued_tokens", 1)
        self._check_integer("max_buffered_bytes", 1024)
        self._check_integer("stream_interval", 1)
        self._check_integer("max_stored_responses", 0)
        self._check_integer("max_stored_bytes", 0)
        if self.max_body_bytes is not None:
            self._check_integer("max_body_bytes", 1024)
        for field in ("request_timeout", "queue_timeout"):
            if getattr(self, field) is not None:
                self._check_seconds(field)
        for field in (
            "body_timeout",
            "write_timeout",
            "keep_alive_interval",
            "stall_timeout",
        ):
            self._check_seconds(field)
        if self.shutdown_timeout != 0:
            self._check_seconds("shutdown_timeout")
        if self.log_level not in LOG_LEVELS:
            names = ", ".join(LOG_LEVELS)
            raise ConfigError(f"log_level={self.log_level!r} must be one of {names}")
        if not self.ssl_certfile and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ConfigError("ssl_keyfile and ssl_ca_certs need ssl_certfile")
        if any(not key.strip() for key in self.api_key or ()):
            raise ConfigError("api_key must not be empty")

    def _check_integer(self, field: str, low: int, high: int | None = None) -> None:
        value = getattr(self, field)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < low
            or (high is not None and value > high)
        ):
            bound = f"at least {low}" if high is None else f"{low} to {high}"
            raise ConfigError(f"{field}={value!r} must be an integer, {bound}")

    def _check_seconds(self, field: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise ConfigError(f"{field}={value!r} must be above 0, in seconds")
