"""The obvious version: every tile gathers its sequence's table; differentiable."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.attention import Cache, QueryTile, attend_dense
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
    num_tokens = q.shape[0]
    tiles = make_tiles(row_starts, num_tokens, LAYOUT)
    offsets = jnp.arange(LAYOUT.tile_q(num_tokens))
    tokens = tiles.first_tokens[:, None] + offsets[None, :]  # [N, tile_q]
    used = offsets[None, :] < tiles.num_tokens[:, None]
    # Position of token i of a sequence: it ends at the sequence's length.
    shift = (lengths - row_starts[1:])[tiles.rows]
    positions = jnp.where(used, tokens + shift[:, None], -1)

    def attend(q_tile: Array, q_positions: Array, table: Array, length: Array) -> Array:
        queries = QueryTile(q_tile, q_positions)
        return attend_dense(queries, Cache(kv, kv_scales), table, length, options)

    out = jax.vmap(attend)(
        q.at[tokens].get(mode="clip"),
        positions,
        block_tables[tiles.rows],
        lengths[tiles.rows],
    )
    targets = jnp.where(used, tokens, num_tokens)
    return jnp.zeros_like(q).at[targets].set(out, mode="drop")


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
