"""Clients that leave, clients that do not read, and prompts of a megabyte.

python -m benchmarks.server.faults aborts readers prompts --record
"""

import argparse
import asyncio
import json
import random
import socket
import sys
import time
from typing import Any

from benchmarks import record
from benchmarks.server.client import (
    Reader,
    answer_of,
    connect,
    percentile,
    request_bytes,
    send_all,
)
from benchmarks.server.load import bodies, body
from benchmarks.server.process import Resources, Server, serving

ABORTED, AT_ONCE = 2000, 64
LATEST_ABORT = 0.6
"""Seconds after which the last of those that leave have left."""
SETTLE_SECONDS = 1.0
NORMAL, SLOW, TOKENS = 56, 8, 128
PROMPT_BYTES = 1_000_000


def is_clean(found: Resources, before: Resources) -> bool:
    """Whether nothing of any request is left."""
    state = found.state
    return (
        state["running"] + state["waiting"] + state["open"] == 0
        and state["blocks"]["used"] == 0
        and state["tasks"] <= before.state["tasks"]
        and found.files <= before.files
    )


def seconds_until_clean(server: Server, before: Resources) -> float:
    """How long something is left; more than a minute is an error."""
    began = time.monotonic()
    while not is_clean(server.resources(), before):
        if time.monotonic() - began > 60:
            raise TimeoutError(f"left over: {server.resources()}")
        time.sleep(0.02)
    return time.monotonic() - began


def leave(reader: Reader, dice: random.Random) -> None:
    """Closes a connection, in good order or not."""
    if reader.transport.is_closing():
        return
    if dice.random() < 0.5:
        reader.transport.close()
        return
    linger = (1).to_bytes(4, sys.byteorder) + bytes(4)
    handle = reader.transport.get_extra_info("socket")
    handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    reader.transport.abort()


async def _abort_some(port: int, count: int, dice: random.Random) -> dict[str, int]:
    """Half of the requests leave at a random moment; counts of what became of them."""
    loop = asyncio.get_running_loop()
    readers = await connect(port, count)
    for i, reader in enumerate(readers):
        request = body(48, i, stream=dice.random() < 0.5)
        reader.send(request_bytes(port, request, "/v1/completions"))
        if i % 2:
            loop.call_later(dice.uniform(0, LATEST_ABORT), leave, reader, dice)
    await asyncio.gather(*(reader.done for reader in readers))
    answers = [answer_of(reader) for reader in readers[::2]]
    good = sum(a.status == 200 and a.tokens == 48 and not a.error for a in answers)
    return {"stayed": len(answers), "complete": good}


def aborts() -> dict[str, Any]:
    """2,000 requests of which half leave at a random moment."""
    dice, waits, stayed, complete = random.Random(0), list[float](), 0, 0
    with serving("--max-num-queued-reqs", str(AT_ONCE)) as server:
        send_all(server.port, bodies(AT_ONCE, 8))
        before = server.resources()
        for _ in range(ABORTED // AT_ONCE):
            found = asyncio.run(_abort_some(server.port, AT_ONCE, dice))
            stayed += found["stayed"]
            complete += found["complete"]
            waits.append(seconds_until_clean(server, before))
    return {
        "case": f"{ABORTED} requests, half of them left at a random moment",
        "stayed": stayed,
        "complete": complete,
        "clean_after_s_max": max(waits),
        "passed": complete == stayed and max(waits) <= SETTLE_SECONDS,
    }


async def _with_slow(port: int, slow: int) -> list[float]:
    """Seconds between tokens of normal readers beside some that read nothing."""
    lazy = await connect(port, slow)
    for i, reader in enumerate(lazy):
        reader.transport.pause_reading()
        request = body(450, 1000 + i)
        reader.send(request_bytes(port, request, "/v1/completions"))
    readers = await connect(port, NORMAL)
    for i, reader in enumerate(readers):
        reader.send(request_bytes(port, body(TOKENS, i), "/v1/completions"))
    await asyncio.gather(*(reader.done for reader in readers))
    for reader in lazy:
        reader.transport.abort()
    answers = [answer_of(reader) for reader in readers]
    if any(a.tokens != TOKENS for a in answers):
        raise ValueError("a normal reader has not got its tokens")
    return [b - a for x in answers for a, b in zip(x.times, x.times[1:], strict=False)]


def readers() -> dict[str, Any]:
    """56 streams beside 8 whose clients read nothing."""
    with serving("--max-num-seqs", str(NORMAL + SLOW)) as server:
        send_all(server.port, bodies(NORMAL + SLOW, 16))
        before = server.resources()
        alone = asyncio.run(_with_slow(server.port, 0))
        beside = asyncio.run(_with_slow(server.port, SLOW))
        clean = seconds_until_clean(server, before)
        after = server.resources()
    ratio = percentile(beside, 0.99) / percentile(alone, 0.99)
    return {
        "case": f"{NORMAL} streams beside {SLOW} that nobody reads",
        "itl_p99_ms": 1e3 * percentile(beside, 0.99),
        "itl_p99_of_none_slow": ratio,
        "clean_after_s": clean,
        "rss_growth_mib": after.rss_mib - before.rss_mib,
        "passed": clean <= SETTLE_SECONDS,
    }


async def _probe_beside(port: int, request: bytes) -> tuple[list[float], int]:
    """Seconds of `/health` while one request is answered, and its status."""
    (reader,) = await connect(port, 1)
    waits: list[float] = []
    reader.send(request)
    while not reader.done.done():
        (probe,) = await connect(port, 1)
        began = time.monotonic()
        probe.send(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        await probe.done
        waits.append(time.monotonic() - began)
        await asyncio.sleep(0.002)
    return waits, answer_of(reader).status


def prompts() -> dict[str, Any]:
    """`/health` while megabytes are parsed, rendered, tokenised and compiled."""
    text = ("word " * PROMPT_BYTES)[:PROMPT_BYTES]
    chat = {"model": "jllm", "max_tokens": 4}
    schema = {"properties": {f"field_{i}": {"type": "string"} for i in range(3000)}}
    cases = {
        "prompt": ("/v1/completions", chat | {"prompt": text}),
        "tokens": ("/v1/completions", chat | {"prompt": [5] * (PROMPT_BYTES // 4)}),
        "chat": (
            "/v1/chat/completions",
            chat | {"messages": [{"role": "user", "content": text}]},
        ),
        "messages": (
            "/v1/chat/completions",
            chat | {"messages": [{"role": "user", "content": "hi"}] * 20_000},
        ),
        "schema": (
            "/v1/completions",
            chat | {"prompt": "x", "structured_outputs": {"json": schema}},
        ),
        "tokenize": ("/tokenize", {"prompt": text}),
    }
    found: dict[str, Any] = {}
    with serving() as server:
        for name, (path, asked) in cases.items():
            request = request_bytes(server.port, asked, path)
            waits, status = asyncio.run(_probe_beside(server.port, request))
            found[name] = {"status": status, "health_max_ms": 1e3 * max(waits)}
    worst = max(part["health_max_ms"] for part in found.values())
    return {"case": "megabytes", **found, "passed": worst < 100}


CASES = {"aborts": aborts, "readers": readers, "prompts": prompts}


def main() -> None:
    """Runs the cases named on the command line; exits with 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--record", action="store_true", help="append to results/")
    arguments = parser.parse_args()
    rows = [{"kind": name, **CASES[name]()} for name in arguments.cases]
    print(json.dumps(rows, indent=1))
    if arguments.record:
        record.append("server_faults", rows)
    sys.exit(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    main()
