"""Where the keys and values of new tokens go in the pool, and in which form."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped


class NewTokens(NamedTuple):
    """What attention gets of the new tokens.

    The leading axes are `[T]`, or `[S]` or `[S, Q]` where all rows have as many.
    """

    q: Float[Array, "*N H D"]
    keys: Float[Array, "*N K D"]
    values: Float[Array, "*N K D"]


def check_new_tokens(tokens: NewTokens, kv: Array) -> None:
    """Raises ValueError naming the argument when shapes or types do not fit."""
    q, keys, values = tokens
    if keys.shape != values.shape:
        raise ValueError(f"keys {keys.shape} and values {values.shape} differ")
    if keys.shape != (*q.shape[:-2], kv.shape[2], kv.shape[4]):
        raise ValueError(f"keys {keys.shape} do not fit q {q.shape} and kv {kv.shape}")
    if kv.dtype == jnp.uint16:
        raise ValueError("kv of uint16 (the bits of 16-bit floats) is not updated here")


def stored_values(
    tokens: NewTokens, dtype: jnp.dtype, kv_scales: Float[Array, "2 K"] | None
) -> Shaped[Array, "*N 2 K D"]:
    """New keys and values as the cache keeps them: by the scales, rounded, in range."""
    new = jnp.stack([tokens.keys, tokens.values], axis=-3)
    if kv_scales is None:
        return new.astype(dtype)
    scales = kv_scales.astype(jnp.float32)[..., None]
    scales = jnp.expand_dims(scales, tuple(range(new.ndim - scales.ndim)))
    new = new.astype(jnp.float32) / scales
    if jnp.issubdtype(dtype, jnp.integer):
        bounds = jnp.iinfo(dtype)
        return jnp.clip(jnp.rint(new), bounds.min, bounds.max).astype(dtype)
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(new, -largest, largest).astype(dtype)


def token_slots(
    kv_shape: tuple[int, ...],
    block_tables: Int[Array, "S M"],
    rows: Int[Array, " T"],
    positions: Int[Array, " T"],
) -> Int[Array, " T"]:
    """Slots of tokens, all distinct; outside of the pool for those not to be written.

    Those are the tokens at negative positions, behind the table, or in blocks that the
    pool does not have.
    """
    num_blocks, block_size = kv_shape[0], kv_shape[3]
    runs = positions // block_size
    blocks = block_tables.at[rows, runs].get(mode="clip")
    is_stored = (positions >= 0) & (runs < block_tables.shape[1])
    is_stored &= (blocks >= 0) & (blocks < num_blocks)
    beyond = num_blocks * block_size + jnp.arange(len(rows), dtype=positions.dtype)
    slots = blocks.astype(positions.dtype) * block_size + positions % block_size
    return jnp.where(is_stored, slots, beyond)


def scatter_tokens(
    kv: Shaped[Array, "B 2 K P D"],
    new: Shaped[Array, "T 2 K D"],
    slots: Int[Array, " T"],
) -> Shaped[Array, "B 2 K P D"]:
    """Writes the tokens' rows of one head each into a pool seen as a matrix of rows."""
    num_blocks, _, num_kv_heads, block_size, head_dim = kv.shape
    heads = jnp.arange(2 * num_kv_heads, dtype=slots.dtype)
    runs = (slots // block_size)[:, None] * heads.size + heads[None, :]
    rows = runs * block_size + (slots % block_size)[:, None]
    matrix = kv.reshape(num_blocks * heads.size * block_size, head_dim)
    matrix = matrix.at[rows.reshape(-1)].set(
        new.reshape(-1, head_dim), mode="drop", unique_indices=True
    )
    return matrix.reshape(kv.shape)
