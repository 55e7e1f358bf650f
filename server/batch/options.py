"""Options of a batch job: one frozen dataclass, validated before anything is read."""

import dataclasses
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from jllm import ConfigError, EngineConfig
from jllm.batch import JobConfig
from server.config import ServerConfig

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
MAX_COUNT = 2**31 - 1
DEFAULT_ROWS = 256
NAME_LETTERS = frozenset(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_."
)


def _option(default: Any, text: str, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """All options of a job; the flags of `jllm batch` are made from the fields."""

    inputs: Sequence[str] = _option(
        (),
        "files of requests (.jsonl, as OpenAI's batch API has them) or of prompts "
        '(.jsonl with {"prompt": …}, .txt with one a line); paths, patterns, gs://, '
        "s3://",
        positional="INPUT",
    )
    output: str | None = _option(
        None, "folder or URL of the job; the same command there goes on with it"
    )
    endpoint: str = _option(
        "/v1/completions", f"API that plain prompts are for: {', '.join(ENDPOINTS)}"
    )
    body: dict[str, Any] | None = _option(
        None, 'fields of every request of a plain prompt, such as {"max_tokens": 64}'
    )
    price_per_hour: float | None = _option(
        None, "dollars that an hour of this worker costs; shows those per token"
    )
    shared: bool = _option(
        False, "other workers may work on the same job; start each with it"
    )
    worker_id: str | None = _option(
        None, "name of this worker in messages; none is made of host and process"
    )
    range_lines: int = _option(256, "lines that a worker takes, and loses, at once")
    max_in_flight: int | None = _option(
        None, "lines that are worked on at once; none is twice the rows of the engine"
    )
    lease_seconds: float = _option(
        60.0, "seconds without a sign of life until a worker's lines go to others"
    )
    flush_seconds: float = _option(
        1.0, "seconds until answers are on the disk; 10 suit an object store"
    )
    grace_seconds: float = _option(
        5.0, "seconds that lines get to end after SIGTERM; at most 10"
    )
    ray: bool = _option(False, "run one worker per replica in a Ray cluster")
    num_replicas: int = _option(1, "workers that Ray runs")
    ray_resources: dict[str, Any] | None = _option(
        None, 'what each of them needs, such as {"GPU": 1}; none is one CPU'
    )
    served_model_name: Sequence[str] | None = _option(
        None, "name of the model in requests; may be repeated; none is the model's own"
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

    def __post_init__(self) -> None:
        """Checks types and ranges; raises `ConfigError` naming field and bound."""
        if not self.inputs:
            raise ConfigError("inputs must name at least one file")
        if not self.output:
            raise ConfigError("output is missing: give --output FOLDER")
        if self.endpoint not in ENDPOINTS:
            names = ", ".join(ENDPOINTS)
            raise ConfigError(f"endpoint={self.endpoint!r} must be one of {names}")
        if self.worker_id is not None and (
            not self.worker_id or set(self.worker_id) - NAME_LETTERS
        ):
            raise ConfigError(
                f"worker_id={self.worker_id!r} must be of letters, digits, _ and ."
            )
        self._check_integer("range_lines")
        self._check_integer("num_replicas")
        if self.max_in_flight is not None:
            self._check_integer("max_in_flight")
        if self.price_per_hour is not None:
            self._check_number("price_per_hour", 0, 1e9)
        self._check_number("lease_seconds", 1, 86400)
        self._check_number("flush_seconds", 0.01, 3600)
        self._check_number("grace_seconds", 0, 10)
        if not self.ray and (self.num_replicas > 1 or self.ray_resources):
            raise ConfigError("num_replicas and ray_resources need ray")
        if self.ray and self.worker_id is not None:
            raise ConfigError("worker_id cannot be given with ray, which names workers")

    def _check_integer(self, field: str) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{field}={value!r} must be an integer, at least 1")

    def _check_number(self, field: str, low: float, high: float) -> None:
        value = getattr(self, field)
        if not isinstance(value, (int, float)) or not low <= value <= high:
            raise ConfigError(f"{field}={value!r} must be between {low:g} and {high:g}")

    def server_config(self) -> ServerConfig:
        """The server's options that requests are read by; nobody waits in a queue."""
        return ServerConfig(
            served_model_name=self.served_model_name,
            default_model=True,
            strict_fields=self.strict_fields,
            trust_request_chat_template=self.trust_request_chat_template,
            enable_auto_tool_choice=self.enable_auto_tool_choice,
            tool_call_parser=self.tool_call_parser,
            reasoning_parser=self.reasoning_parser,
            max_num_queued_reqs=MAX_COUNT,
            max_num_queued_tokens=MAX_COUNT**2,
            request_timeout=None,
        )

    def job_config(self, engine: EngineConfig) -> JobConfig:
        """How the worker goes about the job."""
        rows = (engine.max_num_seqs or DEFAULT_ROWS) * engine.data_parallel_size
        host = "".join(c if c in NAME_LETTERS else "_" for c in socket.gethostname())
        return JobConfig(
            worker=self.worker_id or f"{host}_{os.getpid()}",
            is_shared=self.shared or self.ray,
            range_lines=self.range_lines,
            max_in_flight=self.max_in_flight or 2 * rows,
            lease_seconds=self.lease_seconds,
            flush_seconds=self.flush_seconds,
            grace_seconds=self.grace_seconds,
        )

    def settings(self, engine: EngineConfig) -> Mapping[str, Any]:
        """What decides the answers besides the inputs, for a job to be gone on with."""
        own = (
            "endpoint",
            "body",
            "served_model_name",
            "strict_fields",
            "trust_request_chat_template",
            "enable_auto_tool_choice",
            "tool_call_parser",
            "reasoning_parser",
        )
        engines = (
            "model",
            "revision",
            "tokenizer",
            "chat_template",
            "generation_config",
            "dtype",
            "load_format",
            "max_model_len",
            "seed",
        )
        found = {name: getattr(self, name) for name in own}
        found |= {name: getattr(engine, name) for name in engines}
        found["served_model_name"] = list(self.served_model_name or ()) or None
        return found
