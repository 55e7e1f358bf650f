"""Kernels for GPUs in Pallas on Triton."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int

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

SCAN_SIZES = {"chunk": 64, "columns": 32, "num_warps": 4, "num_stages": 2}
EXACT_SIZES = {"chunk": 16, "columns": 16, "num_warps": 8, "num_stages": 1}
"""float32 is multiplied without tensor cores, hence smaller tiles."""

STEP_SIZES = {"columns": 16, "num_warps": 4, "num_stages": 1}


def ssm_scan_gpu_triton(
    x: Float[Array, "T H P"],
    dt: Float[Array, "T H"],
    A: Float[Array, " H"],
    B: Float[Array, "T G N"],
    C: Float[Array, "T G N"],
    D: Float[Array, " H"],
    state: Float[Array, "S H P N"],
    row_starts: Int[Array, " S+1"],
    *,
    target: Target,
) -> tuple[Float[Array, "T H P"], Float[Array, "S H P N"]]:
    """One program per sequence, head and part of the head's width.

    A program walks its sequence chunk by chunk with its part of the state, which is
    independent of the others, in registers: inputs are read once, and no state between
    chunks goes to memory.
    """
    check_widths(x.dtype, P=x.shape[2], N=B.shape[2])
    default = EXACT_SIZES if x.dtype == jnp.float32 else SCAN_SIZES
    sizes = tuned_sizes("ssm_scan", target, f"scan {x.dtype}", default)
    return scan_rows(
        partial(_scan_kernel, chunk=sizes["chunk"]),
        Launch("ssm_scan", sizes, target),
        x,
        row_starts,
        (x, dt, A, B, C, D, state),
    )


def _scan_kernel(*refs: Any, chunk: int, columns: int) -> None:
    starts, x, dt, A, B, C, D, state, y, final = refs
    row, head, part = (pl.program_id(axis) for axis in range(3))
    num_rows, num_heads, _, state_width = state.shape
    group = head // (num_heads // B.shape[1])
    mine = part * columns + jnp.arange(columns, dtype=jnp.int32)
    places = jnp.arange(state_width, dtype=jnp.int32)
    start, end = starts[row], starts[row + 1]
    is_row = row < num_rows
    old = jnp.minimum(row, num_rows - 1)
    rate, skip = A[head], D[head]
    dtype = x.dtype

    def advance(index: Array, carried: Array) -> Array:
        tokens, inside = chunk_tokens(start, index, chunk, end)
        live = inside & is_row
        values = load_tokens(x, tokens, head, mine, live)
        steps = load_run(dt, tokens, head, live)
        enters = load_tokens(B, tokens, group, places, live)
        leaves = load_tokens(C, tokens, group, places, live)
        logs = steps * rate
        sums, total = jnp.cumsum(logs), jnp.sum(logs)
        scores = multiply(leaves, enters, dtype, (1, 1)) * decay_matrix(sums)
        out = multiply(scores * steps[None, :], values, dtype)
        out += jnp.exp(sums)[:, None] * multiply(leaves, carried, dtype)
        out += skip * values.astype(jnp.float32)
        store_tokens(y, (tokens, head, mine), inside, out)
        weights = jnp.exp(total - sums) * steps
        added = values.astype(jnp.float32) * weights[:, None]
        return carried * jnp.exp(total) + multiply(enters, added, dtype, (0, 0))

    # [N, columns]
    carried = pltriton.load(state.at[old, head, mine[None, :], places[:, None]])
    num_chunks = (end - start + chunk - 1) // chunk
    carried = jax.lax.fori_loop(0, num_chunks, advance, carried)

    @pl.when(is_row)
    def _() -> None:
        place = final.at[old, head, mine[None, :], places[:, None]]
        pltriton.store(place, carried)


def ssm_step_gpu_triton(
    x: Float[Array, "T H P"],
    dt: Float[Array, "T H"],
    A: Float[Array, " H"],
    B: Float[Array, "T G N"],
    C: Float[Array, "T G N"],
    D: Float[Array, " H"],
    state: Float[Array, "R H P N"],
    rows: Int[Array, " T"],
    *,
    target: Target,
) -> tuple[Float[Array, "T H P"], Float[Array, "R H P N"]]:
    """One program per token, head and part of the head's width; state in place."""
    check_widths(x.dtype, P=x.shape[2], N=B.shape[2])
    sizes = tuned_sizes("ssm_scan", target, "step", STEP_SIZES)
    launch = Launch("ssm_step", sizes, target)
    return step_rows(_step_kernel, launch, x, rows, (x, dt, A, B, C, D, state))


def _step_kernel(*refs: Any, columns: int) -> None:
    rows, x, dt, A, B, C, D, state, y, final = refs
    token, head, part = (pl.program_id(axis) for axis in range(3))
    num_rows, num_heads = state.shape[:2]
    group = head // (num_heads // B.shape[1])
    mine = pl.ds(part * columns, columns)
    row = rows[token]
    is_live = (row >= 0) & (row < num_rows)

    @pl.when(is_live)
    def _() -> None:
        place = jnp.clip(row, 0, num_rows - 1)
        old = pltriton.load(state.at[place, head, mine, :])
        values = pltriton.load(x.at[token, head, mine]).astype(jnp.float32)
        enters = pltriton.load(B.at[token, group, :]).astype(jnp.float32)
        leaves = pltriton.load(C.at[token, group, :]).astype(jnp.float32)
        step = dt[token, head]
        added = (values * step)[:, None] * enters[None, :]
        new = old * jnp.exp(step * A[head]) + added
        out = jnp.sum(new * leaves[None, :], axis=1) + D[head] * values
        pltriton.store(final.at[place, head, mine, :], new)
        pltriton.store(y.at[token, head, mine], out.astype(y.dtype))

    @pl.when(jnp.logical_not(is_live))
    def _() -> None:
        pltriton.store(y.at[token, head, mine], jnp.zeros(columns, y.dtype))
