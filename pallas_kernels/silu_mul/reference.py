"""By XLA: one fusion of two slices."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.common.elementwise import Activation, activate


def silu_mul_reference(
    x: Float[Array, "T N"], activation: Activation
) -> Float[Array, "T F"]:
    """Computes activation(gate) * up; see `api.silu_mul`."""
    half = x.shape[1] // 2
    gate, up = x[:, :half], x[:, half:]
    wide = gate.astype(jnp.float32)
    match activation:
        case "silu":
            active = jax.nn.silu(wide)
        case "gelu":
            active = jax.nn.gelu(wide, approximate=False)
        case "gelu_tanh":
            # JAX's own cancels for gates far below zero.
            active = activate(wide, activation)
    return active.astype(x.dtype) * up
