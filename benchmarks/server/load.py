"""Many streams at once, far too many requests at once, and the server beside `LLM`.

python -m benchmarks.server.load streams overload offline --record
"""

import argparse
import json
import statistics
import time
from typing import Any

from benchmarks import record
from benchmarks.server.client import Answer, percentile, send_all
from benchmarks.server.process import serving

MODEL = "jllm"
PROMPT = "Once upon a time there was a little"
STREAMS, STREAM_TOKENS = 256, 64
REQUESTS, CAP, ACCEPTED_TOKENS = 10_000, 512, 64
SPREAD = 20.0
"""Seconds over which the requests come that do not come at once."""
OFFLINE_PROMPTS, OFFLINE_TOKENS, ROUNDS = 128, 64, 5


def body(tokens: int, index: int = 0, *, stream: bool = True) -> dict[str, Any]:
    """A request of a fixed number of tokens, each with a prompt of its own."""
    more = {"stream": True, "stream_options": {"include_usage": True}}
    return {
        "model": MODEL,
        "prompt": f"{PROMPT} cat number {index}",
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        **(more if stream else {}),
    }


def bodies(count: int, tokens: int, *, stream: bool = True) -> list[dict[str, Any]]:
    """That many of them."""
    return [body(tokens, i, stream=stream) for i in range(count)]


def milliseconds(values: list[float]) -> dict[str, float | None]:
    """Median and 99th percentile."""
    if not values:
        return {"p50": None, "p99": None}
    return {
        "p50": round(1e3 * percentile(values, 0.5), 1),
        "p99": round(1e3 * percentile(values, 0.99), 1),
    }


def streams() -> dict[str, Any]:
    """256 concurrent streams of 64 tokens: no error, all tokens."""
    with serving("--max-num-queued-reqs", str(STREAMS)) as server:
        send_all(server.port, bodies(64, 16))
        answers, seconds = send_all(server.port, bodies(STREAMS, STREAM_TOKENS))
    good = [a for a in answers if a.status == 200 and a.tokens == STREAM_TOKENS]
    gaps = [b - a for x in good for a, b in zip(x.times, x.times[1:], strict=False)]
    return {
        "case": f"{STREAMS} streams of {STREAM_TOKENS} tokens",
        "errors": len(answers) - len(good),
        "first_error": next((a.error for a in answers if a.error), None),
        "tokens_per_second": sum(a.tokens for a in good) / seconds,
        "ttft_ms": milliseconds([a.times[0] for a in good]),
        "itl_ms": milliseconds(gaps),
    }


def overload() -> dict[str, Any]:
    """10,000 requests with room for 512, at once and within ten seconds."""
    with serving("--max-num-queued-reqs", str(CAP)) as server:
        send_all(server.port, bodies(64, 16))
        # What it does when nobody has to be refused, for the ratio.
        calm = _rate(*send_all(server.port, bodies(CAP, ACCEPTED_TOKENS)))
        before = server.resources()
        at_once = send_all(server.port, bodies(REQUESTS, ACCEPTED_TOKENS))
        spread = send_all(server.port, bodies(REQUESTS, ACCEPTED_TOKENS), spread=SPREAD)
        after = server.resources()
    return {
        "case": f"{REQUESTS} requests, room for {CAP}",
        "unshed_tokens_per_second": calm,
        "at_once": _shed(*at_once, calm),
        f"within_{SPREAD:.0f}_seconds": _shed(*spread, calm),
        "rss_growth_mib": after.rss_mib - before.rss_mib,
        "files_growth": after.files - before.files,
    }


def _rate(answers: list[Answer], seconds: float) -> float:
    return sum(a.tokens for a in answers) / seconds


def _shed(answers: list[Answer], seconds: float, calm: float) -> dict[str, Any]:
    """What became of requests of which most were refused."""
    accepted = [a for a in answers if a.status == 200]
    refused = [a for a in answers if a.status == 429]
    complete = sum(a.tokens == ACCEPTED_TOKENS and not a.error for a in accepted)
    return {
        "accepted": len(accepted),
        "accepted_complete": complete,
        "refused": len(refused),
        "other": len(answers) - len(accepted) - len(refused),
        "refusal_ms": milliseconds([a.seconds for a in refused]),
        "seconds": seconds,
        "throughput_of_unshed": _rate(accepted, seconds) / calm,
    }


def offline() -> dict[str, Any]:
    """The same prompts through the server and through `LLM.generate`, in turn."""
    from jllm import LLM, SamplingParams

    prompts = [body(OFFLINE_TOKENS, i)["prompt"] for i in range(OFFLINE_PROMPTS)]
    params = SamplingParams(max_tokens=OFFLINE_TOKENS, temperature=0, ignore_eos=True)
    total = OFFLINE_PROMPTS * OFFLINE_TOKENS
    rates: dict[str, list[float]] = {"offline": [], "whole": [], "streamed": []}
    with serving("--max-num-queued-reqs", str(OFFLINE_PROMPTS)) as server, LLM() as llm:
        for round_ in range(ROUNDS + 1):
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            rates["offline"].append(total / (time.perf_counter() - began))
            for name in ("whole", "streamed"):
                asked = bodies(
                    OFFLINE_PROMPTS, OFFLINE_TOKENS, stream=name == "streamed"
                )
                rates[name].append(_rate(*send_all(server.port, asked)))
            if round_ == 0:  # warm-up: compilation, prefix cache
                for found in rates.values():
                    found.clear()
    base = statistics.mean(rates["offline"])
    return {
        "case": f"{OFFLINE_PROMPTS} requests of {OFFLINE_TOKENS} tokens",
        "tokens_per_second": {k: statistics.median(v) for k, v in rates.items()},
        "served_of_offline": statistics.mean(rates["whole"]) / base,
        "streamed_of_offline": statistics.mean(rates["streamed"]) / base,
        "rounds": {k: [round(x) for x in v] for k, v in rates.items()},
    }


CASES = {"streams": streams, "overload": overload, "offline": offline}


def main() -> None:
    """Runs the cases named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), choices=[*CASES, []])
    parser.add_argument("--record", action="store_true", help="append to results/")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.cases:
        row = {"kind": name, **CASES[name]()}
        print(json.dumps(row, indent=1))
        rows.append(row)
    if arguments.record:
        record.append("server_load", rows)


if __name__ == "__main__":
    main()
