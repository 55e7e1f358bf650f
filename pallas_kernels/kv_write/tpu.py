"""The same writes in the forms that XLA's TPU compiler does in place.

It gives the operand of a scatter of [2, K, D] slices a layout of its own, so that the
whole pool is copied there and back.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.kv_write.reference import as_slices

LANES = 128


def kv_write_tpu(
    kv: Shaped[Array, "B 2 K P D"],
    keys: Float[Array, "T K D"],
    values: Float[Array, "T K D"],
    slots: Int[Array, " T"],
) -> Shaped[Array, "B 2 K P D"]:
    """Writes by whole registers where the head width allows; see `api.kv_write`."""
    new = as_slices(keys, values, kv.dtype)
    if kv.shape[-1] % LANES == 0:
        return _scatter_rows(kv, new, slots)
    return _update_in_turn(kv, new, slots)


def _scatter_rows(kv: Array, new: Array, slots: Array) -> Array:
    """Scatters one [D] row per token and head: the pool is a matrix of such rows."""
    num_blocks, _, num_kv_heads, block_size, head_dim = kv.shape
    heads = jnp.arange(2 * num_kv_heads, dtype=slots.dtype)
    runs = (slots // block_size)[:, None] * heads.size + heads[None, :]
    rows = runs * block_size + (slots % block_size)[:, None]
    flat = kv.reshape(num_blocks * heads.size * block_size, head_dim)
    flat = flat.at[rows.reshape(-1)].set(
        new.reshape(-1, head_dim), mode="drop", unique_indices=True
    )
    return flat.reshape(kv.shape)


def _update_in_turn(kv: Array, new: Array, slots: Array) -> Array:
    """Updates one slice after another; narrow heads lie across the registers."""
    num_slots, block_size = kv.shape[0] * kv.shape[3], kv.shape[3]

    def write(token: Array, pool: Array) -> Array:
        slot = slots[token]
        # A start past the pool is clamped, so that an old slice is written again.
        start = (slot // block_size, 0, 0, slot % block_size, 0)
        shape = (1, *kv.shape[1:3], 1, kv.shape[4])
        old = jax.lax.dynamic_slice(pool, start, shape)
        slice_ = jax.lax.dynamic_slice_in_dim(new, token, 1)[:, :, :, None]
        slice_ = jnp.where(slot < num_slots, slice_, old)
        return jax.lax.dynamic_update_slice(pool, slice_, start)

    return jax.lax.fori_loop(0, slots.shape[0], write, kv)
