"""By XLA: bisection on the bit patterns, which have the order of the numbers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from pallas_kernels.top_p_threshold.search import key_of, value_of

NUM_HALVINGS = 32


def top_p_threshold_reference(
    scores: Float[Array, "S V"],
    top_k: Int[Array, " S"],
    top_p: Float[Array, " S"],
    temperature: Float[Array, " S"],
) -> Float[Array, " S"]:
    """Finds the thresholds; see `api.top_p_threshold`."""
    best = jnp.max(scores, axis=1)
    is_neutral = (top_k <= 0) | (top_k >= scores.shape[1])
    wanted = jnp.where(is_neutral, 0, top_k)

    def has_enough(kept: Bool[Array, "S V"]) -> Bool[Array, " S"]:
        return jnp.sum(kept, axis=1, dtype=jnp.int32) >= wanted

    lowest = jnp.where(is_neutral, -jnp.inf, _bisect(scores, best, has_enough))
    weights = jnp.exp((scores - best[:, None]) / temperature[:, None])
    weights = jnp.where(scores >= lowest[:, None], weights, 0.0)
    target = top_p * jnp.sum(weights, axis=1)

    def has_mass(kept: Bool[Array, "S V"]) -> Bool[Array, " S"]:
        return jnp.sum(jnp.where(kept, weights, 0.0), axis=1) >= target

    found = jnp.maximum(_bisect(scores, best, has_mass), lowest)
    found = jnp.where(top_p >= 1, lowest, found)
    return jnp.where(jnp.isfinite(best), found, -jnp.inf)


def _bisect(
    scores: Float[Array, "S V"],
    best: Float[Array, " S"],
    enough: Callable[[Bool[Array, "S V"]], Bool[Array, " S"]],
) -> Float[Array, " S"]:
    """The largest threshold up to the best score at which enough scores are kept."""
    low = jnp.full_like(best, -jnp.inf)

    def halve(
        _: Array, bounds: tuple[Int[Array, " S"], Int[Array, " S"]]
    ) -> tuple[Int[Array, " S"], Int[Array, " S"]]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up
        fits = enough(scores >= value_of(middle)[:, None])
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

    bounds = (key_of(low), key_of(best))
    return value_of(jax.lax.fori_loop(0, NUM_HALVINGS, halve, bounds)[0])
