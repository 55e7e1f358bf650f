"""Pallas on Triton: programs of some rows, one row for each token and head."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.elementwise import check_byte_float, saturate, struct
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes
from pallas_kernels.kv_write.heads import HeadNorms, Heads, Rotation

SIZES = {"values": 1024, "warps": 4, "copied": 4096}
MAX_WIDTH = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What the kernels know of their arguments.

    Attributes:
        num_tokens: New tokens `T`.
        num_heads: Query heads `H`, none where only keys and values are written.
        num_kv_heads: KV heads `K`.
        head_dim: Head width `D`.
        num_slots: Places in the pool.
        block_size: Places per block.
        tile: Rows and padded width of a program's tile.
        half: Pairs of features that are rotated; 0 for none.
        epsilon: Of the norms; None for none.
        weight_offset: Of the norms.
    """

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_slots: int
    block_size: int
    tile: tuple[int, int]
    half: int = 0
    epsilon: float | None = None
    weight_offset: int = 0

    @property
    def num_q_tiles(self) -> int:
        """Programs that work on queries."""
        return pl.cdiv(self.num_tokens * self.num_heads, self.tile[0])

    @property
    def num_kv_tiles(self) -> int:
        """Programs that work on keys, and on values."""
        return pl.cdiv(self.num_tokens * self.num_kv_heads, self.tile[0])


def kv_write_gpu_triton(
    kv: Shaped[Array, "B 2 K P D"],
    keys: Float[Array, "T K D"],
    values: Float[Array, "T K D"],
    slots: Int[Array, " T"],
    kv_scales: Float[Array, "2 K"] | None,
    *,
    target: Target,
) -> Shaped[Array, "B 2 K P D"]:
    """Writes rows of the pool; see `api.kv_write`."""
    shape = _shape(kv, keys, 0, target)
    _, pool = _call(shape, kv, (None, keys, values), slots, kv_scales, (), target)
    return pool


def qkv_write_gpu_triton(
    heads: Heads,
    kv: Shaped[Array, "B 2 K P W"],
    slots: Int[Array, " T"],
    rotation: Rotation,
    norms: HeadNorms | None,
    kv_scales: Float[Array, "2 K"] | None,
    *,
    target: Target,
) -> tuple[Float[Array, "T H W"], Shaped[Array, "B 2 K P W"]]:
    """Normalises, rotates and writes in one kernel; see `api.qkv_write`."""
    if heads.keys.shape[2] != kv.shape[4]:
        raise NotImplementedError(
            f"heads of width {heads.keys.shape[2]} in a pool of width {kv.shape[4]}"
        )
    shape = _shape(kv, heads.keys, heads.q.shape[1], target)
    shape = dataclasses.replace(shape, half=rotation.cos.shape[1])
    extra: tuple[Array, ...] = tuple(rotation)
    if norms is not None:
        shape = dataclasses.replace(
            shape, epsilon=norms.epsilon, weight_offset=norms.weight_offset
        )
        extra = (*extra, norms.q, norms.keys)
    q, pool = _call(shape, kv, tuple(heads), slots, kv_scales, extra, target)
    return q.reshape(heads.q.shape), pool


def copy_blocks_gpu_triton(
    pool: Shaped[Array, "B ..."],
    sources: Int[Array, " C"],
    targets: Int[Array, " C"],
    *,
    target: Target,
) -> Shaped[Array, "B ..."]:
    """Copies runs of values of each block; see `api.copy_blocks`."""
    _check_pool(pool)
    if not pool.size or not sources.size:
        return pool
    sizes = tuned_sizes("kv_write", target, f"copy/{pool.dtype}", SIZES)
    matrix = pool.reshape(pool.shape[0], -1)
    copied = min(sizes["copied"], pl.next_power_of_2(matrix.shape[1]))
    out = pl.pallas_call(
        partial(_copy_kernel, copied=copied),
        grid=(sources.shape[0], pl.cdiv(matrix.shape[1], copied)),
        out_shape=struct(matrix.shape, matrix.dtype),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=pl.no_block_spec,
        input_output_aliases={0: 0},
        compiler_params=pltriton.CompilerParams(num_warps=sizes["warps"], num_stages=1),
        interpret=target.interpret,
        name="copy_blocks",
    )(matrix, sources, targets)
    return out.reshape(pool.shape)


def _copy_kernel(
    pool_ref: Any, sources_ref: Any, targets_ref: Any, out_ref: Any, *, copied: int
) -> None:
    num_blocks, width = pool_ref.shape
    source = jnp.clip(sources_ref[pl.program_id(0)], 0, num_blocks - 1)
    block = targets_ref[pl.program_id(0)]
    columns = pl.program_id(1) * copied + jnp.arange(copied, dtype=jnp.int32)
    is_inside = (block >= 0) & (block < num_blocks)
    mask = (columns < width) & is_inside
    values = pltriton.load(pool_ref.at[source, columns], mask=mask)
    block = jnp.where(is_inside, block, num_blocks)
    pltriton.store(out_ref.at[block, columns], values, mask=mask)


def _check_pool(pool: Array) -> None:
    if pool.dtype.itemsize not in (1, 2, 4):
        raise NotImplementedError(f"a pool of {pool.dtype}")
    if 2**31 <= pool.size <= 2**32 // pool.dtype.itemsize:
        # Pallas on Triton computes 32-bit offsets of elements in arrays of up to 4 GiB.
        raise NotImplementedError(
            f"a pool of {pool.size} values of {pool.dtype}: offsets would overflow"
        )


def _shape(kv: Array, keys: Array, num_heads: int, target: Target) -> Shape:
    """Checks what the kernels support."""
    num_blocks, _, num_kv_heads, block_size, width = kv.shape
    _check_pool(kv)
    if kv.dtype == jnp.uint16 or keys.dtype.itemsize not in (2, 4):
        raise NotImplementedError(f"{keys.dtype} in a pool of {kv.dtype}")
    if width > MAX_WIDTH:
        raise NotImplementedError(f"head width {width} is above {MAX_WIDTH}")
    check_byte_float(kv.dtype, target.generation)
    padded = pl.next_power_of_2(width)
    sizes = tuned_sizes("kv_write", target, f"write/{kv.dtype}", SIZES)
    return Shape(
        num_tokens=keys.shape[0],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=width,
        num_slots=num_blocks * block_size,
        block_size=block_size,
        tile=(max(1, sizes["values"] // padded), padded),
    )


def _call(
    shape: Shape,
    kv: Array,
    heads: tuple[Any, ...],
    slots: Array,
    kv_scales: Array | None,
    extra: tuple[Array, ...],
    target: Target,
) -> tuple[Any, Array]:
    """Runs the kernel on matrices with a row for each token, or place, and head."""
    matrices = [x.reshape(-1, shape.head_dim) for x in heads if x is not None]
    if not slots.size or not kv.size:
        return (matrices[0] if shape.num_heads else None), kv
    pool = kv.reshape(-1, shape.head_dim)
    scales = [] if kv_scales is None else [kv_scales.reshape(-1)]
    arrays = [pool, slots, *matrices, *scales, *extra]
    outputs = [struct(pool.shape, pool.dtype)]
    if shape.num_heads:
        outputs.append(struct(matrices[0].shape, matrices[0].dtype))
    sizes = tuned_sizes("kv_write", target, f"write/{kv.dtype}", SIZES)
    results = pl.pallas_call(
        partial(_write_kernel, shape=shape, has_scales=kv_scales is not None),
        grid=(shape.num_q_tiles + 2 * shape.num_kv_tiles,),
        out_shape=outputs,
        in_specs=[pl.no_block_spec] * len(arrays),
        out_specs=[pl.no_block_spec] * len(outputs),
        input_output_aliases={0: 0},
        compiler_params=pltriton.CompilerParams(num_warps=sizes["warps"], num_stages=1),
        interpret=target.interpret,
        name="qkv_write" if shape.num_heads else "kv_write",
    )(*arrays)
    return (results[1] if shape.num_heads else None), results[0].reshape(kv.shape)


def _write_kernel(*refs: Any, shape: Shape, has_scales: bool) -> None:
    has_q = shape.num_heads > 0
    num_inputs = len(refs) - 1 - has_q
    slots_ref, *inputs = refs[1:num_inputs]
    pool_ref = refs[num_inputs]
    heads, rest = inputs[: 2 + has_q], inputs[2 + has_q :]
    scales_ref = rest.pop(0) if has_scales else None
    tables, weights = rest[:2], rest[2:]
    program = pl.program_id(0)
    first_keys, first_values = shape.num_q_tiles, shape.num_q_tiles + shape.num_kv_tiles

    if has_q:

        @pl.when(program < first_keys)
        def _() -> None:
            rows = _rows(program, shape)
            weight = weights[0] if weights else None
            out = _prepared(heads[0], rows, shape.num_heads, tables, weight, shape)
            index, mask = _matrix_index(rows, rows < heads[0].shape[0], shape)
            pltriton.store(refs[-1].at[index], out, mask=mask)

    @pl.when((program >= first_keys) & (program < first_values))
    def _() -> None:
        rows = _rows(program - first_keys, shape)
        if has_q:
            weight = weights[1] if weights else None
            out = _prepared(heads[1], rows, shape.num_kv_heads, tables, weight, shape)
        else:
            out = _load_rows(heads[0], rows, shape)
        _store_rows(pool_ref, out, rows, slots_ref, scales_ref, 0, shape)

    @pl.when(program >= first_values)
    def _() -> None:
        rows = _rows(program - first_values, shape)
        out = _load_rows(heads[-1], rows, shape)
        _store_rows(pool_ref, out, rows, slots_ref, scales_ref, 1, shape)


def _rows(program: Any, shape: Shape) -> Any:
    return program * shape.tile[0] + jnp.arange(shape.tile[0], dtype=jnp.int32)


def _matrix_index(rows: Any, is_valid: Any, shape: Shape) -> tuple[Any, Any]:
    """Indices of a tile of rows and columns, and which of them are there."""
    columns = jnp.arange(shape.tile[1], dtype=jnp.int32)
    index = (
        jnp.broadcast_to(rows[:, None], shape.tile),
        jnp.broadcast_to(columns[None, :], shape.tile),
    )
    return index, is_valid[:, None] & (columns < shape.head_dim)[None, :]


def _load_rows(x_ref: Any, rows: Any, shape: Shape) -> Any:
    index, mask = _matrix_index(rows, rows < x_ref.shape[0], shape)
    return pltriton.load(x_ref.at[index], mask=mask, other=0.0)


def _prepared(
    x_ref: Any, rows: Any, num_heads: int, tables: Any, weight_ref: Any, shape: Shape
) -> Any:
    """A tile of normalised and rotated heads.

    Each feature is loaded together with the one it is paired with.
    """
    half, dtype = shape.half, x_ref.dtype
    columns = jnp.arange(shape.tile[1], dtype=jnp.int32)
    is_first, is_rotated = columns < half, columns < 2 * half
    partners = jnp.where(is_first, columns + half, columns - half)
    partners = jnp.where(is_rotated, partners, columns)
    index, mask = _matrix_index(rows, rows < x_ref.shape[0], shape)
    own = pltriton.load(x_ref.at[index], mask=mask, other=0.0).astype(jnp.float32)
    paired_index = (index[0], jnp.broadcast_to(partners[None, :], shape.tile))
    paired = pltriton.load(x_ref.at[paired_index], mask=mask, other=0.0)
    paired = paired.astype(jnp.float32)
    if shape.epsilon is not None:
        mean = jnp.sum(own * own, axis=1) / shape.head_dim
        scale = jax.lax.rsqrt(mean + shape.epsilon)[:, None]
        inside = columns < shape.head_dim
        own, paired = (
            _weighted(x * scale, weight_ref, places, inside, dtype, shape)
            for x, places in ((own, columns), (paired, partners))
        )
    tokens = jax.lax.div(rows, jnp.full_like(rows, num_heads))
    pairs = jnp.where(is_first, columns, columns - half)
    angle_index = (
        jnp.broadcast_to(tokens[:, None], shape.tile),
        jnp.broadcast_to(pairs[None, :], shape.tile),
    )
    angle_mask = mask & is_rotated[None, :]
    cos = pltriton.load(tables[0].at[angle_index], mask=angle_mask, other=1.0)
    sin = pltriton.load(tables[1].at[angle_index], mask=angle_mask, other=0.0)
    sin = jnp.where(is_first[None, :], -sin, sin)
    return (own * cos + paired * sin).astype(dtype)


def _weighted(
    x: Any, weight_ref: Any, places: Any, inside: Any, dtype: Any, shape: Shape
) -> Any:
    """Normalised heads times the norm's weight, in float32 but rounded."""
    weight = pltriton.load(weight_ref.at[places], mask=inside, other=0.0)
    factor = weight.astype(jnp.float32)[None, :]
    if shape.weight_offset:
        out = x * (factor + float(shape.weight_offset))
    else:
        out = x.astype(dtype).astype(jnp.float32) * factor
    return out.astype(dtype).astype(jnp.float32)


def _store_rows(
    pool_ref: Any,
    values: Any,
    rows: Any,
    slots_ref: Any,
    scales_ref: Any,
    part: int,
    shape: Shape,
) -> None:
    """Writes a tile of keys (part 0) or values (part 1) where their slots are."""
    count = jnp.full_like(rows, shape.num_kv_heads)
    tokens, heads = jax.lax.div(rows, count), jax.lax.rem(rows, count)
    inside = rows < shape.num_tokens * shape.num_kv_heads
    slots = pltriton.load(slots_ref.at[tokens], mask=inside, other=-1)
    is_valid = inside & (slots >= 0) & (slots < shape.num_slots)
    slots = jnp.where(is_valid, slots, 0).astype(jnp.int32)
    size = jnp.full_like(slots, shape.block_size)
    blocks, places = jax.lax.div(slots, size), jax.lax.rem(slots, size)
    runs = (blocks * 2 + part) * shape.num_kv_heads + heads
    # Behind the pool where nothing is written, so that no row occurs twice.
    places = jnp.where(is_valid, runs * shape.block_size + places, pool_ref.shape[0])
    if scales_ref is not None:
        scales = pltriton.load(
            scales_ref.at[part * shape.num_kv_heads + heads], mask=inside, other=1.0
        )
        values = values.astype(jnp.float32) / scales.astype(jnp.float32)[:, None]
    index, mask = _matrix_index(places, is_valid, shape)
    if pool_ref.dtype.itemsize == 1:
        values = saturate(values, pool_ref.dtype)
    pltriton.store(pool_ref.at[index], values.astype(pool_ref.dtype), mask=mask)
