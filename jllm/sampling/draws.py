"""Two ways to draw one token per row from a softmax, each with its own random stream.

Neither moves anything of the size of the logits between devices that share the
vocabulary: they reduce over it, and gather one block of it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key, UInt32

DrawMethod = Literal["inverse_cdf", "gumbel"]

NUM_BLOCKS = 128
"""Parts of the vocabulary in a two-level draw; devices should hold whole ones."""


def row_keys(
    seed: UInt32[Array, "S 2"], position: Int[Array, " S"]
) -> Key[Array, " S"]:
    """Makes the random key of each row's next token.

    A key depends on the seed and the position in the sequence alone, so that a request
    gets the same tokens in any batch, row, bucket and step.
    """
    keys = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys, position)


def argmax(scores: Float[Array, "S V"]) -> Int[Array, " S"]:
    """Finds the lowest id with the largest score; 0 in a row that holds a NaN."""
    # Two plain reductions are several times faster on CPU than the paired one of
    # jnp.argmax, and need less communication where the vocabulary is sharded.
    vocab_size = scores.shape[1]
    ids = jnp.arange(vocab_size, dtype=jnp.int32)[None, :]
    best = jnp.max(scores, axis=1, keepdims=True)
    first = jnp.min(jnp.where(scores == best, ids, vocab_size), axis=1)
    return jnp.where(first < vocab_size, first, 0)


def inverse_cdf(
    scores: Float[Array, "S V"], keys: Key[Array, " S"]
) -> Int[Array, " S"]:
    """Draws by two uniforms per row: one chooses a block of ids, one an id within it.

    There is no prefix sum over the vocabulary, only over the sums of the blocks and
    over one block; and no uniform has to resolve a single token of a large vocabulary.
    """
    num_rows, vocab_size = scores.shape
    block_size = -(-vocab_size // NUM_BLOCKS)
    padding = NUM_BLOCKS * block_size - vocab_size
    padded = jnp.pad(scores, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    blocks = padded.reshape(num_rows, NUM_BLOCKS, block_size)
    best = jnp.max(scores, axis=1)
    sums = jnp.sum(jnp.exp(blocks - best[:, None, None]), axis=2)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    chosen = _choose(sums, uniforms[:, 0])
    block = jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)[:, 0]
    place = _choose(jnp.exp(block - best[:, None]), uniforms[:, 1])
    return jnp.minimum(chosen * block_size + place, vocab_size - 1)


def _choose(weights: Float[Array, "S N"], uniform: Float[Array, " S"]) -> Array:
    """Index by the cumulative distribution; never one of weight zero if there is one."""
    cumulative = jnp.cumsum(weights, axis=1)
    target = uniform * cumulative[:, -1]
    possible = weights > 0
    # Rounding may leave a prefix sum below the one before it, or the target above the
    # last of them, hence the condition and the fallback.
    reached = possible & (cumulative > target[:, None])
    last = weights.shape[1] - 1 - jnp.argmax(possible[:, ::-1], axis=1)
    first = jnp.argmax(reached, axis=1)
    return jnp.where(jnp.any(reached, axis=1), first, last).astype(jnp.int32)


def gumbel(scores: Float[Array, "S V"], keys: Key[Array, " S"]) -> Int[Array, " S"]:
    """Draws by the largest score after adding one Gumbel variate to each (Gumbel, 1954).

    The variate of an id does not depend on the size of the vocabulary.
    """
    shape = scores.shape[1:]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, shape, jnp.float32))(keys)
    return argmax(scores + noise)


class Draw(Protocol):
    """Draws one token per row from the softmax of its scores."""

    def __call__(
        self, scores: Float[Array, "S V"], keys: Key[Array, " S"]
    ) -> Int[Array, " S"]:
        """Returns token ids."""
        ...


DRAWS: Mapping[DrawMethod, Draw] = MappingProxyType(
    {"inverse_cdf": inverse_cdf, "gumbel": gumbel}
)
