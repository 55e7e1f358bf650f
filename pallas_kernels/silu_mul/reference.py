"""By XLA: one fusion of two slices."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.common.elementwise import Activation


def silu_mul_reference(
    x: Float[Array, "T N"], activation: Activation
) -> Float[Array, "T F"]:
    """Computes activation(gate) * up; see `api.silu_mul`."""
    half = x.shape[1] // 2
    gate, up = x[:, :half], x[:, half:]
    wide = gate.astype(jnp.float32)
    if activation == "silu":
        active = jax.nn.silu(wide)
    else:
        active = jax.nn.gelu(wide, approximate=activation == "gelu_tanh")
    return active.astype(x.dtype) * up
