"""The obvious version: every tile gathers its sequence's table; differentiable."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.attention import (
    Cache,
    QueryTile,
    attend_dense,
    dense_weights,
    load_blocks,
)
from pallas_kernels.common.kv_update import (
    NewTokens,
    scatter_tokens,
    stored_values,
    token_slots,
)
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.ragged_attention.tiles import TileLayout, TileTable, make_tiles

LAYOUT = TileLayout(tokens=64)


def ragged_attention_reference(
    q: Float[Array, "T H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    row_starts: Int[Array, " S+1"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    kv_scales: Float[Array, "2 K"] | None,
    *,
    tiles: TileTable | None = None,
) -> Float[Array, "T H D"]:
    """Attends all tiles at once to whole tables; see `api.ragged_attention`."""
    del tiles  # made here, where all of it can be read
    runs = _cut(lengths, row_starts, q.shape[0])

    def attend(q_tile: Array, q_positions: Array, table: Array, length: Array) -> Array:
        queries = QueryTile(q_tile, q_positions)
        return attend_dense(queries, Cache(kv, kv_scales), table, length, options)

    out = jax.vmap(attend)(
        runs.take(q), runs.positions, block_tables[runs.rows], lengths[runs.rows]
    )
    return runs.put(out, q.shape[0])


def ragged_attention_weights(
    q: Float[Array, "T H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    row_starts: Int[Array, " S+1"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
) -> Float[Array, "T H C"]:
    """How much of each position of its sequence each token's attention takes.

    Position `c` is place `c` of the sequence's table, `C = M P`. Differentiable; the
    rows sum to one, or to less where a sink takes the rest.
    """
    runs = _cut(lengths, row_starts, q.shape[0])

    def weigh(q_tile: Array, q_positions: Array, table: Array, length: Array) -> Array:
        queries = QueryTile(q_tile, q_positions)
        return dense_weights(queries, Cache(kv, None), table, length, options)

    out = jax.vmap(weigh)(
        runs.take(q), runs.positions, block_tables[runs.rows], lengths[runs.rows]
    )
    return runs.put(out, q.shape[0])


def attend_by_weights(
    weights: Float[Array, "T H C"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    row_starts: Int[Array, " S+1"],
    lengths: Int[Array, " S"],
    dtype: jnp.dtype,
) -> Float[Array, "T H D"]:
    """What `ragged_attention` gives with these weights in place of its own.

    `dtype` is that of queries and result; a pool of uint16 holds its bits.
    """
    runs = _cut(lengths, row_starts, weights.shape[0])
    num_kv_heads = kv.shape[2]

    def attend(tile: Array, table: Array, length: Array) -> Array:
        values = load_blocks(Cache(kv, None), table, 0, length, dtype).values
        grouped = tile.reshape(tile.shape[0], num_kv_heads, -1, tile.shape[-1])
        out = jnp.einsum("qkgn,knd->qkgd", grouped, values)
        return out.reshape(*tile.shape[:2], -1).astype(dtype)

    out = jax.vmap(attend)(
        runs.take(weights), block_tables[runs.rows], lengths[runs.rows]
    )
    return runs.put(out, weights.shape[0])


class _Runs(NamedTuple):
    """Tokens cut into tiles of one sequence each."""

    rows: Int[Array, " N"]
    tokens: Int[Array, "N Q"]
    positions: Int[Array, "N Q"]

    def take(self, of_tokens: Shaped[Array, "T ..."]) -> Shaped[Array, "N Q ..."]:
        """The tiles' tokens; anything where a tile has none."""
        return of_tokens.at[self.tokens].get(mode="clip")

    def put(
        self, of_tiles: Shaped[Array, "N Q ..."], num_tokens: int
    ) -> Shaped[Array, "T ..."]:
        """Back to tokens; zeros for those of no tile."""
        targets = jnp.where(self.positions >= 0, self.tokens, num_tokens)
        zeros = jnp.zeros((num_tokens, *of_tiles.shape[2:]), of_tiles.dtype)
        return zeros.at[targets].set(of_tiles, mode="drop")


def _cut(
    lengths: Int[Array, " S"], row_starts: Int[Array, " S+1"], num_tokens: int
) -> _Runs:
    tiles = make_tiles(row_starts, num_tokens, LAYOUT)
    offsets = jnp.arange(LAYOUT.tile_q(num_tokens))
    rows, first_tokens = jnp.asarray(tiles.rows), jnp.asarray(tiles.first_tokens)
    tokens = first_tokens[:, None] + offsets[None, :]  # [N, Q]
    used = offsets[None, :] < tiles.num_tokens[:, None]
    # Position of token i of a sequence: it ends at the sequence's length.
    shift = (lengths - row_starts[1:])[rows]
    return _Runs(rows, tokens, jnp.where(used, tokens + shift[:, None], -1))


def ragged_attention_update_reference(
    tokens: NewTokens,
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    row_starts: Int[Array, " S+1"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    kv_scales: Float[Array, "2 K"] | None,
    *,
    tiles: TileTable | None = None,
) -> tuple[Float[Array, "T H D"], Shaped[Array, "B 2 K P D"]]:
    """Scatters the tokens, then attends; see `update.ragged_attention_update`."""
    del tiles
    places = jnp.arange(tokens.q.shape[0], dtype=row_starts.dtype)
    rows = jnp.sum(places[:, None] >= row_starts[None, 1:], axis=1)
    is_padding = rows == lengths.shape[0]
    rows = jnp.minimum(rows, lengths.shape[0] - 1)
    positions = places + (lengths - row_starts[1:])[rows]
    positions = jnp.where(is_padding, -1, positions)
    new = stored_values(tokens, kv.dtype, kv_scales)
    slots = token_slots(kv.shape, block_tables, rows, positions)
    kv = scatter_tokens(kv, new, slots)
    out = ragged_attention_reference(
        tokens.q, kv, block_tables, row_starts, lengths, options, kv_scales
    )
    return out, kv
