"""Kernel for GPUs in Pallas on Triton."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.chunks import make_chunks, with_padding_row
from pallas_kernels.common.recurrent_triton import check_widths, multiply
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes

LOG2_E = math.log2(math.e)
MASKED = -1e30
"""Score of a key that a query may not see; finite, so that no NaN can arise."""

SIZES = {"rows": 64, "keys": 32, "num_warps": 8, "num_stages": 2, "max_splits": 32}
EXACT_SIZES = {
    "rows": 16,
    "keys": 16,
    "num_warps": 8,
    "num_stages": 1,
    "max_splits": 32,
}
"""float32 is multiplied without tensor cores, hence smaller tiles."""

MIN_RANK = 16
MAX_RANK = 512


@dataclasses.dataclass(frozen=True, slots=True)
class _Tiles:
    """How the queries and keys of a call are cut.

    Attributes:
        tokens: Tokens per tile at most.
        heads: Heads per tile, a power of two.
        keys: Keys per step.
        splits: Parts of a sequence that programs of their own attend to.
    """

    tokens: int
    heads: int
    keys: int
    splits: int


class _Refs(NamedTuple):
    rows: Any
    first_tokens: Any
    num_tokens: Any
    lengths: Any
    ends: Any
    tables: Any
    scale: Any
    q_latent: Any
    q_rope: Any
    latent: Any


class _Softmax(NamedTuple):
    """The running state of the online softmax, scores in powers of two."""

    maximum: Float[Array, " M"]
    total: Float[Array, " M"]
    weighted: Float[Array, "M R"]


def mla_attention_gpu_triton(
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
    """One program per run of tokens, group of heads and part of the sequence.

    With few tokens each sequence is cut into parts by its own length, so that all
    multiprocessors have work; their sums are then combined.
    """
    _check(q_latent, q_rope, latent)
    num_tokens, num_heads, rank = q_latent.shape
    default = EXACT_SIZES if q_latent.dtype == jnp.float32 else SIZES
    sizes = tuned_sizes("mla_attention", target, str(q_latent.dtype), default)
    tiles = _tiles(num_tokens, num_heads, lengths.shape[0], sizes, target)
    starts = with_padding_row(row_starts, num_tokens)
    table = make_chunks(starts, num_tokens, tiles.tokens)
    head_parts = -(-num_heads // tiles.heads)
    parts = (tiles.splits, num_tokens, num_heads)
    if tiles.splits == 1:
        out_shape = (jax.ShapeDtypeStruct(q_latent.shape, q_latent.dtype),)
    else:
        out_shape = (
            jax.ShapeDtypeStruct((*parts, rank), jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        )
    results = pl.pallas_call(
        partial(_kernel, tiles=tiles),
        out_shape=out_shape,
        grid=(table.rows.shape[0], head_parts, tiles.splits),
        compiler_params=pltriton.CompilerParams(
            num_warps=sizes["num_warps"], num_stages=sizes["num_stages"]
        ),
        interpret=target.interpret,
        name="mla_attention",
    )(
        *_Refs(
            table.rows,
            table.first_tokens,
            table.num_tokens,
            # The padding is a sequence without keys.
            jnp.append(jnp.asarray(lengths, jnp.int32), jnp.zeros(1, jnp.int32)),
            starts[1:],
            jnp.pad(jnp.asarray(block_tables, jnp.int32), ((0, 1), (0, 0))),
            scale.reshape(1),
            q_latent,
            q_rope,
            latent,
        )
    )
    if tiles.splits == 1:
        return results[0]
    return _combined(*results).astype(q_latent.dtype)


def _check(q_latent: Array, q_rope: Array, latent: Array) -> None:
    rank = q_latent.shape[2]
    check_widths(q_latent.dtype, Dr=q_rope.shape[2])
    if rank < MIN_RANK or rank > MAX_RANK or rank & (rank - 1):
        raise NotImplementedError(f"R={rank}; only powers of two up to {MAX_RANK}")
    narrow = (jnp.float8_e4m3fn, jnp.float8_e5m2)
    if latent.dtype != q_latent.dtype and latent.dtype not in narrow:
        raise NotImplementedError(f"{latent.dtype} latents, {q_latent.dtype} queries")
    if latent.size > 2**31 and latent.size * latent.dtype.itemsize <= 2**32:
        raise NotImplementedError(
            f"{latent.size} 8-bit latents; Triton's offsets fail from 2 to 4 GiB"
        )


def _tiles(
    num_tokens: int, num_heads: int, num_rows: int, sizes: Any, target: Target
) -> _Tiles:
    heads = min(sizes["rows"], max(1, 1 << (num_heads - 1).bit_length()))
    per_row = 1 << (max(1, num_tokens // max(num_rows, 1)).bit_length() - 1)
    tokens = min(sizes["rows"] // heads, per_row)
    # Products need 16 rows; those that are too many are masked.
    tokens = max(tokens, -(-16 // heads))
    programs = (-(-num_tokens // tokens)) * -(-num_heads // heads)
    splits = max(1, min(sizes["max_splits"], target.num_cores // max(programs, 1)))
    return _Tiles(tokens, heads, sizes["keys"], splits)


def _kernel(*refs: Any, tiles: _Tiles) -> None:
    inputs, outputs = _Refs(*refs[:10]), refs[10:]
    index, part, split = (pl.program_id(axis) for axis in range(3))
    row, first = inputs.rows[index], inputs.first_tokens[index]
    count, length = inputs.num_tokens[index], inputs.lengths[row]
    num_heads, rank = inputs.q_latent.shape[1:]
    block_size, width = inputs.latent.shape[1], inputs.tables.shape[1]

    @pl.when(count > 0)
    def _() -> None:
        places = jnp.arange(tiles.tokens * tiles.heads, dtype=jnp.int32)
        tokens = first + places // tiles.heads
        heads = part * tiles.heads + places % tiles.heads
        used = (tokens < first + count) & (heads < num_heads)
        shift = length - inputs.ends[row]
        end = jnp.clip(first + count + shift, 0, width * block_size)
        share = -(-end // (tiles.splits * tiles.keys)) * tiles.keys
        begin = split * share
        stop = jnp.minimum(begin + share, end)
        steps = jnp.maximum(stop - begin + tiles.keys - 1, 0) // tiles.keys
        q_latent = _load_queries(inputs.q_latent, tokens, heads, used)
        q_rope = _load_queries(inputs.q_rope, tokens, heads, used)

        def attend(step: Array, carried: _Softmax) -> _Softmax:
            keys = begin + step * tiles.keys + jnp.arange(tiles.keys, dtype=jnp.int32)
            latents, ropes = _load_keys(inputs, row, keys, stop)
            scores = _scores(q_latent, q_rope, latents, ropes)
            scores *= inputs.scale[0] * np.float32(LOG2_E)
            seen = keys[None, :] <= (tokens + shift)[:, None]
            seen = seen & (keys < stop)[None, :]
            return _accumulate(carried, scores, seen, latents)

        start = _Softmax(
            jnp.full(places.shape, MASKED, jnp.float32),
            jnp.zeros(places.shape, jnp.float32),
            jnp.zeros((places.shape[0], rank), jnp.float32),
        )
        state = jax.lax.fori_loop(0, steps, attend, start)
        _store(outputs, (split, tokens, heads, used), state)


def _load_queries(ref: Any, tokens: Array, heads: Array, used: Array) -> Array:
    columns = jnp.arange(ref.shape[2], dtype=jnp.int32)
    mask = jnp.broadcast_to(used[:, None], (used.shape[0], columns.shape[0]))
    place = ref.at[tokens[:, None], heads[:, None], columns[None, :]]
    return pltriton.load(place, mask=mask, other=jnp.zeros((), ref.dtype))


def _load_keys(
    inputs: _Refs, row: Array, keys: Array, stop: Array
) -> tuple[Array, Array]:
    """Latents and rotary parts at these positions; from `stop` on they are zero."""
    num_blocks, block_size, _ = inputs.latent.shape
    inside = keys < stop
    runs = jnp.where(inside, keys // block_size, 0)
    blocks = pltriton.load(inputs.tables.at[row, runs], mask=inside, other=jnp.int32(0))
    blocks = jnp.clip(blocks, 0, num_blocks - 1)[:, None]
    places = (keys % block_size)[:, None]
    rank, rope = inputs.q_latent.shape[2], inputs.q_rope.shape[2]
    dtype = inputs.q_latent.dtype

    def load(first: int, size: int) -> Array:
        columns = first + jnp.arange(size, dtype=jnp.int32)
        mask = jnp.broadcast_to(inside[:, None], (keys.shape[0], size))
        place = inputs.latent.at[blocks, places, columns[None, :]]
        zero = jnp.zeros((), inputs.latent.dtype)
        return pltriton.load(place, mask=mask, other=zero).astype(dtype)

    return load(0, rank), load(rank, rope)


def _scores(q_latent: Array, q_rope: Array, latents: Array, ropes: Array) -> Array:
    dtype = q_latent.dtype
    scores = multiply(q_rope, ropes, dtype, (1, 1))
    return scores + multiply(q_latent, latents, dtype, (1, 1))


def _accumulate(
    carried: _Softmax, scores: Array, seen: Array, values: Array
) -> _Softmax:
    scores = jnp.where(seen, scores, MASKED)
    maximum = jnp.maximum(carried.maximum, jnp.max(scores, axis=1))
    decay = jnp.exp2(carried.maximum - maximum)
    weights = jnp.where(seen, jnp.exp2(scores - maximum[:, None]), 0.0)
    return _Softmax(
        maximum,
        carried.total * decay + jnp.sum(weights, axis=1),
        carried.weighted * decay[:, None] + multiply(weights, values, values.dtype),
    )


def _store(outputs: tuple[Any, ...], place: tuple[Array, ...], state: _Softmax) -> None:
    split, tokens, heads, used = place
    columns = jnp.arange(state.weighted.shape[1], dtype=jnp.int32)
    wide = jnp.broadcast_to(used[:, None], state.weighted.shape)
    index = (tokens[:, None], heads[:, None], columns[None, :])
    if len(outputs) == 1:
        (out,) = outputs
        total = jnp.maximum(state.total, jnp.finfo(jnp.float32).tiny)
        values = (state.weighted / total[:, None]).astype(out.dtype)
        pltriton.store(out.at[index], values, mask=wide)
        return
    weighted, maximum, total = outputs
    pltriton.store(maximum.at[split, tokens, heads], state.maximum, mask=used)
    pltriton.store(total.at[split, tokens, heads], state.total, mask=used)
    # A part without keys is not read again.
    has_keys = wide & (state.total > 0)[:, None]
    pltriton.store(weighted.at[(split, *index)], state.weighted, mask=has_keys)


def _combined(
    weighted: Float[Array, "N T H R"],
    maximum: Float[Array, "N T H"],
    total: Float[Array, "N T H"],
) -> Float[Array, "T H R"]:
    """One softmax of the parts' sums."""
    factors = jnp.exp2(maximum - maximum.max(axis=0, keepdims=True))
    factors = jnp.where(total > 0, factors, 0)
    sums = jnp.maximum((total * factors).sum(axis=0), jnp.finfo(jnp.float32).tiny)
    has_keys = (total > 0)[..., None]
    products = jnp.where(has_keys, weighted * factors[..., None], 0).sum(axis=0)
    return products / sums[..., None]
