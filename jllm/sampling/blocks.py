"""The vocabulary cut into blocks of ids, so that work on it has two levels.

A first pass reduces each block to a number, a second one looks into few blocks. Devices
that share a vocabulary hold whole blocks when its size is a multiple of the number of
blocks; then nothing of the size of the scores moves between them.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

DRAW_BLOCKS = 128
TOP_K_BLOCKS = 512
"""More of them, since `top_k` looks into as many blocks as it returns scores."""


def split_blocks(scores: Float[Array, "S V"], num_blocks: int) -> Float[Array, "S A N"]:
    """Cuts rows into blocks of consecutive ids, padded with minus infinity."""
    num_rows, vocab_size = scores.shape
    padding = -vocab_size % num_blocks
    padded = jnp.pad(scores, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return padded.reshape(num_rows, num_blocks, -1)


def take_block(blocks: Float[Array, "S A N"], index: Int[Array, " S"]) -> Array:
    """Takes one block `[S, N]` of each row."""
    return jnp.take_along_axis(blocks, index[:, None, None], axis=1)[:, 0]


def first_true(mask: Bool[Array, "S N"]) -> Int[Array, " S"]:
    """Index of the first true entry of each row, 0 if there is none."""
    size = mask.shape[1]
    ids = jnp.arange(size, dtype=jnp.int32)[None, :]
    first = jnp.min(jnp.where(mask, ids, size), axis=1)
    return jnp.where(first < size, first, 0)


def argmax(scores: Float[Array, "S V"]) -> Int[Array, " S"]:
    """Finds the lowest id with the largest score; any id in a row that holds a NaN."""
    # One pass of plain maxima: the paired reduction of jnp.argmax is slow on CPU.
    blocks = split_blocks(scores, DRAW_BLOCKS)
    return find_best(blocks, jnp.max(blocks, axis=2))


def find_best(
    blocks: Float[Array, "S A N"], maxima: Float[Array, "S A"]
) -> Int[Array, " S"]:
    """The same, given the largest score of each block."""
    best = jnp.max(maxima, axis=1, keepdims=True)
    chosen = first_true(maxima == best)
    place = first_true(take_block(blocks, chosen) == best)
    return chosen * blocks.shape[2] + place


def top_k(
    scores: Float[Array, "S V"], count: int
) -> tuple[Float[Array, "S K"], Int[Array, "S K"]]:
    """Finds the best scores and their ids, best first, the lowest id first on ties.

    The best `count` scores lie in the `count` blocks with the largest maxima. Of two
    zeros the positive one is the better.
    """
    if count >= TOP_K_BLOCKS:
        values, ids = jax.lax.top_k(scores, count)
        return values, ids
    blocks = split_blocks(scores, TOP_K_BLOCKS)
    block_size = blocks.shape[2]
    _, chosen = jax.lax.top_k(jnp.max(blocks, axis=2), count)
    # In the order of ids, so that ties stay in it.
    chosen = jnp.sort(chosen, axis=1)
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1)
    values, order = jax.lax.top_k(candidates.reshape(scores.shape[0], -1), count)
    owners = jnp.take_along_axis(chosen, order // block_size, axis=1)
    return values, owners * block_size + order % block_size
