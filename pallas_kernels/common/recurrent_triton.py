"""Pieces of recurrent layers' kernels in Pallas on Triton: rows, loads, products."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int

from pallas_kernels.common.chunks import with_padding_row
from pallas_kernels.common.target import Target
from pallas_kernels.common.tuning import Sizes

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


class Launch(NamedTuple):
    """How a kernel that carries states is started.

    Attributes:
        name: Name of the kernel.
        sizes: "columns" of the output that a program computes at most, "num_warps"
            and "num_stages".
        target: Device.
    """

    name: str
    sizes: Sizes
    target: Target


def scan_rows(
    kernel: Callable[..., None],
    launch: Launch,
    values: Float[Array, "T H W"],
    row_starts: Int[Array, " R"],
    arrays: tuple[Array, ...],
) -> tuple[Array, Array]:
    """One program per sequence, head and part of the outputs' width.

    One more sequence owns the padding and writes its zeros.

    Args:
        kernel: Takes the row starts, the arrays, outputs and final states, and
            `columns` by name.
        launch: How it is started.
        values: What the outputs are like.
        row_starts: First token of each sequence, then their number.
        arrays: What the kernel reads, the states last.
    """
    starts = with_padding_row(row_starts, values.shape[0])
    return _launch(kernel, launch, values, starts.shape[0] - 1, (starts, *arrays))


def step_rows(
    kernel: Callable[..., None],
    launch: Launch,
    values: Float[Array, "T H W"],
    rows: Int[Array, " T"],
    arrays: tuple[Array, ...],
) -> tuple[Array, Array]:
    """One program per token, head and part of the width; the states in place.

    Args:
        kernel: Takes the rows, the arrays, outputs and states, and `columns` by name.
        launch: How it is started.
        values: What the outputs are like.
        rows: Row of each token.
        arrays: What the kernel reads, the states last.
    """
    aliases = {len(arrays): 1}
    return _launch(
        kernel, launch, values, values.shape[0], (rows, *arrays), aliases=aliases
    )


def _launch(
    kernel: Callable[..., None],
    launch: Launch,
    values: Array,
    num_programs: int,
    arrays: tuple[Array, ...],
    *,
    aliases: dict[int, int] | None = None,
) -> tuple[Array, Array]:
    _, num_heads, width = values.shape
    columns = max(MIN_WIDTH, min(width, launch.sizes["columns"]))
    outputs = (values, arrays[-1])
    return pl.pallas_call(
        partial(kernel, columns=columns),
        out_shape=tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs),
        grid=(num_programs, num_heads, width // columns),
        input_output_aliases=aliases or {},
        compiler_params=pltriton.CompilerParams(
            num_warps=launch.sizes["num_warps"], num_stages=launch.sizes["num_stages"]
        ),
        interpret=launch.target.interpret,
        name=launch.name,
    )(*arrays)


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
