"""The obvious version in jnp: the oracle, and the one that runs on a CPU."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped

from pallas_kernels.quantized_matmul.packing import unpack_int4
from pallas_kernels.quantized_matmul.weights import MIDDLE_ZERO, QuantizedWeight


def quantized_matmul_reference(
    x: Shaped[Array, "M K"],
    weight: QuantizedWeight,
    x_scales: Float[Array, " M"] | None,
    out_dtype: DTypeLike,
) -> Float[Array, "M N"]:
    """Multiplies and sums in float32, int8 by int8 in int32."""
    if weight.order is not None:
        x = jnp.take(x, weight.order, axis=1)
    wide = jnp.float32
    if weight.scheme == "int4":
        values = dequantize_int4(weight, x.shape[1])
    else:
        values = weight.values
        if x.dtype == jnp.int8:
            wide = jnp.int32
    out = contract(x.astype(wide), values.astype(wide), wide).astype(jnp.float32)
    if weight.scheme in ("int8", "float8"):
        out = out * weight.scales.astype(jnp.float32)[None, :]
    if x_scales is not None:
        out = out * x_scales.astype(jnp.float32)[:, None]
    return out.astype(out_dtype)


def contract(
    x: Shaped[Array, "M K"], weights: Shaped[Array, "N K"], dtype: DTypeLike
) -> Shaped[Array, "M N"]:
    """Sums over the last axis of both, in the type given."""
    return jax.lax.dot_general(
        x,
        weights,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )


def dequantize_int4(weight: QuantizedWeight, num_inputs: int) -> Float[Array, "N K"]:
    """The weights in float32."""
    values = unpack_int4(weight.values, num_inputs).astype(jnp.float32)
    num_channels, num_groups = weight.scales.shape
    grouped = values.reshape(num_channels, num_groups, -1)
    if weight.zeros is None:
        grouped = grouped - MIDDLE_ZERO
    else:
        grouped = grouped - weight.zeros.astype(jnp.float32)[:, :, None]
    scaled = grouped * weight.scales.astype(jnp.float32)[:, :, None]
    return scaled.reshape(num_channels, num_inputs)
