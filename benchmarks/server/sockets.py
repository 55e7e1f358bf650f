"""A client without an event loop: a few microseconds for what a server sends at once.

Client and server share the processors here, so that what a client costs is taken from
the server. This one can also look at its sockets now and then only, which costs next to
nothing, and makes the times of its chunks as coarse.
"""

import dataclasses
import select
import socket
import time
from collections.abc import Sequence

RECEIVED = 1 << 18
"""Most bytes taken at once."""


@dataclasses.dataclass(slots=True)
class Exchange:
    """One request and what came back.

    Attributes:
        sent: When it was sent, on the monotonic clock.
        chunks: What came when.
    """

    sent: float = 0.0
    chunks: list[tuple[float, bytes]] = dataclasses.field(
        default_factory=list[tuple[float, bytes]]
    )


def connect(port: int, count: int) -> list[socket.socket]:
    """Opens connections, one after another."""
    return [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]


def exchange(
    port: int, requests: Sequence[bytes], *, spread: float = 0.0, period: float = 0.0
) -> list[Exchange]:
    """Sends each request over a connection of its own, open already; reads to its end.

    Args:
        port: Where the server listens.
        requests: Bytes; the server is to close behind its answers.
        spread: Seconds over which the requests are sent; 0 sends them at once.
        period: Seconds between two looks at the sockets; 0 waits for them.
    """
    sockets = connect(port, len(requests))
    exchanges = [Exchange() for _ in requests]
    places = {sock.fileno(): i for i, sock in enumerate(sockets)}
    poll = select.epoll()
    for sock in sockets:
        sock.setblocking(False)
        poll.register(sock, select.EPOLLIN)
    num_sent, began = 0, time.monotonic()
    while places:
        while num_sent < len(requests):
            due = began + spread * num_sent / len(requests)
            if due > time.monotonic():
                break
            exchanges[num_sent].sent = time.monotonic()
            sockets[num_sent].sendall(requests[num_sent])
            num_sent += 1
        wait = 1.0 if num_sent == len(requests) else 0.001
        if period:
            time.sleep(period)
            wait = 0.0
        for handle, _ in poll.poll(wait):
            i = places[handle]
            if not _take(sockets[i], exchanges[i]):
                del places[handle]
                poll.unregister(handle)
                sockets[i].close()
    poll.close()
    return exchanges


def _take(sock: socket.socket, into: Exchange) -> bool:
    """Reads once; whether there may be more."""
    try:
        data = sock.recv(RECEIVED)
    except ConnectionError:
        return False
    if data:
        into.chunks.append((time.monotonic(), data))
    return bool(data)
