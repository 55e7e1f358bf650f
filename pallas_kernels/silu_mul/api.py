"""The public operation: contract, checks, choice of implementation."""

from jax import Array
from jaxtyping import Float

from pallas_kernels.common.dispatch import Implementation, Operation
from pallas_kernels.common.elementwise import ACTIVATIONS, Activation
from pallas_kernels.common.target import Target

OPERATION = Operation("silu_mul", "silu_mul")


def silu_mul(
    x: Float[Array, "T N"],
    *,
    activation: Activation = "silu",
    implementation: Implementation = "auto",
    target: Target | None = None,
) -> Float[Array, "T F"]:
    """Computes activation(gate) * up for x = gate | up, each of width F = N / 2.

    The activation is computed in float32 and rounded to the type of x, and so is the
    product.

    Args:
        x: Outputs of the gate, then those of the up projection.
        activation: "silu", "gelu_tanh" (by tanh), or "gelu" (by the error function).
        implementation: "reference" is differentiable; "auto" is the best one for the
            target.
        target: Device to compile for; None for the default one.

    Raises:
        ValueError: N is odd, or there is no such activation.
        NotImplementedError: A forced implementation cannot do this.

    Source: SwiGLU and GEGLU, arXiv:2002.05202.
    """
    if x.shape[1] % 2:
        raise ValueError(f"x has shape {x.shape}, its width must be even")
    if activation not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation={activation!r} must be one of {names}")
    return OPERATION.run(implementation, target, x, activation)
