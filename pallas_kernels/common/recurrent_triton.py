"""Pieces of recurrent layers' kernels in Pallas on Triton: rows, loads, products."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as pltriton

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
MIN_WIDTH = 16
"""The shortest side of a tile that Triton multiplies."""


def check_widths(dtype: Any, **widths: int) -> None:
    """Raises NotImplementedError for a type or width that no tile can have."""
    if dtype not in FLOATS:
        raise NotImplementedError(f"{dtype} inputs; only 16- and 32-bit floats")
    for name, width in widths.items():
        if width < MIN_WIDTH or width > 256 or width & (width - 1):
            raise NotImplementedError(
                f"{name}={width}; only powers of two from {MIN_WIDTH} to 256"
            )


def split_width(width: int, wanted: int) -> int:
    """Columns of a state that one program holds."""
    return max(MIN_WIDTH, min(width, wanted))


def token_place(tokens: Array, head: Array, columns: Array) -> tuple[Array, ...]:
    """Index of a matrix `[tokens, columns]` of one head."""
    return tokens[:, None], head, columns[None, :]


def load_run(ref: Any, tokens: Array, head: Array, mask: Array) -> Array:
    """Loads one number per token; those masked are zero and are not read."""
    zero = jnp.zeros((), ref.dtype)
    return pltriton.load(ref.at[tokens, head], mask=mask, other=zero)


def load_tokens(
    ref: Any, tokens: Array, head: Array, columns: Array, mask: Array
) -> Array:
    """Loads `[tokens, columns]` of one head; those masked are zero and are not read."""
    place = ref.at[token_place(tokens, head, columns)]
    zero = jnp.zeros((), ref.dtype)
    wide = jnp.broadcast_to(mask[:, None], (tokens.shape[0], columns.shape[0]))
    return pltriton.load(place, mask=wide, other=zero)


def store_tokens(
    ref: Any, place: tuple[Array, Array, Array], mask: Array, values: Array
) -> None:
    """Stores `[tokens, columns]` of one head, where a token is not masked."""
    wide = jnp.broadcast_to(mask[:, None], values.shape)
    target = ref.at[token_place(*place)]
    pltriton.store(target, values.astype(ref.dtype), mask=wide)


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


def decay_matrix(sums: Array) -> Array:
    """exp(sums[i] - sums[j]) on and below the diagonal, zero above it."""
    places = jnp.arange(sums.shape[0], dtype=jnp.int32)
    seen = places[:, None] >= places[None, :]
    # Above the diagonal the exponents are positive and may overflow.
    return jnp.exp(jnp.where(seen, sums[:, None] - sums[None, :], -jnp.inf))


def chunk_tokens(start: Array, chunk: Array, size: int, end: Array) -> tuple[Any, Any]:
    """Tokens of a chunk, and which of them are before the end."""
    tokens = start + chunk * size + jnp.arange(size, dtype=jnp.int32)
    return tokens, tokens < end
