"""Tile after tile, chunk after chunk, only what is live; for the CPU."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.attention import (
    Cache,
    QueryTile,
    attend_blocked,
    pad_tables,
)
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.ragged_attention.tiles import TileLayout, TileTable, tiles_for

LAYOUT = TileLayout(tokens=32)
KEYS_PER_CHUNK = 128
"""Keys per turn: with 256, prompts of 128 tokens took half as long again."""


def tile_layout(q: Any, kv: Any, target: Target) -> TileLayout:
    """How tokens are cut; see `api.tile_layout`."""
    del q, kv, target
    return LAYOUT


def ragged_attention_blocked(
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
    """Attends in proportion to the live tokens; see `api.ragged_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    block_size = kv.shape[3]
    tile_q = LAYOUT.tile_q(num_tokens)
    blocks_per_chunk = max(1, min(KEYS_PER_CHUNK // block_size, block_tables.shape[1]))
    tables = pad_tables(block_tables, blocks_per_chunk)
    table = tiles_for(tiles, row_starts, num_tokens, LAYOUT)
    # A tile reads and writes tile_q tokens; what it writes past its own sequence is
    # overwritten by the next tile, or lies in this margin.
    padded = jnp.pad(q, ((0, tile_q), (0, 0), (0, 0)))
    offsets = jnp.arange(tile_q)

    def attend_tile(tile: Array, out: Array) -> Array:
        row, first = table.rows[tile], table.first_tokens[tile]
        count, length = table.num_tokens[tile], lengths[row]
        first_position = first + length - row_starts[row + 1]
        positions = jnp.where(offsets < count, first_position + offsets, -1)
        q_tile = jax.lax.dynamic_slice_in_dim(padded, first, tile_q)
        attended = attend_blocked(
            QueryTile(q_tile[None], positions[None]),
            Cache(kv, kv_scales),
            tables[row][None],
            length[None],
            options,
            blocks_per_chunk=blocks_per_chunk,
        )
        return jax.lax.dynamic_update_slice_in_dim(out, attended[0], first, 0)

    out = jnp.zeros((num_tokens + tile_q, num_heads, head_dim), q.dtype)
    return jax.lax.fori_loop(0, table.num_used, attend_tile, out)[:num_tokens]
