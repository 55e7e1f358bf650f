"""Pooled prompts: sums of hidden states, from which their embeddings are made.

The device sums the hidden states of a step over the tokens of each row that count; the
host adds up what the chunks of a prompt bring, in float64.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from jllm.pooling import PoolingParams
from jllm.scheduler.plan import StepPlan


def pool_step(
    num_rows: int, hidden: Float[Array, "T E"], owners: Int[Array, " T"]
) -> Float[Array, "S E"]:
    """Sums the hidden states of a step by row, in float32.

    Args:
        num_rows: Rows `S` of the step.
        hidden: Its hidden states.
        owners: The row to which each token is added; `S` for none.
    """
    # Not a product with a matrix of ones: a row that is not finite fails alone.
    return jax.ops.segment_sum(hidden.astype(jnp.float32), owners, num_rows)


class PooledPrompt:
    """What has been summed for one prompt.

    Steps are launched before the last one's results are read, hence two counts.
    """

    def __init__(self, params: PoolingParams, num_tokens: int) -> None:
        """Begins with nothing.

        Args:
            params: Which tokens count.
            num_tokens: Length of the prompt.
        """
        self._start, self._end = params.span(num_tokens)
        self._num_tokens = self._end - self._start
        self._sum: np.ndarray | None = None

    def claim(self, start: int, end: int) -> range:
        """Positions of a launched chunk that count and are not claimed yet.

        What is computed again, after a preemption, was claimed before.

        Args:
            start: First position of the chunk.
            end: The one after its last.
        """
        claimed = range(max(start, self._start), min(end, self._end))
        if claimed:
            self._start = claimed.stop
        return claimed

    def add(self, sums: np.ndarray) -> None:
        """Adds what a step has summed, f32[E]."""
        wide = sums.astype(np.float64)
        self._sum = wide if self._sum is None else self._sum + wide

    @property
    def mean(self) -> np.ndarray:
        """f64[E] mean over the tokens that count, once all have been added."""
        assert self._sum is not None
        return self._sum / self._num_tokens


@dataclasses.dataclass(frozen=True, slots=True)
class PoolSegment:
    """The tokens of one row of a step that count.

    Attributes:
        prompt: Where they count.
        row: Place of the row in the step.
        start: Place of the first of them in the step.
        num_tokens: How many they are.
    """

    prompt: PooledPrompt
    row: int
    start: int
    num_tokens: int


def claim_segments(
    plan: StepPlan, prompts: Sequence[PooledPrompt | None]
) -> list[PoolSegment]:
    """Finds the tokens of a step that count, and claims them.

    Args:
        plan: The step, which must be launched.
        prompts: Of each of its chunks; None for one that is not pooled.
    """
    found: list[PoolSegment] = []
    start = index = len(plan.decoding)
    for row, prompt in zip(plan.chunks, prompts, strict=True):
        if prompt is not None:
            claimed = prompt.claim(row.position, row.position + row.num_tokens)
            first = start + claimed.start - row.position
            if claimed:
                found.append(PoolSegment(prompt, index, first, len(claimed)))
        start += row.num_tokens
        index += 1
    return found


def pool_owners(
    segments: Sequence[PoolSegment], num_rows: int, num_tokens: int
) -> np.ndarray:
    """The row of each token of a step, i32[T]; `num_rows` where it does not count."""
    owners = np.full(num_tokens, num_rows, np.int32)
    for segment in segments:
        end = segment.start + segment.num_tokens
        owners[segment.start : end] = segment.row
    return owners


def add_sums(segments: Sequence[PoolSegment], sums: np.ndarray) -> None:
    """Adds what a step has summed, f32[S, E], to the prompts of its segments."""
    for segment in segments:
        segment.prompt.add(sums[segment.row])
