"""Pieces of element-by-element kernels, written so that every compiler takes them."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Activation = Literal["silu", "gelu_tanh", "gelu"]
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")

# Polynomial g with erfc(x) = t exp(g(t) - x^2) and t = 1 / (1 + x / 2), fitted to
# within 1e-7 of erfc for every x >= 0; the highest power first.
_ERFC = (
    0.170998601,
    -0.822747616,
    1.489701018,
    -1.136492417,
    0.279698898,
    -0.186610878,
    0.096857490,
    0.374083033,
    1.000024163,
    -1.265512232,
)
_SQRT_HALF = 0.7071067811865476
_GELU_TANH = 0.7978845608028654


def activate(x: Any, activation: Activation) -> Any:
    """SiLU, or GELU by the error function or by tanh, of float32 numbers.

    Source: arXiv:1606.08415 for all three.
    """
    if activation == "silu":
        return x / (1.0 + jnp.exp(-x))
    if activation == "gelu_tanh":
        inner = 2 * _GELU_TANH * (x + 0.044715 * x * x * x)
        # 1 + tanh(y) = 2 / (1 + exp(-2 y)), which has no cancellation.
        return x / (1.0 + jnp.exp(-inner))
    half = 0.5 * _erfc(jnp.abs(x) * _SQRT_HALF)
    return x * jnp.where(x < 0, half, 1.0 - half)


def _erfc(x: Any) -> Any:
    t = 1.0 / (1.0 + 0.5 * x)
    total = t * 0.0 + _ERFC[0]
    for coefficient in _ERFC[1:]:
        total = total * t + coefficient
    return t * jnp.exp(total - x * x)


def saturate(x: Any, dtype: DTypeLike) -> Any:
    """Rounds float32 numbers to a type; beyond its range the largest value results."""
    dtype = jnp.dtype(dtype)
    if dtype == jnp.int8:
        rounded = _round_half_even(jnp.clip(x, -128.0, 127.0))
        return rounded.astype(jnp.int32).astype(jnp.int8)
    if dtype.itemsize == 1:
        largest = float(jnp.finfo(dtype).max)
        return jnp.clip(x, -largest, largest).astype(dtype)
    return x.astype(dtype)


def _round_half_even(x: Any) -> Any:
    # Pallas on Triton has no rounding to nearest.
    nearest = jnp.floor(x + 0.5)
    is_odd = nearest - 2.0 * jnp.floor(0.5 * nearest) == 1.0
    return jnp.where((nearest - x == 0.5) & is_odd, nearest - 1.0, nearest)


def largest_value(dtype: DTypeLike) -> float:
    """What the largest magnitude of a quantized row becomes."""
    dtype = jnp.dtype(dtype)
    return 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)


def check_byte_float(dtype: DTypeLike, generation: str) -> None:
    """Raises NotImplementedError where a GPU cannot convert to a float8 type."""
    known = generation.removeprefix("sm_").rstrip("af")
    is_old = known.isdigit() and int(known) < 89
    if jnp.dtype(dtype) == jnp.float8_e4m3fn and is_old:
        raise NotImplementedError(
            f"float8_e4m3fn needs sm_89 or newer, not {generation}"
        )


def as_float32(x: Any) -> Any:
    """Widens, by way of int32 from int8, which not every compiler does in one step."""
    if x.dtype == jnp.int8:
        return x.astype(jnp.int32).astype(jnp.float32)
    return x if x.dtype == jnp.float32 else x.astype(jnp.float32)


def struct(shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """The description of an array."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
