"""Pieces of attention over a paged cache that the kernels for Triton share.

A tile holds the queries of some tokens of one sequence for all query heads of one KV
head, so that each key is read once for all of them: tile row r is token r // group and
query head r % group of that KV head.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Bool, Float, Int, Shaped

from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target

LOG2_E = math.log2(math.e)
LOWEST = -1e30
"""Maximum of no scores at all; finite, so that no NaN can arise."""

MIN_TILE = 16
"""Least size of a tile's sides, that of a tensor core's operands."""

MAX_HEAD_DIM = 256
QUERY_TYPES = ("bfloat16", "float16", "float32")
CACHE_TYPES = (*QUERY_TYPES, "float8_e4m3fn", "float8_e5m2", "int8")


def power_of_two(number: int) -> int:
    """The least power of two that is not below the number, nor below `MIN_TILE`."""
    return max(MIN_TILE, 1 << (number - 1).bit_length())


def check_supported(q: Array, kv: Array, target: Target) -> None:
    """Raises NotImplementedError with the reason why these arrays cannot be used."""
    if q.shape[-1] > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"head width {q.shape[-1]} is above {MAX_HEAD_DIM} on Triton"
        )
    if q.dtype.name not in QUERY_TYPES:
        raise NotImplementedError(f"queries of {q.dtype} on Triton")
    is_bits = kv.dtype == jnp.uint16 and q.dtype.itemsize == 2
    if kv.dtype.name not in CACHE_TYPES and not is_bits:
        raise NotImplementedError(f"a cache of {kv.dtype} for {q.dtype} on Triton")
    architecture = target.generation.removeprefix("sm_").rstrip("abcdef")
    number = int(architecture) if architecture.isdigit() else 90
    if number < 80:
        raise NotImplementedError(f"{target.generation} is older than sm_80")
    if kv.dtype == jnp.float8_e4m3fn and number < 89:
        raise NotImplementedError(f"float8_e4m3fn on {target.generation}, below sm_89")
    # Offsets are signed 32-bit numbers of elements for arrays of up to 2 ** 32 bytes.
    if kv.size > 2**31 and kv.size * kv.dtype.itemsize <= 2**32:
        raise NotImplementedError(
            f"a cache of {kv.size} bytes; Triton's offsets fail between 2 and 4 GiB "
            "of 8-bit values"
        )


class Refs(NamedTuple):
    """The arrays that every attention kernel reads; None for what is not used."""

    q: Any  # [T, H, D]
    kv: Any  # [B, 2, K, P, D]
    block_tables: Any  # [S, M]
    lengths: Any  # [S]
    kv_scales: Any  # [2, K]
    sinks: Any  # [H]
    alibi_slopes: Any  # [H]


def gather_operands(
    q: Array,
    kv: Array,
    block_tables: Array,
    lengths: Array,
    options: ScoreOptions,
    kv_scales: Array | None,
) -> Refs:
    """The operands of a kernel, in the order in which it takes them."""

    def as_float(array: Array | None) -> Array | None:
        return None if array is None else array.astype(jnp.float32)

    return Refs(
        q,
        kv,
        block_tables.astype(jnp.int32),
        lengths.astype(jnp.int32),
        as_float(kv_scales),
        as_float(options.sinks),
        as_float(options.alibi_slopes),
    )


class Softmax(NamedTuple):
    """The running state of the online softmax, scores in powers of two."""

    maximum: Float[Array, " R"]
    total: Float[Array, " R"]
    weighted: Float[Array, "R W"]


class QueryTile(NamedTuple):
    """Queries of one sequence for one KV head.

    Attributes:
        row: The sequence.
        head: The KV head.
        first_token: Place of the first token in the packed order.
        num_tokens: Its tokens; rows of others hold zeros and see anything.
        first_position: Position of the first token in its sequence.
    """

    row: Int[Array, ""]
    head: Int[Array, ""]
    first_token: Int[Array, ""]
    num_tokens: Int[Array, ""] | int
    first_position: Int[Array, ""]


class KeyRun(NamedTuple):
    """Keys of the queries' sequence, cut into tiles of `block_n`.

    Attributes:
        begin: Position of the first key of tile 0.
        length: Position after the last key that the last query sees.
    """

    begin: Int[Array, ""]
    length: Int[Array, ""]


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionTiles:
    """What is known of a call while its kernel is traced.

    Attributes:
        tokens: Tokens per tile at most.
        group: Query heads per KV head.
        head_dim: Head width.
        block_size: Places per block of the cache.
        num_blocks: Blocks of the cache.
        capacity: Keys of a row at most, by the width of the block tables.
        block_n: Keys per tile.
        dtype: Type of the operands of both products.
        precision: Precision of both products, as `lax.dot_general` takes it.
        query_dtype: Type of the queries.
        scale: See `ScoreOptions`.
        window: See `ScoreOptions`.
        soft_cap: See `ScoreOptions`.
    """

    tokens: int
    group: int
    head_dim: int
    block_size: int
    num_blocks: int
    capacity: int
    block_n: int
    dtype: Any
    precision: Any
    query_dtype: Any
    scale: float
    window: int | None
    soft_cap: float | None

    @property
    def rows(self) -> int:
        """Rows of the query tile."""
        return power_of_two(self.tokens * self.group)

    @property
    def width(self) -> int:
        """Columns of all tiles; the head width or the next power of two."""
        return power_of_two(self.head_dim)

    def row_tokens(self) -> Int[Array, " R"]:
        """Token of each tile row, counted from the tile's first."""
        return lax.div(jnp.arange(self.rows, dtype=jnp.int32), np.int32(self.group))

    def row_heads(self, head: Int[Array, ""]) -> Int[Array, " R"]:
        """Query head of each tile row."""
        rows = jnp.arange(self.rows, dtype=jnp.int32)
        return head * self.group + lax.rem(rows, np.int32(self.group))

    def used_rows(self, num_tokens: Int[Array, ""] | int) -> Bool[Array, " R"]:
        """Whether a tile row stands for a query."""
        return jnp.arange(self.rows, dtype=jnp.int32) < num_tokens * self.group

    def columns(self) -> Int[Array, " W"]:
        """Numbers of the columns."""
        return jnp.arange(self.width, dtype=jnp.int32)

    def mask(
        self, rows: Bool[Array, " N"] | None, num_rows: int
    ) -> Bool[Array, "N W"] | None:
        """Entries that exist of a tile, given its rows; None if it is all of them."""
        shape = num_rows, self.width
        columns = self.columns() < self.head_dim
        if self.width == self.head_dim:
            return None if rows is None else jnp.broadcast_to(rows[:, None], shape)
        if rows is None:
            return jnp.broadcast_to(columns[None, :], shape)
        return rows[:, None] & columns[None, :]

    def load_length(self, refs: Refs, row: Int[Array, ""]) -> Int[Array, ""]:
        """Keys of a row; never more than its table has blocks for."""
        return jnp.minimum(refs.lengths[row], self.capacity)

    def load_queries(self, refs: Refs, tile: QueryTile) -> Float[Array, "R W"]:
        """The queries of a tile, zeros where there are none."""
        token = tile.first_token + self.row_tokens()
        index = refs.q.at[
            token[:, None], self.row_heads(tile.head)[:, None], self.columns()[None, :]
        ]
        mask = self.mask(self.used_rows(tile.num_tokens), self.rows)
        zero = jnp.zeros((), self.query_dtype)
        return pltriton.load(index, mask=mask, other=zero).astype(self.dtype)

    def store_rows(self, ref: Any, tile: QueryTile, out: Float[Array, "R W"]) -> None:
        """Writes the outputs `[T, H, D]` of a tile's queries."""
        token = tile.first_token + self.row_tokens()
        index = ref.at[
            token[:, None], self.row_heads(tile.head)[:, None], self.columns()[None, :]
        ]
        mask = self.mask(self.used_rows(tile.num_tokens), self.rows)
        pltriton.store(index, out.astype(self.query_dtype), mask=mask)

    def load_heads(self, ref: Any, head: Int[Array, ""]) -> Float[Array, " R"]:
        """An option `[H]`, one value per tile row."""
        return ref[self.row_heads(head)]

    def start(self) -> Softmax:
        """The state before the first key."""
        return Softmax(
            jnp.full((self.rows,), LOWEST, jnp.float32),
            jnp.zeros((self.rows,), jnp.float32),
            jnp.zeros((self.rows, self.width), jnp.float32),
        )

    def finish(
        self, state: Softmax, sinks: Float[Array, " R"] | None
    ) -> Float[Array, "R W"]:
        """Divides by the sums of the weights; no weight at all gives zeros."""
        maximum, total, weighted = state
        if sinks is not None:
            # The sink is one more score, which has no value.
            sinks = sinks * LOG2_E
            peak = jnp.maximum(maximum, sinks)
            decay = jnp.exp2(maximum - peak)
            total = total * decay + jnp.exp2(sinks - peak)
            weighted = weighted * decay[:, None]
        return weighted / jnp.where(total > 0, total, 1.0)[:, None]


def plan_tiles(
    q: Shaped[Array, "T H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    options: ScoreOptions,
    *,
    tokens: int,
    block_n: int,
    target: Target,
) -> AttentionTiles:
    """Reads off the arrays what a kernel has to know."""
    num_blocks, _, num_kv_heads, block_size, head_dim = kv.shape
    is_narrow = kv.dtype.itemsize == 1 or kv.dtype in (q.dtype, jnp.uint16)
    dtype = q.dtype if is_narrow else jnp.dtype(jnp.float32)
    precision = None
    if dtype == jnp.float32:
        # Three passes of a tensor core keep the precision of float32; the CPU has none.
        precision = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = lax.Precision.HIGHEST if target.interpret else precision
    return AttentionTiles(
        tokens=tokens,
        group=q.shape[1] // num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        num_blocks=num_blocks,
        capacity=block_tables.shape[1] * block_size,
        block_n=block_n,
        dtype=dtype,
        precision=precision,
        query_dtype=q.dtype,
        scale=options.scale,
        window=options.window,
        soft_cap=options.soft_cap,
    )


def attend_keys(
    tiles: AttentionTiles, refs: Refs, tile: QueryTile, keys: KeyRun
) -> Callable[..., Softmax]:
    """Prepares what adds a run of key tiles to the softmax of a query tile.

    Returns:
        A function of the state, the first key tile, the one after the last, and
        whether some queries may not see some of these keys.
    """
    q = tiles.load_queries(refs, tile)
    query_positions = tile.first_position + tiles.row_tokens()
    factor = jnp.float32(tiles.scale)
    if refs.kv_scales is not None:
        factor = factor * refs.kv_scales[0, tile.head]
    slopes = None
    if refs.alibi_slopes is not None:
        slopes = tiles.load_heads(refs.alibi_slopes, tile.head)

    is_plain = tiles.soft_cap is None and slopes is None and tiles.scale > 0
    is_plain = is_plain and refs.kv_scales is None
    exponent = np.float32(tiles.scale * LOG2_E)

    def add_tile(index: Array, state: Softmax, *, is_masked: bool) -> Softmax:
        first = keys.begin + index * tiles.block_n
        positions = first + jnp.arange(tiles.block_n, dtype=jnp.int32)
        exists = (positions < keys.length) if is_masked else None
        blocks = _load_blocks(tiles, refs, tile.row, positions, exists)
        key_tile = _load_tile(tiles, refs, tile.head, (0, blocks, positions, exists))
        scores = _dot(tiles, q, key_tile, transpose=True)
        if not is_plain:
            positions_of_both = query_positions, positions
            scores = _transform(tiles, scores, factor, slopes, positions_of_both)
        if is_masked:
            # The maximum starts at a finite number, so that no NaN can arise.
            visible = _visible(tiles, query_positions, positions, keys.length)
            scores = jnp.where(visible, scores, -jnp.inf)
        peak = scores.max(axis=1)
        # Without options the factor is applied with the shift, in one instruction.
        maximum = jnp.maximum(state.maximum, peak * exponent if is_plain else peak)
        scores = scores * exponent if is_plain else scores
        weights = jnp.exp2(scores - maximum[:, None])
        decay = jnp.exp2(state.maximum - maximum)
        total = state.total * decay + weights.sum(axis=1)
        value_tile = _load_tile(tiles, refs, tile.head, (1, blocks, positions, exists))
        added = _dot(tiles, weights.astype(tiles.dtype), value_tile, transpose=False)
        return Softmax(maximum, total, state.weighted * decay[:, None] + added)

    def add_tiles(
        state: Softmax, first: Array | np.int32, end: Array, *, is_masked: bool
    ) -> Softmax:
        body = functools.partial(add_tile, is_masked=is_masked)
        return lax.fori_loop(first, end, body, state)

    return add_tiles


def scale_values(
    refs: Refs, tile: QueryTile, weighted: Float[Array, "R W"]
) -> Float[Array, "R W"]:
    """Multiplies with the scale of a quantized cache's values."""
    if refs.kv_scales is None:
        return weighted
    return weighted * refs.kv_scales[1, tile.head]


def first_visible(window: int | None, position: Int[Array, "..."]) -> Int[Array, "..."]:
    """First key that a query at this position sees, or any later one."""
    if window is None:
        return jnp.zeros_like(position)
    return jnp.maximum(position - (window - 1), 0)


def divide_up(number: Array, divisor: Array | int) -> Array:
    """The quotient of numbers that are not negative, rounded up."""
    by = np.int32(divisor) if isinstance(divisor, int) else divisor
    return lax.div(number + (by - 1), jnp.broadcast_to(by, number.shape))


def compiler_params(num_warps: int, num_stages: int) -> pltriton.CompilerParams:
    """Selects Triton, which a plain `pallas_call` need not do."""
    return pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages)


def _load_blocks(
    tiles: AttentionTiles,
    refs: Refs,
    row: Array,
    positions: Int[Array, " N"],
    exists: Bool[Array, " N"] | None,
) -> Int[Array, " N"]:
    """The block of each key; none outside the pool."""
    index = refs.block_tables.at[row, lax.div(positions, np.int32(tiles.block_size))]
    if exists is None:
        blocks = pltriton.load(index)
    else:
        blocks = pltriton.load(index, mask=exists, other=np.int32(0))
    return jnp.clip(blocks, 0, tiles.num_blocks - 1)


def _load_tile(
    tiles: AttentionTiles, refs: Refs, head: Array, which: tuple[int, Array, Array, Any]
) -> Float[Array, "N W"]:
    """Keys (0) or values (1) of a tile, zeros where there are none.

    Unused places hold anything, NaN included, and a weight of zero does not cancel a
    NaN; hence they are not read.
    """
    part, blocks, positions, exists = which
    places = lax.rem(positions, np.int32(tiles.block_size))
    index = refs.kv.at[
        blocks[:, None], part, head, places[:, None], tiles.columns()[None, :]
    ]
    mask = tiles.mask(exists, tiles.block_n)
    if mask is None:
        tile = pltriton.load(index)
    else:
        tile = pltriton.load(index, mask=mask, other=jnp.zeros((), refs.kv.dtype))
    if tile.dtype == jnp.uint16:
        tile = lax.bitcast_convert_type(tile, tiles.query_dtype)
    return tile.astype(tiles.dtype)


def _dot(
    tiles: AttentionTiles, a: Array, b: Array, *, transpose: bool
) -> Float[Array, "M N"]:
    return lax.dot_general(
        a,
        b,
        (((1,), (1 if transpose else 0,)), ((), ())),
        precision=tiles.precision,
        preferred_element_type=jnp.float32,
    )


def _transform(
    tiles: AttentionTiles,
    products: Float[Array, "R N"],
    factor: Float[Array, ""],
    slopes: Float[Array, " R"] | None,
    positions: tuple[Int[Array, " R"], Int[Array, " N"]],
) -> Float[Array, "R N"]:
    """Scores for powers of two instead of e."""
    if tiles.soft_cap is None:
        scores = products * (factor * LOG2_E)
    else:
        capped = _tanh(products * (factor / tiles.soft_cap), tiles.query_dtype)
        scores = capped * (tiles.soft_cap * LOG2_E)
    if slopes is not None:
        query_positions, key_positions = positions
        distance = key_positions[None, :] - query_positions[:, None]
        scores += (slopes * LOG2_E)[:, None] * distance.astype(jnp.float32)
    return scores


def _tanh(x: Float[Array, "R N"], query_dtype: Any) -> Float[Array, "R N"]:
    """Hyperbolic tangent; for 16-bit queries in the quick form, exact to 1e-7."""
    if query_dtype == jnp.float32:
        return jnp.tanh(x)
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2 * LOG2_E)))


def _visible(
    tiles: AttentionTiles,
    query_positions: Int[Array, " R"],
    key_positions: Int[Array, " N"],
    length: Int[Array, ""],
) -> Bool[Array, "R N"]:
    if tiles.tokens == 1:
        # The keys that one token sees are the very run that is visited.
        visible = key_positions[None, :] < length
        return jnp.broadcast_to(visible, (tiles.rows, tiles.block_n))
    distance = query_positions[:, None] - key_positions[None, :]
    visible = distance >= 0
    return visible if tiles.window is None else visible & (distance < tiles.window)
