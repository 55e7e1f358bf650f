"""Pieces of recurrent layers' kernels for TPUs: rows, layouts, products."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.chunks import ChunkedOrder
from pallas_kernels.common.target import Target

LANES = 128
MAX_BLOCK_WIDTH = 2048


def check_types(dtype: Any) -> None:
    """Raises NotImplementedError for a type that a TPU's kernels do not multiply."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{dtype} inputs; only float32 and bfloat16")


def heads_per_block(num_heads: int, widths: tuple[int, ...], wanted: int) -> int:
    """Heads of a block: as many as wanted if their widths fill whole lanes.

    Args:
        num_heads: Heads among which a block may be chosen, from the first one on.
        widths: Columns per head of each array.
        wanted: Heads of a block at most, unless fewer do not fill lanes.

    Raises:
        NotImplementedError: Not even all the heads fill whole lanes.
    """
    fitting = [
        count
        for count in range(1, num_heads + 1)
        if num_heads % count == 0 and all(count * w % LANES == 0 for w in widths)
    ]
    if not fitting or max(fitting[0] * w for w in widths) > MAX_BLOCK_WIDTH:
        raise NotImplementedError(
            f"{num_heads} heads of widths {widths}: no group fills {LANES} lanes"
        )
    return max([count for count in fitting if count <= wanted] or fitting[:1])


def take_tokens(array: Shaped[Array, "T ..."], tokens: Int[Array, " N"]) -> Array:
    """Rows of an array in the order given, flat; zeros where there is no token."""
    flat = array.reshape(array.shape[0], -1)
    return flat.at[tokens].get(mode="fill", fill_value=0)


def distinct_rows(rows: Int[Array, " T"], num_rows: int) -> tuple[Array, Array]:
    """Rows with those outside of 0 ... R - 1 replaced by rows that nobody has.

    A kernel can then carry every row through memory and back without two programs
    sharing one.

    Returns:
        The rows, all inside and distinct; and which were inside already.

    Raises:
        NotImplementedError: There may be too few rows for that.
    """
    if rows.shape[0] > num_rows:
        raise NotImplementedError(f"{rows.shape[0]} tokens for {num_rows} rows")
    is_live = (rows >= 0) & (rows < num_rows)
    every = jnp.arange(num_rows, dtype=rows.dtype)
    taken = jnp.any((rows[:, None] == every[None, :]) & is_live[:, None], axis=0)
    free = jnp.argsort(taken, stable=True).astype(rows.dtype)
    rank = jnp.cumsum(jnp.logical_not(is_live).astype(jnp.int32)) - 1
    return jnp.where(is_live, rows, free[jnp.maximum(rank, 0)]), is_live


class Launch(NamedTuple):
    """How a kernel that carries states is started.

    Attributes:
        name: Name of the kernel.
        heads: Heads of a block of states.
        cost: What it costs, for the compiler.
        target: Device.
    """

    name: str
    heads: int
    cost: pl.CostEstimate
    target: Target


Operand = tuple[pl.BlockSpec, Array]
"""An array that a kernel reads, and how it is cut into blocks."""


def scan_chunks(
    kernel: Callable[..., None],
    launch: Launch,
    order: ChunkedOrder,
    values: Float[Array, "T H W"],
    operands: Sequence[Operand],
    state: Float[Array, "S H N M"],
) -> tuple[Array, Array]:
    """Walks all chunks of all sequences, for one block of heads after the other.

    The state stays in the output's tile for as long as chunks are of one sequence.

    Args:
        kernel: Takes the table's rows, first chunks and numbers of tokens, then the
            operands, states, outputs and final states.
        launch: How it is started.
        order: The tokens in whole chunks.
        values: What the outputs are like.
        operands: Cut by block of heads, chunk and the table.
        state: State of each sequence.
    """
    table, tokens, places = order
    _, num_heads, width = values.shape
    chunk = tokens.size // table.rows.size
    value_spec = pl.BlockSpec((chunk, launch.heads * width), lambda h, c, *_: (c, h))
    state_spec = pl.BlockSpec(
        (1, launch.heads, *state.shape[2:]), lambda h, c, rows, *_: (rows[c], h, 0, 0)
    )
    padded, final = pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct((tokens.size, num_heads * width), values.dtype),
            jax.ShapeDtypeStruct(state.shape, state.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_heads // launch.heads, table.rows.size),
            in_specs=[*(spec for spec, _ in operands), state_spec],
            out_specs=(value_spec, state_spec),
        ),
        # A sequence without chunks keeps its state.
        input_output_aliases={3 + len(operands): 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        cost_estimate=launch.cost,
        interpret=launch.target.interpret,
        name=launch.name,
    )(
        table.rows,
        table.is_first,
        table.num_tokens,
        *(array for _, array in operands),
        state,
    )
    out = padded.at[places].get(mode="fill", fill_value=0)
    return out.reshape(values.shape), final


def step_rows(
    kernel: Callable[..., None],
    launch: Launch,
    rows: Int[Array, " T"],
    width: int,
    operands: Sequence[Operand],
    state: Float[Array, "R H N M"],
) -> tuple[Float[Array, "T B I W"], Array]:
    """Carries each row's state once through fast memory, in place.

    Args:
        kernel: Takes the rows, the operands, states, outputs and new states.
        launch: How it is started.
        rows: Row of each token, all distinct and inside.
        width: Columns of a head's output.
        operands: Cut by token and block of heads.
        state: State of each row.

    Returns:
        The outputs by blocks of heads, and the states.
    """
    num_tokens, num_blocks = rows.shape[0], state.shape[1] // launch.heads
    state_spec = pl.BlockSpec(
        (1, launch.heads, *state.shape[2:]), lambda t, h, rows: (rows[t], h, 0, 0)
    )
    by_block = (num_tokens, num_blocks, launch.heads, width)
    return pl.pallas_call(
        kernel,
        out_shape=(
            jax.ShapeDtypeStruct(by_block, jnp.float32),
            jax.ShapeDtypeStruct(state.shape, state.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_tokens, num_blocks),
            in_specs=[*(spec for spec, _ in operands), state_spec],
            out_specs=(block_spec(launch.heads, width), state_spec),
        ),
        input_output_aliases={1 + len(operands): 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary")
        ),
        cost_estimate=launch.cost,
        interpret=launch.target.interpret,
        name=launch.name,
    )(rows, *(array for _, array in operands), state)


def block_spec(*sizes: int) -> pl.BlockSpec:
    """What one token and block of heads has of an array `[T, blocks, *sizes]`."""
    return pl.BlockSpec((1, 1, *sizes), lambda t, h, _: (t, h, 0, 0))


def multiply(
    a: Array, b: Array, dtype: Any, contract: tuple[int, int] = (1, 0)
) -> Array:
    """Product of two matrices of `dtype` with float32 sums; float32 is not rounded."""
    exact = jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=exact if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def multiply_split(a: Array, b: Array, dtype: Any) -> Array:
    """Product of two float32 matrices, rounded less than `dtype` would round them.

    For 16-bit inputs each operand is the sum of two bfloat16; the product of the
    smaller parts is left out.
    """
    if dtype == jnp.float32:
        return multiply(a, b, dtype)
    half = jnp.bfloat16
    high_a, high_b = a.astype(half), b.astype(half)
    low_a = (a - high_a.astype(jnp.float32)).astype(half)
    low_b = (b - high_b.astype(jnp.float32)).astype(half)
    small = multiply(low_a, high_b, half) + multiply(high_a, low_b, half)
    return multiply(high_a, high_b, half) + small


def places_of(size: int) -> tuple[Array, Array]:
    """Row and column of each place of a square matrix."""
    rows = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    return rows, jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)


def running_sums(logs: Array) -> Array:
    """Sums along the last axis up to each place, in float32."""
    rows, columns = places_of(logs.shape[1])
    return multiply(logs, (rows <= columns).astype(jnp.float32), jnp.float32)


def decay_matrix(column: Array, row: Array) -> Array:
    """exp(column - row) on and below the diagonal, zero above it."""
    rows, columns = places_of(row.shape[1])
    # Above the diagonal the exponents are positive and may overflow.
    return jnp.exp(jnp.where(rows >= columns, column - row, -jnp.inf))
