"""Products with weights stored as the checkpoint has them, outputs first."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


def linear(
    x: Float[Array, "*batch K"],
    weight: Float[Array, "*out K"],
    bias: Float[Array, "*out"] | None = None,
) -> Float[Array, "..."]:
    """Contracts the last axis of both; float32 sums, result in the type of `x`.

    The weight keeps its checkpoint orientation, so that nothing is transposed at load,
    and the product asks for float32 output, without which XLA's CPU backend is many
    times slower for bfloat16.
    """
    out = linear_float32(x, weight)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(x.dtype)


def linear_float32(
    x: Float[Array, "*batch K"], weight: Float[Array, "*out K"]
) -> Float[Array, "..."]:
    """The same product, left in float32; for logits."""
    contract = (((x.ndim - 1,), (weight.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)
