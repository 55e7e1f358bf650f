"""What the server adds to an engine: processor time and delay of every token.

python -m benchmarks.server.overhead --record

The engine computes nothing (`benchmarks.server.instant`), the client looks at the bytes
after the run only. Every step has a token of its own, so that the text of a chunk tells
when its tokens were made.
"""

import argparse
import array
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jllm
from benchmarks import record
from benchmarks.server.client import percentile, request_bytes
from benchmarks.server.instant import FIRST_TOKEN, NUM_TOKENS
from benchmarks.server.process import free_port, running
from benchmarks.server.sockets import Exchange, exchange
from jllm.text.tokenizer import load_tokenizer

STREAMS = 64
TEXT = re.compile(rb'"(?:text|content)":("(?:[^"\\]|\\.)+")')
GOAL_TOKENS, GOAL_MS = 5000, 5.0
PROMPT = "Once upon a time"
CASES = {
    "completions": ("/v1/completions", {"prompt": PROMPT}),
    "chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": PROMPT}]},
    ),
}


def measure(case: str, *, period: float, tokens: int) -> dict[str, Any]:
    """One run against a server of its own."""
    path, asked = CASES[case]
    fields = {"model": "jllm", "ignore_eos": True, "stream": True, **asked}
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times"
        port = free_port()
        options = {"port": port, "period": period, "times": str(times)}
        module = "benchmarks.server.instant"
        command = [sys.executable, "-m", module, json.dumps(options)]
        with running(command, port) as server:
            for count in (64, tokens):
                body = fields | {"max_tokens": count}
                before, own = server.cpu_seconds, time.process_time()
                found = exchange(port, [request_bytes(port, body, path)] * STREAMS)
                spent = server.cpu_seconds - before
                own = time.process_time() - own
        steps = array.array("d", times.read_bytes())
    delays = list(_delays(found, _texts(), steps))
    return {
        "case": case,
        "streams": STREAMS,
        "tokens": STREAMS * tokens,
        "tokens_timed": len(delays),
        "step_ms": 1e3 * period,
        "tokens_per_core_second": STREAMS * tokens / spent,
        "client_cpu_us_per_token": 1e6 * own / (STREAMS * tokens),
        "added_ms_p50": 1e3 * statistics.median(delays),
        "added_ms_p99": 1e3 * percentile(delays, 0.99),
    }


def _texts() -> list[str]:
    """Text of the token of each step, until they begin anew."""
    tokenizer = load_tokenizer(Path(jllm.__file__).parent / "default_model")
    return [tokenizer.token_text(FIRST_TOKEN + i) for i in range(NUM_TOKENS)]


def _delays(
    found: Sequence[Exchange], texts: Sequence[str], steps: Sequence[float]
) -> Iterator[float]:
    """Seconds from the step that made a token to its arrival."""
    for one in found:
        for moment, data in one.chunks:
            for match in TEXT.finditer(data):
                for step in _steps_of(json.loads(match[1]), texts):
                    yield moment - _latest(steps, step, moment)


def _steps_of(text: str, texts: Sequence[str]) -> Sequence[int]:
    """The steps, one after another, whose tokens make a text; none if it is cut."""
    for first, start in enumerate(texts):
        if not start or not text.startswith(start):
            continue
        made, step = start, first
        while len(made) < len(text):
            step += 1
            made += texts[step % NUM_TOKENS]
        if made == text:
            return range(first, step + 1)
    return ()


def _latest(steps: Sequence[float], step: int, moment: float) -> float:
    """When the last step before a moment was that gave this token."""
    return [t for t in steps[step % NUM_TOKENS :: NUM_TOKENS] if t <= moment][-1]


def main() -> None:
    """Measures; exits with 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--tokens", type=int, default=1000, help="of each stream")
    parser.add_argument("--period", type=float, default=0.02, help="seconds of a step")
    parser.add_argument("--record", action="store_true", help="append to results/")
    arguments = parser.parse_args()
    rows = [
        measure(case, period=arguments.period, tokens=arguments.tokens)
        for case in arguments.cases
    ]
    print(json.dumps(rows, indent=1))
    if arguments.record:
        record.append("server_overhead", rows)
    sys.exit(
        not all(
            row["tokens_per_core_second"] >= GOAL_TOKENS
            and row["added_ms_p99"] < GOAL_MS
            for row in rows
        )
    )


if __name__ == "__main__":
    main()
