"""The search for a threshold in few passes over the scores.

A round cuts the bracket of a threshold at three pivots at once, and also looks for the
least and the greatest score within it; so it ends as soon as a single number is left,
usually after a few rounds. Pivots divide the bracket evenly: first as numbers, over
which scores spread, then as bit patterns, which bounds the number of rounds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NUM_PIVOTS = 3
ROUNDS_BY_VALUE = 8
MAX_ROUNDS = 32
"""Sixteen rounds by patterns cut any bracket down to a single number."""


class Measured(NamedTuple):
    """What a pass over the scores found.

    Attributes:
        sums: For each pivot, what the scores from it on amount to.
        least: Least score in the bracket.
        greatest: Greatest score in the bracket.
    """

    sums: tuple[Any, ...]
    least: Any
    greatest: Any


Measure = Callable[[tuple[Any, ...], Any, Any], Measured]


def key_of(value: Any) -> Any:
    """Maps floats to integers in the same order."""
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def value_of(key: Any) -> Any:
    """Maps back, to positive zero from both zeros."""
    bits = jnp.where(key < 0, key ^ 0x7FFFFFFF, key)
    value = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(value == 0, 0.0, value)


def largest_threshold(
    low: Any, high: Any, measure: Measure, target: Any, is_any: Callable[[Any], Any]
) -> Any:
    """Finds the largest score from which on the scores amount to the target.

    Args:
        low: A score from which on they do.
        high: A score above which they do not; where it is the lower one, it is found.
        measure: Passes over the scores, given pivots and the bracket's two ends.
        target: What they have to amount to.
        is_any: Tells as a scalar whether any of some flags is set.
    """

    def goes_on(state: tuple[Any, Any, Any]) -> Any:
        turn, low, high = state
        return is_any(low < high) & (turn < MAX_ROUNDS)

    def cut(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        turn, low, high = state
        pivots = _pivots(turn, low, high)
        values = tuple(value_of(pivot) for pivot in pivots)
        found = measure(values, value_of(low), value_of(high))
        new_low = jnp.maximum(low, key_of(found.least))
        new_high = jnp.minimum(high, key_of(found.greatest))
        for pivot, total in zip(pivots, found.sums, strict=True):
            fits = total >= target
            new_low = jnp.where(fits, jnp.maximum(new_low, pivot), new_low)
            new_high = jnp.where(fits, new_high, jnp.minimum(new_high, pivot - 1))
        is_open = low < high
        return (
            turn + 1,
            jnp.where(is_open, new_low, low),
            jnp.where(is_open, new_high, high),
        )

    start = (jnp.int32(0), key_of(low), key_of(high))
    return value_of(jax.lax.while_loop(goes_on, cut, start)[1])


def _pivots(turn: Any, low: Any, high: Any) -> tuple[Any, ...]:
    """Cuts the bracket at the quarters; each pivot lies above its lower end."""
    # The difference of two keys may not fit in 32 bits, a quarter of it does.
    quarter = (high >> 2) - (low >> 2)
    bottom, top = value_of(low), value_of(high)
    pivots: list[Any] = []
    for i in range(1, NUM_PIVOTS + 1):
        by_value = key_of(bottom + (top - bottom) * (i / (NUM_PIVOTS + 1)))
        by_key = low + jnp.maximum(quarter * i, i)
        pivot = jnp.where(turn < ROUNDS_BY_VALUE, by_value, by_key)
        pivots.append(jnp.minimum(jnp.maximum(pivot, low + 1), high))
    return tuple(pivots)
