"""Log-probabilities of the model's own distribution, before any rule is applied."""

import dataclasses
from collections.abc import Callable
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jllm.sampling.blocks import top_k
from jllm.types import MAX_LOGPROB_TOKEN_IDS

FINITE = 1
"""Flag of a row whose logits are all finite but for the padded ids."""


PROMPT_CHUNK = 64
"""Positions whose logits are in memory at once when a prompt is scored."""


@dataclasses.dataclass(frozen=True)
class ResultLayout:
    """Where each value lies in a packed int32 row; floats are there by their bits.

    Attributes:
        num_logprobs: Number of best log-probabilities `K`.
    """

    num_logprobs: int

    @cached_property
    def size(self) -> int:
        """Length `W` of a packed row."""
        return 4 + 2 * self.num_logprobs + MAX_LOGPROB_TOKEN_IDS

    def unpack(self, packed: np.ndarray) -> dict[str, np.ndarray]:
        """Splits rows `[..., W]` that were copied to the host.

        Returns:
            `token`, `flags`, `logprob` and `rank` `[...]`, `top_ids` and `top_logprobs`
            `[..., K]`, best first, and `requested` `[..., 128]`, the log-probabilities
            of the ids that the row's rules list.
        """
        head, (ids, values, requested) = packed[..., :4], self._tables(packed)
        return {
            "token": head[..., 0],
            "flags": head[..., 1],
            "logprob": _floats(head[..., 2]),
            "rank": head[..., 3],
            "top_ids": ids,
            "top_logprobs": _floats(values),
            "requested": _floats(requested),
        }

    def _tables(self, packed: np.ndarray) -> list[np.ndarray]:
        width = self.num_logprobs
        return np.split(packed[..., 4:], [width, 2 * width], axis=-1)


def _floats(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.float32)


def pack_result(
    logits: Float[Array, "S V"],
    tokens: Int[Array, " S"],
    requested_ids: Int[Array, "S L"] | None,
    num_logprobs: int,
) -> Int[Array, "S W"]:
    """Gathers all that the host needs to know of some tokens, as `ResultLayout` says.

    Args:
        logits: The model's scores, untouched.
        tokens: One id per row; its log-probability and rank are returned.
        requested_ids: More ids; those out of range get minus infinity. None for none.
        num_logprobs: How many of the best to return, at most the vocabulary.
    """
    best = jnp.max(logits, axis=1, keepdims=True)
    total = jnp.log(jnp.sum(jnp.exp(logits - best), axis=1, keepdims=True)) + best
    chosen = _scores_of(logits, tokens[:, None])
    rank = 1 + jnp.sum(logits > chosen, axis=1, dtype=jnp.int32)
    top_scores, top_ids = top_k(logits, num_logprobs)
    requested_shape = (logits.shape[0], MAX_LOGPROB_TOKEN_IDS)
    requested = jnp.full(requested_shape, -jnp.inf, jnp.float32)
    if requested_ids is not None:
        requested = _scores_of(logits, requested_ids) - total
    flags = jnp.where(jnp.isfinite(best), FINITE, 0)
    parts = [
        tokens[:, None],
        flags,
        _bits(chosen - total),
        rank[:, None],
        top_ids,
        _bits(top_scores - total),
        _bits(requested),
    ]
    return jnp.concatenate([part.astype(jnp.int32) for part in parts], axis=1)


def _scores_of(logits: Float[Array, "S V"], ids: Int[Array, "S N"]) -> Array:
    rows = jnp.arange(ids.shape[0])[:, None]
    return logits.at[rows, ids].get(mode="fill", fill_value=-jnp.inf)


def _bits(values: Float[Array, "S N"]) -> Int[Array, "S N"]:
    return jax.lax.bitcast_convert_type(values, jnp.int32)


def prompt_logprobs(
    hidden: Float[Array, "T E"],
    targets: Int[Array, " T"],
    logits_fn: Callable[[Float[Array, "N E"]], Float[Array, "N V"]],
    num_logprobs: int,
    chunk: int = PROMPT_CHUNK,
) -> Int[Array, "T W"]:
    """Scores the token that follows each position, a chunk of positions at a time.

    Never more than `chunk` rows of logits are in memory.

    Args:
        hidden: Hidden states of a step.
        targets: The token after each of them.
        logits_fn: Gives the scores of some hidden states.
        num_logprobs: How many of the best to return.
        chunk: Rows of logits at a time.

    Returns:
        One packed row per position, as `ResultLayout` says, with nothing requested.
    """
    num_tokens = hidden.shape[0]
    num_chunks = -(-num_tokens // chunk)
    padding = num_chunks * chunk - num_tokens
    hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
    targets = jnp.pad(targets, (0, padding))

    def score(part: tuple[Array, Array]) -> Array:
        return pack_result(logits_fn(part[0]), part[1], None, num_logprobs)

    parts = (
        hidden.reshape(num_chunks, chunk, hidden.shape[1]),
        targets.reshape(num_chunks, chunk),
    )
    packed = jax.lax.map(score, parts)
    return packed.reshape(num_chunks * chunk, -1)[:num_tokens]
