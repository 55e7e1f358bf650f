"""The obvious version: every chunk gathers its sequence's table; differentiable."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.chunks import make_chunks

CHUNK = 32
MASKED = -1e30
"""Score of a key that a query may not see; finite, so that no NaN can arise."""


def mla_attention_reference(
    q_latent: Float[Array, "T H R"],
    q_rope: Float[Array, "T H Dr"],
    latent: Shaped[Array, "B P W"],
    block_tables: Int[Array, "S M"],
    row_starts: Int[Array, " S+1"],
    lengths: Int[Array, " S"],
    scale: Float[Array, ""],
) -> Float[Array, "T H R"]:
    """Attends chunk after chunk of queries to whole tables; see `api.mla_attention`."""
    num_tokens, _, rank = q_latent.shape
    size = min(CHUNK, num_tokens)
    table = make_chunks(row_starts, num_tokens, size)
    lengths, ends = jnp.asarray(lengths), jnp.asarray(row_starts)[1:]
    tables = jnp.asarray(block_tables)
    queries = jnp.concatenate([q_latent, q_rope], axis=-1).astype(jnp.float32)
    width = queries.shape[-1]
    offsets = jnp.arange(size, dtype=jnp.int32)

    def attend(chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        row, first, count = chunk
        length = lengths[row]
        tokens = first + offsets
        positions = tokens + length - ends[row]
        keys = latent.at[tables[row]].get(mode="clip")[..., :width]
        keys = keys.reshape(-1, width).astype(jnp.float32)
        places = jnp.arange(keys.shape[0], dtype=jnp.int32)
        # Unused places hold anything, and a weight of zero does not cancel a NaN.
        keys = jnp.where((places < length)[:, None], keys, 0)
        q = queries.at[tokens].get(mode="clip")
        scores = jnp.einsum("qhw,nw->qhn", q, keys) * scale
        seen = (places[None, :] <= positions[:, None]) & (places < length)[None, :]
        scores = jnp.where(seen[:, None, :], scores, MASKED)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        weights = jnp.where(seen[:, None, :], weights, 0)
        total = jnp.maximum(weights.sum(-1), jnp.finfo(jnp.float32).tiny)
        out = jnp.einsum("qhn,nr->qhr", weights, keys[:, :rank]) / total[..., None]
        return out, jnp.where(offsets < count, tokens, num_tokens)

    out, targets = jax.lax.map(
        attend, (table.rows, table.first_tokens, table.num_tokens)
    )
    out = out.reshape(-1, *q_latent.shape[1:]).astype(q_latent.dtype)
    return jnp.zeros_like(q_latent).at[targets.reshape(-1)].set(out, mode="drop")
