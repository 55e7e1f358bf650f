"""Prometheus metrics, with the names, types and labels of vLLM's behind `jllm:`."""

import collections
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from jllm import STEP_TOKEN_BOUNDS, EngineStats
from server.admission import Admission
from server.event_loop import Turns
from server.histogram import Counts, make_family
from server.llm import Llm

PREFIX = "jllm"
LABELS = ("model_name", "engine")
FIRST_TOKEN_BOUNDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0),
    *(7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BOUNDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0),
    *(7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BOUNDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
N_BOUNDS = (1, 2, 5, 10, 20)
COUNT_BOUNDS = (
    *(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000),
    *(100000, 200000),
)
HISTOGRAMS = {
    "time_to_first_token_seconds": ("time to first token", FIRST_TOKEN_BOUNDS),
    "request_time_per_output_token_seconds": (
        "mean time between the tokens of a request",
        TOKEN_BOUNDS,
    ),
    "e2e_request_latency_seconds": ("time of requests in all", REQUEST_BOUNDS),
    "request_queue_time_seconds": ("time before the first step", REQUEST_BOUNDS),
    "request_inference_time_seconds": ("time from the first step on", REQUEST_BOUNDS),
    "request_prefill_time_seconds": (
        "time from the first step to the first token",
        REQUEST_BOUNDS,
    ),
    "request_decode_time_seconds": ("time from the first token on", REQUEST_BOUNDS),
    "request_prompt_tokens": ("tokens of prompts", COUNT_BOUNDS),
    "request_generation_tokens": ("tokens generated per request", COUNT_BOUNDS),
    "request_prefill_kv_computed_tokens": (
        "tokens of prompts that were not found in the prefix cache",
        COUNT_BOUNDS,
    ),
    "request_params_n": ("outputs asked for", N_BOUNDS),
    "request_params_max_tokens": ("most tokens asked for", COUNT_BOUNDS),
    "request_max_num_generation_tokens": (
        "most tokens that a request could generate",
        COUNT_BOUNDS,
    ),
}
COUNTERS = {
    "prompt_tokens": "tokens of prompts",
    "prompt_tokens_cached": "tokens of prompts found in the prefix cache",
    "generation_tokens": "tokens generated",
}
SPEED_SECONDS = 5
FINISH_REASONS = ("stop", "length", "abort", "error")


class Timed(Protocol):
    """What a finished request is counted by; see `server.call.Call`."""

    arrival: float
    scheduled_time: float | None
    first_token_time: float | None
    last_token_time: float | None
    num_sequences: int
    max_tokens: int | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    reasons: list[str]


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        """Begins with zeros."""
        self._values = (model_name, "0")
        self.registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(
                f"{PREFIX}:{name}", text, LABELS, registry=self.registry, buckets=bounds
            ).labels(*self._values)
            for name, (text, bounds) in HISTOGRAMS.items()
        }
        self._counters = {
            name: Counter(
                f"{PREFIX}:{name}", text, LABELS, registry=self.registry
            ).labels(*self._values)
            for name, text in COUNTERS.items()
        }
        self._token_times = Counts(TOKEN_BOUNDS)
        self._add_counts(
            "inter_token_latency_seconds",
            "time between tokens of streams",
            self._token_times,
        )
        self._num_prompt = self._num_generated = 0
        self._speed: collections.deque[tuple[int, int]] = collections.deque(
            maxlen=SPEED_SECONDS + 1
        )
        self._success = Counter(
            f"{PREFIX}:request_success",
            "sequences ended, by reason",
            (*LABELS, "finished_reason"),
            registry=self.registry,
        )
        for reason in FINISH_REASONS:
            self._success.labels(*self._values, reason)
        self._http_requests = Counter(
            "http_requests",
            "answers, by route and class of status",
            ("handler", "method", "status"),
            registry=self.registry,
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "time of answers, by route",
            ("handler", "method"),
            registry=self.registry,
            buckets=(0.1, 0.5, 1, 5, 10, 60, 600),
        )

    def set_llm(self, llm: Llm, admission: Admission) -> None:
        """Adds what the engine counts; read when the metrics are."""
        self.registry.register(_EngineCollector(llm, admission, self._values))

    def set_turns(self, turns: Turns) -> None:
        """Adds how long the turns of the event loop are."""
        self._add_counts(
            "event_loop_turn_seconds", "time of turns of the event loop", turns.seconds
        )

    def _add_counts(self, name: str, text: str, counts: Counts) -> None:
        family = (f"{PREFIX}:{name}", text, LABELS, self._values)
        self.registry.register(_CountsCollector(lambda: counts.family(*family)))

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Tokens of prompts, and tokens generated, of the requests that have ended."""
        return self._num_prompt, self._num_generated

    def note_generated(self, count: int) -> None:
        """Counts tokens when they come, for the present speed."""
        second = int(time.monotonic())
        if not self._speed or self._speed[-1][0] != second:
            self._speed.append((second, 0))
        self._speed[-1] = (second, self._speed[-1][1] + count)

    def tokens_per_second(self) -> float:
        """Tokens generated per second, over the last few whole seconds."""
        now = int(time.monotonic())
        recent = [n for second, n in self._speed if now - SPEED_SECONDS <= second < now]
        return sum(recent) / SPEED_SECONDS

    def observe_token(self, seconds: float, count: int) -> None:
        """Counts the time since the last tokens of a stream, shared among the new."""
        self._token_times.add(seconds / count, count)

    def observe_call(self, call: Timed) -> None:
        """Counts an inference request that has ended."""
        histograms, now = self._histograms, time.monotonic()
        counts = {
            "prompt_tokens": call.num_prompt_tokens,
            "prompt_tokens_cached": call.num_cached_tokens,
            "generation_tokens": call.num_output_tokens,
        }
        self._num_prompt += call.num_prompt_tokens
        self._num_generated += call.num_output_tokens
        for name, count in counts.items():
            self._counters[name].inc(count)
        for reason in call.reasons or ["abort"]:
            known = "stop" if reason == "tool_calls" else reason
            self._success.labels(*self._values, known).inc()
        computed = call.num_prompt_tokens - call.num_cached_tokens
        observations: dict[str, float | None] = {
            "request_prompt_tokens": call.num_prompt_tokens,
            "request_generation_tokens": call.num_output_tokens,
            "request_prefill_kv_computed_tokens": computed,
            "request_params_n": call.num_sequences,
            "request_params_max_tokens": call.max_tokens,
            "request_max_num_generation_tokens": call.max_tokens,
            "e2e_request_latency_seconds": now - call.arrival,
            **_times(call),
        }
        for name, value in observations.items():
            if value is not None:
                histograms[name].observe(value)

    def observe_http(
        self, route: str, method: str, status: int, seconds: float
    ) -> None:
        """Counts an answer of any kind."""
        self._http_requests.labels(route, method, f"{status // 100}xx").inc()
        self._http_seconds.labels(route, method).observe(seconds)

    def render(self) -> bytes:
        """Writes the text that Prometheus reads."""
        return generate_latest(self.registry)


def _times(call: Timed) -> dict[str, float | None]:
    """Where the time of a request went, as far as it came."""
    first, last, scheduled = (
        call.first_token_time,
        call.last_token_time,
        call.scheduled_time,
    )
    if first is None or last is None:
        return {}
    per_sequence = call.num_output_tokens / call.num_sequences
    times: dict[str, float | None] = {
        "time_to_first_token_seconds": first - call.arrival,
        "request_decode_time_seconds": last - first,
    }
    if per_sequence > 1:
        mean = (last - first) / (per_sequence - 1)
        times["request_time_per_output_token_seconds"] = mean
    if scheduled is not None:
        times["request_queue_time_seconds"] = max(scheduled - call.arrival, 0)
        times["request_prefill_time_seconds"] = first - scheduled
        times["request_inference_time_seconds"] = last - scheduled
    return times


class _CountsCollector:
    """Reads one histogram when it is asked."""

    def __init__(self, read: Callable[[], HistogramMetricFamily]) -> None:
        self._read = read

    def collect(self) -> Iterator[Any]:
        """Gives the one family."""
        yield self._read()


class _EngineCollector:
    """Reads the engine's own counts when it is asked."""

    def __init__(self, llm: Llm, admission: Admission, values: Sequence[str]) -> None:
        self._llm = llm
        self._admission = admission
        self._values = list(values)

    def collect(self) -> Iterator[Any]:
        """Gives all families."""
        stats = self._llm.stats()
        # By bytes: blocks of layers with other windows are of other sizes.
        yield from self._gauges(stats, stats.kv_bytes_used / max(stats.kv_bytes, 1))
        for name, text, value in (
            (
                "prefix_cache_queries",
                "tokens looked for in it",
                stats.num_prefix_queries,
            ),
            ("prefix_cache_hits", "tokens found in it", stats.num_prefix_hits),
            ("num_preemptions", "sequences preempted", stats.num_preemptions),
            ("admission_rejections", "answered 429", self._admission.num_rejected),
        ):
            counter = CounterMetricFamily(f"{PREFIX}:{name}", text, labels=LABELS)
            counter.add_metric(self._values, value)
            yield counter
        yield self._steps(stats)
        info = GaugeMetricFamily(
            f"{PREFIX}:cache_config_info",
            "the KV cache",
            labels=(*LABELS, "block_size", "num_gpu_blocks", "cache_dtype"),
        )
        shape = (str(stats.block_size), str(len(stats.block_states)), "auto")
        info.add_metric([*self._values, *shape], 1)
        yield info

    def _gauges(self, stats: EngineStats, share_used: float) -> Iterator[Any]:
        # What was admitted and has not reached the engine waits as well.
        tokenizing = self._admission.num_queued - stats.num_waiting - stats.num_running
        for name, text, value in (
            ("num_requests_running", "sequences in the steps", stats.num_running),
            (
                "num_requests_waiting",
                "sequences that wait for their turn",
                stats.num_waiting + max(tokenizing, 0),
            ),
            ("kv_cache_usage_perc", "share of KV blocks in use, 0 to 1", share_used),
            ("kv_cache_bytes", "memory of all KV blocks", stats.kv_bytes),
            ("kv_cache_used_bytes", "memory of KV blocks in use", stats.kv_bytes_used),
        ):
            gauge = GaugeMetricFamily(f"{PREFIX}:{name}", text, labels=LABELS)
            gauge.add_metric(self._values, value)
            yield gauge

    def _steps(self, stats: EngineStats) -> HistogramMetricFamily:
        counts = stats.step_counts or (0,) * (len(STEP_TOKEN_BOUNDS) + 1)
        return make_family(
            f"{PREFIX}:iteration_tokens_total",
            "tokens per step",
            (LABELS, self._values),
            (STEP_TOKEN_BOUNDS, counts, stats.step_tokens),
        )
