"""What the rules ask of a context: how often each token occurs, and how it ends."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jllm.sampling.rows import TokenHistory
from jllm.sampling.rules import Rules

CHUNK = 256
"""Tokens of each row that are counted at a time."""


def count_tokens(
    history: TokenHistory,
    first: Int[Array, " S"],
    wanted: Bool[Array, " S"],
    vocab_size: int,
) -> Float[Array, "S V"]:
    """Counts the tokens of each context from position `first` on.

    The work follows the longest wanted range, not the capacity; rows that are not
    wanted count nothing.
    """
    num_rows = first.shape[0]
    num_tokens = jnp.where(wanted, jnp.maximum(history.lengths - first, 0), 0)
    rows = jnp.arange(num_rows)[:, None]
    steps = jnp.arange(CHUNK, dtype=jnp.int32)[None, :]

    def count_chunk(chunk: Int[Array, ""], counts: Array) -> Array:
        offsets = chunk * CHUNK + steps
        tokens = history.tokens_at(first[:, None] + offsets)
        tokens = jnp.where(offsets < num_tokens[:, None], tokens, vocab_size)
        return counts.at[rows, tokens].add(1.0, mode="drop")

    num_chunks = (jnp.max(num_tokens) + CHUNK - 1) // CHUNK
    counts = jnp.zeros((num_rows, vocab_size), jnp.float32)
    return jax.lax.fori_loop(0, num_chunks, count_chunk, counts)


def banned_by_words(
    history: TokenHistory, first: Int[Array, " S"], rules: Rules
) -> Bool[Array, "S W"]:
    """Tells which tokens of the bad words would complete their word now.

    A word is completed by its last token when the tokens just before, from position
    `first` on, are the others; words of one token always are.
    """
    positions = history.lengths[:, None] - rules.bad_distances
    is_last = rules.bad_distances == 0
    differs = (positions < first[:, None]) | (
        history.tokens_at(positions) != rules.bad_tokens
    )
    rows = jnp.arange(first.shape[0])[:, None]
    misses = (differs & ~is_last).astype(jnp.int32)
    num_misses = jnp.zeros_like(rules.bad_ends).at[rows, rules.bad_ends].add(misses)
    return is_last & (num_misses == 0)
