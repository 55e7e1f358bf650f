"""A client that costs little: it notes bytes as they come, and reads them later."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.server.sockets import Exchange, exchange

CONNECTING = 256
"""Connections that are opened at once."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of one request.

    Attributes:
        status: HTTP status, 0 where the connection failed.
        tokens: Completion tokens, by the server's count.
        times: Seconds from the request to each event with text.
        seconds: Seconds from the request to the end of the answer.
        error: What the server failed with, in words.
        ends_well: Whether a stream has one finish reason and ends with its mark.
    """

    status: int
    tokens: int
    times: tuple[float, ...]
    seconds: float
    error: str | None
    ends_well: bool = False


class Reader(asyncio.Protocol):
    """One connection for one request; notes what arrives when."""

    def __init__(self) -> None:
        """Has sent nothing yet."""
        self.chunks: list[tuple[float, bytes]] = []
        self.sent = 0.0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the connection."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def send(self, request: bytes) -> None:
        """Sends the request."""
        self.sent = time.monotonic()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Notes it."""
        self.chunks.append((time.monotonic(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        """The server has closed: the answer is whole."""
        if not self.done.done():
            self.done.set_result(exc)


def request_bytes(port: int, body: dict[str, Any], path: str) -> bytes:
    """A request as it goes over the wire; the server closes behind its answer."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def connect(port: int, count: int) -> list[Reader]:
    """Opens connections, some at a time."""
    loop = asyncio.get_running_loop()
    readers: list[Reader] = []
    while len(readers) < count:
        opened = await asyncio.gather(
            *(
                loop.create_connection(Reader, "127.0.0.1", port)
                for _ in range(min(CONNECTING, count - len(readers)))
            )
        )
        readers += [reader for _, reader in opened]
    return readers


def answer_of(reader: Reader | Exchange) -> Answer:
    """Reads what came."""
    end = reader.chunks[-1][0] if reader.chunks else reader.sent
    data = b"".join(part for _, part in reader.chunks)
    head, _, rest = data.partition(b"\r\n\r\n")
    status = int(head[9:12]) if head.startswith(b"HTTP/1.1 ") else 0
    tokens, error = 0, None
    for line in rest.splitlines():
        text = line.removeprefix(b"data: ")
        if not text.startswith(b"{"):
            continue
        value = json.loads(text)
        tokens = (value.get("usage") or {}).get("completion_tokens", tokens)
        error = str(value["error"]) if "error" in value else error
    times = tuple(
        moment - reader.sent
        for moment, part in reader.chunks
        for _ in range(part.count(b'"text":') - part.count(b'"text":""'))
    )
    marks = rest.count(b'"finish_reason":"'), rest.count(b"data: [DONE]\n\n")
    ends_well = status == 200 and error is None and marks == (1, 1)
    return Answer(status, tokens, times, end - reader.sent, error, ends_well)


def send_all(
    port: int,
    bodies: Sequence[dict[str, Any]],
    *,
    spread: float = 0.0,
    period: float = 0.0,
    path: str = "/v1/completions",
) -> tuple[list[Answer], float]:
    """Sends all, see `exchange`.

    Returns:
        The answers, and the seconds from the first request to the last byte.
    """
    requests = [request_bytes(port, body, path) for body in bodies]
    found = exchange(port, requests, spread=spread, period=period)
    last = max(one.chunks[-1][0] for one in found if one.chunks)
    return [answer_of(one) for one in found], last - min(one.sent for one in found)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of all lies; nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
