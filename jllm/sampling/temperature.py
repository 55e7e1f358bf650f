"""The softmax at a row's temperature.

Temperature enters where probabilities are needed, and scores themselves stay as they
are: on CPU a divided copy of them costs several times as much as a whole draw.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jllm.types import GREEDY_TEMPERATURE


def divisor(temperature: Float[Array, " S"]) -> Float[Array, " S"]:
    """What scores are divided by: the temperature, or 1 in greedy rows."""
    return jnp.where(temperature < GREEDY_TEMPERATURE, 1.0, temperature)


def log_weights(
    scores: Float[Array, "S ..."],
    best: Float[Array, " S"],
    temperature: Float[Array, " S"],
) -> Float[Array, "S ..."]:
    """Logarithms of the probabilities relative to that of the best score."""
    shape = (-1,) + (1,) * (scores.ndim - 1)
    # Subtracted first, so that no quotient overflows upwards.
    return (scores - best.reshape(shape)) / divisor(temperature).reshape(shape)


def weights(
    scores: Float[Array, "S ..."],
    best: Float[Array, " S"],
    temperature: Float[Array, " S"],
) -> Float[Array, "S ..."]:
    """Probabilities relative to that of the best score; 1 at most."""
    return jnp.exp(log_weights(scores, best, temperature))
