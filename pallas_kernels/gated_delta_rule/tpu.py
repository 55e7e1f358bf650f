"""Kernels for TPUs."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float, Int

from pallas_kernels.common.chunks import chunked_order
from pallas_kernels.common.cost import cost_of
from pallas_kernels.common.recurrent_tpu import (
    Launch,
    Operand,
    block_spec,
    check_types,
    decay_matrix,
    distinct_rows,
    heads_per_block,
    multiply,
    multiply_split,
    places_of,
    running_sums,
    scan_chunks,
    step_rows,
    take_tokens,
)
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import tuned_sizes

SIZES = {"chunk": 64, "heads": 4}
STEP_SIZES = {"heads": 8}


def gated_delta_rule_tpu(
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
    """Pads sequences to whole chunks, so that no tile crosses two, and walks them."""
    check_types(v.dtype)
    num_tokens, num_heads, width = v.shape
    num_keys, key_width = k.shape[1:]
    group = num_heads // num_keys
    sizes = tuned_sizes("gated_delta_rule", target, f"rule {v.dtype}", SIZES)
    chunk = sizes["chunk"]
    keys = heads_per_block(
        num_keys, (key_width, group * width), max(sizes["heads"] // group, 1)
    )
    heads = keys * group
    order = chunked_order(row_starts, num_tokens, chunk)
    key_spec = pl.BlockSpec((chunk, keys * key_width), lambda h, c, *_: (c, h))
    value_spec = pl.BlockSpec((chunk, heads * width), lambda h, c, *_: (c, h))
    gate_spec = pl.BlockSpec((1, 1, heads, chunk), lambda h, c, *_: (c, h, 0, 0))

    def gates(array: Float[Array, "T H"]) -> Array:
        taken = take_tokens(array, order.tokens).reshape(-1, chunk, num_heads)
        return taken.swapaxes(1, 2).reshape(-1, num_heads // heads, heads, chunk)

    cost = cost_of(
        *(q, k, v, g, beta, v, state, state),
        flops=2 * v.size * (2 * chunk + 3 * key_width),
        exponentials=g.size * chunk,
    )
    return scan_chunks(
        partial(_rule_kernel, widths=(key_width, width)),
        Launch("gated_delta_rule", heads, cost, target),
        order,
        v,
        (
            (key_spec, take_tokens(q, order.tokens)),
            (key_spec, take_tokens(k, order.tokens)),
            (value_spec, take_tokens(v, order.tokens)),
            (gate_spec, gates(g)),
            (gate_spec, gates(beta)),
        ),
        state,
    )


def _rule_kernel(*refs: Any, widths: tuple[int, int]) -> None:
    _, is_first, num_tokens, *refs_of_tiles = refs
    q, k, v, g, beta, state, out, final = refs_of_tiles
    chunk = pl.program_id(1)
    dtype = k.dtype
    key_width, width = widths

    @pl.when((is_first[chunk] == 1) | (chunk == 0))
    def _() -> None:
        final[...] = state[...]

    @pl.when(num_tokens[chunk] > 0)
    def _() -> None:
        sums = running_sums(g[0, 0])  # [heads, chunk]
        sum_columns, rate_columns = sums.T, beta[0, 0].T
        heads = sums.shape[0]
        group = heads * key_width // k.shape[1]
        for head in range(heads):
            one, mine = slice(head, head + 1), slice(head * width, (head + 1) * width)
            first = head // group * key_width
            keys = k[:, first : first + key_width]
            queries = q[:, first : first + key_width]
            column, rates = sum_columns[:, one], rate_columns[:, one]
            total = sums[one, -1:]
            decay = decay_matrix(column, sums[one, :])
            lower = multiply(keys, keys, dtype, (1, 1)) * decay
            inverse = _inverse(lower * rates, dtype)
            carried = final[0, head]
            reads = keys.astype(jnp.float32) * jnp.exp(column)
            wrong = v[:, mine].astype(jnp.float32) - multiply(reads, carried, dtype)
            written = multiply(inverse, wrong * rates, dtype)
            scores = multiply(queries, keys, dtype, (1, 1)) * decay
            result = multiply(scores, written, dtype)
            result += jnp.exp(column) * multiply(queries, carried, dtype)
            out[:, mine] = result.astype(dtype)
            kept = written * jnp.exp(total - column)
            entered = multiply(keys, kept, dtype, (0, 0))
            final[0, head] = carried * jnp.exp(total) + entered


def _inverse(matrix: Float[Array, "C C"], dtype: Any) -> Float[Array, "C C"]:
    """Inverse of one plus what is below the diagonal, by blocks of doubled size.

    With the inverses X and Z of two neighbouring diagonal blocks and what is below
    them, Y, the inverse of both is [[X, 0], [-Z Y X, Z]]: a substitution by blocks,
    which has none of the cancellation of a power series.
    """
    size = matrix.shape[0]
    rows, columns = places_of(size)
    inverse = jnp.where(rows == columns, 1.0, 0.0)
    for level in range((size - 1).bit_length()):
        pair = (rows >> (level + 1)) == (columns >> (level + 1))
        below = pair & ((rows >> level) > (columns >> level))
        part = jnp.where(below, matrix, 0.0)
        if level:
            part = multiply_split(part, inverse, dtype)
            part = multiply_split(inverse, part, dtype)
        inverse = inverse - part
    return inverse


def gated_delta_step_tpu(
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
    """Carries each row's state once through fast memory, in place."""
    num_tokens, num_heads, width = v.shape
    num_keys, key_width = k.shape[1:]
    group = num_heads // num_keys
    sizes = tuned_sizes("gated_delta_rule", target, "step", STEP_SIZES)
    most = max(sizes["heads"] // group, 1)
    keys = max(n for n in range(1, most + 1) if num_keys % n == 0)
    heads, blocks = keys * group, num_keys // keys
    rows, is_live = distinct_rows(rows, state.shape[0])
    # With no decay and nothing to write, a row goes back as it came.
    is_head, is_value = is_live[:, None], is_live[:, None, None]
    decay = jnp.where(is_head, jnp.exp(g), 1.0)
    rates = jnp.where(is_head, beta, 0.0)
    q, k, v = (jnp.where(is_value, array, 0) for array in (q, k, v))

    def operand(array: Array, *sizes: int) -> Operand:
        by_block = array.astype(jnp.float32).reshape(num_tokens, blocks, *sizes)
        return block_spec(*sizes), by_block

    cost = cost_of(
        *(q, k, v, v),
        flops=6 * v.size * key_width,
        more_bytes=2 * num_tokens * (state.nbytes // state.shape[0]),
    )
    out, state = step_rows(
        _step_kernel,
        Launch("gated_delta_step", heads, cost, target),
        rows,
        width,
        (
            operand(q, keys, key_width),
            operand(k, keys, key_width),
            operand(v, heads, width),
            operand(decay, 1, heads),
            operand(rates, 1, heads),
        ),
        state,
    )
    out = out.reshape(v.shape)
    return jnp.where(is_value, out, 0).astype(v.dtype), state


def _step_kernel(*refs: Any) -> None:
    _, q, k, v, decay, rates, state, out, final = refs
    queries, keys = q[0, 0].T, k[0, 0].T  # [key_width, keys]
    decays, betas = decay[0, 0], rates[0, 0]
    heads = betas.shape[1]
    group = heads // keys.shape[1]
    for head in range(heads):
        one, mine = slice(head, head + 1), slice(head // group, head // group + 1)
        decayed = state[0, head] * decays[:, one]
        key = keys[:, mine]
        read = jnp.sum(decayed * key, axis=0, keepdims=True)
        wrong = v[0, 0, one, :] - read
        new = decayed + key * (wrong * betas[:, one])
        final[0, head] = new
        out[0, 0, one, :] = jnp.sum(new * queries[:, mine], axis=0, keepdims=True)
