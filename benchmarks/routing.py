"""What the choice of replicas is worth: a trace of conversations, simulated.

    python -m benchmarks.routing TRACE [--replicas 4] [--record]

The trace is a file of the Mooncake project (FAST 2025): arrival, lengths, and a hash
for every 512 tokens of the prompt. A simulated replica computes prompts one after
another at a fixed speed, less what its cache holds, generates at a fixed speed, and
forgets the least recently used blocks. Everything is counted; nothing is timed.
"""

import argparse
import dataclasses
import heapq
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from jllm.engine.routing import Route, Router, SentPrefixes

BLOCK = 512
PREFILL_RATE = 16_000.0
"""Prompt tokens per second."""
TOKEN_SECONDS = 0.02
CACHE_TOKENS = 1_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """One request of the trace."""

    time: float
    num_tokens: int
    num_outputs: int
    pieces: tuple[bytes, ...]


def read_trace(path: Path) -> list[Arrival]:
    """Reads a trace."""
    found: list[Arrival] = []
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        # The last hash is that of a block that is not full, and is not cached.
        full = row["hash_ids"][: row["input_length"] // BLOCK]
        pieces = tuple(value.to_bytes(8, "big") for value in full)
        found.append(
            Arrival(
                row["timestamp"] / 1000,
                row["input_length"],
                row["output_length"],
                pieces,
            )
        )
    return found


class Replica:
    """One simulated replica."""

    def __init__(self) -> None:
        """Is idle, with an empty cache."""
        self._cache = SentPrefixes(CACHE_TOKENS // BLOCK)
        self._free_at = 0.0
        self.num_hits = 0
        self.num_computed = 0

    def run(self, arrival: Arrival) -> tuple[float, float]:
        """Takes a request; seconds to its first token, and when it ends."""
        hits = BLOCK * self._cache.num_known(arrival.pieces)
        rest = arrival.num_tokens - hits
        self._cache.add(arrival.pieces)
        self.num_hits += hits
        self.num_computed += rest
        self._free_at = max(self._free_at, arrival.time) + rest / PREFILL_RATE
        end = self._free_at + TOKEN_SECONDS * arrival.num_outputs
        return self._free_at - arrival.time, end


def simulate(
    trace: Sequence[Arrival], num_replicas: int, make: Callable[[int], Router | None]
) -> dict[str, Any]:
    """Sends a whole trace; without a router the replicas take turns."""
    replicas = [Replica() for _ in range(num_replicas)]
    router, waits = make(num_replicas), list[float]()
    open_: list[tuple[float, int, Route]] = []
    for i, arrival in enumerate(trace):
        while open_ and open_[0][0] <= arrival.time:
            _, _, ended = heapq.heappop(open_)
            if router is not None:
                router.end(ended)
        route = Route(i % num_replicas, 0)
        if router is not None:
            route = router.send(arrival.pieces, arrival.num_tokens)
        wait, end = replicas[route.replica].run(arrival)
        waits.append(wait)
        heapq.heappush(open_, (end, i, route))
    waits.sort()
    computed = [replica.num_computed for replica in replicas]
    return {
        "hit_rate": sum(r.num_hits for r in replicas)
        / sum(arrival.num_tokens for arrival in trace),
        "ttft_s": {
            "mean": statistics.mean(waits),
            "p50": waits[len(waits) // 2],
            "p99": waits[int(0.99 * len(waits))],
        },
        "most_of_mean_work": max(computed) / statistics.mean(computed),
    }


POLICIES: dict[str, Callable[[int], Router | None]] = {
    "round robin": lambda count: None,
    "least loaded": lambda count: Router([0] * count, piece_tokens=BLOCK),
    "longest prefix": lambda count: Router([CACHE_TOKENS] * count, piece_tokens=BLOCK),
    "longest prefix, no bound": lambda count: Router(
        [CACHE_TOKENS] * count, piece_tokens=BLOCK, lead_tokens=10**12
    ),
}


def main() -> None:
    """Simulates all policies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--record", action="store_true", help="append to results/")
    arguments = parser.parse_args()
    trace = read_trace(arguments.trace)
    rows = [
        {
            "trace": arguments.trace.name,
            "requests": len(trace),
            "replicas": count,
            "policy": name,
            **simulate(trace, count, make),
        }
        for count in arguments.replicas
        for name, make in POLICIES.items()
    ]
    for row in rows:
        print(json.dumps(row))
    if arguments.record:
        record.append("routing", rows)


if __name__ == "__main__":
    main()
