"""The sampling rules, one pure function each: scores in, scores out.

A banned token has the score minus infinity. Neutral parameters leave a row's scores bit
for bit as they are. Nothing here sorts, gathers or sums up prefixes of the vocabulary:
where it is sharded, devices exchange numbers per row only.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jllm.sampling.history import banned_by_words, count_tokens
from jllm.sampling.rows import SamplingRows, TokenHistory
from jllm.sampling.rules import BITS, Rules
from jllm.sampling.temperature import divisor
from pallas_kernels.common.dispatch import Implementation
from pallas_kernels.common.target import Target
from pallas_kernels.top_p_threshold import top_p_threshold


class ThresholdSearch(NamedTuple):
    """How the lowest score is found that top-k and top-p keep.

    Attributes:
        implementation: Of `top_p_threshold`; only "reference" leaves a sharded
            vocabulary where it is.
        target: Device to compile for, None for the default one.
    """

    implementation: Implementation = "auto"
    target: Target | None = None


AUTO_SEARCH = ThresholdSearch()


def add_bias(
    scores: Float[Array, "S V"],
    ids: Int[Array, "S N"],
    values: Float[Array, "S N"],
) -> Float[Array, "S V"]:
    """Adds values to the scores of some ids; ids out of range are skipped."""
    return scores.at[_rows(ids), ids].add(values, mode="drop")


def apply_penalties(
    scores: Float[Array, "S V"], rows: SamplingRows, history: TokenHistory
) -> Float[Array, "S V"]:
    """Lowers the scores of tokens that the context holds already.

    The repetition penalty (Keskar et al., 2019, CTRL) looks at prompt and output; the
    presence and frequency penalties, as OpenAI defines them, at the output only.
    """
    vocab_size = scores.shape[1]
    repeats = rows.repetition != 1
    in_context = count_tokens(
        history, jnp.zeros_like(history.lengths), repeats, vocab_size
    )
    repetition = rows.repetition[:, None]
    lowered = jnp.where(scores > 0, scores / repetition, scores * repetition)
    scores = jnp.where(in_context > 0, lowered, scores)
    counts_output = (rows.presence != 0) | (rows.frequency != 0)
    in_output = count_tokens(history, rows.prompt_len, counts_output, vocab_size)
    penalty = rows.frequency[:, None] * in_output + rows.presence[:, None]
    return jnp.where(in_output > 0, scores - penalty, scores)


def ban_unless_allowed(
    scores: Float[Array, "S V"], allowed: Int[Array, "S A"]
) -> Float[Array, "S V"]:
    """Bans every id whose bit is not set."""
    num_rows, vocab_size = scores.shape
    bits = (allowed[:, :, None] >> jnp.arange(BITS, dtype=jnp.int32)[None, None]) & 1
    bits = bits.reshape(num_rows, -1)[:, :vocab_size]
    return _ban(scores, bits == 0)


def ban_early_stop(
    scores: Float[Array, "S V"], rows: SamplingRows, stop_ids: Int[Array, "S N"]
) -> Float[Array, "S V"]:
    """Bans the stop ids of rows whose output is shorter than `min_tokens`."""
    is_early = rows.position - rows.prompt_len < rows.min_tokens
    return _ban_ids(
        scores, stop_ids, jnp.broadcast_to(is_early[:, None], stop_ids.shape)
    )


def ban_bad_words(
    scores: Float[Array, "S V"],
    rows: SamplingRows,
    history: TokenHistory,
    rules: Rules,
) -> Float[Array, "S V"]:
    """Bans the last token of each bad word whose other tokens end the output so far."""
    banned = banned_by_words(history, rows.prompt_len, rules)
    return _ban_ids(scores, rules.bad_tokens, banned)


def keep_best_if_all_banned(
    scores: Float[Array, "S V"], masked: Float[Array, "S V"]
) -> Float[Array, "S V"]:
    """Takes the masked scores, or the best of the unmasked ones where none is left."""
    none_left = jnp.max(masked, axis=1, keepdims=True) == -jnp.inf
    best = jnp.max(scores, axis=1, keepdims=True)
    return jnp.where(none_left, _ban(scores, scores < best), masked)


def apply_top_k_top_p(
    scores: Float[Array, "S V"], rows: SamplingRows, search: ThresholdSearch
) -> Float[Array, "S V"]:
    """Keeps the `top_k` best scores, of these those whose probabilities reach `top_p`.

    All that equal the last one kept are kept too. Holtzman et al., 2019, The Curious
    Case of Neural Text Degeneration.
    """
    lowest = top_p_threshold(
        scores,
        rows.top_k,
        rows.top_p,
        divisor(rows.temperature),
        implementation=search.implementation,
        target=search.target,
    )
    return _ban(scores, scores < lowest[:, None])


def apply_min_p(
    scores: Float[Array, "S V"],
    min_p: Float[Array, " S"],
    temperature: Float[Array, " S"],
) -> Float[Array, "S V"]:
    """Keeps tokens at least `min_p` times as probable as the best.

    Nguyen et al., 2024, Turning Up the Heat: Min-p Sampling.
    """
    threshold = jnp.max(scores, axis=1) + divisor(temperature) * jnp.log(min_p)
    return _keep_from(scores, threshold, min_p <= 0)


def _rows(ids: Int[Array, "S N"]) -> Int[Array, "S 1"]:
    return jnp.arange(ids.shape[0])[:, None]


def _ban(scores: Float[Array, "S V"], banned: Bool[Array, "S V"]) -> Array:
    return jnp.where(banned, -jnp.inf, scores)


def _ban_ids(
    scores: Float[Array, "S V"], ids: Int[Array, "S N"], banned: Bool[Array, "S N"]
) -> Array:
    """Bans some ids; those out of range are skipped."""
    ceiling = jnp.where(banned, -jnp.inf, jnp.inf)
    return scores.at[_rows(ids), ids].min(ceiling, mode="drop")


def _keep_from(
    scores: Float[Array, "S V"],
    threshold: Float[Array, " S"],
    neutral: Bool[Array, " S"],
) -> Array:
    """Bans scores below the threshold, except in rows with a neutral parameter."""
    return _ban(scores, (scores < threshold[:, None]) & ~neutral[:, None])
