"""Checks of the fields of a request; each error names field, value and bound."""

import math
from collections.abc import Sequence
from typing import Any, cast

from jllm.errors import InvalidRequestError


def wrong(field: str, value: object, rule: str) -> InvalidRequestError:
    """The error that says what a value must be."""
    return InvalidRequestError(f"{field}={value!r} {rule}", parameter=field)


def number(field: str, value: Any, low: float, high: float, rule: str) -> float:
    """Takes a finite number within bounds, both included; `rule` says which.

    Raises:
        InvalidRequestError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong(field, value, "must be a number")
    if not (math.isfinite(value) and low <= value <= high):
        raise wrong(field, value, rule)
    return float(value)


def integer(field: str, value: Any, low: int, high: int | None = None) -> int:
    """Takes an integer within bounds, both included.

    Raises:
        InvalidRequestError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(field, value, "must be an integer")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise wrong(field, value, f"must be {bound}")
    return value


def boolean(field: str, value: Any) -> None:
    """Takes True and False only.

    Raises:
        InvalidRequestError: It is neither.
    """
    if not isinstance(value, bool):
        raise wrong(field, value, "must be true or false")


def id_list(field: str, value: Any, limit: int | None = None) -> tuple[int, ...]:
    """Takes a list of token ids, at most so many, and leaves out what repeats.

    Raises:
        InvalidRequestError: It is none.
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise wrong(field, value, "must be a list of token ids")
    tokens = cast(Sequence[Any], value)
    ids = tuple(dict.fromkeys(integer(field, token, 0) for token in tokens))
    if limit is not None and len(ids) > limit:
        raise wrong(field, f"<{len(ids)} ids>", f"must hold at most {limit} ids")
    return ids


def string_list(field: str, value: Any) -> tuple[str, ...]:
    """Takes a string or a list of strings, none of them empty.

    Raises:
        InvalidRequestError: It is neither.
    """
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise wrong(field, value, "must be a string or a list of strings")
    values = (value,) if isinstance(value, str) else cast(Sequence[Any], value)
    for text in values:
        if not isinstance(text, str):
            raise wrong(field, value, "must hold strings only")
        if not text:
            raise wrong(field, value, "must not hold an empty string")
    return tuple(values)
