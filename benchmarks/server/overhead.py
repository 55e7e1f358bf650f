"""What the server adds to an engine: processor time and delay of every token.

python -m benchmarks.server.overhead --record

The engine computes nothing (`benchmarks.server.instant`), the client looks at the bytes
after the run only.
"""

import argparse
import array
import asyncio
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from benchmarks import record
from benchmarks.server.client import exchange, percentile
from benchmarks.server.instant import FIRST_TOKEN, NUM_TOKENS
from benchmarks.server.process import Server, free_port, running

STREAMS = 64
TOKEN_ID = re.compile(rb'"token_ids":\[(\d+)\]')
GOAL_TOKENS, GOAL_MS = 5000, 5.0


def body(tokens: int, index: int, *, ids: bool) -> dict[str, Any]:
    """A request for a stream."""
    return {
        "model": "jllm",
        "prompt": f"Once upon a time {index}",
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": ids,
    }


def measure(*, period: float, tokens: int, ids: bool, streams: int = STREAMS) -> dict:
    """One run against a server of its own."""
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times"
        port = free_port()
        options = {"port": port, "period": period, "times": str(times)}
        module = "benchmarks.server.instant"
        command = [sys.executable, "-m", module, json.dumps(options)]
        with running(command, port) as server:
            asyncio.run(exchange(port, [body(64, i, ids=ids) for i in range(streams)]))
            before = _seconds(server)
            bodies = [body(tokens, i, ids=ids) for i in range(streams)]
            chunks = [r.chunks for r in asyncio.run(exchange(port, bodies))]
            spent = _seconds(server) - before
        steps = array.array("d", times.read_bytes())
    events = sum(
        data.count(b'"text":"') for stream in chunks for _, data in stream
    ) - len(chunks)
    delays = sorted(_delays(chunks, steps)) if ids else []
    result = {
        "streams": streams,
        "tokens": streams * tokens,
        "events": events,
        "step_ms": 1e3 * period,
        "tokens_per_core_second": streams * tokens / spent,
        "events_per_core_second": events / spent,
    }
    if delays:
        result |= {
            "added_ms_p50": 1e3 * statistics.median(delays),
            "added_ms_p99": 1e3 * percentile(delays, 0.99),
        }
    return result


def _seconds(server: Server) -> float:
    """Processor time of the server so far."""
    times = psutil.Process(server.process.pid).cpu_times()
    return times.user + times.system


def _delays(
    chunks: list[list[tuple[float, bytes]]], steps: "array.array[float]"
) -> list[float]:
    """Seconds from the step that made a token to its arrival."""
    return [
        moment - _latest(steps, int(match[1]), moment)
        for stream in chunks
        for moment, data in stream
        for match in TOKEN_ID.finditer(data)
    ]


def _latest(steps: "array.array[float]", token: int, moment: float) -> float:
    """When the last step before a moment was that gave this token."""
    step = token - FIRST_TOKEN
    made = [t for t in steps[step::NUM_TOKENS] if t <= moment]
    return made[-1]


def main() -> None:
    """Measures both; exits with 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--period", type=float, default=0.02, help="seconds of a step")
    parser.add_argument("--record", action="store_true", help="append to results/")
    arguments = parser.parse_args()
    rows = [
        {"case": "plain", **measure(period=0.02, tokens=arguments.tokens, ids=False)},
        {
            "case": "delay",
            **measure(period=arguments.period, tokens=arguments.tokens, ids=True),
        },
    ]
    print(json.dumps(rows, indent=1))
    if arguments.record:
        record.append("server_overhead", rows)
    is_fast = rows[0]["events_per_core_second"] >= GOAL_TOKENS
    sys.exit(not (is_fast and rows[1]["added_ms_p99"] < GOAL_MS))


if __name__ == "__main__":
    main()
