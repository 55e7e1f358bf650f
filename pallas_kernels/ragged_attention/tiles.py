"""The tile table: which run of tokens of which sequence each tile computes."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int


class TileTable(NamedTuple):
    """Tiles of at most `tile_q` tokens, none across two sequences.

    Attributes:
        rows: Sequence of each tile; any for unused tiles.
        first_tokens: Place of its first token in the packed order.
        num_tokens: Its tokens; zero for unused tiles.
        num_used: Number of used tiles; they come first.
    """

    rows: Int[Array, " N"]
    first_tokens: Int[Array, " N"]
    num_tokens: Int[Array, " N"]
    num_used: Int[Array, ""]


def make_tiles(row_starts: Int[Array, " R"], num_tokens: int, tile_q: int) -> TileTable:
    """Cuts each sequence's tokens into tiles, in token order."""
    num_rows = row_starts.shape[0] - 1
    max_tiles = -(-num_tokens // tile_q) + num_rows
    tiles_per_row = -(-jnp.diff(row_starts) // tile_q)
    tile_ends = jnp.cumsum(tiles_per_row)
    tiles = jnp.arange(max_tiles)
    rows = jnp.sum(tiles[:, None] >= tile_ends[None, :], axis=1)
    rows = jnp.minimum(rows, num_rows - 1)
    offsets = tiles - (tile_ends - tiles_per_row)[rows]
    first_tokens = row_starts[rows] + offsets * tile_q
    remaining = jnp.where(tiles < tile_ends[-1], row_starts[rows + 1] - first_tokens, 0)
    return TileTable(rows, first_tokens, jnp.minimum(remaining, tile_q), tile_ends[-1])
