"""Normalisation layers."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


@dataclasses.dataclass(frozen=True, slots=True)
class NormKind:
    """Which norm a model has.

    Attributes:
        epsilon: Added to the mean square before the root.
        centred: Whether the mean is subtracted first: a layer norm.
        bias: Whether a vector is added.
        weight_offset: Added to the weights: 0, or 1 as in Gemma.
    """

    epsilon: float = 1e-6
    centred: bool = False
    bias: bool = False
    weight_offset: int = 0


def normalise(
    x: Float[Array, "*batch E"],
    kind: NormKind,
    weight: Float[Array, "..."],
    bias: Float[Array, " E"] | None = None,
) -> Float[Array, "*batch E"]:
    """Applies a norm along the last axis.

    Args:
        x: What is normalised.
        kind: Which norm.
        weight: Factors, of the shape of the last axes of `x`.
        bias: What is added, where the kind has it.
    """
    if kind.centred:
        return layer_norm(x, weight, bias, kind.epsilon)
    return rms_norm(x, weight, kind.epsilon, kind.weight_offset)


def rms_norm(
    x: Float[Array, "*batch E"],
    weight: Float[Array, "..."],
    epsilon: float,
    weight_offset: int = 0,
) -> Float[Array, "*batch E"]:
    """Divides by the root of the mean square, in float32, then scales.

    The quotient is rounded to the type of `x` before it is scaled, except with an
    offset.

    Source: Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    if weight_offset:
        factor = weight.astype(jnp.float32) + weight_offset
        return (wide * scale * jnp.broadcast_to(factor, x.shape)).astype(x.dtype)
    normed = (wide * scale).astype(x.dtype)
    return normed * jnp.broadcast_to(weight, x.shape)


def layer_norm(
    x: Float[Array, "*batch E"],
    weight: Float[Array, "..."],
    bias: Float[Array, " E"] | None,
    epsilon: float,
) -> Float[Array, "*batch E"]:
    """Subtracts the mean, divides by the deviation, scales and adds; in float32.

    Source: Layer Normalization, arXiv:1607.06450.
    """
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon)
    out = normed * jnp.broadcast_to(weight.astype(jnp.float32), x.shape)
    if bias is not None:
        out = out + jnp.broadcast_to(bias.astype(jnp.float32), x.shape)
    return out.astype(x.dtype)


def normalise_heads(
    x: Float[Array, "T N D"],
    kind: NormKind,
    weight: Float[Array, "N D"],
    *,
    together: bool,
) -> Float[Array, "T N D"]:
    """Applies a norm to every head, each with its own weight, or to all of them.

    Args:
        x: Query or key heads.
        kind: Which norm.
        weight: Factors.
        together: Whether the mean is over the features of all heads.
    """
    if not together:
        return normalise(x, kind, weight)
    flat = normalise(x.reshape(x.shape[0], -1), kind, weight.reshape(-1))
    return flat.reshape(x.shape)
