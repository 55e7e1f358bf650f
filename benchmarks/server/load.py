"""Many streams at once, far too many requests at once, and the server beside `LLM`.

python -m benchmarks.server.load streams overload offline --record
"""

import argparse
import asyncio
import json
import statistics
import time

from benchmarks import record
from benchmarks.server.client import Answer, complete, percentile, session
from benchmarks.server.process import serving

PROMPT = "Once upon a time there was a little"
STREAMS, STREAM_TOKENS = 256, 64
REQUESTS, CAP = 10_000, 512
OFFLINE_PROMPTS, OFFLINE_TOKENS, ROUNDS = 128, 64, 3


def body(tokens: int, index: int = 0) -> dict:
    """A request of a fixed number of tokens, each with a prompt of its own."""
    return {
        "prompt": f"{PROMPT} cat number {index}",
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
    }


async def send_all(
    base_url: str, count: int, tokens: int
) -> tuple[list[Answer], float]:
    """Sends all requests at once; the answers, and the seconds to the last one."""
    async with session() as client:
        began = time.perf_counter()
        jobs = (complete(client, base_url, body(tokens, i)) for i in range(count))
        answers = await asyncio.gather(*jobs)
    return list(answers), time.perf_counter() - began


def streams() -> dict:
    """256 concurrent streams of 64 tokens: no error, all tokens."""
    with serving("--max-num-queued-reqs", str(STREAMS)) as server:
        answers, seconds = asyncio.run(
            send_all(server.base_url, STREAMS, STREAM_TOKENS)
        )
    good = [a for a in answers if a.status == 200 and a.tokens == STREAM_TOKENS]
    gaps = [b - a for x in good for a, b in zip(x.times, x.times[1:], strict=False)]
    return {
        "case": f"{STREAMS} streams of {STREAM_TOKENS} tokens",
        "errors": len(answers) - len(good),
        "tokens_per_second": sum(a.tokens for a in good) / seconds,
        "ttft_p50_ms": 1e3 * percentile([a.times[0] for a in good], 0.5),
        "ttft_p99_ms": 1e3 * percentile([a.times[0] for a in good], 0.99),
        "itl_p50_ms": 1e3 * percentile(gaps, 0.5),
        "itl_p99_ms": 1e3 * percentile(gaps, 0.99),
    }


def overload() -> dict:
    """10,000 requests at once with room for 512: the rest is refused at once."""
    with serving("--max-num-queued-reqs", str(CAP)) as server:
        # What it does when nobody has to be refused, for the ratio.
        calm, calm_seconds = asyncio.run(send_all(server.base_url, CAP, 16))
        before = server.resources()
        answers, seconds = asyncio.run(send_all(server.base_url, REQUESTS, 16))
        after = server.resources()
    accepted = [a for a in answers if a.status == 200]
    refused = [a for a in answers if a.status == 429]
    return {
        "case": f"{REQUESTS} requests at once, room for {CAP}",
        "accepted": len(accepted),
        "refused": len(refused),
        "other": len(answers) - len(accepted) - len(refused),
        "accepted_complete": sum(a.tokens == 16 for a in accepted),
        "refusal_p50_ms": 1e3 * percentile([a.seconds for a in refused], 0.5),
        "refusal_p99_ms": 1e3 * percentile([a.seconds for a in refused], 0.99),
        "throughput_of_unshed": (sum(a.tokens for a in accepted) / seconds)
        / (sum(a.tokens for a in calm) / calm_seconds),
        "rss_growth_mib": after.rss_mib - before.rss_mib,
        "files_growth": after.files - before.files,
    }


def offline() -> dict:
    """The same prompts through the server and through `LLM.generate`, in turn."""
    from jllm import LLM, SamplingParams

    prompts = [body(OFFLINE_TOKENS, i)["prompt"] for i in range(OFFLINE_PROMPTS)]
    params = SamplingParams(max_tokens=OFFLINE_TOKENS, temperature=0, ignore_eos=True)
    total = OFFLINE_PROMPTS * OFFLINE_TOKENS
    served, direct = [], []
    with serving("--max-num-queued-reqs", str(OFFLINE_PROMPTS)) as server, LLM() as llm:
        for round_ in range(ROUNDS + 1):
            began = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            direct.append(total / (time.perf_counter() - began))
            answers, seconds = asyncio.run(
                send_all(server.base_url, OFFLINE_PROMPTS, OFFLINE_TOKENS)
            )
            served.append(sum(a.tokens for a in answers) / seconds)
            if round_ == 0:  # warm-up: compilation, prefix cache
                served.clear()
                direct.clear()
    return {
        "case": f"{OFFLINE_PROMPTS} requests of {OFFLINE_TOKENS} tokens",
        "served_tokens_per_second": statistics.median(served),
        "offline_tokens_per_second": statistics.median(direct),
        "served_of_offline": statistics.mean(served) / statistics.mean(direct),
        "ratios": [s / d for s, d in zip(served, direct, strict=True)],
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
