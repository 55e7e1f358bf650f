"""Token embeddings and the output head, both over a padded vocabulary."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jllm.layers.linear import linear_float32


def embed(
    table: Float[Array, "V E"], tokens: Int[Array, " T"], scale: float = 1.0
) -> Float[Array, "T E"]:
    """Looks the tokens up; ids outside the table are clamped.

    Args:
        table: One row per token or position.
        tokens: Rows to take.
        scale: Factor on them, rounded to their type as Gemma was trained.
    """
    rows = table.at[tokens].get(mode="clip")
    return rows if scale == 1 else rows * jnp.asarray(scale, rows.dtype)


def output_logits(
    head: Float[Array, "V E"],
    hidden: Float[Array, "N E"],
    vocab_size: int,
    *,
    bias: Float[Array, " V"] | None = None,
    scale: float = 1.0,
    soft_cap: float | None = None,
) -> Float[Array, "N V"]:
    """Scores every token in float32; ids from `vocab_size` on are minus infinity.

    Args:
        head: One row per token.
        hidden: Hidden states after the last norm.
        vocab_size: Tokens that there are; the other rows are padding.
        bias: Added to the products.
        scale: Factor on that.
        soft_cap: Bound `c` of the scores, c * tanh(s / c); None for none.
    """
    logits = linear_float32(hidden, head)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)[None, :]
    if scale != 1:
        logits = logits * scale
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if head.shape[0] == vocab_size:
        return logits
    real = jnp.arange(head.shape[0])[None, :] < vocab_size
    return jnp.where(real, logits, -jnp.inf)
