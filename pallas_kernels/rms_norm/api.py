"""The public operation: contract, checks, choice of implementation."""

from jax import Array
from jaxtyping import Float

from pallas_kernels.common.dispatch import Implementation, Operation
from pallas_kernels.common.target import Target
from pallas_kernels.rms_norm.reference import Normed, Quantize

OPERATION = Operation("rms_norm", "rms_norm")


def rms_norm(
    x: Float[Array, "T E"],
    weight: Float[Array, " E"],
    epsilon: float,
    *,
    residual: Float[Array, "T E"] | None = None,
    quantize: Quantize | None = None,
    weight_offset: int = 0,
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> Normed:
    """Divides by the root of the mean square, in float32, then scales.

    The result is rounded to the type of x before it is scaled by the weight and after;
    with a weight offset only after. A quantized token is the result so rounded, divided
    by a float32 scale by which its largest magnitude becomes 127 or 448 (a token of
    zeros has the scale 1), and rounded to nearest, ties to even.

    Args:
        x: Hidden states.
        weight: Factor of each feature.
        epsilon: Added to the mean square.
        residual: Added to x first, rounded to its type; the sum is returned as well.
        quantize: Type of the result: None for that of x, "int8" or "float8_e4m3fn".
        weight_offset: Added to the weight: 0, or 1 as in Gemma.
        implementation: "reference" is differentiable; "auto" is the best one for the
            target.
        target: Device to compile for; None for the default one.

    Returns:
        The result, the sum (None without a residual), and the scales (None unless
        quantized).

    Raises:
        ValueError: Shapes or types do not fit together, or an option is out of bounds.
        NotImplementedError: A forced implementation cannot do this.

    Source: Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    if weight.shape != (x.shape[1],):
        raise ValueError(f"weight has shape {weight.shape}, expected ({x.shape[1]},)")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual is {residual.dtype}{residual.shape}, x is {x.dtype}{x.shape}"
        )
    if quantize not in (None, "int8", "float8_e4m3fn"):
        raise ValueError(f"quantize={quantize!r} must be None, int8 or float8_e4m3fn")
    if weight_offset not in (0, 1):
        raise ValueError(f"weight_offset={weight_offset} must be 0 or 1")
    return OPERATION.run(
        implementation, target, x, weight, residual, epsilon, quantize, weight_offset
    )
