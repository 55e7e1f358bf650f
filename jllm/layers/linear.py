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
        out = out + jnp.broadcast_to(bias.astype(jnp.float32), out.shape)
    return out.astype(x.dtype)


def linear_float32(
    x: Float[Array, "*batch K"], weight: Float[Array, "*out K"]
) -> Float[Array, "..."]:
    """The same product, left in float32; for logits."""
    # A weight of two dimensions is used as it lies; of more, XLA would transpose it.
    flat = weight.reshape(-1, weight.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1 and rows.dtype.itemsize == 2:
        out = jax.lax.platform_dependent(
            rows, flat, cpu=_product_of_two_rows, default=_product
        )
    else:
        out = _product(rows, flat)
    return out.reshape(*x.shape[:-1], *weight.shape[:-1])


def _product(x: Float[Array, "N K"], weight: Float[Array, "M K"]) -> Array:
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)


def _product_of_two_rows(x: Float[Array, "1 K"], weight: Float[Array, "M K"]) -> Array:
    """XLA's CPU backend converts the whole weight to float32 for a single row."""
    return _product(jnp.concatenate([x, x]), weight)[:1]
