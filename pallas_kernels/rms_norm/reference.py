"""By XLA, and what the operation returns."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from pallas_kernels.common.elementwise import largest_value, saturate

Quantize = Literal["int8", "float8_e4m3fn"]


class Normed(NamedTuple):
    """Normalised tokens.

    Attributes:
        out: Normalised, of the type of x, or quantized.
        residual: x plus the residual, where one was given.
        scales: Factor on each token of `out`, where it is quantized.
    """

    out: Shaped[Array, "T E"]
    residual: Float[Array, "T E"] | None
    scales: Float[Array, " T"] | None


def rms_norm_reference(
    x: Float[Array, "T E"],
    weight: Float[Array, " E"],
    residual: Float[Array, "T E"] | None,
    epsilon: float,
    quantize: Quantize | None,
    weight_offset: int,
) -> Normed:
    """Normalises; see `api.rms_norm`."""
    total = x if residual is None else x + residual
    wide = total.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean + epsilon)
    factor = weight.astype(jnp.float32)[None, :]
    if weight_offset:
        out = (normed * (factor + weight_offset)).astype(x.dtype)
    else:
        # Rounded in between, as Llama's code does.
        out = (normed.astype(x.dtype).astype(jnp.float32) * factor).astype(x.dtype)
    new_residual = None if residual is None else total
    if quantize is None:
        return Normed(out, new_residual, None)
    wide = out.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=1)
    scales = jnp.where(largest > 0, largest / largest_value(quantize), 1.0)
    return Normed(saturate(wide / scales[:, None], quantize), new_residual, scales)
