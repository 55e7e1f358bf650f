"""Feed-forward layers."""

from collections.abc import Mapping

from jax import Array
from jaxtyping import Float

from jllm.layers.activation import Activation, activate
from jllm.layers.linear import linear


def gated_mlp(
    x: Float[Array, "T E"],
    weights: Mapping[str, Array],
    activation: Activation = "silu",
) -> Float[Array, "T E"]:
    """Computes down(f(gate(x)) * up(x)); arXiv:2002.05202.

    Args:
        x: Hidden states.
        weights: `gate_up` [N, 2, F / N, E] for N devices, `down` [E, F], and biases
            where the model has them: `gate_up_bias` [N, 2, F / N], `down_bias` [E].
        activation: The function f.
    """
    both = linear(x, weights["gate_up"], weights.get("gate_up_bias"))
    gate, up = (both[:, :, i].reshape(x.shape[0], -1) for i in (0, 1))
    hidden = activate(gate, activation) * up
    return linear(hidden, weights["down"], weights.get("down_bias"))


def plain_mlp(
    x: Float[Array, "T E"],
    weights: Mapping[str, Array],
    activation: Activation,
) -> Float[Array, "T E"]:
    """Computes down(f(up(x))).

    Args:
        x: Hidden states.
        weights: `up` [F, E], `down` [E, F], and biases where the model has them:
            `up_bias` [F], `down_bias` [E].
        activation: The function f.
    """
    hidden = activate(linear(x, weights["up"], weights.get("up_bias")), activation)
    return linear(hidden, weights["down"], weights.get("down_bias"))
