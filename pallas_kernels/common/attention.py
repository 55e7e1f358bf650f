"""Pieces of attention over a paged cache that both attention operations use."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from pallas_kernels.common.scores import ScoreOptions

MASKED = -1e30
"""Score of a key that a query may not see; finite, so that no NaN can arise."""


class Cache(NamedTuple):
    """A pool of blocks, and the factors on what it holds if it is quantized."""

    kv: Shaped[Array, "B 2 K P D"]
    scales: Float[Array, "2 K"] | None


class QueryTile(NamedTuple):
    """Queries of one sequence; those at position -1 see nothing."""

    q: Float[Array, "Q H D"]
    positions: Int[Array, " Q"]


class KeyTile(NamedTuple):
    """Keys and values of some blocks of one sequence, one run of places per head."""

    keys: Float[Array, "K N D"]
    values: Float[Array, "K N D"]
    positions: Int[Array, " N"]


def check_attention_arguments(
    q: Array, kv: Array, block_tables: Array, kv_scales: Array | None
) -> None:
    """Raises ValueError naming the argument that does not fit the others."""
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
    if kv_scales is not None and kv_scales.shape != (2, kv.shape[2]):
        raise ValueError(
            f"kv_scales has shape {kv_scales.shape}, expected (2, {kv.shape[2]})"
        )
    if kv.dtype.itemsize == 1 and kv_scales is None:
        raise ValueError(f"kv of {kv.dtype} needs kv_scales")


def load_blocks(
    cache: Cache,
    blocks: Int[Array, " C"],
    first_position: Int[Array, ""] | int,
    limit: Int[Array, ""],
    dtype: jnp.dtype,
    *,
    narrow: bool = False,
) -> KeyTile:
    """Gathers blocks of one sequence in float32; places from `limit` on are zero.

    A pool of uint16 holds the bits of `dtype`; `narrow` leaves them in that type.

    Unused places hold anything, NaN included, and a probability of zero does not
    cancel a NaN; hence the values are masked, not only the scores.
    """
    kv, scales = cache
    _, _, num_kv_heads, block_size, head_dim = kv.shape
    tile = kv.at[blocks].get(mode="clip")  # [C, 2, K, P, D]
    if kv.dtype == jnp.uint16 and not narrow:
        tile = jax.lax.bitcast_convert_type(tile, dtype)
    tile = tile.transpose(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)
    positions = first_position + jnp.arange(blocks.shape[0] * block_size)
    used = (positions < limit)[:, None]
    if narrow:  # As integers, which XLA's CPU backend need not widen to mask them.
        tile = jnp.where(used, tile, jnp.uint16(0))
        tile = jax.lax.bitcast_convert_type(tile, dtype)
        return KeyTile(tile[0], tile[1], positions)
    tile = jnp.where(used, tile.astype(jnp.float32), 0)
    if scales is not None:
        tile = tile * scales.astype(jnp.float32)[:, :, None, None]
    return KeyTile(tile[0], tile[1], positions)


def attend_dense(
    queries: QueryTile,
    cache: Cache,
    block_table: Int[Array, " M"],
    length: Int[Array, ""],
    options: ScoreOptions,
) -> Float[Array, "Q H D"]:
    """Attends queries of one sequence to its whole table at once; differentiable."""
    q, positions = queries
    tile = load_blocks(cache, block_table, 0, length, q.dtype)
    visible = _visible(positions, tile.positions, options)
    scores = _scores(_grouped(q, cache), positions, tile, visible, options)
    sinks = _sinks(options, scores)
    # At least zero: as good a shift as any, and finite where nothing is visible.
    peak = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1), sinks))
    weights = jnp.exp(scores - peak[..., None])
    weights = jnp.where(visible[None, :, None, :], weights, 0)
    total = weights.sum(axis=-1) + jnp.where(sinks > MASKED, jnp.exp(sinks - peak), 0)
    products = jnp.einsum("kqgn,knd->kqgd", weights, tile.values)
    return _normalised(products, total, q)


def attend_blocked(
    queries: QueryTile,
    cache: Cache,
    block_table: Int[Array, " M"],
    length: Int[Array, ""],
    options: ScoreOptions,
    *,
    blocks_per_chunk: int,
) -> Float[Array, "Q H D"]:
    """Attends queries of one sequence to what they see, chunk by chunk of blocks.

    Online softmax: the running maximum, sum and weighted values are rescaled when a
    chunk raises the maximum. `block_table` must hold a whole number of chunks.
    Source: FlashAttention-2, arXiv:2307.08691 section 2.3.
    """
    q, positions = queries
    num_kv_heads, block_size = cache.kv.shape[2:4]
    grouped = _grouped(q, cache)
    keys_per_chunk = blocks_per_chunk * block_size
    # XLA's CPU backend multiplies bfloat16 as it is where there are two rows or more.
    narrow = q.dtype == jnp.bfloat16 and cache.kv.dtype == jnp.uint16
    narrow &= q.shape[0] * grouped.shape[2] > 1

    def add_chunk(
        chunk: Int[Array, ""], carry: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        maximum, total, weighted = carry
        first = chunk * blocks_per_chunk
        blocks = jax.lax.dynamic_slice_in_dim(block_table, first, blocks_per_chunk)
        tile = load_blocks(
            cache, blocks, first * block_size, length, q.dtype, narrow=narrow
        )
        visible = _visible(positions, tile.positions, options)
        scores = _scores(grouped, positions, tile, visible, options)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
        decay = jnp.exp(maximum - new_maximum)
        weights = jnp.exp(scores - new_maximum[..., None])
        weights = jnp.where(visible[None, :, None, :], weights, 0)
        products = jnp.einsum(
            "kqgn,knd->kqgd",
            weights.astype(tile.values.dtype),
            tile.values,
            preferred_element_type=jnp.float32,
        )
        return (
            new_maximum,
            total * decay + weights.sum(axis=-1),
            weighted * decay[..., None] + products,
        )

    shape = (num_kv_heads, q.shape[0], grouped.shape[2])
    sinks = jnp.broadcast_to(_sinks(options, jnp.zeros((*shape, 1))), shape)
    start = (
        sinks,
        (sinks > MASKED).astype(jnp.float32),
        jnp.zeros((*shape, q.shape[-1]), jnp.float32),
    )
    # Nothing before the oldest query's window, nothing after the newest query.
    first_key = jnp.zeros((), jnp.int32)
    if options.window is not None:
        oldest = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions).min()
        first_key = jnp.maximum(oldest - (options.window - 1), 0)
    end_key = jnp.minimum(positions.max() + 1, length)
    _, total, weighted = jax.lax.fori_loop(
        first_key // keys_per_chunk, -(-end_key // keys_per_chunk), add_chunk, start
    )
    return _normalised(weighted, total, q)


def pad_tables(
    block_tables: Int[Array, "S M"], blocks_per_chunk: int
) -> Int[Array, "S N"]:
    """Widens the tables to a whole number of chunks."""
    missing = -block_tables.shape[1] % blocks_per_chunk
    return jnp.pad(block_tables, ((0, 0), (0, missing)))


def _grouped(q: Float[Array, "Q H D"], cache: Cache) -> Float[Array, "Q K G D"]:
    return q.reshape(q.shape[0], cache.kv.shape[2], -1, q.shape[-1])


def _scores(
    q: Float[Array, "Q K G D"],
    q_positions: Int[Array, " Q"],
    tile: KeyTile,
    visible: Bool[Array, "Q N"],
    options: ScoreOptions,
) -> Float[Array, "K Q G N"]:
    """Scores in float32, `MASKED` where not visible."""
    products = jnp.einsum(
        "qkgd,knd->kqgn",
        q.astype(tile.keys.dtype),
        tile.keys,
        preferred_element_type=jnp.float32,
    )
    scores = products * options.scale
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.reshape(q.shape[1], 1, q.shape[2], 1)
        distance = tile.positions[None, :] - q_positions[:, None]  # [Q, N]
        distance = distance.astype(jnp.float32)[None, :, None, :]
        scores = scores + slopes.astype(jnp.float32) * distance
    return jnp.where(visible[None, :, None, :], scores, MASKED)


def _visible(
    q_positions: Int[Array, " Q"],
    key_positions: Int[Array, " N"],
    options: ScoreOptions,
) -> Bool[Array, "Q N"]:
    """A query sees keys up to its own position; position -1 sees none."""
    distance = q_positions[:, None] - key_positions[None, :]
    visible = (distance >= 0) & (q_positions >= 0)[:, None]
    return visible if options.window is None else visible & (distance < options.window)


def _sinks(options: ScoreOptions, scores: Float[Array, "K Q G N"]) -> Array:
    """The sinks' scores as `[K, 1, G]`, `MASKED` where there are none."""
    num_kv_heads, _, group, _ = scores.shape
    if options.sinks is None:
        return jnp.full((num_kv_heads, 1, group), MASKED, jnp.float32)
    return options.sinks.astype(jnp.float32).reshape(num_kv_heads, 1, group)


def _normalised(
    weighted: Float[Array, "K Q G D"],
    total: Float[Array, "K Q G"],
    q: Float[Array, "Q H D"],
) -> Float[Array, "Q H D"]:
    """Divides by the sums of the weights; no weight at all gives zeros."""
    out = weighted / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return out.transpose(1, 0, 2, 3).reshape(q.shape).astype(q.dtype)
