"""An authenticated connection between two hosts that share a secret.

Each side proves with fresh random numbers that it knows the secret before a byte of
the other is interpreted. Both derive a key per direction from it; every frame carries a
code over its number and content, so that none can be forged, changed, repeated or
dropped. Nothing is encrypted.
"""

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

from jllm.distributed.messages import MessageError, decode, encode

MAGIC = b"jllm hosts 1\n"
HELLO = struct.Struct(f"!{len(MAGIC)}sII32s")
"""First bytes of a host that joins: protocol, its id, number of hosts, random bytes."""

CODE_BYTES = 16
"""Length of the code of each frame."""

HEAD = struct.Struct(f"!I{CODE_BYTES}s")
"""Bytes before the content of a frame: its length and its code."""

MAX_FRAME = 1 << 30
"""Bytes of the longest frame."""

HANDSHAKE_SECONDS = 10.0
"""How long a peer may take to prove that it knows the secret."""


class ChannelClosedError(Exception):
    """The other side has closed the connection, or it broke."""


class HandshakeError(Exception):
    """The other side is not a host of this job."""


class Channel:
    """Sends and receives messages; any thread may send, one thread receives.

    Args:
        connection: A connected socket; the channel owns it.
        send_key: Secret of this side's frames.
        receive_key: Secret of the other side's.
    """

    def __init__(
        self, connection: socket.socket, send_key: bytes, receive_key: bytes
    ) -> None:
        """Counts frames from zero."""
        self._connection = connection
        self._send_key, self._receive_key = send_key, receive_key
        self._num_sent = self._num_received = 0
        self._lock = threading.Lock()

    def send(self, *message: Any) -> None:
        """Sends a name and its values; waits while the network is full.

        Raises:
            ChannelClosedError: The connection is gone.
        """
        self.send_encoded(encode(message))

    def send_encoded(self, content: bytes) -> None:
        """Sends what `encode` has made, as `send` does."""
        with self._lock:
            code = _code(self._send_key, self._num_sent, content)
            self._num_sent += 1
            try:
                self._connection.sendall(HEAD.pack(len(content), code) + content)
            except OSError as error:
                raise ChannelClosedError(str(error)) from error

    def receive(self) -> list[Any]:
        """Waits for the next message.

        Raises:
            ChannelClosedError: The connection is gone.
            MessageError: The frame does not come from the other side, or is none.
        """
        length, code = HEAD.unpack(_read(self._connection, HEAD.size))
        if length > MAX_FRAME:
            raise MessageError(f"a frame of {length} bytes")
        content = _read(self._connection, length)
        wanted = _code(self._receive_key, self._num_received, content)
        if not hmac.compare_digest(code, wanted):
            raise MessageError("a frame with a wrong code")
        self._num_received += 1
        return decode(content)

    def limit(self, seconds: float | None) -> None:
        """Counts a connection as gone that brings or takes nothing for so long."""
        self._connection.settimeout(seconds)

    def close(self) -> None:
        """Ends the connection, also for a thread that waits in `receive`."""
        with contextlib.suppress(OSError):  # it was gone already
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def accept(connection: socket.socket, secret: bytes) -> tuple[Channel, int, int]:
    """Checks a host that joins, and proves to it that this is the first host.

    Returns:
        The channel, and id and number of hosts as the other side has them.

    Raises:
        HandshakeError: It does not speak the protocol, is too slow, or does not know
            the secret.
    """
    # In all, not for each byte: a stranger must not hold a place.
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    try:
        hello = _read(connection, HELLO.size, deadline)
        magic, host_id, num_hosts, _ = HELLO.unpack(hello)
        if magic != MAGIC:
            raise HandshakeError("it does not speak jllm's protocol")
        nonce = secrets.token_bytes(32)
        connection.sendall(nonce)
        transcript = hello + nonce
        proof = _read(connection, 32, deadline)
        if not hmac.compare_digest(proof, _proof(secret, b"joining", transcript)):
            raise HandshakeError("it does not know the secret")
        connection.sendall(_proof(secret, b"first", transcript))
        connection.settimeout(HANDSHAKE_SECONDS)
    except (OSError, ChannelClosedError) as error:
        raise HandshakeError(f"no handshake: {error}") from error
    to_first, from_first = _keys(secret, transcript)
    return _channel(connection, from_first, to_first), host_id, num_hosts


def join(
    connection: socket.socket, secret: bytes, host_id: int, num_hosts: int
) -> Channel:
    """Proves to the first host that this one belongs to the job, and checks it.

    Raises:
        HandshakeError: The other side closes the connection, does not speak the
            protocol, or does not know the secret.
    """
    connection.settimeout(HANDSHAKE_SECONDS)
    hello = HELLO.pack(MAGIC, host_id, num_hosts, secrets.token_bytes(32))
    try:
        connection.sendall(hello)
        transcript = hello + _read(connection, 32)
        connection.sendall(_proof(secret, b"joining", transcript))
        proof = _read(connection, 32)
    except (OSError, ChannelClosedError) as error:
        raise HandshakeError(f"no handshake: {error}") from error
    if not hmac.compare_digest(proof, _proof(secret, b"first", transcript)):
        raise HandshakeError("it does not know the secret")
    to_first, from_first = _keys(secret, transcript)
    return _channel(connection, to_first, from_first)


def broadcast(channels: Sequence[Channel], *message: Any) -> None:
    """Sends a message to several hosts, packed once."""
    content = encode(message)
    for channel in channels:
        channel.send_encoded(content)


def _channel(connection: socket.socket, send: bytes, receive: bytes) -> Channel:
    connection.settimeout(None)
    # A step's message must not wait for the next one.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Channel(connection, send, receive)


def _proof(secret: bytes, side: bytes, transcript: bytes) -> bytes:
    return hmac.digest(secret, side + b"\0" + transcript, "sha256")


def _keys(secret: bytes, transcript: bytes) -> tuple[bytes, bytes]:
    """Keys of the frames to the first host and from it."""
    return (
        _proof(secret, b"frames to first", transcript),
        _proof(secret, b"frames from first", transcript),
    )


def _code(key: bytes, number: int, content: bytes) -> bytes:
    code = hashlib.blake2b(key=key, digest_size=CODE_BYTES)
    code.update(number.to_bytes(8, "big"))
    code.update(content)
    return code.digest()


def _read(connection: socket.socket, size: int, deadline: float | None = None) -> bytes:
    """Reads so many bytes, until a time of the monotonic clock if one is given."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        if deadline is not None:
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
        try:
            count = connection.recv_into(view)
        except OSError as error:
            raise ChannelClosedError(str(error)) from error
        if not count:
            raise ChannelClosedError("the connection was closed")
        view = view[count:]
    return bytes(data)
