"""Tables of the tiles that the rows of ragged groups make, computed in the program."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int


class TileTable(NamedTuple):
    """Tiles of rows that belong to one group each.

    Attributes:
        groups: Group of each tile; X for rows past the last group, which are zeros.
        starts: First row.
        ends: Row to stop before; equal to the start for a tile that is not needed.
        num_live: Tiles that are needed; they come first.
    """

    groups: Int[Array, " I"]
    starts: Int[Array, " I"]
    ends: Int[Array, " I"]
    num_live: Int[Array, ""]


def tile_table(
    group_sizes: Int[Array, " X"], num_rows: int, tile: int, *, aligned: bool
) -> TileTable:
    """Cuts the rows of each group into tiles; the length depends on shapes alone.

    Args:
        group_sizes: Rows of each group; rows past their sum make one group more.
        num_rows: Rows in all, T.
        tile: Rows of a tile at most.
        aligned: Whether tiles start at multiples of the tile only, so that one run of
            rows is visited once for each group in it; else they start where their
            group starts.
    """
    num_groups = group_sizes.shape[0]
    sizes = group_sizes.astype(jnp.int32)
    rest = jnp.maximum(num_rows - jnp.sum(sizes), 0)
    sizes = jnp.append(sizes, rest)
    ends = jnp.minimum(jnp.cumsum(sizes), num_rows)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    origins = starts // tile * tile if aligned else starts
    counts = jnp.where(ends > starts, -(-(ends - origins) // tile), 0)
    tile_ends = jnp.cumsum(counts)
    length = max_tiles(num_groups, num_rows, tile, aligned=aligned)
    index = jnp.arange(length, dtype=jnp.int32)
    live = index < tile_ends[-1]
    # The last live tile stands for those that are not needed: nothing new is read.
    place = jnp.minimum(index, jnp.maximum(tile_ends[-1] - 1, 0))
    # Compared with all ends: a search would be a loop, which no command buffer holds.
    passed = tile_ends[None, :] <= place[:, None]
    groups = jnp.sum(passed, axis=1, dtype=jnp.int32)
    groups = jnp.minimum(groups, num_groups)
    first = origins[groups] + (place - tile_ends[groups] + counts[groups]) * tile
    first_row = jnp.maximum(first, starts[groups])
    stop = jnp.minimum(first + tile, ends[groups])
    stop = jnp.where(live, stop, first_row)
    return TileTable(groups, first_row, stop, tile_ends[-1])


def max_tiles(num_groups: int, num_rows: int, tile: int, *, aligned: bool) -> int:
    """A bound on the tiles of any sizes; the rows past the last group count as one.

    Each group that has rows, of which there are at most T, wastes less than a tile; or
    visits one run of rows that another one visits too.
    """
    used = min(num_groups + 1, num_rows)
    if aligned:
        return max(1, min(num_rows, -(-num_rows // tile) + used - 1))
    return max(1, min(num_rows, (num_rows + used * (tile - 1)) // tile))
