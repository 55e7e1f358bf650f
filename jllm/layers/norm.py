"""Normalisation layers."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def rms_norm(
    x: Float[Array, "*batch E"], weight: Float[Array, " E"], epsilon: float
) -> Float[Array, "*batch E"]:
    """Divides by the root of the mean square, in float32, then scales.

    Source: Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    normed = (wide * scale).astype(x.dtype)
    return normed * jnp.broadcast_to(weight, x.shape)
