"""Messages between hosts: lists of plain values in msgpack, arrays as dtype and bytes.

Decoding makes numbers, strings, bytes, lists and arrays, and nothing else.
"""

from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

ARRAY = 1
"""Code of an array among msgpack's extension types."""

DTYPES = ("int32", "int64", "uint32", "uint8", "float32", "bool")
"""Types that arrays may have."""


class MessageError(ValueError):
    """Bytes that are no message, or not the one that is due."""


def encode(message: Sequence[Any]) -> bytes:
    """Packs a message: its name, then its values."""
    return _pack(list(message))


def decode(data: bytes) -> list[Any]:
    """Unpacks a message.

    Raises:
        MessageError: The bytes are no list that begins with a name.
    """
    try:
        message = msgpack.unpackb(data, ext_hook=_unpack_array, strict_map_key=True)
    # Anything may be raised for bytes of any kind.
    except Exception as error:
        raise MessageError(f"not a message: {error}") from error
    if not isinstance(message, list) or not message or not isinstance(message[0], str):
        raise MessageError("not a message: no name")
    return message


def _pack(value: list[Any]) -> bytes:
    packed = msgpack.packb(value, default=_pack_array)
    assert packed is not None
    return packed


def _pack_array(value: Any) -> msgpack.ExtType:
    if not isinstance(value, np.ndarray) or value.dtype.name not in DTYPES:
        raise TypeError(f"{type(value).__name__} cannot be sent to other hosts")
    head = _pack([value.dtype.name, list(value.shape)])
    return msgpack.ExtType(ARRAY, head + np.ascontiguousarray(value).tobytes())


def _unpack_array(code: int, data: bytes) -> np.ndarray:
    if code != ARRAY:
        raise MessageError(f"unknown type {code}")
    unpacker = msgpack.Unpacker()
    # Type and shape are short; more than 100 MiB it would not take.
    unpacker.feed(data[:1024])
    dtype, shape = unpacker.unpack()
    if dtype not in DTYPES:
        raise MessageError(f"arrays of {dtype} are not sent")
    start = unpacker.tell()
    return np.frombuffer(data, dtype, offset=start).reshape(shape)
