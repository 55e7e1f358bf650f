"""Tile after tile of queries and keys, only what is live; for the CPU."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.flash_attention.gradient import Gradients, Saved, attend
from pallas_kernels.flash_attention.rules import (
    LOG2_E,
    LOWEST,
    MASKED,
    NOTHING_SEEN,
    Arrays,
    Rules,
    live_ranges,
    make_rules,
    make_tiles,
)

TILE_Q = 128
TILE_K = 256
"""A tile of scores of one head and both operands stay in the processor's cache."""


def flash_attention_blocked(
    q: Float[Array, "N T H D"],
    k: Float[Array, "N S K D"],
    v: Float[Array, "N S K D"],
    options: ScoreOptions,
    causal: bool,  # noqa: FBT001 (all implementations take it by place)
    q_segment_ids: Int[Array, "N T"] | None,
    kv_segment_ids: Int[Array, "N S"] | None,
) -> Float[Array, "N T H D"]:
    """Attends in memory proportional to T + S; see `api.flash_attention`."""
    arrays = Arrays(
        q, k, v, options.sinks, options.alibi_slopes, q_segment_ids, kv_segment_ids
    )
    return attend(
        _forward, _backward, arrays, make_rules(arrays, options, causal=causal)
    )


class _Tiled(NamedTuple):
    """Whole tiles, one KV head or group of query heads after the other."""

    q: Float[Array, "N K G T D"]
    k: Float[Array, "N K S D"]
    v: Float[Array, "N K S D"]
    sinks: Float[Array, "1 K G 1"] | None
    slopes: Float[Array, "1 K G 1 1"] | None
    q_segments: Int[Array, "N T"] | None
    kv_segments: Int[Array, "N S"] | None
    tile_q: int
    tile_k: int


def _pad(x: Array, axis: int, tile: int) -> Array:
    """Zeros up to a whole number of tiles."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % tile)
    return jnp.pad(x, widths)


def _by_head(x: Float[Array, "N T H D"], num_kv_heads: int) -> Array:
    n, t, h, d = x.shape
    grouped = x.reshape(n, t, num_kv_heads, h // num_kv_heads, d)
    return grouped.transpose(0, 2, 3, 1, 4)


def _per_head(x: Array | None, shape: tuple[int, ...]) -> Array | None:
    return None if x is None else x.astype(jnp.float32).reshape(shape)


def _tiled(arrays: Arrays) -> _Tiled:
    num_kv_heads = arrays.k.shape[2]
    tile_q = min(TILE_Q, arrays.q.shape[1])
    tile_k = min(TILE_K, arrays.k.shape[1])
    q_ids, kv_ids = arrays.q_segments, arrays.kv_segments
    return _Tiled(
        q=_pad(_by_head(arrays.q, num_kv_heads), 3, tile_q),
        k=_pad(arrays.k.swapaxes(1, 2), 2, tile_k),
        v=_pad(arrays.v.swapaxes(1, 2), 2, tile_k),
        sinks=_per_head(arrays.sinks, (1, num_kv_heads, -1, 1)),
        slopes=_per_head(arrays.slopes, (1, num_kv_heads, -1, 1, 1)),
        q_segments=None if q_ids is None else _pad(q_ids, 1, tile_q),
        kv_segments=None if kv_ids is None else _pad(kv_ids, 1, tile_k),
        tile_q=tile_q,
        tile_k=tile_k,
    )


def _slice(x: Array, index: Array, tile: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * tile, tile, axis)


class _Scores(NamedTuple):
    """One tile of scores times log2(e)."""

    scores: Float[Array, "N K G I J"]
    derivative: Float[Array, "N K G I J"] | None
    bias: Float[Array, "1 1 1 I J"] | None


def _score_tile(
    tiled: _Tiled, rules: Rules, q_tile: Array, k_tile: Array, i: Array, j: Array
) -> _Scores:
    """Scores of float32 tiles; masked ones are so low that they weigh nothing."""
    products = jnp.einsum("nkgtd,nksd->nkgts", q_tile, k_tile)
    rows = (i * tiled.tile_q + jnp.arange(tiled.tile_q))[None, None, None, :, None]
    columns = (j * tiled.tile_k + jnp.arange(tiled.tile_k))[None, None, None, None, :]
    q_ids, kv_ids, bias = None, None, None
    if tiled.q_segments is not None and tiled.kv_segments is not None:
        q_ids = _slice(tiled.q_segments, i, tiled.tile_q, 1)
        q_ids = q_ids[:, None, None, :, None]
        kv_ids = _slice(tiled.kv_segments, j, tiled.tile_k, 1)
        kv_ids = kv_ids[:, None, None, None, :]
    if tiled.slopes is not None:
        bias = rules.bias(rows, columns)
    scores, derivative = rules.scores(products, bias, tiled.slopes)
    visible = rules.visible(rows, columns, q_ids, kv_ids)
    return _Scores(jnp.where(visible, scores, MASKED), derivative, bias)


def _spans(ranges: Int[Array, "B I 4"]) -> Int[Array, "I 2"]:
    """First and end of what is live in any sequence of the batch."""
    ends = ranges[:, :, 3]
    firsts = jnp.where(ends > 0, ranges[:, :, 0], jnp.iinfo(jnp.int32).max)
    return jnp.stack([firsts.min(axis=0), ends.max(axis=0)], axis=-1)


def _loop(
    span: Int[Array, " 2"],
    body: Callable[[Array, tuple[Array, ...]], tuple[Array, ...]],
) -> Callable[[tuple[Array, ...]], tuple[Array, ...]]:
    return lambda start: jax.lax.fori_loop(span[0], span[1], body, start)


def _forward(arrays: Arrays, rules: Rules) -> tuple[Array, Array]:
    tiled = _tiled(arrays)
    tile_q, tile_k = tiled.tile_q, tiled.tile_k
    tiles = make_tiles(rules, arrays, tile_q, tile_k)
    spans = _spans(live_ranges(tiles))
    n, num_kv_heads, group, _, width = tiled.q.shape
    shape = (n, num_kv_heads, group, tile_q)

    def attend_tile(numbers: tuple[Array, Array]) -> tuple[Array, Array]:
        i, span = numbers
        q_tile = _slice(tiled.q, i, tile_q, 3).astype(jnp.float32)

        def add(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            peak, total, weighted = carry
            k_tile = _slice(tiled.k, j, tile_k, 2).astype(jnp.float32)
            v_tile = _slice(tiled.v, j, tile_k, 2).astype(jnp.float32)
            scores = _score_tile(tiled, rules, q_tile, k_tile, i, j).scores
            new_peak = jnp.maximum(peak, scores.max(axis=-1))
            decay = jnp.exp2(peak - new_peak)
            weights = jnp.exp2(scores - new_peak[..., None])
            products = jnp.einsum("nkgts,nksd->nkgtd", weights, v_tile)
            return (
                new_peak,
                total * decay + weights.sum(axis=-1),
                weighted * decay[..., None] + products,
            )

        peak, total = jnp.full(shape, LOWEST), jnp.zeros(shape)
        if tiled.sinks is not None:
            peak = jnp.broadcast_to(tiled.sinks * LOG2_E, shape)
            total = jnp.ones(shape)
        start = (peak, total, jnp.zeros((*shape, width)))
        peak, total, weighted = _loop(span, add)(start)
        safe = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, peak / LOG2_E + jnp.log(safe), NOTHING_SEEN)
        return (weighted / safe[..., None]).astype(arrays.q.dtype), lse

    out, lse = jax.lax.map(attend_tile, (jnp.arange(spans.shape[0]), spans))
    lse = lse.transpose(1, 2, 3, 0, 4).reshape(n, num_kv_heads * group, -1)
    return _from_tiles(out, arrays.q), lse[:, :, : rules.num_queries]


def _from_tiles(
    x: Float[Array, "I N K G U D"], like: Float[Array, "N T H D"]
) -> Float[Array, "N T H D"]:
    n, t, h, d = like.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(n, -1, h, d)[:, :t]


def _backward(arrays: Arrays, rules: Rules, saved: Saved) -> Gradients:
    tiled = _tiled(arrays)
    tile_q, tile_k = tiled.tile_q, tiled.tile_k
    tiles = make_tiles(rules, arrays, tile_q, tile_k)
    spans = _spans(live_ranges(tiles.transposed()))
    n, num_kv_heads, group, padded, width = tiled.q.shape
    d_out = _pad(_by_head(saved.d_out, num_kv_heads), 3, tile_q)
    by_row = (n, num_kv_heads, group, padded)
    lse = _pad(saved.lse, 2, tile_q).reshape(by_row) * LOG2_E
    delta = _pad(saved.delta, 2, tile_q).reshape(by_row)

    def visit_keys(
        carry: tuple[Array, Array], numbers: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        j, span = numbers
        k_tile = _slice(tiled.k, j, tile_k, 2).astype(jnp.float32)
        v_tile = _slice(tiled.v, j, tile_k, 2).astype(jnp.float32)

        def add(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            dq, d_slopes, dk, dv = carry
            q_tile = _slice(tiled.q, i, tile_q, 3).astype(jnp.float32)
            d_out_tile = _slice(d_out, i, tile_q, 3).astype(jnp.float32)
            tile = _score_tile(tiled, rules, q_tile, k_tile, i, j)
            weights = jnp.exp2(tile.scores - _slice(lse, i, tile_q, 3)[..., None])
            d_weights = jnp.einsum("nkgtd,nksd->nkgts", d_out_tile, v_tile)
            d_scores = weights * (d_weights - _slice(delta, i, tile_q, 3)[..., None])
            if tile.bias is not None:
                d_slopes = d_slopes + (d_scores * tile.bias).sum(axis=(0, 3, 4))
            if tile.derivative is not None:
                d_scores = d_scores * tile.derivative
            more = jnp.einsum("nkgts,nksd->nkgtd", d_scores, k_tile)
            so_far = _slice(dq, i, tile_q, 3)
            dq = jax.lax.dynamic_update_slice_in_dim(dq, so_far + more, i * tile_q, 3)
            dk = dk + jnp.einsum("nkgts,nkgtd->nksd", d_scores, q_tile)
            dv = dv + jnp.einsum("nkgts,nkgtd->nksd", weights, d_out_tile)
            return dq, d_slopes, dk, dv

        zeros = jnp.zeros((n, num_kv_heads, tile_k, width))
        dq, d_slopes, dk, dv = _loop(span, add)((*carry, zeros, zeros))
        return (dq, d_slopes), (dk, dv)

    start = (jnp.zeros((*by_row, width)), jnp.zeros((num_kv_heads, group)))
    (dq, d_slopes), (dk, dv) = jax.lax.scan(
        visit_keys, start, (jnp.arange(spans.shape[0]), spans)
    )

    def keys(x: Float[Array, "J N K U D"]) -> Array:
        whole = x.transpose(1, 0, 3, 2, 4).reshape(n, -1, num_kv_heads, width)
        return whole[:, : rules.num_keys].astype(arrays.k.dtype)

    dq = dq.transpose(0, 3, 1, 2, 4).reshape(n, padded, -1, width)
    scale = rules.scale
    return Gradients(
        q=(dq[:, : rules.num_queries] * scale).astype(arrays.q.dtype),
        k=keys(dk * scale),
        v=keys(dv),
        slopes=None if arrays.slopes is None else d_slopes.reshape(-1),
    )
