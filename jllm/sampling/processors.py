"""Functions of the user over the scores of a step: what they see, and their check."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped

from jllm.errors import ConfigError
from jllm.processors import LogitsProcessor
from jllm.sampling.rows import SamplingRows, TokenHistory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ProcessorRows:
    """What a logits processor is told of the rows of a step.

    Attributes:
        positions: Index in the sequence of the token to be drawn, which is the number
            of tokens before it.
        prompt_lengths: Tokens of the prompt; the output starts there.
        history: The tokens before, through `tokens_at` and `last_tokens`.
    """

    positions: Int[Array, " S"]
    prompt_lengths: Int[Array, " S"]
    history: TokenHistory

    def tokens_at(self, positions: Int[Array, "S N"]) -> Int[Array, "S N"]:
        """Tokens at these positions of each row; -1 where there is none."""
        inside = (positions >= 0) & (positions < self.positions[:, None])
        return jnp.where(inside, self.history.tokens_at(positions), -1)

    def last_tokens(self, count: int) -> Int[Array, "S N"]:
        """The last tokens of each row, the newest at the end; -1 where it has fewer."""
        steps = jnp.arange(-count, 0, dtype=jnp.int32)
        return self.tokens_at(self.positions[:, None] + steps[None, :])


def apply_processors(
    processors: Sequence[LogitsProcessor],
    vocab_size: int,
    logits: Float[Array, "S V"],
    rows: ProcessorRows,
    arguments: Mapping[str, Shaped[Array, "S ..."]],
) -> Float[Array, "S V"]:
    """Applies them in their order; ids that only pad the vocabulary stay banned.

    Args:
        processors: The functions.
        vocab_size: Ids without padding; the functions see these.
        logits: The model's scores.
        rows: What they are told of each row.
        arguments: Of each row, by name.
    """
    scores = logits[:, :vocab_size]
    for processor in processors:
        own = {name: arguments[name] for name in processor.defaults}
        scores = processor.function(scores, rows, own)
    rest = logits.shape[1] - vocab_size
    return jnp.pad(scores, ((0, 0), (0, rest)), constant_values=-jnp.inf)


def spoiled(
    logits: Float[Array, "S V"], scores: Float[Array, "S V"]
) -> Float[Array, "S V"]:
    """The model's scores, not a number in rows of which processors made such."""
    bad: Bool[Array, "S 1"] = jnp.any(jnp.isnan(scores), axis=1, keepdims=True)
    return jnp.where(bad, jnp.nan, logits)


def processor_rows(rows: SamplingRows, history: TokenHistory) -> ProcessorRows:
    """What processors are told of the rows of a step."""
    return ProcessorRows(rows.position, rows.prompt_len, history)


def check_processors(processors: Sequence[LogitsProcessor], vocab_size: int) -> None:
    """Traces each function once, on shapes alone.

    Raises:
        ConfigError: It fails, or gives something else than scores.
    """
    # Any numbers will do, if they are not likely to fit by accident.
    num_rows, table, pool = 3, (3, 7), (5, 16)
    scores = jax.ShapeDtypeStruct((num_rows, vocab_size), jnp.float32)
    tables = [jax.ShapeDtypeStruct(x, jnp.int32) for x in (pool, table, (num_rows,))]
    for index, processor in enumerate(processors):
        own = {
            name: jax.ShapeDtypeStruct((num_rows, *value.shape), value.dtype)
            for name, value in processor.defaults.items()
        }
        name = f"logits_processors[{index}]"
        try:
            result = jax.eval_shape(partial(_call, processor), scores, own, *tables)
        except Exception as error:
            raise ConfigError(f"{name} cannot be traced: {error}") from error
        if not isinstance(result, jax.ShapeDtypeStruct):
            raise ConfigError(f"{name} gives {type(result).__name__}, not an array")
        if (result.shape, result.dtype) != (scores.shape, scores.dtype):
            raise ConfigError(
                f"{name} gives {result.dtype}{list(result.shape)} for scores "
                f"{scores.dtype}{list(scores.shape)}, whose shape and type it must keep"
            )


def _call(
    processor: LogitsProcessor,
    scores: Float[Array, "S V"],
    arguments: dict[str, Array],
    block_tokens: Int[Array, "B P"],
    block_tables: Int[Array, "S M"],
    lengths: Int[Array, " S"],
) -> Any:
    history = TokenHistory(block_tokens, block_tables, lengths)
    return processor.function(
        scores, ProcessorRows(lengths, lengths, history), arguments
    )
