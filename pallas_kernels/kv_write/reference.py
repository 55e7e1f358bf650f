"""Scatter and gather by XLA; unique indices keep the update in place."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped


def kv_write_reference(
    kv: Shaped[Array, "B 2 K P D"],
    keys: Float[Array, "T K D"],
    values: Float[Array, "T K D"],
    slots: Int[Array, " T"],
) -> Shaped[Array, "B 2 K P D"]:
    """Scatters one [D] row per token and head; see `api.kv_write`.

    To the scatter the pool is a matrix of such rows. XLA's TPU compiler would give the
    operand of a scatter of [2, K, D] slices a layout of its own and copy the whole pool
    there and back; and any backend may turn a scatter of a single slice into a dynamic
    update that it fuses into later reads, and then has to copy the pool.
    """
    num_blocks, _, num_kv_heads, block_size, head_dim = kv.shape
    new = jnp.stack([keys, values], axis=1)  # [T, 2, K, D]
    if kv.dtype == jnp.uint16:
        new = jax.lax.bitcast_convert_type(new, jnp.uint16)
    heads = jnp.arange(2 * num_kv_heads, dtype=slots.dtype)
    runs = (slots // block_size)[:, None] * heads.size + heads[None, :]
    rows = runs * block_size + (slots % block_size)[:, None]
    matrix = kv.reshape(num_blocks * heads.size * block_size, head_dim)
    matrix = matrix.at[rows.reshape(-1)].set(
        new.reshape(-1, head_dim).astype(kv.dtype), mode="drop", unique_indices=True
    )
    return matrix.reshape(kv.shape)


def copy_blocks_reference(
    pool: Shaped[Array, "B ..."],
    sources: Int[Array, " C"],
    targets: Int[Array, " C"],
) -> Shaped[Array, "B ..."]:
    """Gathers the sources, then scatters them; see `api.copy_blocks`."""
    blocks = pool.at[sources].get(mode="clip")
    return pool.at[targets].set(blocks, mode="drop", unique_indices=True)
