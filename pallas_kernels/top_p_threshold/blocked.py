"""By XLA, for CPU: looks into the parts of each row that hold the largest scores.

A row is cut into parts, and everything that is at least as large as the largest score
outside of the best parts lies within them. So a threshold found there is that of the
whole row, unless it is smaller than that; then the row is searched as a whole, one row
after the other, so that it stays in the cache of a core.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from pallas_kernels.top_p_threshold.search import Measured, largest_threshold

PART_SIZE = 128
NUM_BEST = 96
"""Parts looked into; top-k up to this number never needs more."""

Amounts = Callable[[Float[Array, "S N A"]], Array | float]


class Rows(NamedTuple):
    """Rows of scores, and what is asked of them.

    Attributes:
        scores: `[S, N, A]`, part `a` of a row in column `a`: reductions over columns
            are quick on CPU.
        best: Largest score of each row.
        top_k: See `api.top_p_threshold`; 0 where it keeps all.
        top_p: See there; 1 where it keeps all.
        temperature: See there.
    """

    scores: Float[Array, "S N A"]
    best: Float[Array, " S"]
    top_k: Int[Array, " S"]
    top_p: Float[Array, " S"]
    temperature: Float[Array, " S"]

    def weights(self, lowest: Float[Array, " S"]) -> Float[Array, "S N A"]:
        """Weights of the scores from a lowest one on."""
        shifted = self.scores - _wide(self.best)
        weights = jnp.exp(shifted / _wide(self.temperature))
        return jnp.where(self.scores >= _wide(lowest), weights, 0.0)


def top_p_threshold_blocked(
    scores: Float[Array, "S V"],
    top_k: Int[Array, " S"],
    top_p: Float[Array, " S"],
    temperature: Float[Array, " S"],
) -> Float[Array, " S"]:
    """Finds the thresholds; see `api.top_p_threshold`."""
    num_rows, width = scores.shape
    if not scores.size:
        return jnp.full(num_rows, -jnp.inf, jnp.float32)
    padding = -width % PART_SIZE
    padded = jnp.pad(scores, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    parts = padded.reshape(num_rows, PART_SIZE, -1)
    maxima = jnp.max(parts, axis=1)
    best = jnp.max(maxima, axis=1)
    is_finite = jnp.isfinite(best)
    is_neutral = (top_k <= 0) | (top_k >= width)
    rows = Rows(
        parts,
        jnp.where(is_finite, best, 0.0),
        jnp.where(is_neutral | ~is_finite, 0, top_k),
        jnp.where(is_finite, top_p, 1.0),
        temperature,
    )
    if maxima.shape[1] <= 2 * NUM_BEST:
        found = _search_all(rows)
    else:
        found, is_found = _search_best(rows, maxima)
        found = jax.lax.map(_search_unless_found, (rows, found, is_found))
    return jnp.where(is_finite, found, -jnp.inf)


def _search_unless_found(
    row: tuple[Rows, Float[Array, ""], Bool[Array, ""]],
) -> Float[Array, ""]:
    rows, found, is_found = row

    def search() -> Array:
        return _search_all(jax.tree.map(lambda x: x[None], rows))[0]

    return jax.lax.cond(is_found, lambda: found, search)


def _search_all(rows: Rows) -> Float[Array, " S"]:
    """Searches whole rows."""
    is_there = rows.scores > -jnp.inf
    least = _over(jnp.min, jnp.where(is_there, rows.scores, jnp.inf))
    count = _over(jnp.sum, jnp.where(is_there, 1.0, 0.0))
    wanted = rows.top_k.astype(jnp.float32)
    cuts = (wanted > 0) & (wanted <= count)
    kth = _search(rows, 1.0, jnp.where(cuts, least, rows.best), wanted)
    lowest = jnp.where(cuts, kth, -jnp.inf)
    weights = rows.weights(lowest)
    bound = rows.top_p * _over(jnp.sum, weights)
    cuts = rows.top_p < 1
    start = jnp.where(cuts, jnp.maximum(lowest, least), rows.best)
    return jnp.where(cuts, _search(rows, weights, start, bound), lowest)


def _search_best(
    rows: Rows, maxima: Float[Array, "S A"]
) -> tuple[Float[Array, " S"], Bool[Array, " S"]]:
    """Searches the best parts; tells which thresholds are those of the whole rows."""
    ordered, chosen = jax.lax.top_k(maxima, NUM_BEST + 1)
    outside, chosen = ordered[:, -1], chosen[:, None, :-1]
    inside = rows._replace(
        scores=jnp.take_along_axis(rows.scores, chosen, axis=2, mode="clip")
    )
    wanted = rows.top_k.astype(jnp.float32)
    seen = _over(jnp.sum, jnp.where(inside.scores >= _wide(outside), 1.0, 0.0))
    cuts = wanted > 0
    is_found = ~cuts | (seen >= wanted)
    start = jnp.where(cuts & is_found, outside, rows.best)
    lowest = jnp.where(cuts, _search(inside, 1.0, start, wanted), -jnp.inf)

    cuts = rows.top_p < 1
    weights = inside.weights(lowest)
    total = _over(jnp.sum, weights)
    # All that is above the outside lies inside.
    is_total = (lowest > outside) | ~cuts
    total = jax.lax.cond(
        jnp.all(is_total),
        lambda: total,
        lambda: jnp.where(is_total, total, _over(jnp.sum, rows.weights(lowest))),
    )
    bound = rows.top_p * total
    start = jnp.maximum(lowest, outside)
    seen = _over(jnp.sum, jnp.where(inside.scores >= _wide(start), weights, 0.0))
    is_found &= ~cuts | (seen >= bound)
    start = jnp.where(cuts & is_found, start, rows.best)
    found = _search(inside, weights, start, bound)
    return jnp.where(cuts, found, lowest), is_found


def _search(
    rows: Rows,
    amounts: Float[Array, "S N A"] | float,
    low: Float[Array, " S"],
    target: Float[Array, " S"],
) -> Float[Array, " S"]:
    return largest_threshold(
        low, rows.best, partial(_measure, rows.scores, amounts), target, jnp.any
    )


def _measure(
    scores: Float[Array, "S N A"],
    amounts: Float[Array, "S N A"] | float,
    pivots: tuple[Array, ...],
    low: Float[Array, " S"],
    high: Float[Array, " S"],
) -> Measured:
    inside = (scores >= _wide(low)) & (scores <= _wide(high))
    sums = tuple(
        _over(jnp.sum, jnp.where(scores >= _wide(pivot), amounts, 0.0))
        for pivot in pivots
    )
    least = _over(jnp.min, jnp.where(inside, scores, jnp.inf))
    greatest = _over(jnp.max, jnp.where(inside, scores, -jnp.inf))
    return Measured(sums, least, greatest)


def _over(
    reduction: Callable[..., Array], values: Float[Array, "S N A"]
) -> Float[Array, " S"]:
    return reduction(reduction(values, axis=1), axis=1)


def _wide(values: Float[Array, " S"]) -> Float[Array, "S 1 1"]:
    return values[:, None, None]
