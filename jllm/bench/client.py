"""Sends requests to an OpenAI-compatible server and times what it streams back."""

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from jllm.bench.statistics import RequestTiming
from jllm.bench.workload import BenchRequest

Backend = Literal["openai", "openai-chat"]
ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
TOKEN_FIELDS = (
    "text",
    "content",
    "reasoning",
    "reasoning_content",
    "tool_calls",
    "token_ids",
)
WORDS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("red", "blue", "green", "sun", "moon", "star", "day", "night", "tree", "bird"),
    *("fish", "stone", "water", "fire", "wind", "road", "house", "door", "hand"),
)
"""What prompts for a chat are made of: about one token each in most vocabularies."""


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.

    Attributes:
        url: The whole address.
        backend: Kind of its requests.
        model: Name of the model there.
        temperature: Of sampling.
        ignore_eos: Whether every output has its full length.
        api_key: Sent as a bearer token; None sends none.
    """

    url: str
    backend: Backend
    model: str
    temperature: float = 0.0
    ignore_eos: bool = True
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


def make_body(target: Target, request: BenchRequest) -> dict[str, Any]:
    """The JSON body of a request."""
    body: dict[str, Any] = {
        "model": target.model,
        "temperature": target.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.ignore_eos:
        body["ignore_eos"] = True
    ids = request.prompt_token_ids
    if target.backend == "openai":
        body |= {"prompt": list(ids), "max_tokens": request.max_tokens}
    else:
        text = " ".join(WORDS[token % len(WORDS)] for token in ids)
        messages = [{"role": "user", "content": text}]
        body |= {"messages": messages, "max_completion_tokens": request.max_tokens}
    return body


async def send(
    session: Any, target: Target, request: BenchRequest, scheduled: float
) -> RequestTiming:
    """Sends one request and reads its stream; a failure is noted, not raised."""
    start = time.perf_counter()
    chunks: list[float] = []
    usage: dict[str, Any] = {}
    error = None
    try:
        async with session.post(
            target.url, json=make_body(target, request), headers=target.headers
        ) as response:
            if response.status != 200:
                text = (await response.text())[:200]
                error = f"HTTP {response.status}: {' '.join(text.split())}"
            else:
                error = await _read(response.content, chunks, usage)
    except (TimeoutError, OSError, ValueError, *_client_errors()) as failure:
        error = f"{type(failure).__name__}: {failure}"
    details = usage.get("prompt_tokens_details") or {}
    return RequestTiming(
        num_prompt_tokens=usage.get("prompt_tokens", len(request.prompt_token_ids)),
        num_output_tokens=usage.get("completion_tokens", len(chunks)),
        scheduled=scheduled,
        start=start,
        first_token=chunks[0] if chunks else None,
        end=chunks[-1] if chunks and error is None else time.perf_counter(),
        chunk_times=tuple(chunks),
        num_cached_tokens=details.get("cached_tokens"),
        error=error,
    )


async def run_load(
    target: Target,
    requests: Sequence[BenchRequest],
    times: Sequence[float],
    max_concurrency: int | None,
) -> list[RequestTiming]:
    """Sends each request at its time, at most so many at once; waits for all."""
    import aiohttp

    places = asyncio.Semaphore(max_concurrency or len(requests))
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=60)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        began = time.perf_counter()

        async def one(request: BenchRequest, when: float) -> RequestTiming:
            await asyncio.sleep(max(0.0, began + when - time.perf_counter()))
            async with places:
                return await send(session, target, request, began + when)

        # The order of the tasks is the order in which they ask for a place.
        return await asyncio.gather(*map(one, requests, times))


async def _read(content: Any, chunks: list[float], usage: dict[str, Any]) -> str | None:
    """Notes when chunks with tokens come; returns what the server says went wrong."""
    async for data in _events(content):
        if data == "[DONE]":
            return None
        event = json.loads(data)
        if event.get("error"):
            return f"the server reported: {event['error']}"
        if _has_tokens(event):
            chunks.append(time.perf_counter())
        usage.update(event.get("usage") or {})
    return "the stream ended without [DONE]"


async def _events(content: Any) -> AsyncIterator[str]:
    """The data of server-sent events; comments and other fields are skipped."""
    async for raw in content:
        line = raw.decode("utf-8").strip()
        if line.startswith("data:"):
            yield line[5:].strip()


def _has_tokens(event: dict[str, Any]) -> bool:
    """Whether a chunk brings something; the role and the end alone are nothing.

    A token without text, such as part of a character, comes as an empty text without a
    finish reason.
    """
    for choice in event.get("choices") or ():
        part = choice.get("delta", choice)
        if any(part.get(field) for field in TOKEN_FIELDS):
            return True
        if "delta" not in choice and choice.get("finish_reason") is None:
            return True
    return False


def _client_errors() -> tuple[type[Exception], ...]:
    import aiohttp

    return (aiohttp.ClientError,)
