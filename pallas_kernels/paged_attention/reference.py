"""The obvious version: every sequence gathers its whole table; differentiable."""

import jax
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.attention import attend_dense


def paged_attention_reference(
    q: Float[Array, "S H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    lengths: Int[Array, " S"],
    scale: float,
) -> Float[Array, "S H D"]:
    """Attends each sequence's token to its whole table; see `api.paged_attention`."""

    def attend(q_row: Array, table: Array, length: Array) -> Array:
        return attend_dense(q_row[None], length[None] - 1, kv, table, length, scale)[0]

    return jax.vmap(attend)(q, block_tables, lengths)
