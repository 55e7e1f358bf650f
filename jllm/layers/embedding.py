"""Token embeddings and the output head, both over a padded vocabulary."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jllm.layers.linear import linear_float32


def embed(table: Float[Array, "V E"], tokens: Int[Array, " T"]) -> Float[Array, "T E"]:
    """Looks the tokens up; ids outside the table are clamped."""
    return table.at[tokens].get(mode="clip")


def output_logits(
    head: Float[Array, "V E"], hidden: Float[Array, "N E"], vocab_size: int
) -> Float[Array, "N V"]:
    """Scores every token in float32; ids from `vocab_size` on are minus infinity."""
    logits = linear_float32(hidden, head)
    if head.shape[0] == vocab_size:
        return logits
    real = jnp.arange(head.shape[0])[None, :] < vocab_size
    return jnp.where(real, logits, -jnp.inf)
