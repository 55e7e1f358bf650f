"""Good, bad, aborted and slow requests for an hour; everything comes back after.

python -m benchmarks.server.soak --minutes 60 --record
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any

import aiohttp

from benchmarks import record
from benchmarks.server.process import Resources, Server, serving

CLIENTS = 8
MODEL = "jllm"
PROMPTS = ("Once upon a time", "The little cat", "Sam had a red ball", "In the garden")
BAD_BODIES = (
    {"max_tokens": -1},
    {"temperature": "hot"},
    {"prompt": [10**9]},
    {"n": 0},
    {"prompt": "word " * 4000},
    {"model": "another"},
    {"response_format": {"type": "json_schema"}},
    {"structured_outputs": {"regex": "(unclosed"}},
)
EXPECTED = {"good 200", "bad 400", "bad 404", "aborted", "slow 200"}
"""All that may become of a request; anything else fails the run."""
QUIET_SECONDS = 15
SAMPLE_SECONDS = 30.0
PROBE_SECONDS = 0.25
MAX_RSS_GROWTH = 1.03
"""Memory at the end, of what it was after a fifth of the time."""


def good_request(dice: random.Random) -> tuple[str, dict[str, Any]]:
    """Path and body of one of the ordinary requests."""
    prompt = f"{dice.choice(PROMPTS)} {dice.randrange(500)}"
    tokens = dice.randrange(1, 96)
    text = {"model": MODEL, "prompt": prompt, "max_tokens": tokens}
    chat = {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
    }
    schema = {"enum": [dice.randrange(10**6), "yes", "no"]}
    tool = {"name": f"call_{dice.randrange(20)}", "parameters": {"type": "object"}}
    return dice.choice(
        (
            ("/v1/completions", text | {"temperature": 0, "stream": True}),
            ("/v1/completions", text | {"n": 3, "logprobs": 2, "stop": [" the"]}),
            ("/v1/completions", text | {"prompt": [prompt, "A", "B"], "echo": True}),
            ("/v1/completions", text | {"structured_outputs": {"json": schema}}),
            ("/v1/chat/completions", chat | {"stream": True, "n": 2}),
            ("/v1/chat/completions", chat | {"presence_penalty": 1, "seed": 3}),
            (
                "/v1/chat/completions",
                chat
                | {"tools": [{"type": "function", "function": tool}]}
                | {"tool_choice": "required", "stream": True},
            ),
            (
                "/v1/responses",
                {"model": MODEL, "input": prompt, "max_output_tokens": tokens},
            ),
            ("/tokenize", {"model": MODEL, "prompt": prompt * 20}),
        )
    )


async def one(client: aiohttp.ClientSession, url: str, dice: random.Random) -> str:
    """One request of a random kind; what became of it."""
    kind = dice.choices(("good", "bad", "aborted", "slow"), (6, 2, 2, 1))[0]
    path, body = good_request(dice)
    if kind == "bad":
        path = "/v1/completions"
        body = {"model": MODEL, "prompt": "x", "max_tokens": 4}
        body |= dice.choice(BAD_BODIES)
    if kind == "aborted":
        await abort(client, f"{url}{path}", body | {"max_tokens": 300}, dice)
        return kind
    async with client.post(f"{url}{path}", json=body) as response:
        if kind == "slow":
            while await response.content.read(64):
                await asyncio.sleep(0.02)
        elif b'{"error"' in await response.read() and response.status == 200:
            return f"{kind} failed in its stream"
        return f"{kind} {response.status}"


async def abort(
    client: aiohttp.ClientSession, url: str, body: dict[str, Any], dice: random.Random
) -> None:
    """Leaves at a random moment: before the headers, or within the stream."""
    try:
        async with asyncio.timeout(dice.choice((0.001, 0.01, 0.05, 0.3))):
            async with client.post(url, json=body) as response:
                await response.read()
    except TimeoutError:
        pass


def session() -> aiohttp.ClientSession:
    """A session without a limit on connections or time."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
    )


async def keep_going(url: str, until: float, seed: int, counts: Counter[str]) -> None:
    """Sends one request after another."""
    dice = random.Random(seed)
    async with session() as client:
        while time.monotonic() < until:
            try:
                counts[await one(client, url, dice)] += 1
            except aiohttp.ClientError as error:
                counts[f"failed {type(error).__name__}"] += 1
            await asyncio.sleep(dice.random())


async def probe(url: str, until: float, seconds: list[float]) -> None:
    """Asks for `/health` again and again."""
    async with session() as client:
        while time.monotonic() < until:
            began = time.monotonic()
            async with client.get(f"{url}/health") as response:
                response.raise_for_status()
                await response.read()
            seconds.append(time.monotonic() - began)
            await asyncio.sleep(PROBE_SECONDS)


async def soak(
    server: Server, minutes: float
) -> tuple[Counter[str], list[Resources], list[float]]:
    """Keeps all clients going.

    Returns:
        What became of the requests, samples of what the server holds, and seconds of
        the answers of `/health`.
    """
    counts: Counter[str] = Counter()
    until = time.monotonic() + 60 * minutes
    waits: list[float] = []
    jobs = [
        asyncio.create_task(keep_going(server.base_url, until, seed, counts))
        for seed in range(CLIENTS)
    ]
    jobs.append(asyncio.create_task(probe(server.base_url, until, waits)))
    samples = []
    while time.monotonic() < until:
        await asyncio.sleep(min(SAMPLE_SECONDS, 6 * minutes))
        samples.append(await asyncio.to_thread(server.resources))
    await asyncio.gather(*jobs)
    return counts, samples, waits


def row(
    before: Resources,
    after: Resources,
    samples: list[Resources],
    counts: Counter[str],
) -> dict[str, Any]:
    """The result as it is recorded."""
    early = samples[len(samples) // 5].rss_mib
    return {
        "requests": sum(counts.values()),
        "outcomes": dict(sorted(counts.items())),
        "rss_mib": [round(early, 1), round(after.rss_mib, 1)],
        "rss_samples_mib": [
            round(s.rss_mib) for s in samples[:: -(-len(samples) // 20)]
        ],
        "files": [before.files, after.files],
        "threads": [before.threads, after.threads],
        "tasks": [before.state["tasks"], after.state["tasks"]],
        "open_after": after.state["open"] + after.state["running"],
        "blocks_used_after": after.state["blocks"]["used"],
        "preemptions": after.state["preemptions"],
    }


def faults(result: dict[str, Any]) -> list[str]:
    """What did not come back, or was not answered as it must be."""
    wrong = [
        f"{count} requests: {name}"
        for name, count in result["outcomes"].items()
        if name not in EXPECTED
    ]
    early, late = result["rss_mib"]
    if late > MAX_RSS_GROWTH * early:
        wrong.append(f"memory grew from {early} to {late} MiB")
    wrong += [
        f"{name}: {result[name]}"
        for name in ("files", "threads", "tasks")
        if result[name][1] > result[name][0]
    ]
    if result["open_after"] or result["blocks_used_after"]:
        wrong.append("requests or blocks are left")
    return wrong


def main() -> None:
    """Runs the soak and prints its result; exits with 1 if something is left over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--record", action="store_true", help="append to results/")
    arguments = parser.parse_args()
    flags = ("--max-stored-responses", "64", "--tool-call-parser", "hermes")
    with serving(*flags) as server:
        # Everything that is made once is made before the first reading.
        asyncio.run(soak(server, min(1.0, arguments.minutes / 4)))
        time.sleep(QUIET_SECONDS)
        before = server.resources()
        counts, samples, waits = asyncio.run(soak(server, arguments.minutes))
        time.sleep(QUIET_SECONDS)
        after = server.resources()
    result = {"minutes": arguments.minutes, **row(before, after, samples, counts)}
    result["health_p99_ms"] = round(1e3 * sorted(waits)[int(0.99 * len(waits))], 1)
    result["faults"] = faults(result)
    print(json.dumps(result, indent=1))
    if arguments.record:
        record.append("server_soak", [result])
    sys.exit(bool(result["faults"]))


if __name__ == "__main__":
    main()
