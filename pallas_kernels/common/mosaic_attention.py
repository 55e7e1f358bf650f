"""Pieces of attention over a paged cache that the kernels for Hopper share.

A thread block has warpgroups that compute and a last one that only copies. The copying
one issues one TMA transfer per block of the cache, for one KV head, into a ring of
tiles in shared memory; the computing ones multiply with wgmma, queries as the rows of
the accumulators. Tile row r is token r // group and query head r % group of the KV
head, so that each key is read once for all of them.

Source: FlashAttention-3, arXiv:2407.08608 sections 3.1 and 3.2.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target

LOG2_E = math.log2(math.e)
MASKED = -1e30
"""Score of a key that a query may not see; finite, so that no NaN can arise."""

SEEN = -1e29
"""Maxima below this come from masked scores alone."""

ROWS = 64
"""Rows of an accumulator of one warpgroup."""

HEAD_DIMS = (64, 128, 256)
QUERY_TYPES = ("bfloat16", "float16")
NUM_COMPUTE = 2
"""Warpgroups that compute; a third one copies."""

COMPUTE_REGISTERS = 232
COPY_REGISTERS = 40


def check_supported(
    q: Array,
    kv: Array,
    kv_scales: Array | None,
    options: ScoreOptions,
    target: Target,
) -> None:
    """Raises NotImplementedError with the reason why these arrays cannot be used."""
    if target.generation.rstrip("a") != "sm_90":
        raise NotImplementedError(
            f"{target.generation or 'an unknown GPU'} is not sm_90 (Hopper)"
        )
    if target.interpret is True:
        raise NotImplementedError(
            "interpret=True: kernels for Mosaic GPU run in its simulator alone, with "
            "InterpretGPUParams"
        )
    if q.shape[-1] not in HEAD_DIMS:
        raise NotImplementedError(f"head width {q.shape[-1]} is not in {HEAD_DIMS}")
    if q.dtype.name not in QUERY_TYPES:
        raise NotImplementedError(f"queries of {q.dtype} on Mosaic GPU")
    if kv.dtype not in (q.dtype, jnp.uint16) or kv_scales is not None:
        raise NotImplementedError(f"a cache of {kv.dtype} for {q.dtype} on Mosaic GPU")
    block_size = kv.shape[3]
    if block_size % 8 or block_size & (block_size - 1):
        raise NotImplementedError(
            f"blocks of {block_size} places, not a power of two from 8 on"
        )
    if options.scale <= 0:
        raise NotImplementedError(f"scale={options.scale} is not positive")


@dataclasses.dataclass(frozen=True, slots=True)
class MosaicTiles:
    """What is known of a call while its kernel is traced.

    Attributes:
        group: Query heads per KV head.
        head_dim: Head width.
        num_kv_heads: KV heads.
        num_blocks: Blocks of the cache.
        block_size: Places per block.
        block_n: Keys per tile.
        num_stages: Tiles in the ring.
        tokens: Tokens per tile of queries.
        dtype: Type of queries, keys and values.
        scale: See `ScoreOptions`.
        window: See `ScoreOptions`.
        soft_cap: See `ScoreOptions`.
        interpret: Whether the kernel runs in the simulator.
    """

    group: int
    head_dim: int
    num_kv_heads: int
    num_blocks: int
    block_size: int
    block_n: int
    num_stages: int
    tokens: int
    dtype: Any
    scale: float
    window: int | None
    soft_cap: float | None
    interpret: bool

    @classmethod
    def of(
        cls,
        q: Shaped[Array, "... H D"],
        kv: Shaped[Array, "B 2 K P D"],
        options: ScoreOptions,
        sizes: Mapping[str, int],
        *,
        tokens: int,
        target: Target,
    ) -> "MosaicTiles":
        """Reads the sizes off the arrays; `sizes` has those that are tuned."""
        num_blocks, _, num_kv_heads, block_size, head_dim = kv.shape
        return cls(
            group=q.shape[-2] // num_kv_heads,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            num_blocks=num_blocks,
            block_size=block_size,
            block_n=sizes["block_n"],
            num_stages=sizes["num_stages"],
            tokens=tokens,
            dtype=q.dtype,
            scale=float(options.scale),
            window=options.window,
            soft_cap=options.soft_cap,
            interpret=bool(target.interpret),
        )

    @property
    def unit(self) -> int:
        """Places of one transfer: a block, or a tile's part of a larger one."""
        return min(self.block_size, self.block_n)

    @property
    def units_per_block(self) -> int:
        """Transfers that a block is cut into."""
        return self.block_size // self.unit

    @property
    def units_per_tile(self) -> int:
        """Transfers that fill a tile of keys or of values."""
        return self.block_n // self.unit


def compiler_params() -> plgpu.CompilerParams:
    """The parameters of all kernels; JAX versions differ in the default semantics.

    No reduction crosses warps, so that no memory is needed for it.
    """
    return plgpu.CompilerParams(
        approx_math=True,
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        reduction_scratch_bytes=16,
    )


def as_units(
    kv: Shaped[Array, "B 2 K P D"], tiles: MosaicTiles
) -> Shaped[Array, "U W D"]:
    """The cache as a list of what single transfers read; no bytes move."""
    if kv.dtype != tiles.dtype:
        kv = lax.bitcast_convert_type(kv, tiles.dtype)
    return kv.reshape(-1, tiles.unit, tiles.head_dim)


def values_per_row(
    values: Float[Array, " H"], num_kv_heads: int, num_rows: int
) -> Float[Array, "K R"]:
    """The values of the query heads for each tile row of each KV head."""
    grouped = values.astype(jnp.float32).reshape(num_kv_heads, -1)
    repeats = -(-num_rows // grouped.shape[1])
    return jnp.tile(grouped, (1, repeats))[:, :num_rows]


class Run(NamedTuple):
    """Keys that a tile of queries attends to.

    Attributes:
        row: The sequence, as a row of the block tables.
        head: The KV head.
        begin: First key; at the begin of a transfer.
        end: First key that is not read, at most `length`.
        length: Keys from here on do not exist.
    """

    row: Int[Array, ""]
    head: Int[Array, ""]
    begin: Int[Array, ""]
    end: Int[Array, ""]
    length: Int[Array, ""]

    def num_tiles(self, tiles: MosaicTiles) -> Int[Array, ""]:
        """Tiles of keys."""
        return divide_up(jnp.maximum(self.end - self.begin, 0), tiles.block_n)


class Ring(NamedTuple):
    """Tiles in shared memory and their barriers."""

    keys: Any  # [num_stages, block_n, D]
    values: Any  # [num_stages, block_n, D]
    keys_full: Any
    values_full: Any
    keys_free: Any
    values_free: Any

    @classmethod
    def scratch(cls, tiles: MosaicTiles, *, readers: int) -> "Ring":
        """What to allocate; `readers` is how many warpgroups read each tile."""
        shape = (tiles.num_stages, tiles.block_n, tiles.head_dim)
        full = plgpu.Barrier(
            num_arrivals=tiles.units_per_tile, num_barriers=tiles.num_stages
        )
        free = plgpu.Barrier(num_arrivals=readers, num_barriers=tiles.num_stages)
        memory = plgpu.SMEM(shape, tiles.dtype)
        return cls(memory, memory, full, full, free, free)


class Softmax(NamedTuple):
    """The running state of the online softmax, scores in powers of two."""

    weighted: Float[Array, "64 D"]
    maximum: Float[Array, " 64"]
    total: Float[Array, " 64"]

    @classmethod
    def empty(cls, tiles: MosaicTiles) -> "Softmax":
        """The state before the first key."""
        return cls(
            jnp.zeros((ROWS, tiles.head_dim), jnp.float32),
            jnp.full((ROWS,), MASKED, jnp.float32),
            jnp.zeros((ROWS,), jnp.float32),
        )


class Queries(NamedTuple):
    """A warpgroup's rows of a tile of queries.

    Attributes:
        memory: The queries in shared memory, `[64, D]`.
        first_row: Tile row of the first one.
        first_position: Position of the tile's first token in its sequence.
        slopes: ALiBi slope of each row; None for none.
    """

    memory: Any
    first_row: Int[Array, ""] | int
    first_position: Int[Array, ""]
    slopes: Float[Array, " 64"] | None


def divide_up(number: Any, divisor: int) -> Any:
    """`ceil(number / divisor)` of a number that is not negative."""
    return lax.div(number + (divisor - 1), jnp.int32(divisor))


def as_columns(values: Array, width: int) -> Array:
    """One value per row, repeated along the row."""
    return lax.broadcast_in_dim(values, (values.shape[0], width), (0,))


def copy_keys(kv: Any, tables: Any, run: Run, ring: Ring, tiles: MosaicTiles) -> None:
    """Fills the ring with the run's tiles, as they become free.

    A tile's last transfers, past the end of the run, read the last live block again,
    which costs no memory traffic. The table entries of a tile are read one tile ahead,
    so that their latency is not added to that of the transfers.
    """
    num_tiles = run.num_tiles(tiles)
    last = lax.div(run.end - 1, jnp.int32(tiles.unit)) * tiles.unit

    def read_table(tile: Any) -> tuple[Array, ...]:
        """The first of two neighbouring runs of heads for each transfer."""
        found: list[Array] = []
        for unit in range(tiles.units_per_tile):
            position = run.begin + tile * tiles.block_n + unit * tiles.unit
            position = jnp.maximum(jnp.minimum(position, last), 0)
            column = lax.div(position, jnp.int32(tiles.block_size))
            block = tables[run.row, jnp.minimum(column, tables.shape[1] - 1)]
            block = jnp.minimum(jnp.maximum(block, 0), tiles.num_blocks - 1)
            part = lax.div(
                lax.rem(position, jnp.int32(tiles.block_size)), jnp.int32(tiles.unit)
            )
            found.append(
                (block * (2 * tiles.num_kv_heads) + run.head) * tiles.units_per_block
                + part
            )
        return tuple(found)

    values_offset = tiles.num_kv_heads * tiles.units_per_block

    def fill(tile: Array, units: tuple[Array, ...]) -> tuple[Array, ...]:
        stage = lax.rem(tile, jnp.int32(tiles.num_stages))
        following = read_table(tile + 1)
        for memory, full, free, offset in (
            (ring.keys, ring.keys_full, ring.keys_free, 0),
            (ring.values, ring.values_full, ring.values_free, values_offset),
        ):

            @pl.when(tile >= tiles.num_stages)
            def _wait(free: Any = free) -> None:
                plgpu.barrier_wait(free.at[stage])

            for place, unit in enumerate(units):
                plgpu.copy_gmem_to_smem(
                    kv.at[unit + offset],
                    memory.at[stage, pl.ds(place * tiles.unit, tiles.unit)],
                    full.at[stage],
                )
        return following

    lax.fori_loop(jnp.int32(0), num_tiles, fill, read_table(jnp.int32(0)))

    @pl.loop(jnp.maximum(num_tiles - tiles.num_stages, 0), num_tiles)
    def _drain(tile: Array) -> None:
        stage = lax.rem(tile, jnp.int32(tiles.num_stages))
        plgpu.barrier_wait(ring.keys_free.at[stage])
        plgpu.barrier_wait(ring.values_free.at[stage])


def scores_of(
    products: Float[Array, "64 N"],
    queries: Queries,
    first_key: Int[Array, ""],
    tiles: MosaicTiles,
    *,
    is_masked: bool,
) -> Float[Array, "64 N"]:
    """Scores in powers of two, `MASKED` where not visible."""
    if tiles.soft_cap is None:
        scores = products * (tiles.scale * LOG2_E)
    else:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), exact at both ends.
        doubled = products * (2 * LOG2_E * tiles.scale / tiles.soft_cap)
        tanh = 1.0 - 2.0 / (jnp.exp2(doubled) + 1.0)
        scores = tanh * (tiles.soft_cap * LOG2_E)
    if not is_masked and queries.slopes is None:
        return scores
    shape = products.shape
    rows = lax.broadcasted_iota(jnp.int32, shape, 0) + queries.first_row
    tokens = lax.div(rows, lax.full(shape, tiles.group, jnp.int32))
    keys = lax.broadcasted_iota(jnp.int32, shape, 1) + first_key
    distance = tokens + queries.first_position - keys
    if queries.slopes is not None:
        slopes = as_columns(queries.slopes, shape[1])
        scores = scores - slopes * LOG2_E * distance.astype(jnp.float32)
    if not is_masked:
        return scores
    visible = distance >= 0
    if tiles.window is not None:
        visible = visible & (distance < tiles.window)
    return jnp.where(visible, scores, MASKED)


def multiply_keys(
    q: Any, keys: Any, tiles: MosaicTiles, meanwhile: Callable[[], None]
) -> Float[Array, "64 N"]:
    """Queries times keys, both in shared memory."""
    if tiles.interpret:  # the simulator's wgmma knows no transposed operand
        meanwhile()
        return as_float(q[...]) @ as_float(keys[...]).T

    def multiply(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, q, keys.transpose((1, 0)))
        meanwhile()
        return accumulator[...]

    accumulator = plgpu.WGMMAAccumulatorRef((ROWS, tiles.block_n), jnp.float32)
    return pl.run_scoped(multiply, accumulator)


def add_values(
    weighted: Float[Array, "64 D"],
    weights: Float[Array, "64 N"],
    values: Any,
    tiles: MosaicTiles,
) -> Float[Array, "64 D"]:
    """Adds weights, in registers, times values in shared memory."""
    if tiles.interpret:  # nor operands in registers, nor accumulators with a content
        return weighted + as_float(weights) @ as_float(values[...])

    def multiply(accumulator: Any) -> None:
        plgpu.wgmma(accumulator, weights, values)

    state: Any = plgpu.WGMMAAccumulatorRef.init(weighted)
    return pl.run_state(multiply)(state)


def as_float(values: Array) -> Array:
    """Exact float32 of 16-bit numbers."""
    return values.astype(jnp.float32)


def clear_missing(
    values: Any, first_key: Int[Array, ""], length: Int[Array, ""], tiles: MosaicTiles
) -> None:
    """Zeroes the values of places that hold no token.

    They hold anything, NaN included, and a weight of zero does not cancel a NaN.
    """
    rows, columns = min(ROWS, tiles.block_n), HEAD_DIMS[0]  # few registers are free
    for first in range(0, tiles.block_n, rows):
        keys = lax.broadcasted_iota(jnp.int32, (rows, columns), 0) + first
        is_token = keys + first_key < length
        for column in range(0, tiles.head_dim, columns):
            part = values.at[pl.ds(first, rows), pl.ds(column, columns)]
            loaded = part[...]
            part[...] = jnp.where(is_token, loaded, jnp.zeros_like(loaded))
    plgpu.commit_smem()


class Turns(NamedTuple):
    """How the computing warpgroups share tiles and tensor cores.

    Attributes:
        first: Its first tile.
        step: From one of its tiles to the next.
        swap: Waits until the other one is done with the tensor cores.
        clears: Whether it clears the values that are missing.
        cleared: Waits until they are cleared.
    """

    first: Int[Array, ""] | int
    step: int
    swap: Callable[[], None]
    clears: Any
    cleared: Callable[[], None]


def attend(
    queries: Queries, run: Run, ring: Ring, turns: Turns, tiles: MosaicTiles
) -> Softmax:
    """Attends the queries to a warpgroup's share of the run's tiles.

    Only tiles in which some query does not see some key, at either end of the run, are
    masked.
    """

    def add_tile(number: Array, state: Softmax, *, is_masked: bool) -> Softmax:
        tile = number * turns.step + turns.first
        stage = lax.rem(tile, jnp.int32(tiles.num_stages))
        first_key = run.begin + tile * tiles.block_n
        plgpu.barrier_wait(ring.keys_full.at[stage])
        products = multiply_keys(queries.memory, ring.keys.at[stage], tiles, turns.swap)
        plgpu.barrier_arrive(ring.keys_free.at[stage])
        scores = scores_of(products, queries, first_key, tiles, is_masked=is_masked)
        maximum = jnp.maximum(state.maximum, scores.max(axis=1))
        decay = jnp.exp2(state.maximum - maximum)
        weights = jnp.exp2(scores - as_columns(maximum, tiles.block_n))
        total = state.total * decay + weights.sum(axis=1)
        weighted = state.weighted * as_columns(decay, tiles.head_dim)
        narrow = weights.astype(tiles.dtype)
        turns.swap()
        plgpu.barrier_wait(ring.values_full.at[stage])
        values = ring.values.at[stage]
        if is_masked:

            @pl.when(first_key + tiles.block_n > run.length)
            def _clear() -> None:
                @pl.when(turns.clears)
                def _clear_all() -> None:
                    clear_missing(values, first_key, run.length, tiles)

                turns.cleared()

        weighted = add_values(weighted, narrow, values, tiles)
        plgpu.barrier_arrive(ring.values_free.at[stage])
        return Softmax(weighted, maximum, total)

    def add_masked(number: Array, state: Softmax) -> Softmax:
        return add_tile(number, state, is_masked=True)

    def add_plain(number: Array, state: Softmax) -> Softmax:
        return add_tile(number, state, is_masked=False)

    def share(num_tiles: Array) -> Array:
        return divide_up(jnp.maximum(num_tiles - turns.first, 0), turns.step)

    plain_begin, plain_end = plain_tiles(queries, run, tiles)
    state = Softmax.empty(tiles)
    low, high = share(plain_begin), share(plain_end)
    if tiles.window is not None:
        state = lax.fori_loop(jnp.int32(0), low, add_masked, state)
    state = lax.fori_loop(low, high, add_plain, state)
    return lax.fori_loop(high, share(run.num_tiles(tiles)), add_masked, state)


def plain_tiles(
    queries: Queries, run: Run, tiles: MosaicTiles
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Begin and end of the tiles whose keys all queries of the thread block see."""
    num_tiles = run.num_tiles(tiles)
    # The first token sees the fewest keys after it, the last one the fewest before.
    visible = jnp.maximum(queries.first_position + 1 - run.begin, 0)
    end = jnp.minimum(lax.div(visible, jnp.int32(tiles.block_n)), num_tiles)
    if tiles.window is None:
        return jnp.int32(0), end
    newest = queries.first_position + tiles.tokens - 1
    hidden = jnp.maximum(newest - (tiles.window - 1) - run.begin, 0)
    begin = jnp.minimum(divide_up(hidden, tiles.block_n), num_tiles)
    return begin, jnp.maximum(begin, end)


def normalised(state: Softmax) -> tuple[Float[Array, "64 D"], Float[Array, " 64"]]:
    """Weighted means and the logarithms (base 2) of the sums; zeros if nothing seen."""
    is_seen = state.maximum > SEEN
    total = jnp.where(is_seen, state.total, 1.0)
    factor = jnp.where(is_seen, 1.0 / total, 0.0)
    means = state.weighted * as_columns(factor, state.weighted.shape[1])
    sums = jnp.where(is_seen, state.maximum + jnp.log(total) * LOG2_E, MASKED)
    return means, sums
