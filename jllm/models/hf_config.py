"""Checked reading of a Hugging Face config.json."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jllm.errors import UnsupportedModelError
from jllm.layers.activation import Activation

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


def read_bound(
    config: Mapping[str, Any], key: str, default: float | None
) -> float | None:
    """A finite positive number; a null one, unlike a missing one, is none.

    Raises:
        UnsupportedModelError: Of another type, or not finite and positive.
    """
    if config.get(key, default) is None:
        return None
    return read_number({key: config.get(key, default)}, key, 1.0)


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


def with_defaults(
    config: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The config with a family's own defaults for missing and null values."""
    given = {key: value for key, value in config.items() if value is not None}
    return {**config, **defaults, **given}


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
        only = f", only {choices}" if allowed else ""
        raise UnsupportedModelError(
            f"config.json: {key}={value!r} is not supported{only}"
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


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Activation functions by their name in config.json."""


def read_activation(config: Mapping[str, Any], key: str, default: str) -> Activation:
    """The activation function that the config names.

    Raises:
        UnsupportedModelError: An unknown one.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"config.json: {key}={value!r} is not supported, only "
            + ", ".join(ACTIVATIONS)
        )
    return ACTIVATIONS[value]


FULL, SLIDING = "full_attention", "sliding_attention"
"""What a config's `layer_types` may contain."""


def read_layer_types(
    config: Mapping[str, Any], default: Sequence[str]
) -> tuple[str, ...]:
    """Which attention each layer has, `FULL` or `SLIDING`.

    Args:
        config: Content of config.json.
        default: What the layers have where the config does not say.

    Raises:
        UnsupportedModelError: Another type, or not one for each layer.
    """
    types = config.get("layer_types")
    if types is None:
        return tuple(default)
    if not isinstance(types, list) or len(types) != len(default):
        raise UnsupportedModelError(
            f"config.json: layer_types={types!r} must be a list of {len(default)}, one "
            f"for each layer"
        )
    for kind in types:  # pyright: ignore[reportUnknownVariableType]
        if kind not in (FULL, SLIDING):
            raise UnsupportedModelError(
                f"config.json: layer_types: {kind!r} is not supported, only {FULL!r} "
                f"and {SLIDING!r}"
            )
    return tuple(types)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


STRETCHED = ("linear", "dynamic", "yarn")
"""Kinds of RoPE scaling whose factor is not yet in max_position_embeddings."""


def longest_context(config: Mapping[str, Any]) -> int:
    """Most tokens that the model's position embeddings reach.

    Raises:
        UnsupportedModelError: A value is of another type or out of range.
    """
    named = "n_positions" if "n_positions" in config else "max_position_embeddings"
    longest = read_integer(config, named, 2048)
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
