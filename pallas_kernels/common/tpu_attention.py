"""Attention over a paged cache on TPUs: one persistent kernel for every mix of rows."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.scores import ScoreOptions
from pallas_kernels.common.target import Target
from pallas_kernels.common.tpu_attention_kernel import (
    GROUP_BUFFERS,
    LANES,
    Kernel,
    Refs,
    Shape,
    TileSizes,
    sublanes_of,
)

SMEM_BYTES = 3 * 2**18
"""Of the 1 MiB of scalar memory: what block tables and tiles may take."""
CACHE_DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
QUERY_DTYPES = ("float32", "bfloat16", "float16")
"""The kernel sees float16 queries as float32: TPUs have no vectors of float16."""


class Tiles(NamedTuple):
    """The kernel's work, in order; each tile has queries of one row.

    Attributes:
        rows: Row of the block tables.
        first_tokens: First of its tokens in the packed order.
        num_tokens: Tokens; at most the `tile_q` of the sizes.
        first_positions: Position of the first token.
        num_used: How many tiles there are.
    """

    rows: Int[Array, " N"]
    first_tokens: Int[Array, " N"]
    num_tokens: Int[Array, " N"]
    first_positions: Int[Array, " N"]
    num_used: Int[Array, ""]


class Groups(NamedTuple):
    """Sublane groups of the pool that take new tokens before anything is read.

    Attributes:
        values: What the groups take, at the places where it goes.
        blocks: Block of the pool of each group.
        places: First place in the block.
        starts: First place to be written, counted from `places`.
        ends: Where what is written ends.
        num_used: How many groups there are; they come first.
    """

    values: Shaped[Array, "N 2 K U D"]
    blocks: Int[Array, " N"]
    places: Int[Array, " N"]
    starts: Int[Array, " N"]
    ends: Int[Array, " N"]
    num_used: Int[Array, ""]


class TokenRows(NamedTuple):
    """New tokens that are put into the blocks just read; float32, exact in the cache.

    Attributes:
        keys: Keys as they are stored.
        values: Values as they are stored.
    """

    keys: Float[Array, "T K D"]
    values: Float[Array, "T K D"]


class PagedCache(NamedTuple):
    """The pool and how it is read."""

    kv: Shaped[Array, "B 2 K P D"]
    block_tables: Int[Array, "S M"]
    scales: Float[Array, "2 K"] | None


def attend(
    q: Float[Array, "T H D"],
    cache: PagedCache,
    tiles: Tiles,
    options: ScoreOptions,
    sizes: TileSizes,
    new: Groups | TokenRows | None,
    target: Target,
) -> tuple[Float[Array, "T H D"], Shaped[Array, "B 2 K P D"]]:
    """Runs the kernel; the pool is updated in place where there are new tokens.

    Raises:
        NotImplementedError: The kernel cannot do this; the message says why.
    """
    shape = _describe(q, cache, options, sizes)
    if q.dtype == jnp.float16:
        wide = q.astype(jnp.float32)
        out, kv = attend(wide, cache, tiles, options, sizes, new, target)
        return out.astype(q.dtype), kv
    scalars, arrays = _arguments(q, cache, tiles, options, shape, new)
    _check_scalar_memory(scalars)
    scratch = _scratch(q, cache, shape, new)
    names = [*scalars, *arrays]
    kept = ["out"] if new is None else ["out", "kv"]

    def body(*refs: Any) -> None:
        found = Refs()
        for name, ref in zip([*names, *kept, *scratch], refs, strict=True):
            setattr(found, name, ref)
        Kernel(shape, found).run()

    out_shape = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    aliases = {}
    if new is not None:
        out_shape.append(jax.ShapeDtypeStruct(cache.kv.shape, cache.kv.dtype))
        aliases = {names.index("kv"): 1}
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    places = {"kv": pl.BlockSpec(memory_space=pltpu.HBM), "sinks": whole}
    places["slopes"] = whole
    in_specs = [places.get(name, anywhere) for name in arrays]
    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=in_specs,
            out_specs=[places.get(name, anywhere) for name in kept],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=_vmem_bytes(scratch, arrays, shape),
        ),
        cost_estimate=_estimate(q, cache, shape),
        interpret=target.interpret,
        name="paged_attention" if not sizes.is_ragged else "ragged_attention",
    )

    def run(*arguments: Array) -> Any:
        held = list(arguments)
        if not target.interpret:
            # Or the compiler would copy a small pool into vector memory as a whole.
            place = names.index("kv")
            held[place] = pltpu.with_memory_space_constraint(held[place], pltpu.HBM)
        # A constrained pool may not be a result of the whole program: the compiler's
        # verifier takes its two places for different ones.
        return jax.lax.optimization_barrier(call(*held))

    # The constraint exists in compiled code only.
    result = jax.jit(run)(*scalars.values(), *arrays.values())
    return result[0], cache.kv if new is None else result[1]


def _describe(
    q: Array, cache: PagedCache, options: ScoreOptions, sizes: TileSizes
) -> Shape:
    num_blocks, _, num_kv_heads, block_size, head_dim = cache.kv.shape
    q_name, kv_name = q.dtype.name, cache.kv.dtype.name
    sublanes = sublanes_of(cache.kv.dtype)
    if q_name not in QUERY_DTYPES:
        raise NotImplementedError(f"q of {q_name}, not of {', '.join(QUERY_DTYPES)}")
    if kv_name not in CACHE_DTYPES:
        why = " (TPUs have no vectors of it)" if kv_name == "float16" else ""
        known = ", ".join(CACHE_DTYPES)
        raise NotImplementedError(f"kv of {kv_name}{why}, not of {known}")
    if head_dim % LANES:
        raise NotImplementedError(f"head width {head_dim} is no multiple of {LANES}")
    if block_size % sublanes:
        raise NotImplementedError(
            f"block size {block_size} is no multiple of {sublanes}, the rows of a tile "
            f"of {kv_name}"
        )
    wide = kv_name == "float32" or q_name != "bfloat16"
    return Shape(
        sizes=sizes,
        num_blocks=num_blocks,
        num_kv_heads=num_kv_heads,
        group=q.shape[1] // num_kv_heads,
        block_size=block_size,
        head_dim=head_dim,
        table_width=cache.block_tables.shape[1],
        sublanes=sublanes,
        compute_dtype=jnp.float32 if wide else jnp.bfloat16,
        scale=options.scale,
        window=options.window,
        soft_cap=options.soft_cap,
    )


def _arguments(
    q: Array,
    cache: PagedCache,
    tiles: Tiles,
    options: ScoreOptions,
    shape: Shape,
    new: Groups | TokenRows | None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The kernel's arguments by name: those for scalar memory, and the others."""
    first_blocks, end_blocks = _visible_blocks(tiles, shape)
    scalars = {
        "num_tiles": tiles.num_used.reshape(1),
        "rows": tiles.rows,
        "first_tokens": tiles.first_tokens,
        "num_tokens": tiles.num_tokens,
        "first_positions": tiles.first_positions,
        "first_blocks": first_blocks,
        "end_blocks": end_blocks,
        "tables": cache.block_tables.reshape(-1),
    }
    arrays = {"q": q, "kv": cache.kv}
    if isinstance(new, Groups):
        scalars |= {
            "num_groups": new.num_used.reshape(1),
            "group_blocks": new.blocks,
            "group_places": new.places,
            "group_starts": new.starts,
            "group_ends": new.ends,
        }
        arrays["group_values"] = new.values
    scalars = {name: array.astype(jnp.int32) for name, array in scalars.items()}
    if cache.scales is not None:
        scalars["scales"] = cache.scales.astype(jnp.float32).reshape(-1)
    if isinstance(new, TokenRows):
        arrays |= {"new_keys": new.keys, "new_values": new.values}
    if options.sinks is not None:
        arrays["sinks"] = _per_row(options.sinks, shape)
    if options.alibi_slopes is not None:
        arrays["slopes"] = _per_row(options.alibi_slopes, shape)
    return scalars, arrays


def _per_row(per_head: Float[Array, " H"], shape: Shape) -> Float[Array, "K R L"]:
    """A factor of each head, once for each query row, on all lanes."""
    factors = per_head.astype(jnp.float32).reshape(shape.num_kv_heads, 1, shape.group)
    full = (shape.num_kv_heads, shape.sizes.tile_q, shape.group)
    rows = jnp.broadcast_to(factors, full).reshape(shape.num_kv_heads, shape.rows, 1)
    return jnp.broadcast_to(rows, (shape.num_kv_heads, shape.rows, LANES))


def _visible_blocks(tiles: Tiles, shape: Shape) -> tuple[Array, Array]:
    """First block that a tile sees, and the end of those; nothing else is read."""
    oldest = tiles.first_positions
    end_key = jnp.maximum(oldest + tiles.num_tokens, 0)
    end_key = jnp.where(tiles.num_tokens > 0, end_key, 0)
    end = jnp.minimum(-(-end_key // shape.block_size), shape.table_width)
    if shape.window is None:
        return jnp.zeros_like(end), end
    first = jnp.maximum(oldest - (shape.window - 1), 0) // shape.block_size
    return jnp.minimum(first, end), end


def _scratch(
    q: Array, cache: PagedCache, shape: Shape, new: Groups | TokenRows | None
) -> dict[str, Any]:
    """The kernel's own memory by name."""
    sizes, dtype = shape.sizes, cache.kv.dtype
    num_kv_heads, head_dim = shape.num_kv_heads, shape.head_dim
    block = (2, num_kv_heads, shape.block_size, head_dim)
    tokens = (2, sizes.tile_q, num_kv_heads * shape.group, head_dim)
    group = (2, num_kv_heads, shape.sublanes, head_dim)
    stats = (num_kv_heads, shape.rows, LANES)
    dma = pltpu.SemaphoreType.DMA
    scratch: dict[str, Any] = {
        "q_buffer": pltpu.VMEM(tokens, q.dtype),
        "kv_buffer": pltpu.VMEM(
            (sizes.num_buffers, sizes.blocks_per_chunk, *block), dtype
        ),
        "out_buffer": pltpu.VMEM(tokens, q.dtype),
        "packed_q": pltpu.VMEM(
            (num_kv_heads, shape.rows, head_dim), shape.compute_dtype
        ),
        "maximum": pltpu.VMEM(stats, jnp.float32),
        "total": pltpu.VMEM(stats, jnp.float32),
        "weighted": pltpu.VMEM((num_kv_heads, shape.rows, head_dim), jnp.float32),
        "q_sems": dma((2,)),
        "kv_sems": dma((sizes.num_buffers,)),
        "out_sems": dma((2,)),
    }
    if isinstance(new, Groups):
        scratch["group_buffer"] = pltpu.VMEM((GROUP_BUFFERS, 2, *group), dtype)
        scratch["read_sems"] = dma((GROUP_BUFFERS,))
        scratch["write_sems"] = dma((GROUP_BUFFERS,))
    if isinstance(new, TokenRows):
        scratch["new_buffer"] = pltpu.VMEM(
            (2, 2, sizes.tile_q, num_kv_heads, head_dim), jnp.float32
        )
        scratch["group_buffer"] = pltpu.VMEM((2, shape.max_groups, *group), dtype)
        scratch["write_sems"] = dma((2,))
    return scratch


def _check_scalar_memory(scalars: dict[str, Array]) -> None:
    size = sum(4 * array.size for array in scalars.values())
    if size > SMEM_BYTES:
        raise NotImplementedError(
            f"block tables and tiles take {size} bytes of scalar memory, at most "
            f"{SMEM_BYTES} are there; larger blocks or fewer rows need less"
        )


def _vmem_bytes(scratch: dict[str, Any], arrays: dict[str, Array], shape: Shape) -> int:
    """Vector memory to ask for: buffers, constants, and room for some heads' scores."""
    total = 0
    for memory in scratch.values():
        if memory.memory_space == pltpu.VMEM:
            total += _padded_bytes(memory.inner_aval.shape, memory.inner_aval.dtype)
    for name in ("sinks", "slopes"):
        if name in arrays:
            total += 2 * _padded_bytes(arrays[name].shape, arrays[name].dtype)
    scores = _padded_bytes((shape.rows, shape.keys_per_chunk), jnp.float32)
    return total + 8 * scores + 4 * 2**20


def _padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    *outer, rows, columns = shape
    sublanes = sublanes_of(dtype)
    rows, columns = pl.cdiv(rows, sublanes) * sublanes, pl.cdiv(columns, 128) * 128
    return math.prod(outer) * rows * columns * jnp.dtype(dtype).itemsize


def _estimate(q: Array, cache: PagedCache, shape: Shape) -> pl.CostEstimate:
    """Work if the tables are full; the compiler does not know the real lengths."""
    rows, width = cache.block_tables.shape
    if shape.window is not None:
        width = min(width, shape.window // shape.block_size + 1)
    blocks = min(rows * width, shape.num_blocks)
    num_pairs = q.shape[0] * q.shape[1] * blocks * shape.block_size // rows
    block_bytes = math.prod(cache.kv.shape[1:]) * cache.kv.dtype.itemsize
    return pl.CostEstimate(
        flops=4 * num_pairs * shape.head_dim,
        transcendentals=num_pairs,
        bytes_accessed=blocks * block_bytes + 2 * q.size * q.dtype.itemsize,
    )
