"""Tiles of matrix products in Pallas on TPU: sizes, types, products."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

LANES = 128
# Generations whose matrix units take factors of these types.
INT8_GENERATIONS = ("v5e", "v5p", "v6e")
FLOAT8_GENERATIONS = ("tpu7x",)
FLOAT8_TYPES = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))


def contraction_types(
    x_dtype: DTypeLike, w_dtype: DTypeLike, generation: str
) -> tuple[Any, Any]:
    """Type in which tiles are multiplied, and type of the sums.

    8-bit factors that the matrix units do not take become bfloat16, which holds them.

    Raises:
        NotImplementedError: float16, or two different 8-bit types.
    """
    x_dtype, w_dtype = jnp.dtype(x_dtype), jnp.dtype(w_dtype)
    if jnp.dtype(jnp.float16) in (x_dtype, w_dtype):
        raise NotImplementedError("TPUs do not compute in float16")
    if x_dtype.itemsize > 1:
        return x_dtype, jnp.dtype(jnp.float32)
    if x_dtype != w_dtype:
        raise NotImplementedError(f"x of {x_dtype} and weights of {w_dtype}")
    if x_dtype == jnp.int8 and generation in INT8_GENERATIONS:
        return x_dtype, jnp.dtype(jnp.int32)
    if x_dtype in FLOAT8_TYPES and generation in FLOAT8_GENERATIONS:
        return x_dtype, jnp.dtype(jnp.float32)
    return jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def convert(tile: Array, dtype: Any) -> Array:
    """Converts a tile; 8-bit ones by way of float32, which every generation knows."""
    if tile.dtype == dtype:
        return tile
    if tile.dtype.itemsize == 1:
        return tile.astype(jnp.float32).astype(dtype)
    return tile.astype(dtype)


def multiply(x: Array, w: Array, sum_dtype: Any) -> Array:
    """Contracts activations `[M, K]` with weights `[N, K]` to sums `[M, N]`."""
    is_wide = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        w,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if is_wide else None,
        preferred_element_type=sum_dtype,
    )


def min_rows(dtype: DTypeLike) -> int:
    """Rows of a register of the type."""
    return 32 // jnp.dtype(dtype).itemsize


def fitting_tile(size: int, unit: int, limit: int) -> int:
    """The largest multiple of a unit up to a limit that divides a size, else the size.

    A tile that does not divide the contracted axis would read what is not there.
    """
    if size % unit:
        return size
    units = size // unit
    count = max(1, min(units, limit // unit))
    while units % count:
        count -= 1
    return count * unit


def covering_tile(size: int, limit: int) -> int:
    """A tile of an axis that may be cut short at its end."""
    return size if size <= limit else limit
