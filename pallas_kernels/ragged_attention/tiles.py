"""The tile table: which run of tokens of which sequence each tile computes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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

    rows: Int[Array | np.ndarray, " N"]
    first_tokens: Int[Array | np.ndarray, " N"]
    num_tokens: Int[Array | np.ndarray, " N"]
    num_used: Int[Array | np.ndarray, ""]


def max_tiles(num_rows: int, num_tokens: int, tile_q: int) -> int:
    """Tiles that any division of the tokens among the rows can need."""
    return -(-num_tokens // tile_q) + num_rows


def make_tiles(
    row_starts: Int[Array | np.ndarray, " R"], num_tokens: int, tile_q: int
) -> TileTable:
    """Cuts each sequence's tokens into tiles, in token order.

    Arrays of numpy are worked on by numpy, on the host.
    """
    xp: Any = jnp if isinstance(row_starts, jax.Array) else np
    num_rows = row_starts.shape[0] - 1
    tiles_per_row = -(-xp.diff(row_starts) // tile_q)
    tile_ends = xp.cumsum(tiles_per_row, dtype=row_starts.dtype)
    tiles = xp.arange(max_tiles(num_rows, num_tokens, tile_q), dtype=row_starts.dtype)
    rows = xp.sum(tiles[:, None] >= tile_ends[None, :], axis=1, dtype=tiles.dtype)
    rows = xp.minimum(rows, num_rows - 1)
    offsets = tiles - (tile_ends - tiles_per_row)[rows]
    first_tokens = row_starts[rows] + offsets * tile_q
    remaining = xp.where(tiles < tile_ends[-1], row_starts[rows + 1] - first_tokens, 0)
    return TileTable(rows, first_tokens, xp.minimum(remaining, tile_q), tile_ends[-1])
