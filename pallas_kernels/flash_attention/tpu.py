"""Forward and backward kernels for TPU."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from pallas_kernels.common.cost import cost_of
from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes
from pallas_kernels.flash_attention.gradient import Gradients, Saved, attend
from pallas_kernels.flash_attention.rules import (
    COLUMN_SHIFT,
    FIRST,
    FULL,
    LAST,
    LOG2_E,
    LOWEST,
    MASKED,
    MAX_COLUMNS,
    NOTHING_SEEN,
    PARTIAL,
    ROW_SHIFT,
    Arrays,
    Inputs,
    Rules,
    live_pairs,
    make_rules,
    make_tiles,
)

LANES = 128
MAX_HEAD_DIM = 256
MAX_LIST_BYTES = 1 << 18
"""Part of the scalar memory that the list of tiles may take."""


def flash_attention_tpu(
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
    """Attends with Mosaic kernels; see `api.flash_attention`.

    The last axis of the grid runs over a list of the pairs of tiles that need work,
    so that dead ones cost nothing. Scores stand as keys by queries: whatever belongs
    to a query is then a row of lanes, and sums over keys need no shuffles of lanes.
    """
    arrays = Arrays(
        q, k, v, options.sinks, options.alibi_slopes, q_segment_ids, kv_segment_ids
    )
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"type {q.dtype}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise NotImplementedError(f"head width {q.shape[-1]} over {MAX_HEAD_DIM}")
    return attend(
        functools.partial(_forward, target=target),
        functools.partial(_backward, target=target),
        arrays,
        make_rules(arrays, options, causal=causal),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """All that is static of one kernel.

    Attributes:
        rules: Who sees whom.
        tile_q: Queries of a tile.
        tile_k: Keys of a tile.
        num_heads: Query heads `H`.
        group: Query heads per KV head.
        width: Head width as the kernel sees it, a multiple of the lanes.
        dtype: Type of queries, keys and values.
        target: Device.
    """

    rules: Rules
    tile_q: int
    tile_k: int
    num_heads: int
    group: int
    width: int
    dtype: Any
    target: Target

    @property
    def precision(self) -> Any:
        """Of products: float32 is not to be rounded to bfloat16."""
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None


def _make_call(arrays: Arrays, rules: Rules, target: Target, kernel: str) -> _Call:
    _, num_queries, num_heads, head_dim = arrays.q.shape
    default = {"tile_q": 512, "tile_k": 512}
    if arrays.q.dtype == jnp.float32:
        default = {"tile_q": 256, "tile_k": 512}
    key = f"tpu_{kernel}_{arrays.q.dtype}_{head_dim}"
    sizes = tuned_sizes("flash_attention", target, key, default)
    return _Call(
        rules=rules,
        tile_q=min(sizes["tile_q"], pl.cdiv(num_queries, LANES) * LANES),
        tile_k=min(sizes["tile_k"], pl.cdiv(rules.num_keys, LANES) * LANES),
        num_heads=num_heads,
        group=num_heads // arrays.k.shape[2],
        width=pl.cdiv(head_dim, LANES) * LANES,
        dtype=arrays.q.dtype,
        target=target,
    )


def _pad(x: Array, axis: int, tile: int) -> Array:
    missing = -x.shape[axis] % tile
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths)


def _flat(x: Float[Array, "N T H D"], tile: int) -> Array:
    """`[N, T, H * D]`, padded with zeros: a head is a run of whole lanes."""
    padded = _pad(_pad(x, 1, tile), 3, LANES)
    return padded.reshape(*padded.shape[:2], -1)


def _inputs(arrays: Arrays, call: _Call) -> Inputs:
    planes = (
        _flat(arrays.q, call.tile_q),
        _flat(arrays.k, call.tile_k),
        _flat(arrays.v, call.tile_k),
    )
    return Inputs.of(
        arrays,
        planes,
        lambda ids: _pad(ids, 1, call.tile_q)[:, None, :],
        lambda ids: _pad(ids, 1, call.tile_k)[:, :, None],
    )


class _Places(NamedTuple):
    """Index maps from the grid's indices and the list of pairs.

    Attributes:
        row: Gives (n, tile of queries).
        column: Gives (n, tile of keys).
        head: Gives the query head.
        kv_head: Gives the KV head.
    """

    row: Callable[..., tuple[Any, Any]]
    column: Callable[..., tuple[Any, Any]]
    head: Callable[..., Any]
    kv_head: Callable[..., Any]

    def specs(self, call: _Call, inputs: Inputs) -> Inputs:
        """Specifications of the inputs."""
        scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
        specs = Inputs(
            self.q_plane(call),
            self.k_plane(call),
            self.k_plane(call),
            scalars,
            scalars,
            pl.BlockSpec((None, 1, call.tile_q), self._row_of_batch),
            pl.BlockSpec((None, call.tile_k, 1), self._column_of_batch),
        )
        pairs = zip(inputs, specs, strict=True)
        return Inputs(*(None if x is None else spec for x, spec in pairs))

    def _row_of_batch(self, *ids: Any) -> tuple[Any, ...]:
        n, i = self.row(*ids)
        return n, 0, i

    def _column_of_batch(self, *ids: Any) -> tuple[Any, ...]:
        return (*self.column(*ids), 0)

    def q_plane(self, call: _Call) -> pl.BlockSpec:
        """A tile of an array like the queries."""
        shape = (None, call.tile_q, call.width)
        return pl.BlockSpec(shape, lambda *ids: (*self.row(*ids), self.head(*ids)))

    def k_plane(self, call: _Call) -> pl.BlockSpec:
        """A tile of an array like the keys."""
        shape = (None, call.tile_k, call.width)
        return pl.BlockSpec(
            shape, lambda *ids: (*self.column(*ids), self.kv_head(*ids))
        )

    def q_rows(self, call: _Call) -> pl.BlockSpec:
        """A number for each query, from `[N, H, 1, T]`."""

        def place(*ids: Any) -> tuple[Any, ...]:
            n, i = self.row(*ids)
            return n, self.head(*ids), 0, i

        return pl.BlockSpec((None, None, 1, call.tile_q), place)


def _list_spec(pairs: Array) -> Array:
    if pairs.size * 4 > MAX_LIST_BYTES:
        raise NotImplementedError(
            f"a list of {pairs.size} tiles is more than the scalar memory may hold"
        )
    return pairs.reshape(-1)


def _entry(pairs: Array) -> Callable[..., Any]:
    """Reads the number of a pair; the list may be one for the whole batch."""
    length = pairs.shape[1]
    per_sequence = pairs.shape[0] > 1

    def read(n: Any, place: Any, list_ref: Any) -> Any:
        return list_ref[n * length + place if per_sequence else place]

    return read


def _row(number: Any) -> Any:
    return number >> ROW_SHIFT


def _column(number: Any) -> Any:
    return (number >> COLUMN_SHIFT) & (MAX_COLUMNS - 1)


def _dot(call: _Call, a: Array, b: Array, contract: tuple[int, int]) -> Array:
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=call.precision,
        preferred_element_type=jnp.float32,
    )


class _Tile(NamedTuple):
    """Scores times log2(e), keys by queries, and what their gradient needs."""

    scores: Array
    derivative: Array | None
    bias: Array | None


def _scores(
    call: _Call, inputs: Inputs, place: tuple[Any, Any, Any], *, partial: bool
) -> _Tile:
    """Scores of a tile of keys against a tile of queries."""
    i, j, head = place
    products = _dot(call, inputs.k[...], inputs.q[...], (1, 1))
    row_shape, column_shape = (1, call.tile_q), (call.tile_k, 1)
    bias, slope = None, None
    rows = i * call.tile_q + jax.lax.broadcasted_iota(jnp.int32, row_shape, 1)
    columns = j * call.tile_k + jax.lax.broadcasted_iota(jnp.int32, column_shape, 0)
    if inputs.slopes is not None:
        bias = call.rules.bias(rows, columns)
        slope = inputs.slopes[head]
    scores, derivative = call.rules.scores(products, bias, slope)
    if partial:
        q_ids, kv_ids = None, None
        if inputs.q_segments is not None:
            q_ids, kv_ids = inputs.q_segments[...], inputs.kv_segments[...]
        visible = call.rules.visible(rows, columns, q_ids, kv_ids)
        scores = jnp.where(visible, scores, MASKED)
    return _Tile(scores, derivative, bias)


def _both_kinds(number: Any, add: Callable[..., None]) -> None:
    """Runs `add(partial=...)` as the flags of a pair say."""
    pl.when((number & FULL) != 0)(functools.partial(add, partial=False))
    pl.when((number & PARTIAL) != 0)(functools.partial(add, partial=True))


def _params(
    call: _Call,
    grid: tuple[int, int],
    arrays: list[Any],
    num_products: int,
    num_pairs: int,
) -> dict[str, Any]:
    """What the three kernels have in common.

    Args:
        call: The call.
        grid: Parallel, then sequential dimensions of the grid.
        arrays: What is read and written.
        num_products: Products of matrices with a tile of scores.
        num_pairs: Scores computed.
    """
    num_parallel, num_arbitrary = grid
    semantics: tuple[Any, ...] = ("parallel",) * num_parallel + (
        "arbitrary",
    ) * num_arbitrary
    return {
        "compiler_params": pltpu.CompilerParams(dimension_semantics=semantics),
        "cost_estimate": cost_of(
            *arrays,
            flops=2 * num_products * num_pairs * call.width,
            exponentials=num_pairs,
        ),
        "interpret": call.target.interpret,
    }


def _num_pairs(pairs: Array, num_sequences: int, call: _Call) -> int:
    """Scores in the live tiles of all sequences and heads."""
    tiles = pairs.shape[1] * num_sequences * call.num_heads
    return tiles * call.tile_q * call.tile_k


def _query_places(pairs: Array, call: _Call) -> _Places:
    """Index maps of grid (n, head, place in the list of pairs)."""
    read = _entry(pairs)
    return _Places(
        row=lambda n, _, place, ref: (n, _row(read(n, place, ref))),
        column=lambda n, _, place, ref: (n, _column(read(n, place, ref))),
        head=lambda _, h, *__: h,
        # Floor division would ask for the sign, and that for a device.
        kv_head=lambda _, h, *__: jax.lax.div(h, jnp.int32(call.group)),
    )


def _forward(arrays: Arrays, rules: Rules, *, target: Target) -> tuple[Array, Array]:
    call = _make_call(arrays, rules, target, "forward")
    pairs = live_pairs(make_tiles(rules, arrays, call.tile_q, call.tile_k))
    inputs, places = _inputs(arrays, call), _query_places(pairs, call)
    n, padded, _ = inputs.q.shape
    statistics = pltpu.VMEM((1, call.tile_q), jnp.float32)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, call=call, read=_entry(pairs)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(n, call.num_heads, pairs.shape[1]),
            in_specs=[places.specs(call, inputs)],
            out_specs=[places.q_plane(call), places.q_rows(call)],
            scratch_shapes=[
                statistics,
                statistics,
                pltpu.VMEM((call.width, call.tile_q), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(inputs.q.shape, call.dtype),
            jax.ShapeDtypeStruct((n, call.num_heads, 1, padded), jnp.float32),
        ],
        name="flash_attention_forward",
        **_params(call, (2, 1), [*inputs[:3], inputs.q], 2, _num_pairs(pairs, n, call)),
    )(_list_spec(pairs), inputs)
    return _like(out, arrays.q), lse[:, :, 0, : rules.num_queries]


def _like(flat: Array, wanted: Float[Array, "N T H D"]) -> Array:
    """Undoes `_flat`."""
    n, t, h, d = wanted.shape
    return flat.reshape(n, flat.shape[1], h, -1)[:, :t, :, :d]


def _forward_kernel(
    list_ref: Any,
    inputs: Inputs,
    out_ref: Any,
    lse_ref: Any,
    *scratch: Any,
    call: _Call,
    read: Callable[..., Any],
) -> None:
    peak_ref, total_ref, weighted_ref = scratch
    number = read(pl.program_id(0), pl.program_id(2), list_ref)
    head = pl.program_id(1)

    @pl.when((number & FIRST) != 0)
    def _start() -> None:
        peak, total = jnp.float32(LOWEST), 0.0
        if inputs.sinks is not None:
            peak, total = inputs.sinks[head] * LOG2_E, 1.0
        peak_ref[...] = jnp.full(peak_ref.shape, peak, jnp.float32)
        total_ref[...] = jnp.full(total_ref.shape, total, jnp.float32)
        weighted_ref[...] = jnp.zeros(weighted_ref.shape, jnp.float32)

    def add(*, partial: bool) -> None:
        place = _row(number), _column(number), head
        scores = _scores(call, inputs, place, partial=partial).scores
        peak = peak_ref[...]
        new_peak = jnp.maximum(peak, scores.max(axis=0, keepdims=True))
        decay = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(scores - new_peak)
        peak_ref[...] = new_peak
        total_ref[...] = total_ref[...] * decay + weights.sum(axis=0, keepdims=True)
        more = _dot(call, inputs.v[...], weights.astype(call.dtype), (0, 0))
        weighted_ref[...] = weighted_ref[...] * decay + more

    _both_kinds(number, add)

    @pl.when((number & LAST) != 0)
    def _finish() -> None:
        total = total_ref[...]
        safe = jnp.where(total > 0, total, 1.0)
        lse = peak_ref[...] / LOG2_E + jnp.log(safe)
        lse_ref[...] = jnp.where(total > 0, lse, NOTHING_SEEN)
        out_ref[...] = (weighted_ref[...] / safe).T.astype(out_ref.dtype)


def _backward(
    arrays: Arrays, rules: Rules, saved: Saved, *, target: Target
) -> Gradients:
    call = _make_call(arrays, rules, target, "backward")
    dq, d_slopes = _backward_queries(arrays, call, saved)
    dk, dv = _backward_keys(arrays, call, saved)
    return Gradients(dq, dk, dv, d_slopes)


def _flat_saved(saved: Saved, call: _Call) -> Saved:
    def rows(x: Float[Array, "N H T"]) -> Array:
        return _pad(x, 2, call.tile_q)[:, :, None, :]

    return Saved(rows(saved.lse), rows(saved.delta), _flat(saved.d_out, call.tile_q))


def _saved_specs(places: _Places, call: _Call) -> Saved:
    rows = places.q_rows(call)
    return Saved._make((rows, rows, places.q_plane(call)))


def _gradient_tile(
    call: _Call,
    inputs: Inputs,
    saved: Saved,
    place: tuple[Any, Any, Any],
    *,
    partial: bool,
) -> tuple[Array, Array, _Tile, Array]:
    """Weights, cotangents of the products, the tile, cotangents of the scores."""
    tile = _scores(call, inputs, place, partial=partial)
    weights = jnp.exp2(tile.scores - saved.lse[...] * LOG2_E)
    d_weights = _dot(call, inputs.v[...], saved.d_out[...], (1, 1))
    d_scores = weights * (d_weights - saved.delta[...])
    d_products = d_scores if tile.derivative is None else d_scores * tile.derivative
    return weights, d_products, tile, d_scores


def _backward_queries(
    arrays: Arrays, call: _Call, saved: Saved
) -> tuple[Array, Array | None]:
    pairs = live_pairs(make_tiles(call.rules, arrays, call.tile_q, call.tile_k))
    inputs, places = _inputs(arrays, call), _query_places(pairs, call)
    n, padded, _ = inputs.q.shape
    has_slopes = arrays.slopes is not None
    slope_scratch = [pltpu.VMEM((1, call.tile_q), jnp.float32)] if has_slopes else []
    rows = jax.ShapeDtypeStruct((n, call.num_heads, 1, padded), jnp.float32)
    dq, d_slopes = pl.pallas_call(
        functools.partial(_dq_kernel, call=call, read=_entry(pairs)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(n, call.num_heads, pairs.shape[1]),
            in_specs=[places.specs(call, inputs), _saved_specs(places, call)],
            out_specs=[
                places.q_plane(call),
                places.q_rows(call) if has_slopes else None,
            ],
            scratch_shapes=[
                pltpu.VMEM((call.tile_q, call.width), jnp.float32),
                *slope_scratch,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(inputs.q.shape, call.dtype),
            rows if has_slopes else None,
        ],
        name="flash_attention_dq",
        **_params(
            call,
            (2, 1),
            [*inputs[:3], *saved, inputs.q],
            3,
            _num_pairs(pairs, n, call),
        ),
    )(_list_spec(pairs), inputs, _flat_saved(saved, call))
    return _like(dq, arrays.q), d_slopes.sum(axis=(0, 2, 3)) if has_slopes else None


def _dq_kernel(
    list_ref: Any,
    inputs: Inputs,
    saved: Saved,
    dq_ref: Any,
    d_slopes_ref: Any,
    sum_ref: Any,
    *slope_sum_refs: Any,
    call: _Call,
    read: Callable[..., Any],
) -> None:
    number = read(pl.program_id(0), pl.program_id(2), list_ref)
    sums = [sum_ref, *slope_sum_refs]

    @pl.when((number & FIRST) != 0)
    def _start() -> None:
        for ref in sums:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def add(*, partial: bool) -> None:
        place = _row(number), _column(number), pl.program_id(1)
        _, d_products, tile, d_scores = _gradient_tile(
            call, inputs, saved, place, partial=partial
        )
        if tile.bias is not None:
            slope_sum_refs[0][...] += (d_scores * tile.bias).sum(axis=0, keepdims=True)
        sum_ref[...] += _dot(call, d_products.astype(call.dtype), inputs.k[...], (0, 0))

    _both_kinds(number, add)

    @pl.when((number & LAST) != 0)
    def _finish() -> None:
        dq_ref[...] = (sum_ref[...] * call.rules.scale).astype(dq_ref.dtype)
        for ref in slope_sum_refs:
            d_slopes_ref[...] = ref[...]


def _backward_keys(arrays: Arrays, call: _Call, saved: Saved) -> tuple[Array, Array]:
    tiles = make_tiles(call.rules, arrays, call.tile_q, call.tile_k)
    pairs = live_pairs(tiles.transposed())  # of keys and queries
    read, inputs = _entry(pairs), _inputs(arrays, call)
    places = _Places(
        row=lambda n, _, place, __, ref: (n, _column(read(n, place, ref))),
        column=lambda n, _, place, __, ref: (n, _row(read(n, place, ref))),
        head=lambda _, h, __, member, *___: h * call.group + member,
        kv_head=lambda _, h, *__: h,
    )
    shape = jax.ShapeDtypeStruct(inputs.k.shape, call.dtype)
    sums = pltpu.VMEM((call.tile_k, call.width), jnp.float32)
    num_kv_heads = call.num_heads // call.group
    dk, dv = pl.pallas_call(
        functools.partial(_dkv_kernel, call=call, read=read),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(inputs.k.shape[0], num_kv_heads, pairs.shape[1], call.group),
            in_specs=[places.specs(call, inputs), _saved_specs(places, call)],
            out_specs=[places.k_plane(call), places.k_plane(call)],
            scratch_shapes=[sums, sums],
        ),
        out_shape=[shape, shape],
        name="flash_attention_dkv",
        **_params(
            call,
            (2, 2),
            [*inputs[:3], *saved, shape, shape],
            4,
            _num_pairs(pairs, inputs.k.shape[0], call),
        ),
    )(_list_spec(pairs), inputs, _flat_saved(saved, call))
    return _like(dk, arrays.k), _like(dv, arrays.k)


def _dkv_kernel(
    list_ref: Any,
    inputs: Inputs,
    saved: Saved,
    dk_ref: Any,
    dv_ref: Any,
    *sums: Any,
    call: _Call,
    read: Callable[..., Any],
) -> None:
    dk_sum, dv_sum = sums
    number = read(pl.program_id(0), pl.program_id(2), list_ref)
    member = pl.program_id(3)
    head = pl.program_id(1) * call.group + member

    @pl.when(((number & FIRST) != 0) & (member == 0))
    def _start() -> None:
        for ref in sums:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def add(*, partial: bool) -> None:
        place = _column(number), _row(number), head
        weights, d_products, _, _ = _gradient_tile(
            call, inputs, saved, place, partial=partial
        )
        dv_sum[...] += _dot(call, weights.astype(call.dtype), saved.d_out[...], (1, 0))
        dk_sum[...] += _dot(call, d_products.astype(call.dtype), inputs.q[...], (1, 0))

    _both_kinds(number, add)

    @pl.when(((number & LAST) != 0) & (member == call.group - 1))
    def _finish() -> None:
        dk_ref[...] = (dk_sum[...] * call.rules.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)
