"""The runs of new tokens, and the table of the tiles that they are cut into."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int


@dataclasses.dataclass(frozen=True, slots=True)
class TileLayout:
    """How a kernel wants the tokens cut; the same in all programs of a model.

    Attributes:
        tokens: Tokens of a tile at most; a step of fewer tokens has smaller tiles.
        with_padding: Whether the tokens of padding get tiles too, after the others.
    """

    tokens: int
    with_padding: bool = False

    def tile_q(self, num_tokens: int) -> int:
        """Tokens of a tile in a step of so many."""
        return max(1, min(self.tokens, num_tokens))

    def num_tiles(self, num_rows: int, num_tokens: int) -> int:
        """Tiles that any division of the tokens among the rows can need."""
        num_runs = num_rows + self.with_padding
        return -(-num_tokens // self.tile_q(num_tokens)) + num_runs

    def table_size(self, num_rows: int, num_tokens: int) -> int:
        """Numbers of a table of tiles."""
        return 3 * self.num_tiles(num_rows, num_tokens) + 1


@partial(
    jax.tree_util.register_dataclass, data_fields=["packed"], meta_fields=["layout"]
)
@dataclasses.dataclass(frozen=True, slots=True)
class TileTable:
    """Tiles of tokens, none across two sequences; used ones come first.

    One vector, so that it is sent to a device and handed to a kernel as it is.

    Attributes:
        packed: The number of used tiles, then `rows`, `first_tokens`, `num_tokens`.
        layout: How the tokens were cut.
    """

    packed: Int[Array | np.ndarray, " W"]
    layout: TileLayout

    @property
    def size(self) -> int:
        """Number of tiles `N`, used or not."""
        return self.packed.shape[0] // 3

    @property
    def num_used(self) -> Int[Array | np.ndarray, ""]:
        """Number of used tiles."""
        return self.packed[:1].reshape(())

    @property
    def rows(self) -> Int[Array | np.ndarray, " N"]:
        """Sequence of each tile, or their number for one of padding."""
        return self.packed[1 : 1 + self.size]

    @property
    def first_tokens(self) -> Int[Array | np.ndarray, " N"]:
        """Place of each tile's first token in the packed order."""
        return self.packed[1 + self.size : 1 + 2 * self.size]

    @property
    def num_tokens(self) -> Int[Array | np.ndarray, " N"]:
        """Tokens of each tile; zero for unused ones."""
        return self.packed[1 + 2 * self.size :]


class TokenRuns(NamedTuple):
    """The new tokens of each sequence, packed one sequence after the other.

    Sequence i owns tokens starts[i] ... starts[i+1] - 1, which stand at its last
    positions.

    Attributes:
        starts: First token of each sequence, in order; the last entry is the number of
            tokens that are no padding.
        lengths: Tokens of each sequence in the cache, the new ones included.
        tiles: The tokens cut into tiles by `make_tiles`, on the host, as `tile_layout`
            says; None cuts them in the program.
    """

    starts: Int[Array, " S+1"]
    lengths: Int[Array, " S"]
    tiles: TileTable | None = None

    def check(self) -> None:
        """Raises ValueError unless each sequence has its run."""
        if self.starts.shape != (self.lengths.shape[0] + 1,):
            raise ValueError(
                f"starts has shape {self.starts.shape}, expected one entry more than "
                f"the {self.lengths.shape[0]} sequences"
            )


def make_tiles(
    row_starts: Int[Array | np.ndarray, " R"], num_tokens: int, layout: TileLayout
) -> TileTable:
    """Cuts each sequence's tokens into tiles, in token order.

    Arrays of numpy are worked on by numpy, on the host.

    Args:
        row_starts: First token of each sequence, in order, then their number.
        num_tokens: Tokens of the step, padding included.
        layout: How to cut them.
    """
    xp = _library(row_starts)
    tile_q = layout.tile_q(num_tokens)
    num_rows = row_starts.shape[0] - 1
    num_tiles = layout.num_tiles(num_rows, num_tokens)
    if layout.with_padding:
        end = xp.full(1, num_tokens, row_starts.dtype)
        row_starts, num_rows = xp.concatenate([row_starts, end]), num_rows + 1
    tiles_per_row = -(-xp.diff(row_starts) // tile_q)
    tile_ends = xp.cumsum(tiles_per_row, dtype=row_starts.dtype)
    tiles = xp.arange(num_tiles, dtype=row_starts.dtype)
    rows = xp.minimum(_count_up_to(tile_ends, tiles), num_rows - 1)
    offsets = tiles - (tile_ends - tiles_per_row)[rows]
    first_tokens = row_starts[rows] + offsets * tile_q
    remaining = xp.where(tiles < tile_ends[-1], row_starts[rows + 1] - first_tokens, 0)
    counts = xp.minimum(remaining, tile_q)
    parts = (tile_ends[-1:], rows, first_tokens, counts)
    return TileTable(xp.concatenate(parts), layout)


def tiles_for(
    given: TileTable | None,
    row_starts: Int[Array, " R"],
    num_tokens: int,
    layout: TileLayout,
) -> TileTable:
    """The table that the caller has given, if it is cut as the kernel wants it.

    One that was made for another implementation, or none, is made anew.
    """
    if given is not None and given.layout == layout:
        return given
    return make_tiles(row_starts, num_tokens, layout)


def _library(array: Array | np.ndarray) -> Any:
    return jnp if isinstance(array, jax.Array) else np


def _count_up_to(
    ends: Int[Array | np.ndarray, " R"], values: Int[Array | np.ndarray, " N"]
) -> Any:
    """How many of the ends, which are in order, each value has reached."""
    if isinstance(ends, jax.Array):
        reached = values[:, None] >= ends[None, :]
        return jnp.sum(reached, axis=1, dtype=values.dtype)
    return np.searchsorted(ends, values, side="right").astype(values.dtype)
