"""The public operation: contract, checks, choice of implementation."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped

from pallas_kernels.common.dispatch import Implementation, Operation
from pallas_kernels.common.target import Target
from pallas_kernels.quantized_matmul.weights import FLOAT8_TYPES, QuantizedWeight

OPERATION = Operation("quantized_matmul", "quantized_matmul")
INPUT_TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def quantized_matmul(
    x: Shaped[Array, "M K"],
    weight: QuantizedWeight,
    *,
    x_scales: Float[Array, " M"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> Float[Array, "M N"]:
    """Multiplies by a matrix that is read as it is stored: y = x w^T.

    Sums are float32, or int32 for int8 by int8; scales of channels and tokens apply to
    the sums. With x of a float type only the weights are quantised; with x of int8 or
    float8 (see `quantize_per_token`) both factors are. Small M is bound by the bytes of
    the weights: plain bfloat16 weights are allowed, so that one call serves any matrix.

    Args:
        x: Activations of float32, bfloat16, float16, int8 or float8.
        weight: Stored weights, `[N, K]`.
        x_scales: Factor of each row; needed if x is int8 or float8, else forbidden.
        out_dtype: Type of the result: float32 or a 16-bit float. By default that of x,
            float32 if x is quantised.
        implementation: "reference" is differentiable in x and the scales; "auto" is
            the best one for the target.
        target: Device to compile for; None for the default one.

    Raises:
        ValueError: Shapes or types do not fit together.
        NotImplementedError: A forced implementation cannot do this.

    Source: weights alone, GPTQ, arXiv:2210.17323, and AWQ, arXiv:2306.00978; both
    factors with scales per token and channel, LLM.int8(), arXiv:2208.07339 section 2.1.
    """
    _check_input(x, weight, x_scales)
    weight.check(x.shape[1])
    if out_dtype is None:
        out_dtype = jnp.float32 if x.dtype.itemsize == 1 else x.dtype
    if jnp.dtype(out_dtype) not in INPUT_TYPES:
        raise ValueError(
            f"out_dtype={jnp.dtype(out_dtype)} must be float32, bfloat16 or float16"
        )
    return OPERATION.run(
        implementation, target, x, weight, x_scales, jnp.dtype(out_dtype)
    )


def _check_input(
    x: Shaped[Array, "M K"],
    weight: QuantizedWeight,
    x_scales: Float[Array, " M"] | None,
) -> None:
    scheme = weight.scheme
    if x.dtype in INPUT_TYPES:
        if x_scales is not None:
            raise ValueError(f"x_scales must be None for x of {x.dtype}")
        if scheme == "plain" and weight.values.dtype != x.dtype:
            raise ValueError(
                f"weight.values of {weight.values.dtype} must be of {x.dtype}, as x is"
            )
        return
    wanted = "int8" if x.dtype == jnp.int8 else "float8"
    if x.dtype != jnp.int8 and x.dtype not in FLOAT8_TYPES:
        raise ValueError(
            f"x of {x.dtype} must be float32, bfloat16, float16, int8 or float8"
        )
    if scheme != wanted:
        raise ValueError(f"x of {x.dtype} needs {wanted} weights, not {scheme} ones")
    if x_scales is None:
        raise ValueError(f"x_scales must be given for x of {x.dtype}")
    if x_scales.shape != (x.shape[0],):
        raise ValueError(
            f"x_scales has shape {x_scales.shape}, expected ({x.shape[0]},)"
        )
