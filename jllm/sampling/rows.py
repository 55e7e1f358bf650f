"""What the sampler knows of each row: its parameters and its tokens so far."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, UInt32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """Sampling parameters of the rows of a step; neutral values in brackets.

    Attributes:
        temperature: Divides the scores; below `GREEDY_TEMPERATURE` the best one wins.
        top_p: Probability kept, (0, 1] [1].
        min_p: Least probability as a share of the best one's, [0, 1] [0].
        presence: Subtracted from the score of each token of the output [0].
        frequency: Subtracted per occurrence in the output [0].
        repetition: Divides positive and multiplies negative scores of all tokens of the
            context, above 0 [1].
        top_k: Number of tokens kept; 0 or less keeps all [0].
        seed: Seed of the row's random stream, low and high 32 bits.
        position: Index in the sequence of the token to be sampled, which is the number
            of tokens before it.
        prompt_len: Tokens of the prompt; the output starts there.
        min_tokens: Stop tokens are banned until the output is this long [0].
    """

    temperature: Float[Array, " S"]
    top_p: Float[Array, " S"]
    min_p: Float[Array, " S"]
    presence: Float[Array, " S"]
    frequency: Float[Array, " S"]
    repetition: Float[Array, " S"]
    top_k: Int[Array, " S"]
    seed: UInt32[Array, "S 2"]
    position: Int[Array, " S"]
    prompt_len: Int[Array, " S"]
    min_tokens: Int[Array, " S"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenHistory:
    """The contexts of the rows of a step, read through their block tables.

    Token `j` of row `s` is `block_tokens[block_tables[s, j // P], j % P]` for `j` below
    `lengths[s]`; what lies past that is garbage.

    Attributes:
        block_tokens: Token of every place of the KV pool.
        block_tables: Pool blocks of each row in order of position.
        lengths: Tokens of each context.
    """

    block_tokens: Int[Array, "B P"]
    block_tables: Int[Array, "S M"]
    lengths: Int[Array, " S"]

    def tokens_at(self, positions: Int[Array, "S N"]) -> Int[Array, "S N"]:
        """Tokens at these positions of each row; any token where out of range."""
        block_size = self.block_tokens.shape[1]
        rows = jnp.arange(positions.shape[0])[:, None]
        blocks = self.block_tables.at[rows, positions // block_size].get(mode="clip")
        return self.block_tokens.at[blocks, positions % block_size].get(mode="clip")
