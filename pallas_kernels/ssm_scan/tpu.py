"""Kernels for TPUs."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float, Int

from pallas_kernels.common.chunks import chunked_order
from pallas_kernels.common.cost import cost_of
from pallas_kernels.common.recurrent_tpu import (
    LANES,
    Launch,
    block_spec,
    check_types,
    decay_matrix,
    distinct_rows,
    heads_per_block,
    multiply,
    running_sums,
    scan_chunks,
    step_rows,
    take_tokens,
)
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes

SCAN_SIZES = {"chunk": 128, "heads": 8}
STEP_SIZES = {"heads": 8}


def ssm_scan_tpu(
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
    """Pads sequences to whole chunks, so that no tile crosses two, and walks them."""
    check_types(x.dtype)
    num_tokens, num_heads, width = x.shape
    num_groups, state_width = B.shape[1:]
    if num_groups > 1 and state_width % LANES:
        raise NotImplementedError(f"{num_groups} groups of state width {state_width}")
    sizes = tuned_sizes("ssm_scan", target, f"scan {x.dtype}", SCAN_SIZES)
    chunk, per_group = sizes["chunk"], num_heads // num_groups
    heads = heads_per_block(per_group, (width,), sizes["heads"])
    blocks_per_group = per_group // heads
    order = chunked_order(row_starts, num_tokens, chunk)
    steps = take_tokens(dt, order.tokens).T.reshape(-1, heads, order.tokens.size)
    columns = heads * width
    value_spec = pl.BlockSpec((chunk, columns), lambda h, c, *_: (c, h))
    step_spec = pl.BlockSpec((1, heads, chunk), lambda h, c, *_: (h, 0, c))
    group_spec = pl.BlockSpec(
        (chunk, state_width),
        lambda h, c, *_: (c, jax.lax.div(h, np.int32(blocks_per_group))),
    )
    skip_spec = pl.BlockSpec((1, 1, columns), lambda h, *_: (h, 0, 0))
    cost = cost_of(
        *(x, x, dt, B, C, state, state),
        flops=2 * x.size * (chunk + 2 * state_width),
        exponentials=dt.size * chunk,
    )
    return scan_chunks(
        partial(_scan_kernel, width=width),
        Launch("ssm_scan", heads, cost, target),
        order,
        x,
        (
            (value_spec, take_tokens(x, order.tokens)),
            (step_spec, steps),
            (step_spec, steps * A.reshape(-1, heads, 1)),
            (group_spec, take_tokens(B, order.tokens)),
            (group_spec, take_tokens(C, order.tokens)),
            (skip_spec, jnp.repeat(D, width).reshape(-1, 1, columns)),
        ),
        state,
    )


def _scan_kernel(*refs: Any, width: int) -> None:
    _, is_first, num_tokens, *refs_of_tiles = refs
    x, dt, logs, B, C, D, state, y, final = refs_of_tiles
    chunk = pl.program_id(1)
    dtype = x.dtype

    @pl.when((is_first[chunk] == 1) | (chunk == 0))
    def _() -> None:
        final[...] = state[...]

    @pl.when(num_tokens[chunk] > 0)
    def _() -> None:
        steps, sums = dt[0], running_sums(logs[0])  # [heads, chunk]
        step_columns, sum_columns = steps.T, sums.T
        enters, leaves = B[...], C[...]
        products = multiply(leaves, enters, dtype, (1, 1))
        for head in range(steps.shape[0]):
            one, mine = slice(head, head + 1), slice(head * width, (head + 1) * width)
            column, row = sum_columns[:, one], sums[one, :]
            total = row[:, -1:]
            values, carried = x[:, mine], final[0, head]
            scores = products * decay_matrix(column, row) * steps[one, :]
            out = multiply(scores, values, dtype)
            out += jnp.exp(column) * multiply(leaves, carried, dtype, (1, 1))
            wide = values.astype(jnp.float32)
            y[:, mine] = (out + D[0, :, mine] * wide).astype(dtype)
            added = wide * (jnp.exp(total - column) * step_columns[:, one])
            entered = multiply(added, enters, dtype, (0, 0))
            final[0, head] = carried * jnp.exp(total) + entered


def ssm_step_tpu(
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
    """Carries each row's state once through fast memory, in place."""
    num_tokens, num_heads, width = x.shape
    num_groups, state_width = B.shape[1:]
    sizes = tuned_sizes("ssm_scan", target, "step", STEP_SIZES)
    per_group = num_heads // num_groups
    heads = max(n for n in range(1, sizes["heads"] + 1) if per_group % n == 0)
    rows, is_live = distinct_rows(rows, state.shape[0])
    # With step sizes of zero and nothing to enter, a row goes back as it came.
    is_value = is_live[:, None, None]
    values, enters, leaves = (
        jnp.where(is_value, array.astype(jnp.float32), 0.0) for array in (x, B, C)
    )
    steps = jnp.where(is_live[:, None], dt, 0.0)
    by_block = (num_tokens, num_heads // heads, heads, width)
    vectors = (num_tokens, num_heads // heads, 1, heads)
    group_spec = pl.BlockSpec(
        (1, 1, 1, state_width),
        lambda t, h, _: (t, jax.lax.div(h, np.int32(per_group // heads)), 0, 0),
    )
    cost = cost_of(
        *(values, enters, leaves, values),
        flops=5 * x.size * state_width,
        more_bytes=2 * num_tokens * (state.nbytes // state.shape[0]),
    )
    added = (values * steps[:, :, None]).reshape(by_block)
    decay = jnp.exp(steps * A[None, :]).reshape(vectors)
    y, state = step_rows(
        _step_kernel,
        Launch("ssm_step", heads, cost, target),
        rows,
        width,
        (
            (block_spec(heads, width), added),
            (block_spec(1, heads), decay),
            (group_spec, enters[:, :, None, :]),
            (group_spec, leaves[:, :, None, :]),
        ),
        state,
    )
    out = y.reshape(x.shape) + D[None, :, None] * values
    return out.astype(x.dtype), state


def _step_kernel(
    _: Any, x: Any, decay: Any, B: Any, C: Any, state: Any, y: Any, final: Any
) -> None:
    columns = x[0, 0].T  # [width, heads]
    enters, leaves, decays = B[0, 0], C[0, 0], decay[0, 0]
    lanes = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1)
    out = jnp.zeros(columns.shape, jnp.float32)
    for head in range(columns.shape[1]):
        one = slice(head, head + 1)
        new = state[0, head] * decays[:, one] + columns[:, one] * enters
        final[0, head] = new
        read = jnp.sum(new * leaves, axis=1, keepdims=True)
        out = jnp.where(lanes == head, read, out)
    y[0, 0] = out.T
