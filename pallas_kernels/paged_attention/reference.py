"""The obvious version: every sequence gathers its whole table; differentiable."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.attention import Cache, QueryTile, attend_dense
from pallas_kernels.common.kv_update import (
    NewTokens,
    scatter_tokens,
    stored_values,
    token_slots,
)
from pallas_kernels.common.scores import ScoreOptions


def paged_attention_reference(
    q: Float[Array, "S Q H D"],
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    kv_scales: Float[Array, "2 K"] | None,
) -> Float[Array, "S Q H D"]:
    """Attends each sequence's tokens to its whole table; see `api.paged_attention`."""
    num_new = q.shape[1]

    def attend(q_row: Array, table: Array, length: Array) -> Array:
        queries = QueryTile(q_row, length - num_new + jnp.arange(num_new))
        return attend_dense(queries, Cache(kv, kv_scales), table, length, options)

    return jax.vmap(attend)(q, block_tables, lengths)


def paged_attention_update_reference(
    tokens: NewTokens,
    kv: Shaped[Array, "B 2 K P D"],
    block_tables: Int[Array, "S M"],
    lengths: Int[Array, " S"],
    options: ScoreOptions,
    kv_scales: Float[Array, "2 K"] | None,
) -> tuple[Float[Array, "S Q H D"], Shaped[Array, "B 2 K P D"]]:
    """Scatters the tokens, then attends; see `update.paged_attention_update`."""
    num_rows, num_new = tokens.q.shape[:2]
    rows, offsets = jnp.divmod(jnp.arange(num_rows * num_new), num_new)
    positions = lengths[rows] - num_new + offsets
    new = stored_values(tokens, kv.dtype, kv_scales)
    kv = scatter_tokens(
        kv,
        new.reshape(num_rows * num_new, *new.shape[2:]),
        token_slots(kv.shape, block_tables, rows, positions),
    )
    out = paged_attention_reference(
        tokens.q, kv, block_tables, lengths, options, kv_scales
    )
    return out, kv
