"""Prefill attention on TPUs; the kernel is that of `common.tpu_attention`."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.kv_update import NewTokens, stored_values
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.common.tpu_attention import (
    Groups,
    PagedCache,
    Tiles,
    attend,
)
from pallas_kernels.common.tpu_attention_kernel import TOKENS_PER_RUN, TileSizes
from pallas_kernels.common.tuning import Sizes, tuned_sizes
from pallas_kernels.ragged_attention.groups import make_groups
from pallas_kernels.ragged_attention.tiles import TileLayout, TileTable, tiles_for

QUERY_ROWS = {"v6e": 1024}
"""Rows of queries, of one KV head, to a tile. Each tile reads the keys anew: with 512
rows a block of 8 heads of 128 places is 268 MFLOP for 512 KiB, 512 FLOP per byte; v5e
has 240 FLOP per byte of bandwidth, tpu7x 310, v6e 560."""

DEFAULT_QUERY_ROWS = 512
SMALL_QUERY_ROWS = 32
"""Tiles with so few, such as single tokens among prompts, do not compute more."""

CHUNK_KEYS = 512
NUM_BUFFERS = 3

MAX_TILE_HEADS = 8192
MAX_CHUNK_BYTES = 2**22
"""Bounds of what a tile and a chunk take of the vector memory, 64 MiB on tpu7x and 128
on the others. With 32 query and 8 KV heads of 128 in bfloat16 the kernel asks for 29
MiB at 512 query rows and 48 at 1024, with 32 KV heads for 40."""


def ragged_attention_tpu(
    q: Float[Array, "T H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    row_starts: Int[Array, " S+1"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    kv_scales: Float[Array, "2 K"] | None,
    *,
    tiles: TileTable | None = None,
    target: Target,
) -> Float[Array, "T H D"]:
    """Attends tile after tile; see `api.ragged_attention`."""
    cache = PagedCache(kv, block_tables, kv_scales)
    sizes, layout = _tile_sizes(q, cache, target), tile_layout(q, kv, target)
    table = tiles_for(tiles, row_starts, q.shape[0], layout)
    placed = _place(table, row_starts, lengths, q.shape[0])
    return attend(q, cache, placed, options, sizes, None, target)[0]


def ragged_attention_update_tpu(
    tokens: NewTokens,
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    row_starts: Int[Array, " S+1"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    kv_scales: Float[Array, "2 K"] | None,
    *,
    tiles: TileTable | None = None,
    target: Target,
) -> tuple[Float[Array, "T H D"], Shaped[Array, "B 2 K P D"]]:
    """Writes the tokens, then attends, in one kernel; see `update`.

    A prompt of several tiles reads what its earlier tiles have written; hence all is
    written before anything is read.
    """
    cache = PagedCache(kv, block_tables, kv_scales)
    sizes = _tile_sizes(tokens.q, cache, target)
    num_tokens = tokens.q.shape[0]
    layout = tile_layout(tokens.q, kv, target)
    table = tiles_for(tiles, row_starts, num_tokens, layout)
    placed = _place(table, row_starts, lengths, num_tokens)
    stored = stored_values(tokens, kv.dtype, kv_scales)
    new: Groups = make_groups(stored, cache, row_starts, lengths)
    return attend(tokens.q, cache, placed, options, sizes, new, target)


def tile_layout(q: Any, kv: Any, target: Target) -> TileLayout:
    """How tokens are cut; see `api.tile_layout`."""
    num_heads = q.shape[1]
    group = num_heads // kv.shape[2]
    query_rows = _sizes(q, kv, target)["query_rows"]
    tile_q = max(1, min(query_rows // group, MAX_TILE_HEADS // num_heads))
    # Whole runs of tokens, where they are many.
    tile_q = tile_q // TOKENS_PER_RUN * TOKENS_PER_RUN or tile_q
    return TileLayout(tile_q, with_padding=True)


def _place(
    table: TileTable,
    row_starts: Int[Array, " R"],
    lengths: Int[Array, " S"],
    num_tokens: int,
) -> Tiles:
    """Where the tiles stand in their sequences; those of padding see nothing."""
    ends = jnp.append(row_starts[1:], jnp.asarray(num_tokens, row_starts.dtype))
    shift = jnp.append(lengths, jnp.zeros((), lengths.dtype)) - ends
    rows, first_tokens = jnp.asarray(table.rows), jnp.asarray(table.first_tokens)
    return Tiles(
        rows=jnp.minimum(rows, lengths.shape[0] - 1),
        first_tokens=first_tokens,
        num_tokens=jnp.asarray(table.num_tokens),
        first_positions=first_tokens + shift[rows],
        num_used=jnp.asarray(table.num_used),
    )


def _sizes(q: Any, kv: Any, target: Target) -> Sizes:
    group = q.shape[1] // kv.shape[2]
    return tuned_sizes(
        "ragged_attention",
        target,
        f"tpu-{kv.dtype}-K{kv.shape[2]}-G{group}-D{kv.shape[4]}-P{kv.shape[3]}",
        {
            "query_rows": QUERY_ROWS.get(target.generation, DEFAULT_QUERY_ROWS),
            "small_query_rows": SMALL_QUERY_ROWS,
            "chunk_keys": CHUNK_KEYS,
            "num_buffers": NUM_BUFFERS,
        },
    )


def _tile_sizes(
    q: Float[Array, "T H D"], cache: PagedCache, target: Target
) -> TileSizes:
    kv, group = cache.kv, q.shape[1] // cache.kv.shape[2]
    sizes = _sizes(q, kv, target)
    tile_q = tile_layout(q, kv, target).tile_q(q.shape[0])
    small_q = max(1, sizes["small_query_rows"] // group)
    block_bytes = kv.size // kv.shape[0] * kv.dtype.itemsize
    blocks_per_chunk = sizes["chunk_keys"] // kv.shape[3]
    blocks_per_chunk = max(1, min(blocks_per_chunk, MAX_CHUNK_BYTES // block_bytes))
    return TileSizes(
        tile_q=tile_q,
        small_q=small_q if small_q < tile_q else 0,
        blocks_per_chunk=min(blocks_per_chunk, cache.block_tables.shape[1]),
        num_buffers=sizes["num_buffers"],
        is_ragged=True,
    )
