"""Good, bad, aborted and slow requests for an hour; everything comes back after.

python -m benchmarks.server.soak --minutes 60 --record
"""

import argparse
import asyncio
import dataclasses
import json
import random
import time
from collections import Counter

import aiohttp

from benchmarks import record
from benchmarks.server.client import complete, session
from benchmarks.server.process import Resources, Server, serving

CLIENTS = 12
PROMPTS = ("Once upon a time", "The little cat", "Sam had a red ball", "In the garden")
BAD_BODIES = (
    {"prompt": "x", "max_tokens": -1},
    {"prompt": "x", "temperature": "hot"},
    {"prompt": [10**9], "max_tokens": 4},
    {"prompt": "x", "n": 0},
    {"prompt": "word " * 4000, "max_tokens": 4},
    {"prompt": "x", "response_format": {"type": "json_schema"}},
)
QUIET_SECONDS = 15


async def one(client: aiohttp.ClientSession, url: str, dice: random.Random) -> str:
    """One request of a random kind; what became of it."""
    kind = dice.choices(("good", "bad", "aborted", "slow"), (6, 2, 2, 1))[0]
    body = {
        "prompt": f"{dice.choice(PROMPTS)} {dice.randrange(500)}",
        "max_tokens": dice.randrange(1, 96),
        "temperature": dice.choice((0, 0.8)),
    }
    if kind == "bad":
        async with client.post(
            f"{url}/v1/completions", json=dice.choice(BAD_BODIES)
        ) as response:
            await response.read()
            return f"bad {response.status}"
    if kind == "good":
        answer = await complete(client, url, body)
        return f"good {answer.status}"
    async with client.post(
        f"{url}/v1/completions", json=body | {"stream": True}
    ) as response:
        if kind == "aborted":
            await response.content.readany()
            response.close()
            return f"aborted {response.status}"
        while await response.content.read(64):
            await asyncio.sleep(0.02)
        return f"slow {response.status}"


async def keep_going(url: str, until: float, seed: int, counts: Counter[str]) -> None:
    """Sends one request after another."""
    dice = random.Random(seed)
    async with session() as client:
        while time.monotonic() < until:
            try:
                counts[await one(client, url, dice)] += 1
            except aiohttp.ClientError as error:
                counts[f"failed {type(error).__name__}"] += 1
            await asyncio.sleep(dice.random() * 0.2)


async def soak(server: Server, minutes: float) -> tuple[Counter[str], list[dict]]:
    """Keeps all clients going; counts of what became of requests, and samples."""
    counts: Counter[str] = Counter()
    until = time.monotonic() + 60 * minutes
    jobs = [
        asyncio.create_task(keep_going(server.base_url, until, seed, counts))
        for seed in range(CLIENTS)
    ]
    samples = []
    while time.monotonic() < until:
        await asyncio.sleep(min(30.0, 6 * minutes))
        samples.append(sample(await asyncio.to_thread(server.resources)))
    await asyncio.gather(*jobs)
    return counts, samples


def sample(resources: Resources) -> dict:
    """What is watched over time."""
    values = dataclasses.asdict(resources)
    state = values.pop("state")
    return {**values, "running": state["running"], "blocks": state["blocks"]["free"]}


def main() -> None:
    """Runs the soak and prints its result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--record", action="store_true", help="append to results/")
    arguments = parser.parse_args()
    with serving() as server:
        # Everything that is made once is made before the first reading.
        asyncio.run(soak(server, min(1.0, arguments.minutes / 10)))
        time.sleep(QUIET_SECONDS)
        before = server.resources()
        counts, samples = asyncio.run(soak(server, arguments.minutes))
        time.sleep(QUIET_SECONDS)
        after = server.resources()
    early = samples[len(samples) // 5]["rss_mib"]
    row = {
        "minutes": arguments.minutes,
        "requests": sum(counts.values()),
        "outcomes": dict(sorted(counts.items())),
        "rss_mib": [round(before.rss_mib, 1), round(after.rss_mib, 1)],
        "rss_after_a_fifth_mib": round(early, 1),
        "files": [before.files, after.files],
        "threads": [before.threads, after.threads],
        "running_after": after.state["running"],
        "blocks_used_after": after.state["blocks"]["used"],
    }
    print(json.dumps(row, indent=1))
    if arguments.record:
        record.append("server_soak", [row])


if __name__ == "__main__":
    main()
