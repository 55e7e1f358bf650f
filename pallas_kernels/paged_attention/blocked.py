"""Row after row, chunk after chunk, only what is live; for the CPU."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.attention import attend_blocked, pad_tables

KEYS_PER_CHUNK = 256
"""Keys gathered at once; a row at a time they stay in the processor's cache."""


def paged_attention_blocked(
    q: Float[Array, "S H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    lengths: Int[Array, " S"],
    scale: float,
) -> Float[Array, "S H D"]:
    """Attends in proportion to the live tokens; see `api.paged_attention`."""
    block_size = kv.shape[3]
    blocks_per_chunk = max(1, min(KEYS_PER_CHUNK // block_size, block_tables.shape[1]))
    tables = pad_tables(block_tables, blocks_per_chunk)

    def attend_row(row: Array, out: Array) -> Array:
        length = lengths[row]
        attended = attend_blocked(
            jax.lax.dynamic_slice_in_dim(q, row, 1),
            length[None] - 1,
            kv,
            tables[row],
            length,
            scale,
            blocks_per_chunk=blocks_per_chunk,
            num_chunks=-(-length // (blocks_per_chunk * block_size)),
        )
        return jax.lax.dynamic_update_slice_in_dim(out, attended, row, 0)

    return jax.lax.fori_loop(0, q.shape[0], attend_row, jnp.zeros_like(q))
