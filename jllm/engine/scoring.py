"""From the hidden states of a step's rows to scores and tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from jllm.models.base import Model, Weights
from jllm.sampling.draws import DrawMethod, Survey, survey
from jllm.sampling.rows import SamplingRows
from jllm.sampling.sampler import draw


class Scores(NamedTuple):
    """Scores of a step.

    Attributes:
        logits: Scores of the next token; zeros in rows that do not sample.
        finite: Whether a row's scores are finite.
        found: What `survey` says of the scores, if the draw asks for it.
    """

    logits: Float[Array, "S V"]
    finite: Bool[Array, " S"]
    found: Survey | None


class Drawn(NamedTuple):
    """Tokens of a step.

    Attributes:
        tokens: Drawn ids.
        logits: Scores that they were drawn from.
        finite: Whether a row's scores are finite.
    """

    tokens: Int[Array, " S"]
    logits: Float[Array, "S V"]
    finite: Bool[Array, " S"]


def score(
    model: Model,
    method: DrawMethod,
    weights: Weights,
    num_scored: int,
    last: Float[Array, "S E"],
    sampling: SamplingRows,
) -> Scores:
    """Scores the first rows; zeros for others.

    Only what looks at whole rows of scores is here: a program has this several times.
    """
    logits = model.logits(weights, last[:num_scored])
    found = None
    if method == "inverse_cdf":
        found = survey(logits, sampling.temperature[:num_scored])
    best = jnp.max(logits if found is None else found.maxima, axis=-1)
    # A NaN anywhere makes the largest logit NaN; padded ids are minus infinity.
    finite = jnp.isfinite(best)
    rest = last.shape[0] - num_scored
    if rest:
        logits, found = jax.tree.map(lambda x: _pad_rows(x, rest), (logits, found))
        others = jnp.all(jnp.isfinite(last[num_scored:]), axis=-1)
        finite = jnp.concatenate([finite, others])
    return Scores(logits, finite, found)


def score_sampling_rows(
    score_rows: Callable[[int, Array, SamplingRows], Scores],
    sizes: Sequence[int],
    last: Float[Array, "S E"],
    sampling: SamplingRows,
    num_samples: Int[Array, ""],
) -> Scores:
    """Scores the smallest number of rows that holds those that sample.

    Args:
        score_rows: `score` but for its last three arguments.
        sizes: Numbers of rows, ascending.
        last: Hidden state of the last token of each row.
        sampling: How its next token is drawn.
        num_samples: Rows that sample; they come first.
    """
    counts = jnp.array(sizes[:-1], jnp.int32)
    return jax.lax.switch(
        jnp.sum(num_samples > counts),
        [partial(score_rows, count) for count in sizes],
        last,
        sampling,
    )


def draw_tokens(scores: Scores, method: DrawMethod, sampling: SamplingRows) -> Drawn:
    """Draws a token for each row, greedy or by temperature; any for unscored ones."""
    tokens = draw(scores.logits, sampling, method, scores.found)
    return Drawn(tokens, scores.logits, scores.finite)


def _pad_rows(x: Shaped[Array, "N ..."], count: int) -> Shaped[Array, "S ..."]:
    return jnp.pad(x, [(0, count)] + [(0, 0)] * (x.ndim - 1))
