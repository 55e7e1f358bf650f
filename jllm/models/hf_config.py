"""Checked reading of a Hugging Face config.json."""

import math
from collections.abc import Mapping
from typing import Any

from jllm.errors import UnsupportedModelError

MAX_INTEGER = 2**31 - 1


def read_integer(
    config: Mapping[str, Any],
    key: str,
    default: int | None = None,
    high: int = MAX_INTEGER,
) -> int:
    """A positive integer of the config; `default` stands for a missing or null one.

    Raises:
        UnsupportedModelError: Missing, of another type, or not within 1..`high`.
    """
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise UnsupportedModelError(
            f"config.json: {key}={value!r} must be an integer between 1 and {high}"
        )
    return value


def read_number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A finite positive number of the config.

    Raises:
        UnsupportedModelError: Of another type, or not finite and positive.
    """
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnsupportedModelError(f"config.json: {key}={value!r} must be a number")
    if not (math.isfinite(value) and value > 0):
        raise UnsupportedModelError(
            f"config.json: {key}={value!r} must be finite and positive"
        )
    return float(value)


def read_flag(config: Mapping[str, Any], key: str, default: bool) -> bool:  # noqa: FBT001
    """A true or false value of the config.

    Raises:
        UnsupportedModelError: Of another type.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise UnsupportedModelError(
            f"config.json: {key}={value!r} must be true or false"
        )
    return value


def require_value(
    config: Mapping[str, Any], key: str, allowed: tuple[object, ...]
) -> None:
    """Refuses a config value that would change the network in a way not supported.

    Raises:
        UnsupportedModelError: The value is present and not among `allowed`.
    """
    value = config.get(key)
    if value is not None and value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise UnsupportedModelError(
            f"config.json: {key}={value!r} is not supported, only {choices}"
        )


def read_heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, KV heads and head width.

    Raises:
        UnsupportedModelError: The KV heads do not divide the query heads, or the head
            width is odd or follows from nothing.
    """
    num_heads = read_integer(config, "num_attention_heads", high=65536)
    num_kv_heads = read_integer(config, "num_key_value_heads", num_heads)
    width = read_integer(config, "hidden_size")
    if num_heads % num_kv_heads:
        raise UnsupportedModelError(
            f"config.json: num_attention_heads={num_heads} must be a multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    if config.get("head_dim") is None and width % num_heads:
        raise UnsupportedModelError(
            f"config.json: hidden_size={width} must be a multiple of "
            f"num_attention_heads={num_heads}"
        )
    head_dim = read_integer(config, "head_dim", width // num_heads, high=1024)
    if head_dim % 2:
        raise UnsupportedModelError(
            f"config.json: head width {head_dim} must be even for rotary embeddings"
        )
    return num_heads, num_kv_heads, head_dim


STRETCHED = ("linear", "dynamic", "yarn")
"""Kinds of RoPE scaling whose factor is not yet in max_position_embeddings."""


def longest_context(config: Mapping[str, Any]) -> int:
    """Most tokens that the model's position embeddings reach.

    Raises:
        UnsupportedModelError: A value is of another type or out of range.
    """
    longest = read_integer(config, "max_position_embeddings", 2048)
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise UnsupportedModelError(
            f"config.json: rope scaling {scaling!r} must be an object"
        )
    values: Mapping[str, Any] = scaling
    if values.get("rope_type", values.get("type")) not in STRETCHED:
        return longest
    trained = read_integer(values, "original_max_position_embeddings", longest)
    return max(longest, int(trained * read_number(values, "factor", 1.0)))
