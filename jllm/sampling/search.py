"""Thresholds on scores, found by bisection on their bit patterns instead of sorting."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

NUM_HALVINGS = 32


def largest_threshold(
    scores: Float[Array, "S V"],
    enough: Callable[[Bool[Array, "S V"]], Bool[Array, " S"]],
) -> Float[Array, " S"]:
    """Finds the largest threshold per row at which enough scores are at least as large.

    The order of floats is that of their bit patterns, read as integers after flipping
    the negative ones, so that 32 halvings of the integers between minus and plus
    infinity find the threshold exactly.

    Args:
        scores: Any numbers.
        enough: Tells for each row whether a set of its scores is large enough; true for
            every set that holds one for which it is true.

    Returns:
        The threshold; minus infinity where not even all scores are enough.
    """
    num_rows = scores.shape[0]
    low = jnp.full(num_rows, _key(jnp.float32(-jnp.inf)), jnp.int32)
    high = jnp.full(num_rows, _key(jnp.float32(jnp.inf)), jnp.int32)

    def halve(
        _: Array, bounds: tuple[Int[Array, " S"], Int[Array, " S"]]
    ) -> tuple[Int[Array, " S"], Int[Array, " S"]]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up
        fits = enough(scores >= _value(middle)[:, None])
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, NUM_HALVINGS, halve, (low, high))
    return _value(low)


def _key(value: Float[Array, "*N"]) -> Int[Array, "*N"]:
    """Maps floats to integers in the same order."""
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _value(key: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """Maps back."""
    bits = jnp.where(key < 0, key ^ 0x7FFFFFFF, key)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
