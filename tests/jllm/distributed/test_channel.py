"""Connections between hosts: proofs, and frames that nobody else can make."""

import socket
import struct
import threading

import numpy as np
import pytest

from jllm.distributed.channel import (
    CODE_BYTES,
    HEAD,
    HELLO,
    MAGIC,
    ChannelClosedError,
    HandshakeError,
    accept,
    join,
)
from jllm.distributed.messages import MessageError, decode, encode

SECRET = b"0123456789abcdef"


class Wire:
    """Passes bytes on, and lets tests look at them and change them."""

    def __init__(self, connection):
        self.connection, self.sent = connection, []

    def sendall(self, data):
        self.sent.append(data)
        self.connection.sendall(data)

    def __getattr__(self, name):
        return getattr(self.connection, name)


def shake_hands(first, other, secrets=(SECRET, SECRET)):
    """Channels of both sides, or what they raised."""
    results = {}

    def run(name, call):
        try:
            results[name] = call()
        except (HandshakeError, MessageError) as error:
            results[name] = error
            (first if name == "first" else other).close()

    thread = threading.Thread(
        target=run, args=("first", lambda: accept(first, secrets[0]))
    )
    thread.start()
    run("other", lambda: join(other, secrets[1], host_id=3, num_hosts=5))
    thread.join()
    return results["first"], results["other"]


@pytest.fixture
def pair():
    listener = socket.create_server(("127.0.0.1", 0))
    other = socket.create_connection(listener.getsockname())
    first, _ = listener.accept()
    yield Wire(first), Wire(other)
    for connection in (listener, first, other):
        connection.close()


def test_messages_go_both_ways(pair):
    (first, host_id, num_hosts), other = shake_hands(*pair)
    assert (host_id, num_hosts) == (3, 5)
    vector = np.arange(12, dtype=np.int32).reshape(3, 4)
    first.send("run", "decode", 8, [vector, None])
    name, kind, size, (array, nothing) = other.receive()
    assert (name, kind, size, nothing) == ("run", "decode", 8, None)
    assert array.dtype == np.int32
    np.testing.assert_array_equal(array, vector)
    for i in range(3):
        other.send("alive", i, i, False)
        assert first.receive() == ["alive", i, i, False]
    first.close()
    with pytest.raises(ChannelClosedError):
        other.receive()


@pytest.mark.parametrize("wrong", [0, 1])
def test_another_secret_is_refused_by_both(pair, wrong):
    secrets = [SECRET, SECRET]
    secrets[wrong] = b"fedcba9876543210"
    first, other = shake_hands(*pair, secrets)
    assert isinstance(first, HandshakeError)
    assert isinstance(other, HandshakeError)


def test_the_first_hosts_proof_is_checked(pair):
    first, other = pair

    def pretend():
        first.recv(HELLO.size)
        first.sendall(b"n" * 32)
        first.recv(32)
        first.sendall(b"p" * 32)

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(HandshakeError, match="does not know the secret"):
        join(other, SECRET, 1, 2)
    thread.join()


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\nHost: h\r\n\r\n" + b" " * 99, b"\0" * 200, b"\xff" * 200, b""],
    ids=["http", "zeros", "ones", "nothing"],
)
def test_strangers_are_refused(pair, data):
    first, other = pair
    other.sendall(data)
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(HandshakeError):
        accept(first, SECRET)


def test_a_recorded_handshake_cannot_be_repeated(pair):
    shake_hands(*pair)
    recorded = b"".join(pair[1].sent)
    listener = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listener.getsockname()) as other:
        first, _ = listener.accept()
        other.sendall(recorded)
        with first, pytest.raises(HandshakeError, match="secret"):
            accept(first, SECRET)
    listener.close()


def changed(frame):
    return frame[:-1] + bytes([frame[-1] ^ 1])


@pytest.mark.parametrize(
    "frames",
    [
        lambda a, b: [changed(a)],
        lambda a, b: [b],
        lambda a, b: [a, a],
        lambda a, b: [HEAD.pack(5, b"\0" * CODE_BYTES) + b"\x91\xa3abc"],
        lambda a, b: [struct.pack("!I", 2**31) + b"\0" * CODE_BYTES],
    ],
    ids=["changed", "one dropped", "repeated", "forged", "too long"],
)
def test_frames_of_others_are_refused(pair, frames):
    (first, _, _), other = shake_hands(*pair)
    wire = pair[0]
    # Frames as they would be sent, put on the wire otherwise.
    first._connection = Recorder()
    first.send("run", 1)
    first.send("run", 2)
    for frame in frames(*first._connection.frames):
        wire.sendall(frame)

    def receive_both():
        other.receive()
        other.receive()

    with pytest.raises(MessageError):
        receive_both()


class Recorder:
    def __init__(self):
        self.frames = []

    def sendall(self, data):
        self.frames.append(data)


@pytest.mark.parametrize(
    "value",
    [np.zeros(3, np.float64), np.array([object()]), object(), {1, 2}],
    ids=["float64", "objects", "object", "set"],
)
def test_only_plain_values_are_sent(value):
    with pytest.raises(TypeError):
        encode(["run", value])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x91\x01",
        b"\x92\xa3run\xc7\x02\x05ab",
        b"\x92\xa3run\xc7\x03\x01abc",
        b"\x80",
        bytes(range(64)),
        MAGIC,
    ],
)
def test_other_bytes_are_no_messages(data):
    with pytest.raises(MessageError):
        decode(data)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "float32", "bool"])
def test_arrays_keep_type_and_shape(dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)[:, ::2]
    (_, decoded) = decode(encode(["x", array]))
    assert decoded.dtype == array.dtype
    np.testing.assert_array_equal(decoded, array)
