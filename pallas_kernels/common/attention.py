"""Pieces of attention over a paged cache that both attention operations use."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

Implementation = Literal["auto", "reference", "blocked"]

MASKED = -1e30
"""Score of a key that a query may not see; finite, so that no NaN can arise."""


class KeyTile(NamedTuple):
    """Keys and values of some blocks of one sequence, one run of places per head."""

    keys: Float[Array, "K N D"]
    values: Float[Array, "K N D"]
    positions: Int[Array, " N"]


def check_attention_arguments(
    q: Array, kv: Array, block_tables: Array, implementation: str
) -> None:
    """Raises ValueError naming the argument when shapes do not fit together."""
    if kv.ndim != 5 or kv.shape[1] != 2:
        raise ValueError(f"kv has shape {kv.shape}, expected [B, 2, K, P, D]")
    if q.shape[-1] != kv.shape[4]:
        raise ValueError(f"q has head width {q.shape[-1]}, the cache has {kv.shape[4]}")
    if q.shape[-2] % kv.shape[2]:
        raise ValueError(
            f"q has {q.shape[-2]} heads, no multiple of the {kv.shape[2]} KV heads"
        )
    if block_tables.ndim != 2:
        raise ValueError(
            f"block_tables has shape {block_tables.shape}, expected [S, M]"
        )
    if implementation not in ("auto", "reference", "blocked"):
        raise ValueError(
            f"implementation={implementation!r} must be auto, reference or blocked"
        )


def load_blocks(
    kv: Shaped[Array, "B 2 K P D"],
    blocks: Int[Array, " C"],
    first_position: Int[Array, ""] | int,
    limit: Int[Array, ""],
    dtype: jnp.dtype,
) -> KeyTile:
    """Gathers blocks of one sequence in float32; places from `limit` on are zero.

    A pool of uint16 holds the bits of `dtype`.

    Unused places hold anything, NaN included, and a probability of zero does not
    cancel a NaN; hence the values are masked, not only the scores.
    """
    _, _, num_kv_heads, block_size, head_dim = kv.shape
    tile = kv.at[blocks].get(mode="clip")  # [C, 2, K, P, D]
    if kv.dtype == jnp.uint16:
        tile = jax.lax.bitcast_convert_type(tile, dtype)
    tile = tile.transpose(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)
    positions = first_position + jnp.arange(blocks.shape[0] * block_size)
    # XLA's CPU backend has no batched product of 16-bit types with float32 output.
    tile = jnp.where((positions < limit)[:, None], tile.astype(jnp.float32), 0)
    return KeyTile(tile[0], tile[1], positions)


def scores_of(
    q: Float[Array, "Q K G D"],
    tile: KeyTile,
    visible: Bool[Array, "Q N"],
    scale: float,
) -> Float[Array, "K Q G N"]:
    """Scaled products of queries and keys in float32, `MASKED` where not visible."""
    scores = jnp.einsum("qkgd,knd->kqgn", q.astype(jnp.float32), tile.keys)
    return jnp.where(visible[None, :, None, :], scores * scale, MASKED)


def attend_dense(
    q: Float[Array, "Q H D"],
    q_positions: Int[Array, " Q"],
    kv: Shaped[Array, "B 2 K P D"],
    block_table: Int[Array, " M"],
    length: Int[Array, ""],
    scale: float,
) -> Float[Array, "Q H D"]:
    """Attends queries of one sequence to its whole table at once; differentiable."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = kv.shape[2]
    grouped = q.reshape(num_queries, num_kv_heads, -1, head_dim)
    tile = load_blocks(kv, block_table, 0, length, q.dtype)
    visible = _visible(q_positions, tile.positions)
    scores = scores_of(grouped, tile, visible, scale)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = jnp.where(visible[None, :, None, :], weights, 0)
    out = jnp.einsum("kqgn,knd->qkgd", weights, tile.values)
    return out.reshape(num_queries, num_heads, head_dim).astype(q.dtype)


def attend_blocked(
    q: Float[Array, "Q H D"],
    q_positions: Int[Array, " Q"],
    kv: Shaped[Array, "B 2 K P D"],
    block_table: Int[Array, " M"],
    length: Int[Array, ""],
    scale: float,
    *,
    blocks_per_chunk: int,
    num_chunks: Int[Array, ""],
) -> Float[Array, "Q H D"]:
    """Attends queries of one sequence chunk by chunk of blocks, up to `num_chunks`.

    Online softmax: the running maximum, sum and weighted values are rescaled when a
    chunk raises the maximum. `block_table` must hold a whole number of chunks.
    Source: FlashAttention-2, arXiv:2307.08691 section 2.3.
    """
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv.shape[2], kv.shape[3]
    group = num_heads // num_kv_heads
    grouped = q.reshape(num_queries, num_kv_heads, group, head_dim)

    def add_chunk(
        chunk: Int[Array, ""], carry: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        maximum, total, weighted = carry
        first = chunk * blocks_per_chunk
        blocks = jax.lax.dynamic_slice_in_dim(block_table, first, blocks_per_chunk)
        tile = load_blocks(kv, blocks, first * block_size, length, q.dtype)
        visible = _visible(q_positions, tile.positions)
        scores = scores_of(grouped, tile, visible, scale)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
        decay = jnp.exp(maximum - new_maximum)
        weights = jnp.exp(scores - new_maximum[..., None])
        weights = jnp.where(visible[None, :, None, :], weights, 0)
        products = jnp.einsum("kqgn,knd->kqgd", weights, tile.values)
        return (
            new_maximum,
            total * decay + weights.sum(axis=-1),
            weighted * decay[..., None] + products,
        )

    shape = (num_kv_heads, num_queries, group)
    start = (
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    _, total, weighted = jax.lax.fori_loop(0, num_chunks, add_chunk, start)
    out = weighted / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return (
        out.transpose(1, 0, 2, 3)
        .reshape(num_queries, num_heads, head_dim)
        .astype(q.dtype)
    )


def _visible(
    q_positions: Int[Array, " Q"], key_positions: Int[Array, " N"]
) -> Bool[Array, "Q N"]:
    """A query sees the keys up to its own position; position -1 sees none."""
    return key_positions[None, :] <= q_positions[:, None]


def pad_tables(
    block_tables: Int[Array, "S M"], blocks_per_chunk: int
) -> Int[Array, "S N"]:
    """Widens the tables to a whole number of chunks."""
    missing = -block_tables.shape[1] % blocks_per_chunk
    return jnp.pad(block_tables, ((0, 0), (0, missing)))
