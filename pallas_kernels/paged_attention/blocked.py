"""Group after group of rows, chunk after chunk, only what is live; for the CPU."""

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

ROWS_PER_GROUP = 16
"""Rows that take a turn together."""

KEYS_PER_TURN = 1024
"""Keys gathered at once, of all rows of a group: they stay in the processor's cache."""

KEYS_PER_ROW = 256
"""Most of them of one row."""


def paged_attention_blocked(
    q: Float[Array, "S Q H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    kv_scales: Float[Array, "2 K"] | None,
) -> Float[Array, "S Q H D"]:
    """Attends in proportion to the live tokens; see `api.paged_attention`."""
    num_rows, num_new = q.shape[:2]
    block_size = kv.shape[3]
    # Rows of like length go together: a group lasts as long as its longest row.
    group = min(ROWS_PER_GROUP, num_rows)
    keys = min(KEYS_PER_ROW, KEYS_PER_TURN // group)
    blocks_per_chunk = max(1, min(keys // block_size, block_tables.shape[1]))
    num_groups = -(-num_rows // group)
    missing = num_groups * group - num_rows
    order = jnp.pad(jnp.argsort(-lengths), (0, missing), mode="edge")
    tables = pad_tables(block_tables, blocks_per_chunk)

    def attend_group(index: Array, out: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(order, index * group, group)
        positions = lengths[rows][:, None] - num_new + jnp.arange(num_new)[None, :]
        attended = attend_blocked(
            QueryTile(q[rows], positions),
            Cache(kv, kv_scales),
            tables[rows],
            lengths[rows],
            options,
            blocks_per_chunk=blocks_per_chunk,
        )
        return out.at[rows].set(attended)

    return jax.lax.fori_loop(0, num_groups, attend_group, jnp.zeros_like(q))
