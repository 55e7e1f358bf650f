"""Kernel for TPUs."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.chunks import ChunkTable, make_chunks, with_padding_row
from pallas_kernels.common.cost import cost_of
from pallas_kernels.common.recurrent_tpu import LANES, check_types, multiply
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes

LOG2_E = math.log2(math.e)
MASKED = -1e30
"""Score of a key that a query may not see; finite, so that no NaN can arise."""

SIZES = {"rows": 512, "keys": 512}


@dataclasses.dataclass(frozen=True, slots=True)
class _Tiles:
    """How the queries and keys of a call are cut.

    Attributes:
        tokens: Tokens per tile at most.
        blocks: Blocks of the pool per step.
        table_width: Blocks per sequence at most.
    """

    tokens: int
    blocks: int
    table_width: int


class _Refs(NamedTuple):
    """What the kernel is given: scalars, arrays, and its own memory."""

    rows: Any
    first_tokens: Any
    num_tokens: Any
    num_keys: Any
    next_tiles: Any
    shifts: Any
    tables: Any
    scale: Any
    q_latent: Any
    q_rope: Any
    latent: Any
    out: Any
    queries: Any
    ropes: Any
    keys: Any
    result: Any
    maximum: Any
    total: Any
    weighted: Any
    buffer: Any
    query_semaphore: Any
    key_semaphores: Any


def mla_attention_tpu(
    q_latent: Float[Array, "T H R"],
    q_rope: Float[Array, "T H Dr"],
    latent: Shaped[Array, "B P W"],
    block_tables: Int[Array, "S M"],
    row_starts: Int[Array, " S+1"],
    lengths: Int[Array, " S"],
    scale: Float[Array, ""],
    *,
    target: Target,
) -> Float[Array, "T H R"]:
    """One program after the other per run of tokens, all heads together.

    Blocks are fetched one step ahead into the other of two buffers, across runs too, so
    that memory is never idle between sequences.
    """
    num_tokens, num_heads, rank = q_latent.shape
    block_size, rope = latent.shape[1], q_rope.shape[2]
    _check(q_latent, latent)
    sizes = tuned_sizes("mla_attention", target, str(q_latent.dtype), SIZES)
    per_row = max(1, num_tokens // max(lengths.shape[0], 1))
    tokens = max(1, min(sizes["rows"] // num_heads, 1 << (per_row.bit_length() - 1)))
    tiles = _Tiles(
        tokens=tokens,
        blocks=max(1, sizes["keys"] // block_size),
        table_width=block_tables.shape[1],
    )
    starts = with_padding_row(row_starts, num_tokens)
    table = make_chunks(starts, num_tokens, tokens)
    scalars = _scalars(table, starts, lengths, block_size, tiles)
    dtype, flat = q_latent.dtype, tokens * num_heads
    scratch_shapes = [
        pltpu.VMEM((tokens, num_heads, rank), dtype),
        pltpu.VMEM((tokens, num_heads, rope), dtype),
        pltpu.VMEM((2, tiles.blocks, *latent.shape[1:]), latent.dtype),
        pltpu.VMEM((tokens, num_heads, rank), dtype),
        pltpu.VMEM((flat, LANES), jnp.float32),
        pltpu.VMEM((flat, LANES), jnp.float32),
        pltpu.VMEM((flat, rank), jnp.float32),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA,
        pltpu.SemaphoreType.DMA((2,)),
    ]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        partial(_kernel, tiles=tiles),
        out_shape=jax.ShapeDtypeStruct(q_latent.shape, dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars) + 2,
            grid=(table.rows.shape[0],),
            in_specs=[anywhere] * 3,
            out_specs=anywhere,
            scratch_shapes=scratch_shapes,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=_estimate(q_latent, q_rope, latent, block_tables),
        interpret=target.interpret,
        name="mla_attention",
    )(
        *scalars,
        jnp.asarray(block_tables, jnp.int32).reshape(-1),
        scale.reshape(1),
        q_latent,
        q_rope,
        latent,
    )


def _estimate(
    q_latent: Array, q_rope: Array, latent: Array, block_tables: Array
) -> pl.CostEstimate:
    """Work if the tables are full; the compiler does not know the real lengths."""
    num_rows, width = block_tables.shape
    num_blocks = min(num_rows * width, latent.shape[0])
    num_tokens, num_heads, rank = q_latent.shape
    pairs = num_tokens * num_heads * num_blocks * latent.shape[1] // max(num_rows, 1)
    return cost_of(
        q_latent,
        q_latent,
        q_rope,
        flops=2 * pairs * (2 * rank + q_rope.shape[2]),
        exponentials=pairs,
        more_bytes=latent.nbytes // latent.shape[0] * num_blocks,
    )


def _check(q_latent: Array, latent: Array) -> None:
    check_types(q_latent.dtype)
    _, num_heads, rank = q_latent.shape
    block_size = latent.shape[1]
    narrow = (jnp.float8_e4m3fn, jnp.float8_e5m2)
    if latent.dtype != q_latent.dtype and latent.dtype not in narrow:
        raise NotImplementedError(f"{latent.dtype} latents, {q_latent.dtype} queries")
    if num_heads % 16:
        raise NotImplementedError(f"{num_heads} heads, no multiple of 16")
    if rank % LANES:
        raise NotImplementedError(f"R={rank}, no multiple of {LANES}")
    if block_size % 32:
        raise NotImplementedError(f"blocks of {block_size} places, no multiple of 32")


def _scalars(
    table: ChunkTable,
    starts: Array,
    lengths: Int[Array, " S"],
    block_size: int,
    tiles: _Tiles,
) -> tuple[Array, ...]:
    """Of each tile: row, first token, tokens, keys, the next with keys, and shift.

    The shift is what a token's position is ahead of its place in the packed order.
    """
    # The padding is a sequence without keys; its table is never read.
    padded = jnp.append(jnp.asarray(lengths, jnp.int32), jnp.zeros(1, jnp.int32))
    shifts = (padded - starts[1:])[table.rows]
    ends = table.first_tokens + table.num_tokens + shifts
    num_keys = jnp.clip(ends, 0, tiles.table_width * block_size)
    is_row = (table.rows < padded.shape[0] - 1) & (table.num_tokens > 0)
    num_keys = jnp.where(is_row, num_keys, 0)
    num_tiles = num_keys.shape[0]
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    own = jnp.where(num_keys > 0, tile, num_tiles)
    following = jnp.append(own[1:], jnp.full(1, num_tiles, jnp.int32))
    next_tiles = jax.lax.cummin(following, reverse=True)
    return (
        table.rows,
        table.first_tokens,
        table.num_tokens,
        num_keys,
        next_tiles,
        shifts,
    )


def _kernel(*all_refs: Any, tiles: _Tiles) -> None:
    refs = _Refs(*all_refs)
    tile = pl.program_id(0)
    step_size = tiles.blocks * refs.latent.shape[1]
    num_steps = _ceil_div(refs.num_keys[tile], step_size)

    @pl.when(tile == 0)
    def _() -> None:
        refs.buffer[0] = 0
        first = jnp.where(refs.num_keys[0] > 0, 0, refs.next_tiles[0])
        _start_keys(refs, tiles, first, jnp.int32(0), jnp.int32(0))

    _move_queries(refs, tiles, tile, "start")
    refs.maximum[...] = jnp.full(refs.maximum.shape, MASKED, jnp.float32)
    refs.total[...] = jnp.zeros(refs.total.shape, jnp.float32)
    refs.weighted[...] = jnp.zeros(refs.weighted.shape, jnp.float32)
    _move_queries(refs, tiles, tile, "wait")

    def attend(step: Array, buffer: Array) -> Array:
        is_last = step + 1 == num_steps
        following = jnp.where(is_last, refs.next_tiles[tile], tile)
        _start_keys(refs, tiles, following, jnp.where(is_last, 0, step + 1), 1 - buffer)
        _move_keys(refs, tiles, (tile, step, buffer), "wait")
        _attend_step(refs, tile, step, buffer)
        return 1 - buffer

    refs.buffer[0] = jax.lax.fori_loop(0, num_steps, attend, refs.buffer[0])
    total = jnp.maximum(refs.total[:, :1], np.finfo(np.float32).tiny)
    values = refs.weighted[...] / total
    refs.result[...] = values.astype(refs.result.dtype).reshape(refs.result.shape)
    _move_results(refs, tiles, tile, "start")
    _move_results(refs, tiles, tile, "wait")


def _ceil_div(number: Array, divisor: int) -> Array:
    # Of numbers that are not negative: floor_divide asks JAX for a device.
    return jax.lax.div(number + np.int32(divisor - 1), np.int32(divisor))


def _start_keys(
    refs: _Refs, tiles: _Tiles, tile: Array, step: Array, buffer: Array
) -> None:
    @pl.when(tile < refs.rows.shape[0])
    def _() -> None:
        _move_keys(refs, tiles, (tile, step, buffer), "start")


def _move_keys(
    refs: _Refs, tiles: _Tiles, place: tuple[Array, Array, Array], action: str
) -> None:
    """Starts the copies of a step's blocks, or waits for them."""
    tile, step, buffer = place
    num_blocks, block_size, _ = refs.latent.shape
    row, num_keys = refs.rows[tile], refs.num_keys[tile]
    for index in range(tiles.blocks):
        run = step * tiles.blocks + index

        @pl.when(run * block_size < num_keys)
        def _(run: Array = run, index: int = index) -> None:
            block = refs.tables[row * tiles.table_width + run]
            block = jnp.clip(block, 0, num_blocks - 1)
            copy = pltpu.make_async_copy(
                refs.latent.at[block],
                refs.keys.at[buffer, index],
                refs.key_semaphores.at[buffer],
            )
            getattr(copy, action)()


def _move_queries(refs: _Refs, tiles: _Tiles, tile: Array, action: str) -> None:
    pairs = ((refs.q_latent, refs.queries), (refs.q_rope, refs.ropes))
    for index in range(tiles.tokens):

        @pl.when(index < refs.num_tokens[tile])
        def _(index: int = index) -> None:
            token = refs.first_tokens[tile] + index
            for source, place in pairs:
                copy = pltpu.make_async_copy(
                    source.at[token], place.at[index], refs.query_semaphore
                )
                getattr(copy, action)()


def _move_results(refs: _Refs, tiles: _Tiles, tile: Array, action: str) -> None:
    for index in range(tiles.tokens):

        @pl.when(index < refs.num_tokens[tile])
        def _(index: int = index) -> None:
            token = refs.first_tokens[tile] + index
            copy = pltpu.make_async_copy(
                refs.result.at[index], refs.out.at[token], refs.query_semaphore
            )
            getattr(copy, action)()


def _attend_step(refs: _Refs, tile: Array, step: Array, buffer: Array) -> None:
    _, blocks, block_size, width = refs.keys.shape
    tokens, num_heads, rank = refs.queries.shape
    dtype, rope = refs.queries.dtype, refs.ropes.shape[2]
    num_keys, count = refs.num_keys[tile], blocks * block_size
    first = step * count

    @pl.when(first + count > num_keys)
    def _() -> None:
        # Unused places hold anything, and a weight of zero does not cancel a NaN.
        values = refs.keys[buffer].astype(jnp.float32).reshape(count, width)
        rows = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
        values = jnp.where(first + rows < num_keys, values, 0.0)
        shape = (blocks, block_size, width)
        refs.keys[buffer] = values.astype(refs.keys.dtype).reshape(shape)

    keys = refs.keys[buffer].reshape(count, width)
    latents = keys[:, :rank].astype(dtype)
    queries = refs.queries[...].reshape(tokens * num_heads, rank)
    ropes = refs.ropes[...].reshape(tokens * num_heads, rope)
    scores = multiply(queries, latents, dtype, (1, 1))
    scores += multiply(ropes, keys[:, rank : rank + rope].astype(dtype), dtype, (1, 1))
    scores *= refs.scale[0] * np.float32(LOG2_E)
    places = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    token = jnp.zeros(scores.shape, jnp.int32)
    for border in range(1, tokens):
        token += (places >= border * num_heads).astype(jnp.int32)
    position = token + (refs.first_tokens[tile] + refs.shifts[tile])
    key = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    seen = (key <= position) & (key < num_keys)
    scores = jnp.where(seen, scores, MASKED)
    old = refs.maximum[:, :1]
    maximum = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.where(seen, jnp.exp2(scores - maximum), 0.0)
    decay = jnp.exp2(old - maximum)
    total = refs.total[:, :1] * decay + jnp.sum(weights, axis=1, keepdims=True)
    refs.maximum[...] = jnp.broadcast_to(maximum, refs.maximum.shape)
    refs.total[...] = jnp.broadcast_to(total, refs.total.shape)
    added = multiply(weights, latents, dtype)
    refs.weighted[...] = refs.weighted[...] * decay + added
