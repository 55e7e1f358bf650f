"""Two ways to draw one token per row from a softmax, each row with its own stream.

Neither moves anything of the size of the logits between devices that share the
vocabulary: they reduce over it, and gather one block of it.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key, UInt32

from jllm.sampling.blocks import (
    DRAW_BLOCKS,
    argmax,
    find_best,
    split_blocks,
    take_block,
)
from jllm.sampling.temperature import log_weights, weights

DrawMethod = Literal["inverse_cdf", "gumbel"]


def row_keys(
    seed: UInt32[Array, "S 2"], position: Int[Array, " S"]
) -> Key[Array, " S"]:
    """Makes the random key of each row's next token.

    A key depends on the seed and the position in the sequence alone, so that a request
    gets the same tokens in any batch, row, bucket and step.
    """
    keys = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.vmap(jax.random.fold_in)(keys, position)


class Survey(NamedTuple):
    """What one look at all scores leaves, from which a token is found in one block.

    Attributes:
        maxima: Largest score of each block of ids.
        sums: Sum of the weights of each block at the row's temperature.
    """

    maxima: Float[Array, "S A"]
    sums: Float[Array, "S A"]


def survey(scores: Float[Array, "S V"], temperature: Float[Array, " S"]) -> Survey:
    """Looks at all scores, for `inverse_cdf` and `best_of`."""
    blocks = split_blocks(scores, DRAW_BLOCKS)
    maxima = jnp.max(blocks, axis=2)
    best = jnp.max(maxima, axis=1)
    return Survey(maxima, jnp.sum(weights(blocks, best, temperature), axis=2))


def best_of(scores: Float[Array, "S V"], found: Survey) -> Int[Array, " S"]:
    """The id with the largest score, as `argmax` finds it."""
    return find_best(split_blocks(scores, DRAW_BLOCKS), found.maxima)


def inverse_cdf(
    scores: Float[Array, "S V"],
    temperature: Float[Array, " S"],
    keys: Key[Array, " S"],
    found: Survey | None = None,
) -> Int[Array, " S"]:
    """Draws by two uniforms per row: one chooses a block of ids, one an id within it.

    There is no prefix sum over the vocabulary, only over the sums of the blocks and
    over one block; and no uniform has to resolve a single token of a large vocabulary.
    """
    maxima, sums = found or survey(scores, temperature)
    blocks = split_blocks(scores, DRAW_BLOCKS)
    best = jnp.max(maxima, axis=1)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    chosen = _choose(sums, uniforms[:, 0])
    block = take_block(blocks, chosen)
    place = _choose(weights(block, best, temperature), uniforms[:, 1])
    return chosen * blocks.shape[2] + place


def _choose(probabilities: Float[Array, "S N"], uniform: Float[Array, " S"]) -> Array:
    """Index by the cumulative distribution; one of probability 0 only if all are."""
    size = probabilities.shape[1]
    ids = jnp.arange(size, dtype=jnp.int32)[None, :]
    cumulative = jnp.cumsum(probabilities, axis=1)
    target = uniform * jnp.max(cumulative, axis=1)
    # Rounding may leave a prefix sum below the one before it, so the number itself
    # is asked for too; and the target may reach the last sum, which chooses the last.
    possible = probabilities > 0
    reached = possible & (cumulative > target[:, None])
    first = jnp.min(jnp.where(reached, ids, size), axis=1)
    last = jnp.max(jnp.where(possible, ids, 0), axis=1)
    return jnp.minimum(first, last)


def gumbel(
    scores: Float[Array, "S V"],
    temperature: Float[Array, " S"],
    keys: Key[Array, " S"],
) -> Int[Array, " S"]:
    """Draws by the largest score after adding a Gumbel variate to each.

    Maddison et al., 2014, A* Sampling. The variate of an id does not
    depend on the size of the vocabulary.
    """
    shape = scores.shape[1:]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, shape, jnp.float32))(keys)
    best = jnp.max(scores, axis=1)
    return argmax(log_weights(scores, best, temperature) + noise)


Draw = Callable[
    [Float[Array, "S V"], Float[Array, " S"], Key[Array, " S"]], Int[Array, " S"]
]

DRAWS: Mapping[DrawMethod, Draw] = MappingProxyType(
    {"inverse_cdf": inverse_cdf, "gumbel": gumbel}
)
