"""A client that times every streamed token."""

import dataclasses
import json
import time
from typing import Any

import aiohttp


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of one request.

    Attributes:
        status: HTTP status, 0 where the connection failed.
        tokens: Completion tokens, by the server's count.
        times: Seconds from the request to each event of the stream.
        seconds: Seconds from the request to the end of the answer.
        finish_reason: The server's.
    """

    status: int
    tokens: int
    times: tuple[float, ...]
    seconds: float
    finish_reason: str | None


async def complete(
    session: aiohttp.ClientSession, base_url: str, body: dict[str, Any]
) -> Answer:
    """Sends one streamed completion and reads it to its end."""
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    times: list[float] = []
    tokens, reason = 0, None
    try:
        async with session.post(f"{base_url}/v1/completions", json=body) as response:
            if response.status == 200:
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line[6:])
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                    for choice in event["choices"]:
                        reason = choice["finish_reason"] or reason
                        if choice["text"]:
                            times.append(time.perf_counter() - began)
            status = response.status
    except (aiohttp.ClientError, TimeoutError):
        status = 0
    return Answer(status, tokens, tuple(times), time.perf_counter() - began, reason)


def session(*, limit: int = 0) -> aiohttp.ClientSession:
    """A session without a limit on connections or time."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=limit),
        timeout=aiohttp.ClientTimeout(total=None),
    )


def percentile(values: list[float], share: float) -> float:
    """The value below which that share of all lies; nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
