"""Kernels for GPUs in Pallas on Triton."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int

from pallas_kernels.common.chunks import make_chunks
from pallas_kernels.common.recurrent_triton import (
    Launch,
    check_widths,
    chunk_tokens,
    decay_matrix,
    load_run,
    load_tokens,
    multiply,
    scan_rows,
    step_rows,
    store_tokens,
)
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes

SIZES = {
    "chunk": 64,
    "columns": 32,
    "prepare_warps": 8,
    "num_warps": 4,
    "num_stages": 2,
}
EXACT_SIZES = {
    "chunk": 16,
    "columns": 16,
    "prepare_warps": 8,
    "num_warps": 8,
    "num_stages": 1,
}
"""float32 is multiplied without tensor cores, hence smaller tiles."""

STEP_SIZES = {"columns": 32, "num_warps": 4, "num_stages": 1}


def gated_delta_rule_gpu_triton(
    q: Float[Array, "T K Dk"],
    k: Float[Array, "T K Dk"],
    v: Float[Array, "T H Dv"],
    g: Float[Array, "T H"],
    beta: Float[Array, "T H"],
    state: Float[Array, "S H Dk Dv"],
    row_starts: Int[Array, " S+1"],
    *,
    target: Target,
) -> tuple[Float[Array, "T H Dv"], Float[Array, "S H Dk Dv"]]:
    """Two kernels: within all chunks at once, then from chunk to chunk.

    Within a chunk, what the tokens write depends on the state before the chunk by
    written = u - w state; the first kernel computes u and w. The second has one program
    per sequence, head and part of the values' width, whose part of the state stays in
    registers.
    """
    check_widths(v.dtype, Dk=k.shape[2], Dv=v.shape[2])
    default = EXACT_SIZES if v.dtype == jnp.float32 else SIZES
    sizes = tuned_sizes("gated_delta_rule", target, f"rule {v.dtype}", default)
    num_tokens, num_heads, _ = v.shape
    chunk = sizes["chunk"]
    table = make_chunks(row_starts, num_tokens, chunk)
    w, u = pl.pallas_call(
        partial(_prepare_kernel, chunk=chunk),
        out_shape=(
            jax.ShapeDtypeStruct((num_tokens, num_heads, k.shape[2]), k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ),
        grid=(table.rows.shape[0], num_heads),
        compiler_params=pltriton.CompilerParams(
            num_warps=sizes["prepare_warps"], num_stages=1
        ),
        interpret=target.interpret,
        name="gated_delta_prepare",
    )(table.first_tokens, table.num_tokens, k, v, g, beta)
    return scan_rows(
        partial(_rule_kernel, chunk=chunk),
        Launch("gated_delta_rule", sizes, target),
        v,
        row_starts,
        (q, k, g, w, u, state),
    )


def _prepare_kernel(*refs: Any, chunk: int) -> None:
    first_tokens, num_tokens, k, v, g, beta, w, u = refs
    index, head = pl.program_id(0), pl.program_id(1)
    count = num_tokens[index]
    dtype = k.dtype

    @pl.when(count > 0)
    def _() -> None:
        start = first_tokens[index]
        tokens, inside = chunk_tokens(start, jnp.int32(0), chunk, start + count)
        key_columns = jnp.arange(k.shape[2], dtype=jnp.int32)
        value_columns = jnp.arange(v.shape[2], dtype=jnp.int32)
        group = head // (v.shape[1] // k.shape[1])
        keys = load_tokens(k, tokens, group, key_columns, inside)
        sums = jnp.cumsum(load_run(g, tokens, head, inside))
        rates = load_run(beta, tokens, head, inside)
        lower = multiply(keys, keys, dtype, (1, 1)) * decay_matrix(sums)
        inverse = _inverse(lower * rates[:, None], dtype)
        factors = rates * jnp.exp(sums)
        decayed = keys.astype(jnp.float32) * factors[:, None]
        mine = (tokens, head, key_columns)
        store_tokens(w, mine, inside, multiply(inverse, decayed, dtype))
        values = load_tokens(v, tokens, head, value_columns, inside)
        scaled = values.astype(jnp.float32) * rates[:, None]
        mine = (tokens, head, value_columns)
        store_tokens(u, mine, inside, multiply(inverse, scaled, dtype))


def _inverse(matrix: Float[Array, "C C"], dtype: Any) -> Float[Array, "C C"]:
    """Inverse of one plus what is below the diagonal, by blocks of doubled size.

    With the inverses X and Z of two neighbouring diagonal blocks and what is below
    them, Y, the inverse of both is [[X, 0], [-Z Y X, Z]]: a substitution by blocks,
    which has none of the cancellation of a power series.
    """
    size = matrix.shape[0]
    places = jnp.arange(size, dtype=jnp.int32)
    rows, columns = places[:, None], places[None, :]
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    inverse = (rows == columns).astype(jnp.float32)
    block = 1
    while block < size:
        pair = rows // (2 * block) == columns // (2 * block)
        below = pair & (rows // block != columns // block) & (rows > columns)
        part = jnp.where(below, matrix, 0)
        if block > 1:
            part = jnp.dot(part, inverse, precision=precision)
            part = jnp.dot(inverse, part, precision=precision)
        inverse = inverse - part
        block *= 2
    return inverse


def _rule_kernel(*refs: Any, chunk: int, columns: int) -> None:
    starts, q, k, g, w, u, state, out, final = refs
    row, head, part = (pl.program_id(axis) for axis in range(3))
    num_rows, num_heads, key_width, _ = state.shape
    group = head // (num_heads // k.shape[1])
    mine = part * columns + jnp.arange(columns, dtype=jnp.int32)
    places = jnp.arange(key_width, dtype=jnp.int32)
    start, end = starts[row], starts[row + 1]
    is_row = row < num_rows
    old = jnp.minimum(row, num_rows - 1)
    dtype = k.dtype

    def advance(index: Array, carried: Array) -> Array:
        tokens, inside = chunk_tokens(start, index, chunk, end)
        live = inside & is_row
        queries = load_tokens(q, tokens, group, places, live)
        keys = load_tokens(k, tokens, group, places, live)
        logs = load_run(g, tokens, head, live)
        sums, total = jnp.cumsum(logs), jnp.sum(logs)
        reads = load_tokens(w, tokens, head, places, live)
        written = load_tokens(u, tokens, head, mine, live).astype(jnp.float32)
        written -= multiply(reads, carried, dtype)
        scores = multiply(queries, keys, dtype, (1, 1)) * decay_matrix(sums)
        result = multiply(scores, written, dtype)
        result += jnp.exp(sums)[:, None] * multiply(queries, carried, dtype)
        store_tokens(out, (tokens, head, mine), inside, result)
        kept = written * jnp.exp(total - sums)[:, None]
        return carried * jnp.exp(total) + multiply(keys, kept, dtype, (0, 0))

    carried = pltriton.load(state.at[old, head, places[:, None], mine[None, :]])
    num_chunks = (end - start + chunk - 1) // chunk
    carried = jax.lax.fori_loop(0, num_chunks, advance, carried)

    @pl.when(is_row)
    def _() -> None:
        place = final.at[old, head, places[:, None], mine[None, :]]
        pltriton.store(place, carried)


def gated_delta_step_gpu_triton(
    q: Float[Array, "T K Dk"],
    k: Float[Array, "T K Dk"],
    v: Float[Array, "T H Dv"],
    g: Float[Array, "T H"],
    beta: Float[Array, "T H"],
    state: Float[Array, "R H Dk Dv"],
    rows: Int[Array, " T"],
    *,
    target: Target,
) -> tuple[Float[Array, "T H Dv"], Float[Array, "R H Dk Dv"]]:
    """One program per token, head and part of the values' width; state in place."""
    check_widths(v.dtype, Dk=k.shape[2], Dv=v.shape[2])
    sizes = tuned_sizes("gated_delta_rule", target, "step", STEP_SIZES)
    launch = Launch("gated_delta_step", sizes, target)
    return step_rows(_step_kernel, launch, v, rows, (q, k, v, g, beta, state))


def _step_kernel(*refs: Any, columns: int) -> None:
    rows, q, k, v, g, beta, state, out, final = refs
    token, head, part = (pl.program_id(axis) for axis in range(3))
    num_rows, num_heads = state.shape[:2]
    group = head // (num_heads // k.shape[1])
    mine = pl.ds(part * columns, columns)
    row = rows[token]
    is_live = (row >= 0) & (row < num_rows)

    @pl.when(is_live)
    def _() -> None:
        place = jnp.clip(row, 0, num_rows - 1)
        old = pltriton.load(state.at[place, head, :, mine])
        query = pltriton.load(q.at[token, group, :]).astype(jnp.float32)
        key = pltriton.load(k.at[token, group, :]).astype(jnp.float32)
        value = pltriton.load(v.at[token, head, mine]).astype(jnp.float32)
        decayed = old * jnp.exp(g[token, head])
        wrong = value - jnp.sum(decayed * key[:, None], axis=0)
        new = decayed + key[:, None] * (beta[token, head] * wrong)[None, :]
        result = jnp.sum(new * query[:, None], axis=0)
        pltriton.store(final.at[place, head, :, mine], new)
        pltriton.store(out.at[token, head, mine], result.astype(out.dtype))

    @pl.when(jnp.logical_not(is_live))
    def _() -> None:
        pltriton.store(out.at[token, head, mine], jnp.zeros(columns, out.dtype))
