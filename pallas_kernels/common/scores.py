"""How attention turns products of queries and keys into weights."""

import dataclasses
from functools import partial

import jax
from jax import Array
from jaxtyping import Float


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sinks", "alibi_slopes"],
    meta_fields=["scale", "window", "soft_cap"],
)
@dataclasses.dataclass(frozen=True, slots=True)
class ScoreOptions:
    """Options of every attention operation.

    The score of a query at position i and a key at position j is s = scale * q . k,
    then soft_cap * tanh(s / soft_cap), then plus slope * (j - i). Key j is visible
    where j <= i, and with a window where also i - j < window. A sink takes part in the
    softmax as one more score that has no value.

    Attributes:
        scale: Factor on the products, usually D ** -0.5.
        window: Newest positions that a query sees, itself included; None for all.
        soft_cap: Bound of the scores (Gemma 2, arXiv:2408.00118); None for none.
        sinks: Score of each head's sink (gpt-oss); None for none.
        alibi_slopes: Slope of each head (ALiBi, arXiv:2108.12409); None for none.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: Float[Array, " H"] | None = None
    alibi_slopes: Float[Array, " H"] | None = None

    def check(self, num_heads: int) -> None:
        """Raises ValueError naming the option that is out of its bounds."""
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ValueError(f"soft_cap={self.soft_cap} must be positive")
        for name in ("sinks", "alibi_slopes"):
            array = getattr(self, name)
            if array is not None and array.shape != (num_heads,):
                raise ValueError(
                    f"{name} has shape {array.shape}, expected ({num_heads},)"
                )
