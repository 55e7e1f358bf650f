"""Scatter and gather by XLA; unique indices keep the update in place."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.kv_write.heads import (
    HeadNorms,
    Heads,
    Rotation,
    rotate_and_widen,
    stored,
)


def kv_write_reference(
    kv: Shaped[Array, "B 2 K P D"],
    keys: Float[Array, "T K D"],
    values: Float[Array, "T K D"],
    slots: Int[Array, " T"],
    kv_scales: Float[Array, "2 K"] | None,
) -> Shaped[Array, "B 2 K P D"]:
    """Scatters one [D] row per token and head; see `api.kv_write`.

    To the scatter the pool is a matrix of such rows. XLA's TPU compiler would give the
    operand of a scatter of [2, K, D] slices a layout of its own and copy the whole pool
    there and back; and any backend may turn a scatter of a single slice into a dynamic
    update that it fuses into later reads, and then has to copy the pool.
    """
    num_blocks, _, num_kv_heads, block_size, head_dim = kv.shape
    new = stored(keys, values, kv.dtype, kv_scales)
    heads = jnp.arange(2 * num_kv_heads, dtype=slots.dtype)
    runs = (slots // block_size)[:, None] * heads.size + heads[None, :]
    rows = runs * block_size + (slots % block_size)[:, None]
    matrix = kv.reshape(num_blocks * heads.size * block_size, head_dim)
    matrix = matrix.at[rows.reshape(-1)].set(
        new.reshape(-1, head_dim),
        mode="drop",
        unique_indices=True,
        wrap_negative_indices=False,
    )
    return matrix.reshape(kv.shape)


def qkv_write_reference(
    heads: Heads,
    kv: Shaped[Array, "B 2 K P W"],
    slots: Int[Array, " T"],
    rotation: Rotation,
    norms: HeadNorms | None,
    kv_scales: Float[Array, "2 K"] | None,
) -> tuple[Float[Array, "T H W"], Shaped[Array, "B 2 K P W"]]:
    """Normalises, rotates, then scatters; see `api.qkv_write`."""
    q, keys, values = rotate_and_widen(heads, rotation, norms, kv.shape[4])
    return q, kv_write_reference(kv, keys, values, slots, kv_scales)


def copy_blocks_reference(
    pool: Shaped[Array, "B ..."],
    sources: Int[Array, " C"],
    targets: Int[Array, " C"],
) -> Shaped[Array, "B ..."]:
    """Gathers the sources, then scatters them; see `api.copy_blocks`."""
    blocks = pool.at[sources].get(mode="clip", wrap_negative_indices=False)
    return pool.at[targets].set(
        blocks, mode="drop", unique_indices=True, wrap_negative_indices=False
    )
