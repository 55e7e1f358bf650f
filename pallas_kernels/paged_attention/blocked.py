"""Row after row, chunk after chunk, only what is live; for the CPU."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.attention import (
    Cache,
    QueryTile,
    attend_blocked,
    pad_tables,
)
from pallas_kernels.common.scores import ScoreOptions

KEYS_PER_CHUNK = 256
"""Keys gathered at once; a row at a time they stay in the processor's cache."""


def paged_attention_blocked(
    q: Float[Array, "S Q H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    kv_scales: Float[Array, "2 K"] | None,
) -> Float[Array, "S Q H D"]:
    """Attends in proportion to the live tokens; see `api.paged_attention`."""
    num_new, block_size = q.shape[1], kv.shape[3]
    blocks_per_chunk = max(1, min(KEYS_PER_CHUNK // block_size, block_tables.shape[1]))
    tables = pad_tables(block_tables, blocks_per_chunk)

    def attend_row(row: Array, out: Array) -> Array:
        attended = attend_blocked(
            QueryTile(q[row], lengths[row] - num_new + jnp.arange(num_new)),
            Cache(kv, kv_scales),
            tables[row],
            lengths[row],
            options,
            blocks_per_chunk=blocks_per_chunk,
        )
        return jax.lax.dynamic_update_slice_in_dim(out, attended[None], row, 0)

    return jax.lax.fori_loop(0, q.shape[0], attend_row, jnp.zeros_like(q))
