"""The public operation: contract, checks, choice of implementation."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Shaped

from pallas_kernels.common.dispatch import Implementation, Operation
from pallas_kernels.common.target import Target

OPERATION = Operation(
    "grouped_matmul",
    "grouped_matmul",
    cpu=("blocked", "reference"),
    gpu=("gpu_triton", "blocked"),
    tpu=("tpu", "blocked"),
)
INPUT_TYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
WEIGHT_TYPES = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)


def grouped_matmul(
    x: Float[Array, "T K"],
    weights: Shaped[Array, "X N K"],
    group_sizes: Int[Array, " X"],
    *,
    scales: Float[Array, "X N"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> Float[Array, "T N"]:
    """Multiplies each row by the matrix of its group: y[t] = x[t] weights[g(t)]^T.

    The first group_sizes[0] rows belong to group 0, the next to group 1 and so on; rows
    past the last group give zeros. Sums are float32. Only matrices of groups that have
    rows are read; with int8 or float8 weights the scales of the channels apply to the
    sums.

    Args:
        x: Rows sorted by group.
        weights: A matrix of each group, of the type of x, int8 or float8.
        group_sizes: Rows of each group; their sum is at most T.
        scales: Factor of each channel; needed for int8 and float8 weights, else
            forbidden.
        out_dtype: Type of the result, float32 or a 16-bit float; that of x by default.
        implementation: "reference" computes every row with every matrix and is
            differentiable; "blocked" works in proportion to the rows; "auto" is the
            best one for the target.
        target: Device to compile for; None for the default one.

    Raises:
        ValueError: Shapes or types do not fit together.
        NotImplementedError: A forced implementation cannot do this.

    Source: MegaBlocks, arXiv:2211.15841 section 4.
    """
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    for name, dtype in (("x", jnp.dtype(x.dtype)), ("out_dtype", out_dtype)):
        if dtype not in INPUT_TYPES:
            raise ValueError(
                f"{name} of {dtype} must be of float32, bfloat16 or float16"
            )
    _check_weights(x, weights, group_sizes, scales)
    return OPERATION.run(
        implementation, target, x, weights, group_sizes, scales, out_dtype
    )


def _check_weights(
    x: Float[Array, "T C"],
    weights: Shaped[Array, "X N K"],
    group_sizes: Int[Array, " G"],
    scales: Float[Array, "A B"] | None,
) -> None:
    num_groups, num_channels, num_inputs = weights.shape
    if num_inputs != x.shape[1]:
        raise ValueError(f"weights have {num_inputs} inputs, x has {x.shape[1]}")
    if group_sizes.shape != (num_groups,):
        raise ValueError(
            f"group_sizes has shape {group_sizes.shape}, expected ({num_groups},)"
        )
    if weights.dtype in WEIGHT_TYPES:
        if scales is None:
            raise ValueError(f"scales must be given for weights of {weights.dtype}")
        if scales.shape != (num_groups, num_channels):
            raise ValueError(
                f"scales has shape {scales.shape}, expected "
                f"({num_groups}, {num_channels})"
            )
    elif weights.dtype != x.dtype:
        raise ValueError(
            f"weights of {weights.dtype} must be of {x.dtype} as x is, int8 or float8"
        )
    elif scales is not None:
        raise ValueError(f"scales must be None for weights of {weights.dtype}")
