"""What the fused operation takes, and the same computed by XLA."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from pallas_kernels.common.elementwise import saturate


class Heads(NamedTuple):
    """Heads of the new tokens, as the projection gives them.

    Attributes:
        q: Queries.
        keys: Keys.
        values: Values.
    """

    q: Float[Array, "T H D"]
    keys: Float[Array, "T K D"]
    values: Float[Array, "T K D"]


class Rotation(NamedTuple):
    """Rotary embedding of the new tokens, gathered by their positions.

    It turns the first 2 F features of a head, feature i with feature i + F.

    Attributes:
        cos: Cosine of each pair's angle, float32.
        sin: Sine.
    """

    cos: Float[Array, "T F"]
    sin: Float[Array, "T F"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "keys"],
    meta_fields=["epsilon", "weight_offset"],
)
@dataclasses.dataclass(frozen=True, slots=True)
class HeadNorms:
    """Root-mean-square norms of each query and key head before they are rotated.

    Attributes:
        q: Weight of the queries' norm.
        keys: Weight of the keys' norm.
        epsilon: Added to the mean square.
        weight_offset: Added to the weights: 0, or 1 as in Gemma.
    """

    q: Float[Array, " D"]
    keys: Float[Array, " D"]
    epsilon: float
    weight_offset: int = 0


def rotate_and_widen(
    heads: Heads, rotation: Rotation, norms: HeadNorms | None, width: int
) -> Heads:
    """Normalises and rotates queries and keys, and appends zeros up to `width`.

    In float32, rounded in between; see `api.qkv_write`.
    """
    q, keys, values = heads
    if norms is not None:
        q = _normalise(q, norms.q, norms)
        keys = _normalise(keys, norms.keys, norms)
    rotated = (rotate(q, rotation), rotate(keys, rotation), values)
    return Heads(*(_widen(x, width) for x in rotated))


def stored(
    keys: Float[Array, "T K D"],
    values: Float[Array, "T K D"],
    dtype: jnp.dtype,
    kv_scales: Float[Array, "2 K"] | None,
) -> Shaped[Array, "T 2 K D"]:
    """Keys and values as the pool keeps them; uint16 stands for 16-bit floats' bits."""
    new = jnp.stack([keys, values], axis=1)
    if kv_scales is not None:
        wide = new.astype(jnp.float32) / kv_scales.astype(jnp.float32)[None, :, :, None]
        return saturate(wide, dtype)
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(new, jnp.uint16)
    return new.astype(dtype)


def _widen(x: Float[Array, "T N D"], width: int) -> Float[Array, "T N W"]:
    missing = width - x.shape[2]
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing))) if missing else x


def _normalise(
    x: Float[Array, "T N D"], weight: Float[Array, " D"], norms: HeadNorms
) -> Float[Array, "T N D"]:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=2, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean + norms.epsilon)
    factor = weight.astype(jnp.float32)[None, None, :]
    if norms.weight_offset:
        return (normed * (factor + norms.weight_offset)).astype(x.dtype)
    return (normed.astype(x.dtype).astype(jnp.float32) * factor).astype(x.dtype)


def rotate(x: Float[Array, "T N D"], rotation: Rotation) -> Float[Array, "T N D"]:
    """Rotates the first 2 F features of every head, in float32."""
    half = rotation.cos.shape[1]
    cos, sin = rotation.cos[:, None, :], rotation.sin[:, None, :]
    first = x[:, :, :half].astype(jnp.float32)
    second = x[:, :, half : 2 * half].astype(jnp.float32)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    parts = [part.astype(x.dtype) for part in rotated]
    return jnp.concatenate([*parts, x[:, :, 2 * half :]], axis=2)
