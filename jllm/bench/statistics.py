"""What is computed from the times of requests: TTFT, TPOT, ITL, E2EL, goodput.

Definitions and names of the figures are those of `vllm bench serve`, so that results
can be laid side by side.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jllm.errors import InvalidRequestError

PERCENTILES = (50.0, 90.0, 99.0)


@dataclasses.dataclass(frozen=True, slots=True)
class RequestTiming:
    """One request as its client saw it; seconds on one clock.

    Attributes:
        num_prompt_tokens: Tokens of its prompt.
        num_output_tokens: Tokens that came back.
        scheduled: When it should have been sent.
        start: When it was sent; later than that if it waited for a free place.
        first_token: When the first token came; None if none did.
        end: When the last one came, or the request failed.
        chunk_times: When each chunk with new tokens came; empty where only the first
            and the last were seen.
        num_cached_tokens: Prompt tokens that the prefix cache had; None if not told.
        error: Why it failed.
    """

    num_prompt_tokens: int
    num_output_tokens: int
    scheduled: float
    start: float
    first_token: float | None
    end: float
    chunk_times: tuple[float, ...] = ()
    num_cached_tokens: int | None = None
    error: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether it ended without an error and brought a token."""
        return self.error is None and self.first_token is not None

    @property
    def ttft(self) -> float:
        """Time to first token: from the start of the request in the client."""
        assert self.first_token is not None
        return self.first_token - self.start

    @property
    def ttft_from_schedule(self) -> float:
        """The same from when the request should have been sent."""
        assert self.first_token is not None
        return self.first_token - self.scheduled

    @property
    def e2el(self) -> float:
        """End-to-end latency: from the start to the last token."""
        return self.end - self.start

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        if self.num_output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.num_output_tokens - 1)

    @property
    def itls(self) -> list[float]:
        """Inter-token latencies: from one chunk to the next, whatever it holds."""
        return [
            b - a for a, b in zip(self.chunk_times, self.chunk_times[1:], strict=False)
        ]


def percentile(values: Sequence[float], percent: float) -> float:
    """A percentile with linear interpolation, NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def distribution(
    values: Sequence[float], percentiles: Sequence[float] = PERCENTILES
) -> dict[str, float]:
    """Mean, median, deviation, largest and percentiles; empty of nothing."""
    if not values:
        return {}
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return {
        "mean": mean,
        "median": percentile(values, 50),
        "std": math.sqrt(variance),
        **{f"p{percent:g}": percentile(values, percent) for percent in percentiles},
        "max": max(values),
    }


def spread(values: Sequence[float]) -> float:
    """Largest less smallest, as a share of the median."""
    median = percentile(values, 50)
    return (max(values) - min(values)) / median if median else 0.0


def parse_goodput(entries: Sequence[str]) -> dict[str, float]:
    """Reads limits such as "ttft:500", in milliseconds.

    Raises:
        InvalidRequestError: An entry is malformed, or its metric has no limit.
    """
    limits: dict[str, float] = {}
    for entry in entries:
        name, _, text = entry.partition(":")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if name not in ("ttft", "tpot", "e2el") or not value > 0:
            raise InvalidRequestError(
                f"goodput={entry!r} must be ttft:MS, tpot:MS or e2el:MS, above 0"
            )
        limits[name] = value
    return limits


def is_good(timing: RequestTiming, limits: Mapping[str, float]) -> bool:
    """Whether a request keeps all limits; a failed one keeps none."""
    if not timing.is_complete:
        return False
    values = {"ttft": timing.ttft, "tpot": timing.tpot or 0.0, "e2el": timing.e2el}
    return all(values[name] * 1000 <= limit for name, limit in limits.items())


def summarize(
    timings: Sequence[RequestTiming],
    *,
    percentiles: Sequence[float] = PERCENTILES,
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """All figures of a run; times in milliseconds, rates per second.

    The duration is from the first start to the last end.
    """
    done = [timing for timing in timings if timing.is_complete]
    result: dict[str, Any] = {
        "completed": len(done),
        "failed": len(timings) - len(done),
        "errors": _count_errors(timings),
        "duration": _duration(timings),
        "total_input_tokens": sum(t.num_prompt_tokens for t in done),
        "total_output_tokens": sum(t.num_output_tokens for t in done),
    }
    result |= _rates(result, timings, goodput)
    samples = {
        "ttft": [t.ttft for t in done],
        "ttft_from_schedule": [t.ttft_from_schedule for t in done],
        "tpot": [t.tpot for t in done if t.tpot is not None],
        "itl": [itl for t in done for itl in t.itls],
        "itl_per_token": [itl for t in done for itl in _itls_per_token(t)],
        "e2el": [t.e2el for t in done],
    }
    for name, values in samples.items():
        for label, value in distribution(values, percentiles).items():
            result[f"{label}_{name}_ms"] = 1000 * value
    beside = itls_beside_prefill(done)
    if beside:
        result["max_itl_beside_prefill_ms"] = 1000 * max(beside)
        result["p99_itl_beside_prefill_ms"] = 1000 * percentile(beside, 99)
    cached = [t for t in done if t.num_cached_tokens is not None]
    if cached:
        hits = sum(t.num_cached_tokens or 0 for t in cached)
        result["total_cached_tokens"] = hits
        result["prefix_hit_rate"] = hits / sum(t.num_prompt_tokens for t in cached)
    return result


def itls_beside_prefill(timings: Sequence[RequestTiming]) -> list[float]:
    """Inter-token latencies during which another request waited for its first token."""
    waits = _merged([(t.start, t.first_token or t.end) for t in timings])
    starts = [start for start, _ in waits]
    found: list[float] = []
    for timing in timings:
        times = timing.chunk_times
        for begin, end in itertools.pairwise(times):
            # The last interval that starts before the gap ends is the only candidate.
            index = bisect.bisect_left(starts, end) - 1
            if index >= 0 and waits[index][1] > begin:
                found.append(end - begin)
    return found


def _merged(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals, in order."""
    union: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def _itls_per_token(timing: RequestTiming) -> list[float]:
    """ITLs with a chunk of several tokens counted that often, its time divided."""
    num_chunks = len(timing.chunk_times)
    if num_chunks < 2 or timing.num_output_tokens <= num_chunks:
        return timing.itls
    tokens_per_chunk = timing.num_output_tokens / num_chunks
    return [itl / tokens_per_chunk for itl in timing.itls]


def _duration(timings: Sequence[RequestTiming]) -> float:
    if not timings:
        return 0.0
    return max(t.end for t in timings) - min(t.start for t in timings)


def _rates(
    result: Mapping[str, Any],
    timings: Sequence[RequestTiming],
    goodput: Mapping[str, float] | None,
) -> dict[str, float]:
    duration = result["duration"]
    if not duration:
        return {}
    inputs, outputs = result["total_input_tokens"], result["total_output_tokens"]
    rates = {
        "request_throughput": result["completed"] / duration,
        "output_throughput": outputs / duration,
        "input_throughput": inputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
    }
    if goodput:
        good = sum(is_good(timing, goodput) for timing in timings)
        rates["request_goodput"] = good / duration
        rates["good_share"] = good / len(timings)
    return rates


def _count_errors(timings: Sequence[RequestTiming]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for timing in timings:
        if not timing.is_complete:
            reason = timing.error or "no token came"
            counts[reason] = counts.get(reason, 0) + 1
    return counts
