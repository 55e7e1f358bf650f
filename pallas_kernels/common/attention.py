"""Pieces of attention over a paged cache that both attention operations use."""

from functools import partial
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
    """Queries of one sequence, or of each of several; position -1 sees nothing."""

    q: Float[Array, "*R Q H D"]
    positions: Int[Array, "*R Q"]


class KeyTile(NamedTuple):
    """Keys and values of some blocks of one sequence, one run of places per head."""

    keys: Float[Array, "K N D"]
    values: Float[Array, "K N D"]
    positions: Int[Array, " N"]


class Softmax(NamedTuple):
    """An online softmax: largest score, sum of weights, weighted sum of values."""

    maximum: Float[Array, "*R K Q G"]
    total: Float[Array, "*R K Q G"]
    weighted: Float[Array, "*R K Q G D"]


def check_lengths(lengths: Array, block_tables: Array) -> None:
    """Raises ValueError unless each table has one length."""
    if lengths.shape != block_tables.shape[:1]:
        raise ValueError(
            f"lengths has shape {lengths.shape}, expected one for each of the "
            f"{block_tables.shape[0]} block_tables"
        )


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
    num_places = blocks.shape[0] * block_size
    if kv.dtype in (jnp.uint16, jnp.float32):
        parts = _gather_runs(kv, blocks, limit - first_position)
    else:
        tile = kv.at[blocks].get(mode="clip")  # [C, 2, K, P, D]
        tile = tile.transpose(1, 2, 0, 3, 4)
        tile = tile.reshape(2, num_kv_heads, num_places, head_dim)
        used = (jnp.arange(num_places) < limit - first_position)[:, None]
        tile = jnp.where(used, tile.astype(jnp.float32), 0)
        parts = (tile[0], tile[1])
    if kv.dtype == jnp.uint16:
        parts = [jax.lax.bitcast_convert_type(part, dtype) for part in parts]
    if not narrow:
        parts = [part.astype(jnp.float32) for part in parts]
    if scales is not None:
        factors = scales.astype(jnp.float32)[:, :, None, None]
        parts = [part * factor for part, factor in zip(parts, factors, strict=True)]
    return KeyTile(parts[0], parts[1], first_position + jnp.arange(num_places))


def _gather_runs(
    kv: Shaped[Array, "B 2 K P D"], blocks: Int[Array, " C"], num_used: Array | int
) -> list[Shaped[Array, "K N D"]]:
    """Keys and values of some blocks; places from `num_used` on are zero.

    XLA's CPU backend gathers long runs fast, here all places of a head in a block, and
    joins a gather with what follows where it has one user: hence one for the keys and
    one for the values. Both are masked, since arithmetic makes XLA divide a gather
    among the cores; as integers, which it need not widen.
    """
    num_blocks, _, num_kv_heads, block_size, head_dim = kv.shape
    runs = kv.reshape(-1, block_size * head_dim)
    blocks = jnp.clip(blocks, 0, num_blocks - 1)
    keys_at = 2 * num_kv_heads * blocks[None, :] + jnp.arange(num_kv_heads)[:, None]
    used = jnp.arange(blocks.shape[0] * block_size * head_dim) < num_used * head_dim
    used = used[None, :]

    def gather(places: Array) -> Array:
        found = runs.at[places].get(mode="promise_in_bounds")
        masked = jnp.where(used, found.reshape(num_kv_heads, -1), kv.dtype.type(0))
        return masked.reshape(num_kv_heads, -1, head_dim)

    return [gather(keys_at), gather(keys_at + num_kv_heads)]


def attend_dense(
    queries: QueryTile,
    cache: Cache,
    block_table: Int[Array, " M"],
    length: Int[Array, ""],
    options: ScoreOptions,
) -> Float[Array, "Q H D"]:
    """Attends queries of one sequence to its whole table at once; differentiable."""
    tile = load_blocks(cache, block_table, 0, length, queries.q.dtype)
    weights, total = _dense_softmax(queries, cache, tile, options)
    products = jnp.einsum("kqgn,knd->kqgd", weights, tile.values)
    return _normalised(products, total, queries.q)


def dense_weights(
    queries: QueryTile,
    cache: Cache,
    block_table: Int[Array, " M"],
    length: Int[Array, ""],
    options: ScoreOptions,
) -> Float[Array, "Q H N"]:
    """How much of each place of the table a query takes; zero where it sees nothing."""
    tile = load_blocks(cache, block_table, 0, length, queries.q.dtype)
    weights, total = _dense_softmax(queries, cache, tile, options)
    weights = weights / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    num_queries, num_heads, _ = queries.q.shape
    return weights.transpose(1, 0, 2, 3).reshape(num_queries, num_heads, -1)


def _dense_softmax(
    queries: QueryTile, cache: Cache, tile: KeyTile, options: ScoreOptions
) -> tuple[Float[Array, "K Q G N"], Float[Array, "K Q G"]]:
    """Weights of all places of a table, and their sum, a sink's included."""
    q, positions = queries
    visible = _visible(positions, tile.positions, options)
    scores = _scores(_grouped(q, cache), positions, tile, visible, options)
    sinks = _sinks(options, scores)
    # At least zero: as good a shift as any, and finite where nothing is visible.
    peak = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1), sinks))
    weights = jnp.exp(scores - peak[..., None])
    weights = jnp.where(visible[None, :, None, :], weights, 0)
    total = weights.sum(axis=-1) + jnp.where(sinks > MASKED, jnp.exp(sinks - peak), 0)
    return weights, total


def attend_blocked(
    queries: QueryTile,
    cache: Cache,
    block_tables: Int[Array, "R M"],
    lengths: Int[Array, " R"],
    options: ScoreOptions,
    *,
    blocks_per_chunk: int,
) -> Float[Array, "R Q H D"]:
    """Attends queries of some sequences to what they see, chunk by chunk of blocks.

    Online softmax: the running maximum, sum and weighted values are rescaled when a
    chunk raises the maximum. All sequences take as many chunks as the longest; their
    tables must hold a whole number of chunks.
    Source: FlashAttention-2, arXiv:2307.08691 section 2.3.

    Args:
        queries: Those of all sequences, `[R, Q, H, D]` and `[R, Q]`.
        cache: The pool.
        block_tables: Blocks of each.
        lengths: Their lengths, the queries' own tokens included.
        options: How scores are made.
        blocks_per_chunk: Blocks of each sequence in a turn.
    """
    q, positions = queries
    num_kv_heads, block_size = cache.kv.shape[2:4]
    group = q.shape[2] // num_kv_heads
    keys_per_chunk = blocks_per_chunk * block_size

    def add_chunk(chunk: Int[Array, ""], carry: Softmax) -> Softmax:
        first = chunk * blocks_per_chunk
        blocks = jax.lax.dynamic_slice_in_dim(block_tables, first, blocks_per_chunk, 1)
        add = partial(_add_keys, cache, options, first * block_size)
        return jax.vmap(add)(queries, blocks, lengths, carry)

    shape = (q.shape[0], num_kv_heads, q.shape[1], group)
    sinks = _sinks(options, jnp.zeros((*shape[1:], 1)))
    start = Softmax(
        jnp.broadcast_to(sinks, shape),
        jnp.broadcast_to((sinks > MASKED).astype(jnp.float32), shape),
        jnp.zeros((*shape, q.shape[-1]), jnp.float32),
    )
    # Nothing before the oldest query's window, nothing after the newest query.
    first_key = jnp.zeros((), jnp.int32)
    if options.window is not None:
        oldest = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions).min()
        first_key = jnp.maximum(oldest - (options.window - 1), 0)
    end_key = jnp.minimum(positions.max(axis=1) + 1, lengths).max()
    done = jax.lax.fori_loop(
        first_key // keys_per_chunk, -(-end_key // keys_per_chunk), add_chunk, start
    )
    return jax.vmap(_normalised)(done.weighted, done.total, q)


def _add_keys(
    cache: Cache,
    options: ScoreOptions,
    first_position: Int[Array, ""],
    queries: QueryTile,
    blocks: Int[Array, " C"],
    length: Int[Array, ""],
    so_far: Softmax,
) -> Softmax:
    """Adds the keys of some blocks of one sequence to its softmax."""
    q, positions = queries
    grouped = _grouped(q, cache)
    # XLA's CPU backend multiplies bfloat16 as it is where there are two rows or more.
    narrow = q.dtype == jnp.bfloat16 and cache.kv.dtype == jnp.uint16
    narrow &= q.shape[0] * grouped.shape[2] > 1
    tile = load_blocks(cache, blocks, first_position, length, q.dtype, narrow=narrow)
    visible = _visible(positions, tile.positions, options)
    scores = _scores(grouped, positions, tile, visible, options)
    # Above the masked scores, so that their weights are zero without a second mask.
    maximum = jnp.maximum(so_far.maximum, jnp.maximum(scores.max(axis=-1), MASKED / 2))
    decay = jnp.exp(so_far.maximum - maximum)
    weights = jnp.exp(scores - maximum[..., None])
    products = jnp.einsum(
        "kqgn,knd->kqgd",
        weights.astype(tile.values.dtype),
        tile.values,
        preferred_element_type=jnp.float32,
    )
    return Softmax(
        maximum,
        so_far.total * decay + weights.sum(axis=-1),
        so_far.weighted * decay[..., None] + products,
    )


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
