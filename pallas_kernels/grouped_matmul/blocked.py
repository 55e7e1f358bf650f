"""In jnp, in proportion to the rows: one tile of one group after the other."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Shaped

from pallas_kernels.grouped_matmul.tiles import tile_table

MAX_TILE = 64


def grouped_matmul_blocked(
    x: Float[Array, "T K"],
    weights: Shaped[Array, "X N K"],
    group_sizes: Int[Array, " X"],
    scales: Float[Array, "X N"] | None,
    out_dtype: DTypeLike,
) -> Float[Array, "T N"]:
    """As the reference; reads the matrices of groups that have rows, and no others."""
    num_rows, num_groups = x.shape[0], weights.shape[0]
    if 0 in (num_rows, num_groups):
        return jnp.zeros((num_rows, weights.shape[1]), out_dtype)
    # About as many rows as a group has, so that few tiles are mostly empty.
    tile = min(MAX_TILE, max(1, 2 ** ((2 * num_rows // num_groups).bit_length() - 1)))
    table = tile_table(group_sizes, num_rows, tile, aligned=False)
    padded = jnp.pad(x, ((0, tile), (0, 0)))
    places = jnp.arange(tile, dtype=jnp.int32)

    def add_tile(i: Int[Array, ""], out: Float[Array, "R N"]) -> Float[Array, "R N"]:
        start, group = table.starts[i], jnp.minimum(table.groups[i], num_groups - 1)
        rows = jax.lax.dynamic_slice_in_dim(padded, start, tile)
        sums = jax.lax.dot_general(
            rows.astype(jnp.float32),
            weights[group].astype(jnp.float32),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        if scales is not None:
            sums = sums * scales[group].astype(jnp.float32)[None, :]
        # What is written past the end of a group, the next tile writes over.
        inside = (start + places < table.ends[i]) & (table.groups[i] < num_groups)
        tile_out = jnp.where(inside[:, None], sums, 0.0).astype(out_dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, tile_out, start, axis=0)

    zeros = jnp.zeros((num_rows + tile, weights.shape[1]), out_dtype)
    # Zeros stand already where rows belong to no group: their tiles come last.
    num_tiles = jnp.sum(
        (table.groups < num_groups) & (table.starts < table.ends), dtype=jnp.int32
    )
    return jax.lax.fori_loop(0, num_tiles, add_tile, zeros)[:num_rows]
