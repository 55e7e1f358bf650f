"""Which sublane groups of the pool take new tokens, and what they take."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int, Shaped

from pallas_kernels.common.tpu_attention import Groups, PagedCache
from pallas_kernels.common.tpu_attention_kernel import sublanes_of


def make_groups(
    new: Shaped[Array, "T 2 K D"],
    cache: PagedCache,
    row_starts: Int[Array, " R"],
    lengths: Int[Array, " S"],
) -> Groups:
    """Brings each sequence's new tokens into the order of the pool's sublane groups.

    No smaller part of the pool can be addressed by a DMA. A sequence of n new tokens
    touches at most n / U + 2 groups of U places.
    """
    num_tokens, num_rows = new.shape[0], lengths.shape[0]
    num_blocks, block_size = cache.kv.shape[0], cache.kv.shape[3]
    size = sublanes_of(cache.kv.dtype)
    ends = lengths.astype(jnp.int32)
    starts = jnp.maximum(ends - jnp.diff(row_starts), 0)
    first_groups = starts // size
    groups_per_row = jnp.where(ends > starts, -(-ends // size) - first_groups, 0)
    group_ends = jnp.cumsum(groups_per_row)

    groups = jnp.arange(num_tokens // size + 2 * num_rows, dtype=jnp.int32)
    rows = jnp.sum(groups[:, None] >= group_ends[None, :], axis=1)
    is_used = rows < num_rows
    rows = jnp.minimum(rows, num_rows - 1)
    offsets = groups - (group_ends - groups_per_row)[rows]
    positions = (first_groups[rows] + offsets) * size
    runs = positions // block_size
    blocks = cache.block_tables.at[rows, runs].get(mode="clip")
    is_in_pool = (blocks >= 0) & (blocks < num_blocks)
    is_in_pool &= runs < cache.block_tables.shape[1]

    # The token of each place; any where there is none.
    places = positions[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
    tokens = places + (row_starts[1:] - ends)[rows][:, None]
    values = new.at[tokens].get(mode="clip")  # [N, U, 2, K, D]
    first = jnp.clip(starts[rows] - positions, 0, size)
    last = jnp.clip(ends[rows] - positions, 0, size)
    return Groups(
        values=values.transpose(0, 2, 3, 1, 4),
        blocks=jnp.clip(blocks, 0, num_blocks - 1),
        places=positions % block_size,
        starts=first,
        ends=jnp.where(is_used & is_in_pool, last, 0),
        num_used=group_ends[-1],
    )
