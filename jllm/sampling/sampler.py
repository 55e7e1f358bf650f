"""From scores to tokens: the plain draw of every step, and the one with every rule."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from jllm.processors import LogitsProcessor, argument_defaults
from jllm.sampling import transforms
from jllm.sampling.blocks import argmax
from jllm.sampling.draws import (
    DRAWS,
    DrawMethod,
    Survey,
    best_of,
    inverse_cdf,
    row_keys,
    survey,
)
from jllm.sampling.logprobs import pack_result
from jllm.sampling.processors import apply_processors, processor_rows, spoiled
from jllm.sampling.rows import SamplingRows, TokenHistory
from jllm.sampling.rules import RuleLayout, Rules, unpack_rules
from jllm.sampling.transforms import AUTO_SEARCH, ThresholdSearch
from jllm.types import GREEDY_TEMPERATURE


class Context(NamedTuple):
    """What the rules of a step are told besides the scores."""

    rows: SamplingRows
    history: TokenHistory
    rules: Rules
    search: ThresholdSearch


@dataclasses.dataclass(frozen=True, slots=True)
class SamplerOptions:
    """What is the same for all rows and steps.

    Attributes:
        num_logprobs: Number of best log-probabilities returned.
        method: How tokens are drawn.
        search: How top-k and top-p find what they keep.
        processors: Functions of the user, applied before all rules.
        vocab_size: Ids that these see; the rest pads the vocabulary.
    """

    num_logprobs: int
    method: DrawMethod = "inverse_cdf"
    search: ThresholdSearch = AUTO_SEARCH
    processors: tuple[LogitsProcessor, ...] = ()
    vocab_size: int = 0


Transform = Callable[[Float[Array, "S V"], Context], Float[Array, "S V"]]

# The order of the rules; the first two groups also change what greedy rows take. The
# filters take the probabilities at the row's temperature, as the draw does after them.
ADJUSTMENTS: tuple[Transform, ...] = (
    lambda s, c: transforms.add_bias(s, c.rules.bias_ids, c.rules.bias_values),
    lambda s, c: transforms.apply_penalties(s, c.rows, c.history),
    lambda s, c: transforms.ban_unless_allowed(s, c.rules.allowed),
)
# Where these leave nothing, the best of what is allowed is taken.
MASKS: tuple[Transform, ...] = (
    lambda s, c: transforms.ban_early_stop(s, c.rows, c.rules.stop_ids),
    lambda s, c: transforms.ban_bad_words(s, c.rows, c.history, c.rules),
)
FILTERS: tuple[Transform, ...] = (
    lambda s, c: transforms.apply_top_k_top_p(s, c.rows, c.search),
    lambda s, c: transforms.apply_min_p(s, c.rows.min_p, c.rows.temperature),
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleResult:
    """Sampled tokens, and all that the host needs to know of them.

    Attributes:
        tokens: One id per row.
        packed: The same with flags and log-probabilities, see `ResultLayout`.
    """

    tokens: Int[Array, " S"]
    packed: Int[Array, "S W"]


def draw(
    logits: Float[Array, "S V"],
    rows: SamplingRows,
    method: DrawMethod = "inverse_cdf",
    found: Survey | None = None,
) -> Int[Array, " S"]:
    """Takes the best id of greedy rows, draws from the softmax of the others.

    Args:
        logits: The model's scores.
        rows: Parameters of each row.
        method: How a token is drawn.
        found: What `survey` says of these scores, where it has been asked already.
    """
    keys = row_keys(rows.seed, rows.position)
    if method == "inverse_cdf":
        found = found or survey(logits, rows.temperature)
        drawn = inverse_cdf(logits, rows.temperature, keys, found)
        best = best_of(logits, found)
    else:
        drawn, best = DRAWS[method](logits, rows.temperature, keys), argmax(logits)
    return jnp.where(rows.temperature < GREEDY_TEMPERATURE, best, drawn)


def sample(
    logits: Float[Array, "S V"],
    rows: SamplingRows,
    history: TokenHistory,
    rules: Int[Array, "S X"],
    options: SamplerOptions,
    arguments: tuple[Shaped[Array, "S ..."], ...] = (),
) -> SampleResult:
    """Draws a token per row with every rule, and returns its log-probabilities.

    A row without rules gets the token that `draw` gives it.

    Args:
        logits: The model's scores; ids that only pad the vocabulary are minus infinity.
        rows: Parameters of each row.
        history: Context of each row.
        rules: Packed rules of each row, see `pack_rules`.
        options: What is the same for all rows and steps.
        arguments: Of the processors, for each row, in the order of their declaration.
    """
    unpacked = unpack_rules(RuleLayout(logits.shape[1]), rules)
    context = Context(rows, history, unpacked, options.search)
    scores = logits
    if options.processors:
        names = argument_defaults(options.processors)
        scores = apply_processors(
            options.processors,
            options.vocab_size,
            logits,
            processor_rows(rows, history),
            dict(zip(names, arguments, strict=True)),
        )
        logits = spoiled(logits, scores)
    tokens = draw(apply_rules(scores, context), rows, options.method)
    packed = pack_result(logits, tokens, unpacked.logprob_ids, options.num_logprobs)
    return SampleResult(tokens=tokens, packed=packed)


def apply_rules(logits: Float[Array, "S V"], context: Context) -> Float[Array, "S V"]:
    """Applies every rule in order; what is not banned may be drawn."""
    scores = _apply(ADJUSTMENTS, logits, context)
    masked = _apply(MASKS, scores, context)
    scores = transforms.keep_best_if_all_banned(scores, masked)
    return _apply(FILTERS, scores, context)


def _apply(
    steps: tuple[Transform, ...], scores: Float[Array, "S V"], context: Context
) -> Float[Array, "S V"]:
    for step in steps:
        scores = step(scores, context)
    return scores
