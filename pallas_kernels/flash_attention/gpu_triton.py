"""Forward and backward kernels in Pallas on Triton."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int

from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes
from pallas_kernels.flash_attention.gradient import Gradients, Saved, attend
from pallas_kernels.flash_attention.rules import (
    LOG2_E,
    LOWEST,
    MASKED,
    NOTHING_SEEN,
    Arrays,
    Rules,
    Tiles,
    live_ranges,
    make_rules,
    make_tiles,
    tanh_by_exp2,
)

MAX_HEAD_DIM = 256
MAX_ELEMENTS = 2**31
"""Triton's offsets into an array are int32."""
MIN_TILE = 16
"""Least extent of an operand of Triton's product."""


def flash_attention_gpu_triton(
    q: Float[Array, "N T H D"],
    k: Float[Array, "N S K D"],
    v: Float[Array, "N S K D"],
    options: ScoreOptions,
    causal: bool,  # noqa: FBT001 (all implementations take it by place)
    q_segment_ids: Int[Array, "N T"] | None,
    kv_segment_ids: Int[Array, "N S"] | None,
    *,
    target: Target,
) -> Float[Array, "N T H D"]:
    """Attends with Triton kernels; see `api.flash_attention`."""
    arrays = Arrays(
        q, k, v, options.sinks, options.alibi_slopes, q_segment_ids, kv_segment_ids
    )
    check_supported(arrays)
    return attend(
        functools.partial(_forward, target=target),
        functools.partial(backward, target=target),
        arrays,
        make_rules(arrays, options, causal=causal),
    )


def check_supported(arrays: Arrays) -> None:
    """Raises NotImplementedError for what no kernel of this file can do."""
    q, k = arrays.q, arrays.k
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"type {q.dtype}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise NotImplementedError(f"head width {q.shape[-1]} over {MAX_HEAD_DIM}")
    if max(q.size, k.size) >= MAX_ELEMENTS:
        raise NotImplementedError("arrays of 2**31 elements or more")


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """All that is static of one kernel.

    Attributes:
        rules: Who sees whom.
        tile_q: Queries of a tile.
        tile_k: Keys of a tile.
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
        group: Query heads per KV head.
        head_dim: Head width `D`.
        width: Head width as the kernel sees it, a power of two.
        has_full: Whether any tile may be full.
        has_partial: Whether any tile may be partly masked.
        target: Device.
    """

    rules: Rules
    tile_q: int
    tile_k: int
    num_warps: int
    num_stages: int
    group: int
    head_dim: int
    width: int
    has_full: bool
    has_partial: bool
    target: Target

    @property
    def params(self) -> dict[str, Any]:
        """Arguments of every `pallas_call`."""
        return {
            "compiler_params": pltriton.CompilerParams(
                num_warps=self.num_warps, num_stages=self.num_stages
            ),
            "interpret": self.target.interpret,
        }

    def q_plane(self, heads: int | None, index: Callable[..., Any]) -> pl.BlockSpec:
        """One or several heads of an array like the queries; `index` gives (n, h)."""
        rows = pl.cdiv(self.rules.num_queries, self.tile_q) * self.tile_q
        return self._plane(rows, heads, index)

    def k_plane(self, index: Callable[..., Any]) -> pl.BlockSpec:
        """One head of an array like the keys."""
        rows = pl.cdiv(self.rules.num_keys, self.tile_k) * self.tile_k
        return self._plane(rows, None, index)

    def _plane(
        self, rows: int, heads: int | None, index: Callable[..., Any]
    ) -> pl.BlockSpec:
        def place(*ids: Any) -> tuple[Any, ...]:
            n, h = index(*ids)
            return n, 0, h, 0

        return pl.BlockSpec((None, rows, heads, self.width), place)

    def q_rows(self, heads: int | None, index: Callable[..., Any]) -> pl.BlockSpec:
        """One number for each query of one or several heads, from `[N, H, T]`."""
        rows = pl.cdiv(self.rules.num_queries, self.tile_q) * self.tile_q
        return pl.BlockSpec((None, heads, rows), lambda *ids: (*index(*ids), 0))


class _Extras(NamedTuple):
    """Arrays, their specifications or references; None where there are none."""

    sinks: Any
    slopes: Any
    q_segments: Any
    kv_segments: Any


def _extras(arrays: Arrays, call: _Call) -> tuple[_Extras, _Extras]:
    """The small arrays and their specifications; the batch is the last grid axis."""
    num_heads = (arrays.q.shape[2],)
    rows = pl.cdiv(call.rules.num_queries, call.tile_q) * call.tile_q
    columns = pl.cdiv(call.rules.num_keys, call.tile_k) * call.tile_k
    heads = pl.BlockSpec(num_heads, lambda *_: (0,))
    values = _Extras(*arrays[3:])
    specs = _Extras(
        heads,
        heads,
        pl.BlockSpec((None, rows), lambda *ids: (ids[-1], 0)),
        pl.BlockSpec((None, columns), lambda *ids: (ids[-1], 0)),
    )
    kept = [None if x is None else spec for x, spec in zip(values, specs, strict=True)]
    return values, _Extras(*kept)


def _default_sizes(kernel: str, width: int, dtype: Any) -> dict[str, int]:
    """Sizes that fit into the registers and the shared memory of sm_80 to sm_90."""
    if dtype == jnp.float32:
        tiles = {"forward": (64, 32), "dq": (32, 32), "dkv": (32, 32)}[kernel]
        if width > 128:
            tiles = (32, 16) if kernel == "forward" else (16, 16)
        warps, stages = 8 if width > 128 else 4, 2
    elif width > 128:
        tiles = {"forward": (128, 32), "dq": (64, 32), "dkv": (32, 64)}[kernel]
        warps, stages = 8, 2
    elif width > 64:
        tiles = {"forward": (128, 64), "dq": (128, 64), "dkv": (64, 128)}[kernel]
        warps, stages = 8, 3 if kernel == "forward" else 2
    else:
        tiles = {"forward": (128, 64), "dq": (128, 64), "dkv": (64, 128)}[kernel]
        warps, stages = (4, 3) if kernel == "forward" else (8, 2)
    return {
        "tile_q": tiles[0],
        "tile_k": tiles[1],
        "num_warps": warps,
        "num_stages": stages,
    }


def _make_call(
    kernel: str, arrays: Arrays, rules: Rules, target: Target
) -> tuple[_Call, Tiles]:
    head_dim = arrays.q.shape[3]
    width = max(MIN_TILE, pl.next_power_of_2(head_dim))
    dtype = arrays.q.dtype
    default = _default_sizes(kernel, width, dtype)
    key = f"triton_{kernel}_{dtype}_{width}"
    sizes = dict(tuned_sizes("flash_attention", target, key, default))
    for name, rows in (("tile_q", rules.num_queries), ("tile_k", rules.num_keys)):
        sizes[name] = max(MIN_TILE, min(sizes[name], pl.next_power_of_2(rows)))
    tiles = make_tiles(rules, arrays, sizes["tile_q"], sizes["tile_k"])
    known = isinstance(tiles.live, np.ndarray)
    call = _Call(
        rules=rules,
        group=arrays.q.shape[2] // arrays.k.shape[2],
        head_dim=head_dim,
        width=width,
        has_full=not known or bool((tiles.full & tiles.live).any()),
        has_partial=not known or bool((tiles.live & ~tiles.full).any()),
        target=target,
        **sizes,
    )
    return call, tiles


def _load(
    call: _Call,
    ref: Any,
    start: Any,
    *,
    is_query: bool,
    member: Array | None = None,
) -> Array:
    """A tile of one head; zeros past the last row and past the head width."""
    rules = call.rules
    limit = rules.num_queries if is_query else rules.num_keys
    tile = call.tile_q if is_query else call.tile_k
    mask = None
    if limit % tile:
        rows = start + jnp.arange(tile)
        mask = jnp.broadcast_to(rows[:, None] < limit, (tile, call.width))
    if call.head_dim < call.width:
        inside = jnp.arange(call.width)[None, :] < call.head_dim
        inside = jnp.broadcast_to(inside, (tile, call.width))
        mask = inside if mask is None else mask & inside
    rows = pl.ds(start, tile)
    place = ref.at[rows, :] if member is None else ref.at[rows, member, :]
    if mask is None:
        return pltriton.load(place)
    return pltriton.load(place, mask=mask, other=0.0)


def _store(call: _Call, ref: Any, values: Array, start: Any, limit: int) -> None:
    """Writes a tile of rows, nothing past the last row and the head width."""
    tile = values.shape[0]
    inside = (start + jnp.arange(tile))[:, None] < limit
    inside = inside & (jnp.arange(call.width)[None, :] < call.head_dim)
    place = ref.at[pl.ds(start, tile), :]
    pltriton.store(place, values.astype(ref.dtype), mask=inside)


def _load_row(
    ref: Any, start: Any, limit: int, tile: int, member: Array | None = None
) -> Array:
    """Numbers of a tile of rows; zeros past the last one."""
    rows = pl.ds(start, tile)
    place = ref.at[rows] if member is None else ref.at[member, rows]
    if limit % tile == 0:
        return pltriton.load(place)
    return pltriton.load(place, mask=start + jnp.arange(tile) < limit, other=0)


def _store_row(ref: Any, values: Array, start: Any, limit: int) -> None:
    tile = values.shape[0]
    inside = start + jnp.arange(tile) < limit
    pltriton.store(ref.at[pl.ds(start, tile)], values, mask=inside)


def _loop(call: _Call, ranges: Any, step: Callable[..., Any], start: Any) -> Any:
    """Runs `step(tile, carry, partial=...)` over the live tiles, full ones first."""
    first, full_first, full_end, end = (ranges[number] for number in range(4))
    carry = start
    if call.has_full:
        carry = jax.lax.fori_loop(
            full_first, full_end, functools.partial(step, partial=False), carry
        )
    if call.has_partial:
        leading = full_first - first

        def partial_step(number: Array, carry: Any) -> Any:
            tile = jnp.where(
                number < leading, first + number, full_end + (number - leading)
            )
            return step(tile, carry, partial=True)

        count = leading + (end - full_end)
        carry = jax.lax.fori_loop(jnp.zeros_like(count), count, partial_step, carry)
    return carry


class _Tile(NamedTuple):
    """A tile of scores times log2(e), and what its gradient needs."""

    scores: Array
    derivative: Array | None
    bias: Array | None


def _scores(
    call: _Call,
    extras: _Extras,
    products: Array,
    place: tuple[Array, Array, Any],
    *,
    partial: bool,
    transposed: bool = False,
) -> _Tile:
    """Makes scores of products at (first row, first column, head)."""
    first_row, first_column, head = place
    rows = first_row + jnp.arange(call.tile_q)
    columns = first_column + jnp.arange(call.tile_k)

    def spread(x: Array, *, is_row: bool) -> Array:
        return x[:, None] if is_row != transposed else x[None, :]

    bias, slope = None, None
    if extras.slopes is not None:
        bias = call.rules.bias(spread(rows, is_row=True), spread(columns, is_row=False))
        slope = extras.slopes[head].astype(jnp.float32)
    scores, derivative = call.rules.scores(products, bias, slope, tanh_by_exp2)
    if partial:
        q_ids, kv_ids = None, None
        if extras.q_segments is not None:
            limits = call.rules.num_queries, call.rules.num_keys
            q_ids = _load_row(extras.q_segments, first_row, limits[0], call.tile_q)
            kv_ids = _load_row(extras.kv_segments, first_column, limits[1], call.tile_k)
            q_ids = spread(q_ids, is_row=True)
            kv_ids = spread(kv_ids, is_row=False)
        visible = call.rules.visible(
            spread(rows, is_row=True), spread(columns, is_row=False), q_ids, kv_ids
        )
        scores = jnp.where(visible, scores, MASKED)
    return _Tile(scores, derivative, bias)


def _tile_number(call: _Call) -> Array:
    """Tile of queries of this program; causal ones have the longest work first."""
    index = pl.program_id(0)
    return pl.num_programs(0) - 1 - index if call.rules.causal else index


def _forward(arrays: Arrays, rules: Rules, *, target: Target) -> tuple[Array, Array]:
    call, tiles = _make_call("forward", arrays, rules, target)
    n, _, num_heads, _ = arrays.q.shape
    ranges = live_ranges(tiles)
    extras, extra_specs = _extras(arrays, call)
    lse = jax.ShapeDtypeStruct((n, num_heads, rules.num_queries), jnp.float32)
    q_plane = call.q_plane(None, lambda _, h, n: (n, h))
    k_plane = call.k_plane(lambda _, h, n: (n, h // call.group))
    return pl.pallas_call(
        functools.partial(_forward_kernel, call=call),
        grid=(pl.cdiv(rules.num_queries, call.tile_q), num_heads, n),
        in_specs=[_range_spec(ranges), q_plane, k_plane, k_plane, extra_specs],
        out_specs=[q_plane, call.q_rows(None, lambda _, h, n: (n, h))],
        out_shape=[jax.ShapeDtypeStruct(arrays.q.shape, arrays.q.dtype), lse],
        name="flash_attention_forward",
        **call.params,
    )(ranges, arrays.q, arrays.k, arrays.v, extras)


def _range_spec(ranges: Array) -> pl.BlockSpec:
    """The ranges of all tiles of one sequence."""
    per_sequence = ranges.shape[0] > 1
    shape = (None, *ranges.shape[1:])
    return pl.BlockSpec(shape, lambda *ids: (ids[-1] if per_sequence else 0, 0, 0))


def _forward_kernel(
    ranges_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    extras: _Extras,
    out_ref: Any,
    lse_ref: Any,
    *,
    call: _Call,
) -> None:
    rules = call.rules
    tile, head = _tile_number(call), pl.program_id(1)
    first_row = tile * call.tile_q
    q = _load(call, q_ref, first_row, is_query=True)

    def step(j: Array, carry: tuple[Array, ...], *, partial: bool) -> tuple[Array, ...]:
        peak, total, weighted = carry
        first_column = j * call.tile_k
        k = _load(call, k_ref, first_column, is_query=False)
        products = pltriton.dot(q, k, trans_b=True)
        place = first_row, first_column, head
        scores = _scores(call, extras, products, place, partial=partial).scores
        new_peak = jnp.maximum(peak, scores.max(axis=1))
        decay = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(scores - new_peak[:, None])
        v = _load(call, v_ref, first_column, is_query=False)
        more = pltriton.dot(weights.astype(v.dtype), v)
        return (
            new_peak,
            total * decay + weights.sum(axis=1),
            weighted * decay[:, None] + more,
        )

    peak = jnp.full((call.tile_q,), LOWEST, jnp.float32)
    total = jnp.zeros((call.tile_q,), jnp.float32)
    if extras.sinks is not None:
        peak = jnp.full_like(peak, extras.sinks[head].astype(jnp.float32) * LOG2_E)
        total = jnp.ones_like(total)
    start = peak, total, jnp.zeros((call.tile_q, call.width), jnp.float32)
    ranges = [ranges_ref[tile, number] for number in range(4)]
    peak, total, weighted = _loop(call, ranges, step, start)
    safe = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, (peak + jnp.log2(safe)) / LOG2_E, NOTHING_SEEN)
    _store(call, out_ref, weighted / safe[:, None], first_row, rules.num_queries)
    _store_row(lse_ref, lse, first_row, rules.num_queries)


def backward(
    arrays: Arrays, rules: Rules, saved: Saved, *, target: Target
) -> Gradients:
    """The backward pass: one kernel for the queries, one for keys and values."""
    dq, d_slopes = _backward_queries(arrays, rules, saved, target)
    dk, dv = _backward_keys(arrays, rules, saved, target)
    return Gradients(dq, dk, dv, d_slopes)


def _backward_queries(
    arrays: Arrays, rules: Rules, saved: Saved, target: Target
) -> tuple[Array, Array | None]:
    call, tiles = _make_call("dq", arrays, rules, target)
    n, _, num_heads, _ = arrays.q.shape
    ranges = live_ranges(tiles)
    extras, extra_specs = _extras(arrays, call)
    q_plane = call.q_plane(None, lambda _, h, n: (n, h))
    k_plane = call.k_plane(lambda _, h, n: (n, h // call.group))
    rows = call.q_rows(None, lambda _, h, n: (n, h))
    has_slopes = arrays.slopes is not None
    dq, d_slopes = pl.pallas_call(
        functools.partial(_dq_kernel, call=call),
        grid=(pl.cdiv(rules.num_queries, call.tile_q), num_heads, n),
        in_specs=[
            _range_spec(ranges),
            q_plane,
            k_plane,
            k_plane,
            Saved._make((rows, rows, q_plane)),
            extra_specs,
        ],
        out_specs=[q_plane, rows if has_slopes else None],
        out_shape=[
            jax.ShapeDtypeStruct(arrays.q.shape, arrays.q.dtype),
            jax.ShapeDtypeStruct(saved.lse.shape, jnp.float32) if has_slopes else None,
        ],
        name="flash_attention_dq",
        **call.params,
    )(ranges, arrays.q, arrays.k, arrays.v, saved, extras)
    return dq, d_slopes.sum(axis=(0, 2)) if has_slopes else None


def _dq_kernel(
    ranges_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    saved: Saved,
    extras: _Extras,
    dq_ref: Any,
    d_slopes_ref: Any,
    *,
    call: _Call,
) -> None:
    rules = call.rules
    tile, head = _tile_number(call), pl.program_id(1)
    first_row, limit = tile * call.tile_q, rules.num_queries
    q = _load(call, q_ref, first_row, is_query=True)
    d_out = _load(call, saved.d_out, first_row, is_query=True)
    lse = _load_row(saved.lse, first_row, limit, call.tile_q)[:, None] * LOG2_E
    delta = _load_row(saved.delta, first_row, limit, call.tile_q)[:, None]

    def step(j: Array, carry: tuple[Any, ...], *, partial: bool) -> tuple[Any, ...]:
        dq, d_slopes = carry
        first_column = j * call.tile_k
        k = _load(call, k_ref, first_column, is_query=False)
        v = _load(call, v_ref, first_column, is_query=False)
        products = pltriton.dot(q, k, trans_b=True)
        place = first_row, first_column, head
        scores = _scores(call, extras, products, place, partial=partial)
        weights = jnp.exp2(scores.scores - lse)
        d_scores = weights * (pltriton.dot(d_out, v, trans_b=True) - delta)
        if scores.bias is not None:
            d_slopes = d_slopes + (d_scores * scores.bias).sum(axis=1)
        if scores.derivative is not None:
            d_scores = d_scores * scores.derivative
        return dq + pltriton.dot(d_scores.astype(k.dtype), k), d_slopes

    d_slopes = None
    if extras.slopes is not None:
        d_slopes = jnp.zeros((call.tile_q,), jnp.float32)
    start = jnp.zeros((call.tile_q, call.width), jnp.float32), d_slopes
    ranges = [ranges_ref[tile, number] for number in range(4)]
    dq, d_slopes = _loop(call, ranges, step, start)
    _store(call, dq_ref, dq * rules.scale, first_row, limit)
    if d_slopes is not None:
        _store_row(d_slopes_ref, d_slopes, first_row, limit)


def _backward_keys(
    arrays: Arrays, rules: Rules, saved: Saved, target: Target
) -> tuple[Array, Array]:
    call, tiles = _make_call("dkv", arrays, rules, target)
    n, _, num_kv_heads, _ = arrays.k.shape
    ranges = live_ranges(tiles.transposed())
    extras, extra_specs = _extras(arrays, call)
    q_planes = call.q_plane(call.group, lambda _, h, n: (n, h))
    k_plane = call.k_plane(lambda _, h, n: (n, h))
    rows = call.q_rows(call.group, lambda _, h, n: (n, h))
    out_shape = jax.ShapeDtypeStruct(arrays.k.shape, arrays.k.dtype)
    return pl.pallas_call(
        functools.partial(_dkv_kernel, call=call),
        grid=(pl.cdiv(rules.num_keys, call.tile_k), num_kv_heads, n),
        in_specs=[
            _range_spec(ranges),
            q_planes,
            k_plane,
            k_plane,
            Saved._make((rows, rows, q_planes)),
            extra_specs,
        ],
        out_specs=[k_plane, k_plane],
        out_shape=[out_shape, out_shape],
        name="flash_attention_dkv",
        **call.params,
    )(ranges, arrays.q, arrays.k, arrays.v, saved, extras)


def _dkv_kernel(
    ranges_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    saved: Saved,
    extras: _Extras,
    dk_ref: Any,
    dv_ref: Any,
    *,
    call: _Call,
) -> None:
    rules = call.rules
    tile, kv_head = pl.program_id(0), pl.program_id(1)
    first_column, limit = tile * call.tile_k, rules.num_queries
    k = _load(call, k_ref, first_column, is_query=False)
    v = _load(call, v_ref, first_column, is_query=False)
    ranges = [ranges_ref[tile, number] for number in range(4)]

    def visit_head(member: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        def step(
            i: Array, carry: tuple[Array, Array], *, partial: bool
        ) -> tuple[Array, Array]:
            dk, dv = carry
            first_row = i * call.tile_q
            q = _load(call, q_ref, first_row, is_query=True, member=member)
            d_out = _load(call, saved.d_out, first_row, is_query=True, member=member)
            lse = _load_row(saved.lse, first_row, limit, call.tile_q, member)
            delta = _load_row(saved.delta, first_row, limit, call.tile_q, member)
            # Keys by queries: both sums over queries are then plain products.
            products = pltriton.dot(k, q, trans_b=True)
            place = first_row, first_column, kv_head * call.group + member
            scores = _scores(
                call, extras, products, place, partial=partial, transposed=True
            )
            weights = jnp.exp2(scores.scores - lse[None, :] * LOG2_E)
            dv = dv + pltriton.dot(weights.astype(q.dtype), d_out)
            d_weights = pltriton.dot(v, d_out, trans_b=True)
            d_scores = weights * (d_weights - delta[None, :])
            if scores.derivative is not None:
                d_scores = d_scores * scores.derivative
            return dk + pltriton.dot(d_scores.astype(q.dtype), q), dv

        return _loop(call, ranges, step, carry)

    zeros = jnp.zeros((call.tile_k, call.width), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, call.group, visit_head, (zeros, zeros))
    _store(call, dk_ref, dk * rules.scale, first_column, rules.num_keys)
    _store(call, dv_ref, dv, first_column, rules.num_keys)
