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
    """Scatters one [2, K, D] slice per token; see `api.kv_write`."""
    num_blocks, block_size = kv.shape[0], kv.shape[3]
    new = as_slices(keys, values, kv.dtype)
    if new.shape[0] == 1:
        # XLA turns a scatter of one slice into a dynamic update, fuses that into the
        # reads that follow, and then has to copy the pool. So a second slice is added,
        # outside the pool.
        new = jnp.concatenate([new, new])
        past = jnp.full(1, num_blocks * block_size, slots.dtype)
        slots = jnp.concatenate([slots, jnp.maximum(slots + 1, past)])
    return kv.at[slots // block_size, :, :, slots % block_size].set(
        new, mode="drop", unique_indices=True
    )


def as_slices(
    keys: Float[Array, "T K D"], values: Float[Array, "T K D"], dtype: jnp.dtype
) -> Shaped[Array, "T 2 K D"]:
    """What the pool holds of each token: key and value in its type."""
    new = jnp.stack([keys, values], axis=1)
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(new, jnp.uint16)
    return new.astype(dtype)


def copy_blocks_reference(
    pool: Shaped[Array, "B ..."],
    sources: Int[Array, " C"],
    targets: Int[Array, " C"],
) -> Shaped[Array, "B ..."]:
    """Gathers the sources, then scatters them; see `api.copy_blocks`."""
    blocks = pool.at[sources].get(mode="clip")
    return pool.at[targets].set(blocks, mode="drop", unique_indices=True)
