"""Decode attention on TPUs; the kernel is that of `common.tpu_attention`."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.kv_update import NewTokens, stored_values
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.common.tpu_attention import (
    PagedCache,
    Tiles,
    TokenRows,
    attend,
)
from pallas_kernels.common.tpu_attention_kernel import TileSizes
from pallas_kernels.common.tuning import tuned_sizes

CHUNK_BYTES = 2**21
"""Of keys and values fetched at once. With three more under way 6 MiB are in flight:
more than bandwidth times latency, about 1.5 us at 3.7 TB/s."""

NUM_BUFFERS = 4


def paged_attention_tpu(
    q: Float[Array, "S Q H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    kv_scales: Float[Array, "2 K"] | None,
    *,
    target: Target,
) -> Float[Array, "S Q H D"]:
    """Attends with one tile for each row; see `api.paged_attention`."""
    cache = PagedCache(kv, block_tables, kv_scales)
    return _attend_rows(q, cache, lengths, options, None, target)[0]


def paged_attention_update_tpu(
    tokens: NewTokens,
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    kv_scales: Float[Array, "2 K"] | None,
    *,
    target: Target,
) -> tuple[Float[Array, "S Q H D"], Shaped[Array, "B 2 K P D"]]:
    """Puts the tokens into the blocks it reads, and writes those; see `update`."""
    cache = PagedCache(kv, block_tables, kv_scales)
    stored = stored_values(tokens, kv.dtype, kv_scales).astype(jnp.float32)
    stored = stored.reshape(-1, *stored.shape[2:])
    new = TokenRows(stored[:, 0], stored[:, 1])
    return _attend_rows(tokens.q, cache, lengths, options, new, target)


def _attend_rows(
    q: Float[Array, "S Q H D"],
    cache: PagedCache,
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    new: TokenRows | None,
    target: Target,
) -> tuple[Float[Array, "S Q H D"], Shaped[Array, "B 2 K P D"]]:
    num_rows, num_new = q.shape[:2]
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    tiles = Tiles(
        rows=rows,
        first_tokens=rows * num_new,
        num_tokens=jnp.full_like(rows, num_new),
        first_positions=lengths.astype(jnp.int32) - num_new,
        num_used=jnp.asarray(num_rows, jnp.int32),
    )
    flat = q.reshape(num_rows * num_new, *q.shape[2:])
    sizes = _tile_sizes(num_new, cache, target)
    out, kv = attend(flat, cache, tiles, options, sizes, new, target)
    return out.reshape(q.shape), kv


def _tile_sizes(num_new: int, cache: PagedCache, target: Target) -> TileSizes:
    kv = cache.kv
    block_bytes = kv.size // kv.shape[0] * kv.dtype.itemsize
    width = cache.block_tables.shape[1]
    sizes = tuned_sizes(
        "paged_attention",
        target,
        f"tpu-{kv.dtype.name}-K{kv.shape[2]}-D{kv.shape[4]}-P{kv.shape[3]}",
        {
            "blocks_per_chunk": max(1, CHUNK_BYTES // block_bytes),
            "num_buffers": NUM_BUFFERS,
        },
    )
    return TileSizes(
        tile_q=num_new,
        small_q=0,
        blocks_per_chunk=min(sizes["blocks_per_chunk"], width),
        num_buffers=sizes["num_buffers"],
        is_ragged=False,
    )
