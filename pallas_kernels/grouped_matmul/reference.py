"""The obvious version in jnp: every row with every matrix, then the row's own."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Shaped


def grouped_matmul_reference(
    x: Float[Array, "T K"],
    weights: Shaped[Array, "X N K"],
    group_sizes: Int[Array, " X"],
    scales: Float[Array, "X N"] | None,
    out_dtype: DTypeLike,
) -> Float[Array, "T N"]:
    """Multiplies and sums in float32."""
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    places = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    starts = ends - group_sizes.astype(jnp.int32)
    members = (places < ends[None, :]) & (places >= starts[None, :])  # [T, X]

    def add_group(
        sums: Float[Array, "T N"], group: tuple[Array, Array, Array]
    ) -> tuple[Float[Array, "T N"], None]:
        matrix, scale, is_member = group
        out = jax.lax.dot_general(
            x.astype(jnp.float32),
            matrix.astype(jnp.float32),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        out = out * scale.astype(jnp.float32)[None, :]
        # Not a product: rows of other groups may hold anything.
        return jnp.where(is_member[:, None], out, sums), None

    if scales is None:
        scales = jnp.ones(weights.shape[:2], jnp.float32)
    zeros = jnp.zeros((x.shape[0], weights.shape[1]), jnp.float32)
    sums, _ = jax.lax.scan(add_group, zeros, (weights, scales, members.T))
    return sums.astype(out_dtype)
