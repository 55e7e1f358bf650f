"""Mosaic TPU: reads, changes and writes back aligned tiles of rows by DMA.

A token's places are single rows of a tile, and a DMA moves whole tiles. The tokens are
taken in groups. Sorted by slot, those of a group that share a tile of a block are
neighbours, a run; each run is one round trip, and as no two runs of a group share a
tile, several of them are under way at a time.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.cost import cost_of
from pallas_kernels.common.elementwise import as_float32, saturate, struct
from pallas_kernels.common.target import Target
from pallas_kernels.kv_write.heads import HeadNorms, Heads, Rotation, rotate_and_widen

LANES = 128
TILE_BYTES = 32
"""Rows of a tile times bytes of a value."""
NUM_BUFFERS = 8
AHEAD = 4
"""Runs that are read before they are needed."""
MAX_COPIES = 8
BUFFER_BYTES = 8 << 20
MAX_GROUP = 256
GROUP_BYTES = 1 << 20
VMEM_BYTES = 48 << 20


class Runs(NamedTuple):
    """Tokens of each of N groups of G, sorted by slot and cut where the tile changes.

    Attributes:
        tokens: Tokens by their places in the group, in the order of their slots.
        slots: Their slots.
        starts: First of each run, and the end of the last one, G + 1 per group.
        num_runs: Number of runs in each group.
    """

    tokens: Int[Array, " I"]
    slots: Int[Array, " I"]
    starts: Int[Array, " J"]
    num_runs: Int[Array, " N"]


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What the kernel knows of its arguments.

    Attributes:
        group: Tokens of a group.
        block_size: Places per block.
        rows: Rows of a tile.
        num_buffers: Tiles in memory.
    """

    group: int
    block_size: int
    rows: int
    num_buffers: int


def kv_write_tpu(
    kv: Shaped[Array, "B 2 K P D"],
    keys: Float[Array, "T K D"],
    values: Float[Array, "T K D"],
    slots: Int[Array, " T"],
    kv_scales: Float[Array, "2 K"] | None,
    *,
    target: Target,
) -> Shaped[Array, "B 2 K P D"]:
    """Writes rows of the pool; see `api.kv_write`."""
    num_blocks, _, num_kv_heads, block_size, width = kv.shape
    rows = TILE_BYTES // kv.dtype.itemsize
    _check(kv, keys, rows)
    if not slots.size or not kv.size:
        return kv
    num_tokens, item = keys.shape[0], keys.dtype.itemsize
    group = min(num_tokens, MAX_GROUP, GROUP_BYTES // (num_kv_heads * width * item))
    tile_bytes = 2 * num_kv_heads * rows * width * kv.dtype.itemsize
    buffers = NUM_BUFFERS if tile_bytes * NUM_BUFFERS <= BUFFER_BYTES else AHEAD + 1
    shape = Shape(group, block_size, rows, buffers)
    runs = _find_runs(slots, num_blocks * block_size, shape)
    new = pl.BlockSpec((group, num_kv_heads, width), lambda i, *_: (i, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    arrays, in_specs = [keys, values, kv], [new, new, anywhere]
    if kv_scales is not None:
        scales = kv_scales.astype(jnp.float32)[:, :, None]
        arrays.append(jnp.broadcast_to(scales, (2, num_kv_heads, width)))
        in_specs.append(pl.BlockSpec(memory_space=pltpu.VMEM))
    return pl.pallas_call(
        partial(_write_kernel, shape=shape),
        out_shape=struct(kv.shape, kv.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(runs),
            grid=(pl.cdiv(num_tokens, group),),
            in_specs=in_specs,
            out_specs=anywhere,
            scratch_shapes=[
                pltpu.VMEM((buffers, 2, num_kv_heads, rows, width), kv.dtype),
                pltpu.VMEM((2 * num_kv_heads * rows, width), jnp.float32),
                pltpu.SemaphoreType.DMA((2, buffers)),
            ],
        ),
        input_output_aliases={len(runs) + 2: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=VMEM_BYTES,
            has_side_effects=True,
        ),
        cost_estimate=cost_of(
            keys, values, flops=0, more_bytes=2 * tile_bytes * num_tokens
        ),
        interpret=target.interpret,
        name="kv_write",
    )(*runs, *arrays)


def qkv_write_tpu(
    heads: Heads,
    kv: Shaped[Array, "B 2 K P W"],
    slots: Int[Array, " T"],
    rotation: Rotation,
    norms: HeadNorms | None,
    kv_scales: Float[Array, "2 K"] | None,
    *,
    target: Target,
) -> tuple[Float[Array, "T H W"], Shaped[Array, "B 2 K P W"]]:
    """Normalises and rotates in a fusion of XLA, then writes; see `api.qkv_write`."""
    q, keys, values = rotate_and_widen(heads, rotation, norms, kv.shape[4])
    return q, kv_write_tpu(kv, keys, values, slots, kv_scales, target=target)


def copy_blocks_tpu(
    pool: Shaped[Array, "B ..."],
    sources: Int[Array, " C"],
    targets: Int[Array, " C"],
    *,
    target: Target,
) -> Shaped[Array, "B ..."]:
    """Copies blocks by DMA, several at a time; see `api.copy_blocks`."""
    if pool.ndim < 3:
        raise NotImplementedError(f"a pool of shape {pool.shape}: blocks within tiles")
    if not pool.size or not sources.size:
        return pool
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        _copy_kernel,
        out_shape=struct(pool.shape, pool.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[anywhere],
            out_specs=anywhere,
            scratch_shapes=[pltpu.SemaphoreType.DMA((MAX_COPIES,))],
        ),
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), has_side_effects=True
        ),
        cost_estimate=cost_of(
            flops=0, more_bytes=2 * sources.size * (pool.nbytes // pool.shape[0])
        ),
        interpret=target.interpret,
        name="copy_blocks",
    )(sources, targets, pool)


def _copy_kernel(
    sources_ref: Any, targets_ref: Any, pool_ref: Any, out_ref: Any, semaphores: Any
) -> None:
    del pool_ref  # the same memory as out_ref
    num_copies, num_blocks = sources_ref.shape[0], out_ref.shape[0]

    def is_inside(i: Any) -> Any:
        return (targets_ref[i] >= 0) & (targets_ref[i] < num_blocks)

    def copy(i: Any) -> Any:
        source = jnp.clip(sources_ref[i], 0, num_blocks - 1)
        return pltpu.make_async_copy(
            out_ref.at[source],
            out_ref.at[jnp.clip(targets_ref[i], 0, num_blocks - 1)],
            semaphores.at[jax.lax.rem(i, MAX_COPIES)],
        )

    # The last steps only wait.
    @pl.loop(0, num_copies + MAX_COPIES)
    def _(i: Any) -> None:
        @pl.when((i >= MAX_COPIES) & is_inside(jnp.maximum(i - MAX_COPIES, 0)))
        def _() -> None:
            copy(i - MAX_COPIES).wait()

        @pl.when((i < num_copies) & is_inside(jnp.minimum(i, num_copies - 1)))
        def _() -> None:
            copy(i).start()


def _check(kv: Array, keys: Array, rows: int) -> None:
    if kv.shape[4] % LANES:
        raise NotImplementedError(
            f"head width {kv.shape[4]} is no multiple of {LANES} lanes"
        )
    if kv.shape[3] % rows:
        raise NotImplementedError(
            f"block size {kv.shape[3]} is no multiple of the {rows} rows of a tile of "
            f"{kv.dtype}"
        )
    for array in (kv, keys):
        if array.dtype in (jnp.uint16, jnp.float16):
            raise NotImplementedError(f"{array.dtype}: TPUs have no vectors of float16")


def _find_runs(slots: Array, num_slots: int, shape: Shape) -> Runs:
    """Sorts the tokens; the same for all layers of a step, hence computed once."""
    group = shape.group
    missing = -slots.shape[0] % group
    slots = jnp.pad(slots.astype(jnp.int32), (0, missing), constant_values=-1)
    slots = jnp.where((slots < 0) | (slots >= num_slots), num_slots, slots)
    slots = slots.reshape(-1, group)
    ids = jnp.arange(group, dtype=jnp.int32)
    ids = jnp.broadcast_to(ids[None], slots.shape)
    slots, tokens = jax.lax.sort((slots, ids), dimension=1, num_keys=1)
    tiles = slots // shape.rows
    previous = jnp.pad(tiles[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    is_valid = slots < num_slots
    is_first = is_valid & (tiles != previous)
    end = jnp.sum(is_valid, axis=1, keepdims=True, dtype=jnp.int32)
    starts = jnp.sort(jnp.where(is_first, ids, end), axis=1)
    starts = jnp.concatenate([starts, end], axis=1)
    num_runs = jnp.sum(is_first, axis=1, dtype=jnp.int32)
    return Runs(tokens.reshape(-1), slots.reshape(-1), starts.reshape(-1), num_runs)


def _write_kernel(
    tokens_ref: Any,
    slots_ref: Any,
    starts_ref: Any,
    num_runs_ref: Any,
    *refs: Any,
    shape: Shape,
) -> None:
    # The pool comes in under its first name, and is only used under the second.
    keys_ref, values_ref, _, *scales_refs = refs[:-4]
    pool_ref, tiles_ref, wide_ref, semaphores = refs[-4:]
    group = pl.program_id(0)
    num_runs, first_token = num_runs_ref[group], group * shape.group

    def start_of(run: Any) -> Any:
        return starts_ref[group * (shape.group + 1) + run]

    def tile_of(run: Any) -> Any:
        slot = slots_ref[first_token + start_of(run)]
        place = jax.lax.rem(slot, shape.block_size)
        first = pl.multiple_of(place - jax.lax.rem(place, shape.rows), shape.rows)
        block = jax.lax.div(slot, shape.block_size)
        return pool_ref.at[block, :, :, pl.ds(first, shape.rows), :]

    def buffer_of(run: Any) -> Any:
        return jax.lax.rem(run, shape.num_buffers)

    def read(run: Any) -> Any:
        buffer = buffer_of(run)
        return pltpu.make_async_copy(
            tile_of(run), tiles_ref.at[buffer], semaphores.at[0, buffer]
        )

    def write(run: Any) -> Any:
        buffer = buffer_of(run)
        return pltpu.make_async_copy(
            tiles_ref.at[buffer], tile_of(run), semaphores.at[1, buffer]
        )

    def change(run: Any) -> None:
        tile_ref = tiles_ref.at[buffer_of(run)]
        _, num_heads, rows, width = tile_ref.shape
        # In float32, since rows of narrower types share registers.
        wide = as_float32(tile_ref[...])
        wide_ref[...] = wide.reshape(2 * num_heads * rows, width)

        @pl.loop(first_token + start_of(run), first_token + start_of(run + 1))
        def _(i: Any) -> None:
            token, row = tokens_ref[i], jax.lax.rem(slots_ref[i], shape.rows)
            for part, new_ref in enumerate((keys_ref, values_ref)):
                new = new_ref[token].astype(jnp.float32)
                for scales_ref in scales_refs:
                    new = new / scales_ref[part]
                for head in range(num_heads):
                    place = (part * num_heads + head) * rows + row
                    wide_ref[pl.ds(place, 1), :] = new[head : head + 1]

        wide = wide_ref[...].reshape(2, num_heads, rows, width)
        tile_ref[...] = saturate(wide, tile_ref.dtype)

    @pl.loop(0, jnp.minimum(AHEAD, num_runs))
    def _(run: Any) -> None:
        read(run).start()

    @pl.loop(0, num_runs)
    def _(run: Any) -> None:
        read(run).wait()
        change(run)
        write(run).start()
        following = run + AHEAD

        @pl.when(following < num_runs)
        def _() -> None:
            @pl.when(following >= shape.num_buffers)
            def _() -> None:
                write(following - shape.num_buffers).wait()

            read(following).start()

    # The next group may need the same tiles.
    @pl.loop(jnp.maximum(num_runs - shape.num_buffers, 0), num_runs)
    def _(run: Any) -> None:
        write(run).wait()
