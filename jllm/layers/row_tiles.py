"""Computes rows some at a time, so that a row's bits do not depend on their number."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Shaped


@dataclasses.dataclass(frozen=True, slots=True)
class RowTiles:
    """How many rows are computed at a time.

    Attributes:
        size: Rows at a time, missing ones are zeros.
        is_least: Whether the device's library adds up a row in one order from so many
            rows on, so that more are computed at once.
        output_multiple: That order also asks for outputs in such a number; a weight
            that has another is padded in every step.
    """

    size: int
    is_least: bool = False
    output_multiple: int = 1


def in_row_tiles(
    function: Callable[[Array], Array],
    x: Shaped[Array, "N ..."],
    tiles: RowTiles | None,
) -> Shaped[Array, "N ..."]:
    """Applies a function to tiles of rows, in a program of one shape.

    Libraries and compilers choose by the number of rows how a sum over the features is
    divided, and so how it is rounded. With tiles it is divided in the same way in every
    step, whatever the other rows are.

    Args:
        function: Gives a row for each row, from that row alone.
        x: The rows.
        tiles: How many at a time; None for all.
    """
    if tiles is None:
        return function(x)
    num_rows = x.shape[0]
    if tiles.is_least and num_rows >= tiles.size:
        return function(x)
    num_tiles = -(-num_rows // tiles.size)
    padding = [(0, num_tiles * tiles.size - num_rows)] + [(0, 0)] * (x.ndim - 1)
    padded = jnp.pad(x, padding)
    if tiles.is_least:
        return function(padded)[:num_rows]

    def apply(rows: Array) -> Array:
        # A loop of one is no loop to XLA: the barriers keep what stands around it out.
        rows = jax.lax.optimization_barrier(rows)
        return jax.lax.optimization_barrier(function(rows))

    out = jax.lax.map(apply, padded.reshape(num_tiles, tiles.size, *x.shape[1:]))
    return out.reshape(num_tiles * tiles.size, *out.shape[2:])[:num_rows]
