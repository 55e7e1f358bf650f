"""Feed-forward layers."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jllm.layers.linear import linear


def gated_mlp(
    x: Float[Array, "T E"], weights: Mapping[str, Array]
) -> Float[Array, "T E"]:
    """Computes down(silu(gate(x)) * up(x)); SwiGLU, arXiv:2002.05202.

    Args:
        x: Hidden states.
        weights: `gate_up` [N, 2, F / N, E] for N devices, `down` [E, F], and biases
            where the model has them: `gate_up_bias` [N, 2, F / N], `down_bias` [E].
    """
    both = linear(x, weights["gate_up"], weights.get("gate_up_bias"))
    gate, up = (both[:, :, i].reshape(x.shape[0], -1) for i in (0, 1))
    hidden = jax.nn.silu(gate.astype(jnp.float32)).astype(x.dtype) * up
    return linear(hidden, weights["down"], weights.get("down_bias"))
