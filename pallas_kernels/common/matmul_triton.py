"""Tiles of matrix products in Pallas on Triton: loads with bounds, products, sums."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.typing import DTypeLike


def contraction_types(x_dtype: DTypeLike, w_dtype: DTypeLike) -> tuple[Any, Any]:
    """Type in which tiles are multiplied, and type of the sums.

    Two tiles of one 8-bit type are multiplied as they are, others in the type of x.

    Raises:
        NotImplementedError: Two different 8-bit types.
    """
    x_dtype, w_dtype = jnp.dtype(x_dtype), jnp.dtype(w_dtype)
    if x_dtype.itemsize == 1:
        if x_dtype != w_dtype:
            raise NotImplementedError(f"x of {x_dtype} and weights of {w_dtype}")
        return x_dtype, jnp.dtype(jnp.int32 if x_dtype == jnp.int8 else jnp.float32)
    return x_dtype, jnp.dtype(jnp.float32)


def load_tile(
    ref: Any,
    leading: tuple[Any, ...],
    starts: tuple[Any, Any],
    sizes: tuple[int, int],
    limits: tuple[Any, Any],
) -> Array:
    """Loads `[rows, columns]` of a matrix; places at or past a limit are zero.

    Args:
        ref: Array of the matrix, or of a stack of them.
        leading: Indices of the matrix in the stack.
        starts: First row and column.
        sizes: Rows and columns of the tile.
        limits: Row and column to stop before; None where the tile cannot pass it.
    """
    index = (*leading, *map(pl.ds, starts, sizes))
    mask = _inside(starts, sizes, limits)
    if mask is None:
        return pltriton.load(ref.at[index])
    other = jnp.zeros((), ref.dtype)
    return pltriton.load(ref.at[index], mask=mask, other=other)


def load_run(
    ref: Any, leading: tuple[Any, ...], start: Any, size: int, limit: Any
) -> Array:
    """Loads a run of a vector; places at or past the limit are zero."""
    index = (*leading, pl.ds(start, size))
    if limit is None:
        return pltriton.load(ref.at[index])
    mask = start + jax.lax.iota(jnp.int32, size) < limit
    return pltriton.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def multiply(w: Array, x: Array, sum_dtype: Any) -> Array:
    """Contracts weights `[N, K]` with activations `[M, K]` to sums `[N, M]`.

    Weights come first: converted ones then feed the tensor cores from registers, and
    few rows of x do not waste the long side of the instruction.
    """
    return jax.lax.dot_general(
        w, x, (((1,), (1,)), ((), ())), preferred_element_type=sum_dtype
    )


def store_tile(
    ref: Any,
    leading: tuple[Any, ...],
    starts: tuple[Any, Any],
    value: Array,
    limits: tuple[Any, Any],
) -> None:
    """Stores a tile; what lies at or past a limit is left alone."""
    sizes = (value.shape[0], value.shape[1])
    index = (*leading, *map(pl.ds, starts, sizes))
    pltriton.store(ref.at[index], value, mask=_inside(starts, sizes, limits))


def _inside(
    starts: tuple[Any, Any], sizes: tuple[int, int], limits: tuple[Any, Any]
) -> Array | None:
    """Which places of a tile lie before the limits; None for all of them."""
    mask = None
    for axis, (start, size, limit) in enumerate(
        zip(starts, sizes, limits, strict=True)
    ):
        if limit is None:
            continue
        shape = (size, 1) if axis == 0 else (1, size)
        places = start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
        inside = jnp.broadcast_to(places < limit, sizes)
        mask = inside if mask is None else mask & inside
    return mask


def bound(size: int, tile: int) -> int | None:
    """The limit that loads have to respect; None where tiles divide the size."""
    return size if size % tile else None


def num_splits(num_programs: int, num_steps: int, num_cores: int) -> int:
    """Parts into which to cut the sums, so that every multiprocessor has work.

    Two programs fit a multiprocessor and keep enough bytes in flight; no more programs
    than that, or a few of them would run alone at the end. Each part keeps two steps at
    least, and more than eight parts cost more than they bring.
    """
    return max(1, min(2 * num_cores // num_programs, num_steps // 2, 8))
