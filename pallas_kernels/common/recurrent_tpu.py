"""Pieces of recurrent layers' kernels for TPUs: rows, layouts, products."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int, Shaped

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
