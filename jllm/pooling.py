"""How the hidden states of a prompt become one vector."""

import dataclasses
from typing import Literal

from jllm.checks import boolean, integer, wrong

Pooling = Literal["last", "mean", "cls"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean", "cls")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """What is asked of an embedding.

    The hidden states are those after the model's last norm, summed in float32 or wider.

    Attributes:
        pooling: "last" takes the hidden state of the last token, "cls" that of the
            first, "mean" the mean over all tokens.
        normalize: Scales the vector to length 1; a vector of zeros stays as it is.
        dimensions: Keeps so many leading numbers, before the vector is normalised, for
            models that were trained for it (Matryoshka); None keeps all.
        truncate_prompt_tokens: Keeps only the last tokens of the prompt; -1 is as many
            as the context holds.
    """

    pooling: Pooling = "last"
    normalize: bool = True
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        """Checks every field; raises `InvalidRequestError` with its name."""
        if self.pooling not in POOLINGS:
            raise wrong("pooling", self.pooling, "must be last, mean or cls")
        boolean("normalize", self.normalize)
        if self.dimensions is not None:
            integer("dimensions", self.dimensions, 1)
        kept = self.truncate_prompt_tokens
        if kept is not None and integer("truncate_prompt_tokens", kept, -1) == 0:
            raise wrong("truncate_prompt_tokens", 0, "must be -1 or at least 1")

    def reads_prefix_cache(self) -> bool:
        """Whether the tokens before the last need not be computed for it."""
        return self.pooling == "last"

    def span(self, num_tokens: int) -> tuple[int, int]:
        """First position of a prompt that counts, and the one after the last."""
        if self.pooling == "last":
            return num_tokens - 1, num_tokens
        return (0, 1) if self.pooling == "cls" else (0, num_tokens)
