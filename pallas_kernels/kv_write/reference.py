"""Scatter and gather by XLA; unique indices keep the update in place."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped


def kv_write_reference(
    kv: Float[Array, "B 2 K P D"],
    keys: Float[Array, "T K D"],
    values: Float[Array, "T K D"],
    slots: Int[Array, " T"],
) -> Float[Array, "B 2 K P D"]:
    """Scatters one [2, K, D] slice per token; see `api.kv_write`."""
    block_size = kv.shape[3]
    new = jnp.stack([keys, values], axis=1).astype(kv.dtype)  # [T, 2, K, D]
    return kv.at[slots // block_size, :, :, slots % block_size].set(
        new, mode="drop", unique_indices=True
    )


def copy_blocks_reference(
    pool: Shaped[Array, "B ..."],
    sources: Int[Array, " C"],
    targets: Int[Array, " C"],
) -> Shaped[Array, "B ..."]:
    """Gathers the sources, then scatters them; see `api.copy_blocks`."""
    blocks = pool.at[sources].get(mode="clip")
    return pool.at[targets].set(blocks, mode="drop", unique_indices=True)
